"""The goals, and how each is measured: what must be reached, what is aimed at, and of what limit.

Memory-bound ones are bytes over the measured copy bandwidth, compute-bound ones operations over the
measured product rate. Parameter counts are exact for the shapes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from bench.gpu.runs import Runs


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured, as text, and its share of the ceiling where there is one."""

    text: str
    of_ceiling: float | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """One row of the table."""

    name: str
    text: str
    must: str
    aim: str
    run: Callable[[Runs], Result]


def _decode(name: str, weight_bytes: float, kv_bytes: int) -> Callable[[Runs], Result]:
    def run(runs: Runs) -> Result:
        step_s = statistics.median(runs.decode(name, batch=1, context=512))
        needed = weight_bytes + kv_bytes * 512
        ratio = needed / (step_s * runs.ceilings.copy_tb_s * 1e12)
        return Result(f"{step_s * 1e3:.2f} ms", ratio)

    return run


def _prefill(runs: Runs) -> Result:
    tok_s = runs.prefill("8b", num_prompts=8, length=2048)
    operations = tok_s * (13.9e9 + 0.29e6 * 2048)
    return Result(f"{tok_s:.0f} tok/s", operations / (runs.ceilings.matmul_tflop_s * 1e12))


def _offline(name: str, limit_tok_s: float) -> Callable[[Runs], Result]:
    def run(runs: Runs) -> Result:
        tok_s = runs.offline(name)
        # The limit was worked out for 3.0 TB/s.
        return Result(f"{tok_s:.0f} tok/s", tok_s / (limit_tok_s * runs.ceilings.copy_tb_s / 3.0))

    return run


def _against_transformers(runs: Runs) -> Result:
    ours = 1 / statistics.median(runs.decode("0.6b", batch=1, context=512))
    single, batched = runs.transformers_tok_s()
    return Result(f"{ours / single:.1f}x, {runs.offline('0.6b') / batched:.1f}x")


def _warm_turn(runs: Runs) -> Result:
    turns = runs.turns("27b", length=32768 - 256, num_new=100)
    return Result(f"{turns.warm_s / turns.cold_s:.1%} of {turns.cold_s:.1f} s")


def _sleep(runs: Runs) -> Result:
    sleep_s, wake_s = runs.sleep_and_wake("8b")
    return Result(f"{sleep_s:.2f} / {wake_s:.2f} s")


def _idle(runs: Runs) -> Result:
    return Result(f"{runs.idle_share('0.6b', batch=64):.1%}")


def _interference(runs: Runs) -> Result:
    return Result(f"{runs.interference('8b', num_decoding=8, length=32000):.1f}x")


def _not_here(reason: str) -> Callable[[Runs], Result]:
    return lambda runs: Result(reason)


# In an order that builds each model once: memory holds one at a time.
GOALS: Final = (
    Goal("G2", "0.6B bf16, batch 1, context 512: step", "<= 0.95 ms", "<= 0.50 ms",
         _decode("0.6b", 1.192e9, 114_688)),
    Goal("G4", "0.6B, 256 requests of 100-1024 in and out", ">= 14000", ">= 20000",
         _offline("0.6b", 25_782)),
    Goal("G6", "0.6B against transformers: batch 1, 256 requests", "10x, 3x", "20x, 5x",
         _against_transformers),
    Goal("G12", "0.6B, batch 64: GPU idle", "<= 5 %", "<= 1 %", _idle),
    Goal("G1", "8B bf16, batch 1, context 512: step", "<= 6.30 ms", "<= 5.32 ms",
         _decode("8b", 15.136e9, 147_456)),
    Goal("G3", "8B, prefill 8 x 2048 in chunks of 8192", ">= 45 %", ">= 60 %", _prefill),
    Goal("G5", "8B, 256 requests of 100-1024 in and out", ">= 6000", ">= 8000",
         _offline("8b", 9_835)),
    Goal("G13", "8B, 8 streams while 32k prompts arrive: p99/median", "<= 4x", "<= 2x",
         _interference),
    Goal("G11", "8B, sleep / wake", "<= 1.5 s", "<= 0.6 s", _sleep),
    Goal("G9", "8B Q4_K, Q6_K head, batch 1: step", ">= 55 %", ">= 75 %",
         _decode("8b-q4_k", 6.946e9 * 148 / 256 + 0.622e9 * 210 / 256, 147_456)),
    Goal("G10", "8B, cold load from the page cache to the first token", "<= 8 s", "<= 4 s",
         _not_here("needs a checkpoint")),
    Goal("G7", "27B hybrid bf16, batch 1: step", "<= 21.5 ms", "<= 18.1 ms",
         _decode("27b", 51.24e9 + 302e6, 65_536)),
    Goal("G8", "27B hybrid, warm turn behind 32k tokens", "<= 5 %", "<= 1 %", _warm_turn),
)  # fmt: skip
