"""Sampling on the device without the host: the token ids of a step stay where the next one is.

Used by `engine.decode_steps` for rows without penalties, masks and log-probabilities; all others
take `engine.sampling.sampler`, whose tokens these are. Stateless.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from engine.sampling.sampler import is_plain
from engine.scheduling.sequence import Sequence

# Rows of a top-k beyond this, and rows with a top-p alone, need the whole vocabulary sorted.
MAX_TOP_K: Final = 1024

# What a step's rows need: only the largest logit, the largest 1024, or all of them in order.
Effort = Literal["greedy", "top", "sorted"]


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """Settings of a step's rows on the device, (num_rows,): float32 and int64."""

    temperatures: Tensor
    top_ps: Tensor
    min_ps: Tensor
    top_ks: Tensor
    seeds: Tensor
    positions: Tensor  # of the token to be drawn


def effort_of(sequences: list[Sequence]) -> Effort:
    """Return the least effort that does for all rows."""
    efforts = {_effort(sequence) for sequence in sequences}
    return next(effort for effort in ("sorted", "top", "greedy") if effort in efforts)


def takes(sequence: Sequence) -> bool:
    """Tell whether the sequence's tokens may be drawn here."""
    return is_plain(sequence)


def sample(logits: Tensor, settings: SamplingTensors, effort: Effort) -> Tensor:
    """Return a token id per row of logits (num_rows, vocab_size); -1 where they are not finite."""
    logits = logits.float()
    token_ids = logits.argmax(-1)
    if effort != "greedy":
        token_ids = _draw(logits, token_ids, settings, effort)
    return torch.where(torch.isfinite(logits.sum(-1)), token_ids, -1)


def _draw(logits: Tensor, greedy: Tensor, settings: SamplingTensors, effort: Effort) -> Tensor:
    from engine.kernels.triton.sampling import draw  # imports Triton

    if effort == "sorted":
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
    else:
        values, ids = logits.topk(min(MAX_TOP_K, logits.shape[-1]), dim=-1)
    return draw(
        logits.contiguous(),
        (values, ids),
        greedy,
        temperatures=settings.temperatures,
        top_ks=settings.top_ks,
        top_ps=settings.top_ps,
        min_ps=settings.min_ps,
        seeds=settings.seeds,
        positions=settings.positions,
    )


def _effort(sequence: Sequence) -> Effort:
    submit = sequence.submit
    if submit.temperature == 0:
        return "greedy"
    is_wide = submit.top_p < 1.0 and submit.top_k <= 0
    return "sorted" if is_wide or submit.top_k > MAX_TOP_K else "top"
