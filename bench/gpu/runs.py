"""The models of one benchmark run, one in memory at a time, and what is measured on them."""

from __future__ import annotations

import gc
import time
from typing import Any, Final

import torch

from bench.gpu import workloads
from bench.gpu.ceilings import Ceilings
from bench.gpu.random_models import QWEN3_0_6B, QWEN3_5_27B, QWEN3_8B, make_engine
from bench.gpu.transformers_side import transformers_tok_s
from engine.engine import Engine
from engine.formats.ggml import GGMLType

_NUM_STEPS: Final = 64
_MODELS: Final[dict[str, tuple[Any, GGMLType | None]]] = {
    "0.6b": (QWEN3_0_6B, None),
    "8b": (QWEN3_8B, None),
    "8b-q4_k": (QWEN3_8B, GGMLType.Q4_K),
    "27b": (QWEN3_5_27B, None),
}


class Runs:
    """See the module's text."""

    def __init__(self, ceilings: Ceilings) -> None:
        self.ceilings = ceilings
        self._name = ""
        self._engine: Engine | None = None
        self._offline: dict[str, float] = {}

    def decode(self, name: str, *, batch: int, context: int) -> list[float]:
        """Return the times of decode steps, in seconds."""
        return workloads.decode_step_s(self._load(name), batch, context, _NUM_STEPS)

    def prefill(self, name: str, *, num_prompts: int, length: int) -> float:
        """Return prompt tokens per second."""
        return workloads.prefill_tok_s(self._load(name), num_prompts, length)

    def offline(self, name: str) -> float:
        """Return output tokens per second of the offline workload, measured once."""
        if name not in self._offline:
            self._offline[name] = workloads.offline_tok_s(self._load(name))
        return self._offline[name]

    def turns(self, name: str, *, length: int, num_new: int) -> workloads.Turns:
        """Return the times of a cold and of a warm turn."""
        engine = self._load(name)
        workloads.turns(engine, 512, 32)  # compile
        return workloads.turns(engine, length, num_new)

    def interference(self, name: str, *, num_decoding: int, length: int) -> float:
        """Return p99 over median of the time between tokens."""
        return workloads.interference(self._load(name), num_decoding, length)

    def idle_share(self, name: str, *, batch: int) -> float:
        """Return which share of a decode phase no kernel ran."""
        engine = self._load(name)
        workloads.begin_decoding(engine, batch, 512, _NUM_STEPS)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            wall_s = sum(workloads.time_steps(engine, _NUM_STEPS))
            torch.cuda.synchronize()
        workloads.drain(engine)
        busy_us = sum(event.self_device_time_total for event in profile.key_averages())
        return 1 - busy_us * 1e-6 / wall_s

    def sleep_and_wake(self, name: str) -> tuple[float, float]:
        """Return the seconds that each takes."""
        engine = self._load(name)
        started = time.perf_counter()
        engine.sleep()
        torch.cuda.synchronize()
        slept = time.perf_counter()
        engine.wake()
        torch.cuda.synchronize()
        return slept - started, time.perf_counter() - slept

    def transformers_tok_s(self) -> tuple[float, float]:
        """Return transformers' rates for the 0.6B shape: one stream, and the offline workload."""
        self._unload()
        return transformers_tok_s(QWEN3_0_6B)

    def _load(self, name: str) -> Engine:
        if name != self._name or self._engine is None:
            self._unload()
            spec, quant = _MODELS[name]
            self._engine = make_engine(
                spec,
                torch.device("cuda"),
                quant=quant,
                max_num_seqs=256,
                max_num_batched_tokens=8192,
                max_prefill_chunk=8192,
                max_queue_depth=512,
            )
            self._name = name
        return self._engine

    def _unload(self) -> None:
        self._engine = None
        gc.collect()
        torch.cuda.empty_cache()
