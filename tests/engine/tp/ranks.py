"""All ranks of one model in one process: a thread for each worker, gloo between them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cortexd.models import ModelFiles
from cortexd.settings import Engine as EngineSettings
from engine.cache.kv_cache import CacheSize
from engine.engine import Engine
from engine.preflight import inspect
from engine.scheduling.step_plan import StepPlan
from engine.tp.comm import Comm
from engine.tp.shard_runner import ShardRunner
from engine.tp.sharding import Shard
from engine.tp.step_codec import StepEncoder
from tests.waiting import DEADLINE_S

CPU = torch.device("cpu")


def settings_of(**fields: Any) -> EngineSettings:
    """Return small limits. Kernels are the reference's: the native pool is one per process."""
    fields = {
        "device": "cpu",
        "dtype": "float32",
        "num_threads": 1,
        "block_size": 8,
        "kv_cache_mib": 1,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "max_prefill_chunk": 32,
        "backend": "reference",
        **fields,
    }
    return EngineSettings(**fields)


def quiet(fraction: float, stage: str) -> None:
    """Take no notice of progress."""


def joined(
    world_size: int, work: Callable[[Comm], Any], timeout_s: float = DEADLINE_S
) -> list[Any]:
    """Run `work` on every rank of a new group; return the results by rank, errors included."""
    results: list[Any] = [None] * world_size
    with TemporaryDirectory() as folder:
        address = f"file://{folder}/meet"

        def run(rank: int) -> None:
            try:
                comm = Comm.join(address, Shard(rank, world_size), CPU, timeout_s=timeout_s)
                results[rank] = work(comm)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


@dataclass
class ThreadLockstep:
    """Hands every plan to the workers' threads and collects what they say."""

    world_size: int
    orders: list[queue.Queue[Callable[[ShardRunner], int] | None]] = field(default_factory=list)
    answers: queue.Queue[int | Exception] = field(default_factory=queue.Queue)
    runners: list[ShardRunner] = field(default_factory=list)
    encoder: StepEncoder = field(default_factory=lambda: StepEncoder("m"))

    def _all(self, order: Callable[[ShardRunner], int] | None) -> None:
        for inbox in self.orders:
            inbox.put(order)

    def _collect(self) -> list[int]:
        answers = [self.answers.get(timeout=DEADLINE_S) for _ in self.orders]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [answer for answer in answers if isinstance(answer, int)]

    def shards_loaded(self, free_bytes: int) -> int:
        return min([free_bytes, *self._collect()])

    def make_cache(self, size: CacheSize) -> int:
        def make(runner: ShardRunner) -> int:
            runner.make_cache(size.num_blocks, size.num_state_slots)
            return runner.memory_bytes

        self._all(make)
        return sum(self._collect())

    def begin_step(self, plan: StepPlan) -> None:
        # Through the codec, since only what it carries is known to a worker.
        message = self.encoder.encode(plan)

        def step(runner: ShardRunner) -> int:
            runner.step(message)
            return 0

        self._all(step)

    def end_step(self) -> None:
        self._collect()


@contextmanager
def engine_of(files: ModelFiles, world_size: int, **fields: Any) -> Iterator[Engine]:
    """Return rank 0's engine with the other ranks behind it."""
    settings, spec = settings_of(**fields), inspect(files)
    if world_size == 1:
        yield Engine.load(files, spec, settings, quiet)
        return
    lockstep = ThreadLockstep(world_size, [queue.Queue() for _ in range(1, world_size)])
    with TemporaryDirectory() as folder:
        address = f"file://{folder}/meet"

        def work(rank: int) -> None:
            try:
                comm = Comm.join(address, Shard(rank, world_size), CPU, timeout_s=DEADLINE_S)
                runner = ShardRunner.load(files, spec, settings, comm, device=CPU, progress=quiet)
                lockstep.runners.append(runner)
                lockstep.answers.put(runner.free_bytes)
                while (order := lockstep.orders[rank - 1].get()) is not None:
                    lockstep.answers.put(order(runner))
            except Exception as error:
                lockstep.answers.put(error)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(1, world_size)]
        for thread in threads:
            thread.start()
        try:
            comm = Comm.join(address, Shard(0, world_size), CPU, timeout_s=DEADLINE_S)
            yield Engine.load(files, spec, settings, quiet, comm=comm, lockstep=lockstep)
        finally:
            lockstep._all(None)
            for thread in threads:
                thread.join()


def saved(folder: Path, model: Any) -> ModelFiles:
    """Write a transformers model into a new folder."""
    from tests.engine.checkpoints import save_oracle

    folder.mkdir()
    return save_oracle(model, folder)
