"""`python -m bench rpc`: what a step costs when a model is split over ranks on this machine.

First the RPC alone: real rank processes over ZeroMQ answer steps that they only read, so the time
is that of encoding, sending, decoding and the acks. Next the sums over ranks, of which a step has
two a layer. Then a random model of some 60 million weights on one rank and on several, by the same
leader and workers that serve: the time of a step, and its ratio to one rank's. On a CPU ranks share
the cores, so a ratio below 1 is not to be had from more arithmetic, only from what one rank cannot
use. Needs the test extra (it writes the model).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.rpc.model import write_model
from bench.rpc.sums import HIDDEN_SIZE, measure_sums
from bench.rpc.tree import measure_rpc, measure_steps

RPC_RANKS = (1, 2, 4)
NUM_ROWS = (1, 64, 256)
SUM_RANKS = (2, 4)
SUM_ROWS = (1, 8, 256)
STEP_RANKS = (1, 2, 4)


def main(arguments: Sequence[str]) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m bench rpc")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each row's blocks")
    parser.add_argument("--threads", type=int, default=0, help="in all; 0: as many as there are")
    chosen = parser.parse_args(arguments)
    print(f"load before: {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(prefix="cx-rpc-") as folder:
        _print_rpc(Path(folder), chosen.context)
        _print_sums()
        _print_steps(Path(folder), chosen.threads)
    print(f"load after:  {os.getloadavg()[0]:.2f}")
    return 0


def _print_rpc(folder: Path, context: int) -> None:
    print(f"\nRPC of one step, send + acks, {context} tokens a row: median (p90) in ms; bytes")
    print("ranks " + "".join(f"{f'{rows} rows':>28}" for rows in NUM_ROWS))
    for world_size in RPC_RANKS:
        if world_size == 1:
            costs = ["none: nobody to tell"] * len(NUM_ROWS)
        else:
            measured = measure_rpc(folder, world_size, NUM_ROWS, context)
            costs = [f"{m.median_ms:.2f} ({m.p90_ms:.2f}); {m.num_bytes}" for m in measured]
        print(f"{world_size:5} " + "".join(f"{cost:>28}" for cost in costs))


def _print_sums() -> None:
    print(f"\nSum over ranks of rows of {HIDDEN_SIZE} float32: median (p10), CPU time in us")
    print("ranks, through        " + "".join(f"{f'{rows} rows':>24}" for rows in SUM_ROWS))
    for world_size in SUM_RANKS:
        for is_shared in (False, True):
            costs = measure_sums(world_size, SUM_ROWS, is_shared=is_shared)
            cells = [f"{c.median_us:.0f} ({c.p10_us:.0f}), {c.cpu_us:.0f}" for c in costs]
            name = f"{world_size}, {'shared memory' if is_shared else 'gloo'}"
            print(f"{name:22}" + "".join(f"{cell:>24}" for cell in cells))


def _print_steps(folder: Path, num_threads: int) -> None:
    weights = write_model(folder / "model")
    print(f"\nStep of a random qwen3 of {weights / 1e6:.0f} million weights on the CPU, in ms")
    total = num_threads or len(os.sched_getaffinity(0))
    whole: dict[str, float] = {}
    for world_size in STEP_RANKS:
        threads = max(1, total // world_size)
        times = measure_steps(folder, folder / "model", world_size, threads)
        whole = whole or times
        cells = [f"{what} {ms:.1f} (x{ms / whole[what]:.2f})" for what, ms in times.items()]
        print(f"{world_size} ranks of {threads} threads: {', '.join(cells)}")
