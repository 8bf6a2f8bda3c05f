"""Decode steps from buffers that never move: on CUDA each is one captured graph, sampler included.

Used by the engine for steps in which every row computes one token and draws the next on the device.
A bucket's first step runs as it is, which compiles its kernels; the second is captured, and from
then on it is replayed. Nothing in a step waits for the host: its tokens are copied to pinned memory
behind it, and the next step of the same rows can start before they have arrived. Without a CUDA
device (the kernels' interpreter) the same steps run uncaptured.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from engine.batch import StepBatch
from engine.cache.kv_cache import KVCache
from engine.sampling import device_sampler
from engine.sampling.device_sampler import Effort
from engine.scheduling.step_plan import PlannedRow
from engine.step_buffers import StepBuffers

# Rows of a step are rounded up to one of these.
BUCKETS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


class CapturableModel(Protocol):
    """A forward pass that reads device tensors only, and never waits."""

    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor: ...


@dataclass(slots=True)
class Flight:
    """A step that was started. `token_ids` (bucket,) are on the device, `host` will be."""

    rows: list[PlannedRow]
    token_ids: Tensor
    host: Tensor
    done: torch.cuda.Event | None

    def wait(self) -> list[int]:
        """Return the drawn tokens of the rows, -1 where logits were not finite."""
        if self.done is not None:
            self.done.synchronize()
        return self.host[: len(self.rows)].tolist()


class _Bucket:
    """Buffers, results and graphs for steps of up to so many rows."""

    def __init__(self, buffers: StepBuffers, device: torch.device) -> None:
        self.buffers = buffers
        is_pinned = device.type == "cuda"
        # Two take turns, as one is read while the other is written.
        self.results = [
            torch.zeros(buffers.num_rows, dtype=torch.int64, pin_memory=is_pinned) for _ in range(2)
        ]
        self.turn = 0
        self.graphs: dict[Effort, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.is_warm: set[Effort] = set()


class DecodeSteps:
    """See the module's text."""

    def __init__(
        self, model: CapturableModel, cache: KVCache, max_blocks: int, device: torch.device
    ) -> None:
        """Take the model; a block table has `max_blocks` places."""
        self._model = model
        self._cache = cache
        self._max_blocks = max_blocks
        self._device = device
        self._buckets: dict[int, _Bucket] = {}
        # All graphs share one pool of memory.
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __repr__(self) -> str:
        graphs = {size: sorted(bucket.graphs) for size, bucket in self._buckets.items()}
        return f"<DecodeSteps: graphs {graphs}>"

    @staticmethod
    def takes(rows: list[PlannedRow]) -> bool:
        """Tell whether a step of these rows can run here."""
        return len(rows) <= BUCKETS[-1] and all(
            row.num_tokens == 1
            and row.samples
            and row.num_scored == 0
            and device_sampler.takes(row.sequence)
            for row in rows
        )

    def launch(self, rows: list[PlannedRow], after: Flight | None = None) -> Flight:
        """Start a step; `after` is the same rows' step before, whose tokens it takes."""
        bucket = self._bucket(BUCKETS[bisect_left(BUCKETS, len(rows))])
        bucket.buffers.fill(rows, None if after is None else after.token_ids)
        effort = device_sampler.effort_of([row.sequence for row in rows])
        token_ids = self._run(bucket, effort)
        host = bucket.results[bucket.turn]
        bucket.turn = 1 - bucket.turn
        host.copy_(token_ids, non_blocking=True)
        done = None
        if self._device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return Flight(rows, token_ids, host, done)

    def forget_graphs(self) -> None:
        """Drop all graphs, whose addresses are about to change; they are captured anew."""
        self._buckets.clear()

    def _bucket(self, size: int) -> _Bucket:
        if size not in self._buckets:
            buffers = StepBuffers(size, self._max_blocks, self._cache.block_size, self._device)
            self._buckets[size] = _Bucket(buffers, self._device)
        return self._buckets[size]

    def _run(self, bucket: _Bucket, effort: Effort) -> Tensor:
        if self._device.type != "cuda":
            return self._compute(bucket, effort)
        if effort not in bucket.is_warm:
            bucket.is_warm.add(effort)
            return self._compute(bucket, effort)
        if effort not in bucket.graphs:
            bucket.graphs[effort] = self._capture(bucket, effort)
        graph, token_ids = bucket.graphs[effort]
        graph.replay()
        return token_ids

    def _compute(self, bucket: _Bucket, effort: Effort) -> Tensor:
        logits = self._model.forward(bucket.buffers.batch, self._cache)
        return device_sampler.sample(logits, bucket.buffers.sampling, effort)

    def _capture(self, bucket: _Bucket, effort: Effort) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record a step without running it."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # A tensor that the collector frees in the middle would invalidate the capture.
        gc.collect()
        gc.disable()
        try:
            # Other threads (NCCL's watchdog) may ask for events meanwhile.
            with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
                token_ids = self._compute(bucket, effort)
        finally:
            gc.enable()
        return graph, token_ids
