"""`python -m bench load`: how fast a file becomes a model, and a large vocabulary a tokenizer.

Each load is a process of its own over a file in the page cache, and ends with an engine that can
step: the weights are repacked. The first load of a process gets memory as the machine hands it
out, the second what the first has given back. CPU seconds are told beside those on the clock,
since others who use the machine change them less. Files are made under `--cache-dir` on first use.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench import llama_cpp
from bench.machine import commit, cpu_name, default_cache_dir
from bench.model_files import FORMATS, QWEN3_0_6B, model_file
from bench.runner import cpu_seconds

DEFAULT_FORMATS: Final = ("BF16", "Q8_0", "Q6_K", "Q4_K_M")


def main(arguments: list[str]) -> int:
    """Measure and print the tables; return the exit code."""
    options = _options(arguments)
    print(f"{time.strftime('%Y-%m-%d %H:%M')}, commit {commit()}")
    print(f"{cpu_name()}, {os.cpu_count()} CPUs, {options.threads} threads")
    print(f"load of the machine before: {os.getloadavg()[0]:.2f}\n")
    print("| load, file in the page cache | MB | s | CPU s | first of a process: s | CPU s |")
    print("|---|---|---|---|---|---|")
    for name in options.formats:
        print(_load_row(options, name), flush=True)
    path = llama_cpp.vocabulary(options.cache_dir)
    print("\n| a vocabulary of 151,936 tokens, 151,387 merges | s | CPU s |")
    print("|---|---|---|")
    print(_open_row("GGUF header opened and checked", options.rounds, lambda: _open(path)))
    print(_open_row("tokenizer built", options.rounds, lambda: _build_tokenizer(path)))
    print(_open_row("the same header by gguf's reader", 1, lambda: _open_with_gguf(path)))
    print(f"\nload of the machine, this run included: {os.getloadavg()[0]:.2f}")
    return 0


def _load_row(options: argparse.Namespace, name: str) -> str:
    driver = llama_cpp.find_or_build(options.cache_dir)
    path = model_file(options.cache_dir / "models", QWEN3_0_6B, name, driver)
    command = [sys.executable, "-m", "bench.load_side", str(path), str(options.threads)]
    firsts, seconds = [], []
    for _ in range(options.rounds):
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        first, second = json.loads(out.splitlines()[-1])
        firsts.append(first)
        seconds.append(second)
    megabytes = path.stat().st_size / 1e6
    return f"| {path.stem} | {megabytes:.0f} | {_medians(seconds)} | {_medians(firsts)} |"


def _medians(samples: list[tuple[float, float]]) -> str:
    walls, cpus = zip(*samples, strict=True)
    return f"{statistics.median(walls):.3f} | {statistics.median(cpus):.3f}"


def _open_row(label: str, rounds: int, run: Callable[[], None]) -> str:
    samples = []
    for _ in range(rounds):
        cpu, wall = cpu_seconds(), time.perf_counter()
        run()
        samples.append((time.perf_counter() - wall, cpu_seconds() - cpu))
    return f"| {label} | {_medians(samples)} |"


def _open(path: Path) -> None:
    from engine.formats.gguf import GGUFFile

    GGUFFile.open(path).close()


def _build_tokenizer(path: Path) -> None:
    from cortexd.models import ModelFiles
    from engine.text.text_model import TextModel

    weights = (str(path),)
    TextModel.load(
        ModelFiles(model_id="bench", source="path", revision="", format="gguf", weights=weights)
    )


def _open_with_gguf(path: Path) -> None:
    import gguf

    gguf.GGUFReader(str(path))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench load", description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=DEFAULT_FORMATS)
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir())
    return parser.parse_args(arguments)
