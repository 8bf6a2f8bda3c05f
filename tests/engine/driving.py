"""Run an engine to the end and collect what each sequence got."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cortexd.errors import ErrorInfo
from cortexd.messages.inference import SequenceDelta
from engine.batch import StepBatch
from engine.cache.kv_cache import KVCache
from engine.engine import Engine
from engine.loading.model_load import Model
from tests.engine.doubles import make_submit

OWNER = "front.0"


@dataclass
class Outcome:
    """Everything one sequence received."""

    token_ids: list[int] = field(default_factory=list)
    deltas: list[SequenceDelta] = field(default_factory=list)
    finish_reason: str | None = None
    error: ErrorInfo | None = None


def collect(
    outcomes: dict[int, Outcome], step: dict[str, list[SequenceDelta]], owner: str = OWNER
) -> None:
    """Add one step's deltas of one owner."""
    for delta in step.get(owner, []):
        outcome = outcomes[delta.sequence_id]
        assert outcome.finish_reason is None, "a delta after the last one"
        outcome.deltas.append(delta)
        outcome.token_ids += delta.token_ids
        outcome.finish_reason = delta.finish_reason
        outcome.error = delta.error


def run_to_end(engine: Engine, outcomes: dict[int, Outcome] | None = None) -> dict[int, Outcome]:
    """Step until nothing is left; check that nothing leaked."""
    outcomes = defaultdict(Outcome) if outcomes is None else outcomes
    while engine.has_work:
        collect(outcomes, engine.step())
    assert engine.scheduler.pool.num_used == 0
    assert engine.report("m").num_running == 0
    return outcomes


def generate(engine: Engine, prompt: list[int], **fields: object) -> list[int]:
    """Run one sequence alone; return its tokens."""
    engine.submit(OWNER, make_submit(prompt, **fields))
    outcomes = run_to_end(engine)
    return next(iter(outcomes.values())).token_ids


class Recorder:
    """A model that keeps the logits it returned, and can spoil a row's."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.logits: list[Tensor] = []  # one (vocab_size,) per sampled row
        self.spoil: dict[int, float] = {}  # row of the next step with logits → value

    @property
    def backend_name(self) -> str:
        """As the real model."""
        return self.model.backend_name

    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Run the real model."""
        logits = self.model.forward(batch, cache).clone()
        if len(logits):
            for row, value in self.spoil.items():
                logits[row, 3] = value
            self.spoil = {}
        self.logits += list(logits.float())
        return logits


def record(engine: Engine) -> Recorder:
    """Put a recorder in front of the engine's model."""
    recorder = Recorder(engine.model)
    engine.model = recorder
    return recorder


def max_difference(left: Tensor, right: Tensor) -> float:
    """Return the largest absolute difference."""
    return float((left - right).abs().max())


torch.set_num_threads(1)
