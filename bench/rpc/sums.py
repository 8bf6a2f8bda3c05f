"""What one sum over CPU ranks takes, through gloo and through shared memory."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

HIDDEN_SIZE = 768
NUM_SUMS = 300
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class SumCost:
    """Microseconds of one sum on rank 0: median, tenth percentile, and of the CPU."""

    median_us: float
    p10_us: float
    cpu_us: float


def measure_sums(world_size: int, num_rows: tuple[int, ...], *, is_shared: bool) -> list[SumCost]:
    """Return the costs for each number of rows of `HIDDEN_SIZE` float32."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    task = num_rows, is_shared
    with tempfile.TemporaryDirectory(prefix="cx-sums-") as folder:
        address = f"file://{folder}/meet"
        ranks = [
            spawn.Process(target=_run, args=(rank, world_size, address, task, theirs))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        theirs.close()
        try:
            costs: list[SumCost] = ours.recv()
        finally:
            for process in ranks:
                process.join(_TIMEOUT_S)
                process.kill()
    return costs


def _run(
    rank: int,
    world_size: int,
    address: str,
    task: tuple[tuple[int, ...], bool],
    results: Connection,
) -> None:
    num_rows, is_shared = task
    import torch

    from engine.kernels import cpu as native
    from engine.tp.comm import Comm
    from engine.tp.sharding import Shard

    torch.set_num_threads(1)
    if native.available():
        native.set_num_threads(1)
    device = torch.device("cpu")
    comm = Comm.join(address, Shard(rank, world_size), device, timeout_s=_TIMEOUT_S)
    comm.share_memory(is_possible=is_shared and native.available())
    costs = []
    for count in num_rows:
        times = []
        began = time.process_time()
        for _ in range(NUM_SUMS):
            partial = torch.ones(count, HIDDEN_SIZE)
            started = time.perf_counter()
            comm.all_reduce(partial)
            times.append(1e6 * (time.perf_counter() - started))
        cpu_us = 1e6 * (time.process_time() - began) / NUM_SUMS
        times.sort()
        costs.append(SumCost(statistics.median(times), times[NUM_SUMS // 10], cpu_us))
    if rank == 0:
        results.send(costs)
