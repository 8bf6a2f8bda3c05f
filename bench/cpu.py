"""`python -m bench cpu`: our engine against llama.cpp and transformers on this CPU.

Same file, same number of threads, a process each, turn by turn, so that a machine that others use
slows all of them down. Makes what it needs under `--cache-dir` on first use: llama.cpp from its
source package, and the model files. The table has the medians of the rounds; the ratio is that of
the wall-clock medians, the one in brackets that of the CPU time, which others disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import llama_cpp
from bench.machine import commit, cpu_name, default_cache_dir, demo_file
from bench.model_files import FORMATS, QWEN3_0_6B, QWEN3_5_0_8B, QWEN3_MOE, Shape, model_file
from bench.runner import Load, Runner, Sample

DEMO: Final = "demo"
DEFAULT_FORMATS: Final = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", DEMO)
SHAPES: Final = {"dense": QWEN3_0_6B, "hybrid": QWEN3_5_0_8B, "experts": QWEN3_MOE}
LOADS: Final = {
    "batch-1": Load(1, 128, 64),
    "batch-4": Load(4, 128, 32),
    "batch-8": Load(8, 128, 32),
    "prefill": Load(0, 512, 0),
}
BANDWIDTH_MIB: Final = 800


@dataclass(frozen=True)
class Setup:
    """What all measurements share."""

    driver: Path
    cache_dir: Path
    threads: int
    rounds: int
    has_transformers: bool
    loads: tuple[Load, ...]
    bandwidth: float  # bytes per second


def main(arguments: list[str]) -> int:
    """Measure and print the tables; return the exit code."""
    options = _options(arguments)
    driver = llama_cpp.find_or_build(options.cache_dir)
    bandwidth = _bandwidth(driver, options.threads)
    setup = Setup(
        driver=driver,
        cache_dir=options.cache_dir,
        threads=options.threads,
        rounds=options.rounds,
        has_transformers=options.transformers,
        loads=tuple(LOADS[name] for name in options.loads),
        bandwidth=bandwidth,
    )
    print(f"{time.strftime('%Y-%m-%d %H:%M')}, commit {commit()}")
    print(f"{cpu_name()}, {os.cpu_count()} CPUs, {options.threads} threads")
    print(f"{llama_cpp.SOURCE_PACKAGE}, native build; memory reads {bandwidth / 1e9:.1f} GB/s")
    print("tok/s; share: weight bytes per step times steps per second, of the memory bandwidth\n")
    print("| format | load | ours | llama.cpp | ratio (CPU time) | our share | transformers bf16 |")
    print("|---|---|---|---|---|---|---|")
    for kind in options.shapes:
        for name in options.formats:
            if name == DEMO and kind != "dense":
                continue  # the demo model has one shape
            _measure_format(setup, SHAPES[kind], name)
    print(f"\nload of the machine, this run included: {os.getloadavg()[0]:.2f}")
    return 0


def _measure_format(setup: Setup, shape: Shape, name: str) -> None:
    models = setup.cache_dir / "models"
    path = demo_file() if name == DEMO else model_file(models, shape, name, setup.driver)
    threads = str(setup.threads)
    sides = [
        Runner([sys.executable, "-m", "bench.engine_side", str(path), threads]),
        Runner([str(setup.driver), "run", str(path), threads]),
    ]
    if name == "BF16" and setup.has_transformers and shape is QWEN3_0_6B:
        sides.append(Runner([sys.executable, "-m", "bench.transformers_side", threads]))
    label = "SmolLM2-135M Q4_1" if name == DEMO else f"{shape.name} {name}"
    # Which experts a step reads, depends on its tokens.
    bandwidth_s = None if shape.experts else path.stat().st_size / setup.bandwidth
    try:
        for load in setup.loads:
            print(_row(label, load, _samples(sides, load, setup.rounds), bandwidth_s), flush=True)
    finally:
        for side in sides:
            side.close()


def _samples(sides: Sequence[Runner], load: Load, rounds: int) -> list[list[Sample]]:
    """Return each side's samples, after one run of each that warms up."""
    for side in sides:
        side.measure(load)
    samples: list[list[Sample]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, taken in zip(sides, samples, strict=True):
            taken.append(side.measure(load))
    return samples


def _row(label: str, load: Load, samples: list[list[Sample]], bandwidth_s: float | None) -> str:
    """Return a row; `bandwidth_s`: seconds that reading the step's weights takes, where known."""
    walls = [statistics.median(s.wall_s for s in side) for side in samples]
    cpus = [statistics.median(s.cpu_s for s in side) for side in samples]
    speeds = [load.num_tokens / wall for wall in walls]
    kind = f"decode, batch {load.batch}" if load.batch else f"prefill {load.prompt}"
    share = ""
    if load.batch and bandwidth_s is not None:
        share = f"{bandwidth_s * load.tokens / walls[0]:.0%}"
    third = f"{speeds[2]:.1f}" if len(speeds) > 2 else ""
    return (
        f"| {label} | {kind} | {speeds[0]:.1f} | {speeds[1]:.1f} "
        f"| {walls[1] / walls[0]:.2f} ({cpus[1] / cpus[0]:.2f}) | {share} | {third} |"
    )


def _bandwidth(driver: Path, threads: int) -> float:
    command = [str(driver), "bandwidth", str(threads), str(BANDWIDTH_MIB)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(json.loads(out)["bytes_per_s"])


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench cpu", description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        default=["dense"],
        help="dense (qwen3), hybrid (qwen3.5), experts (qwen3moe); the last two take 9 GB more",
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=[*FORMATS, DEMO],
        default=DEFAULT_FORMATS,
        metavar="FORMAT",
        help=f'of {", ".join(FORMATS)}, or "{DEMO}" for the demo model\'s own file',
    )
    parser.add_argument(
        "--loads", nargs="+", choices=LOADS, default=list(LOADS), help="default: all"
    )
    parser.add_argument(
        "--transformers", action="store_true", help="measure transformers too (dense)"
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=default_cache_dir(),
        help="where llama.cpp and the model files are, or are made (4 GB)",
    )
    return parser.parse_args(arguments)
