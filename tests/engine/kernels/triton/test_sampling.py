"""Tokens drawn on the device are those of the reference sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.kernels.triton import sampling
from engine.sampling.device_sampler import SamplingTensors, effort_of, sample
from engine.sampling.sampler import Sampler
from engine.scheduling.sequence import Sequence
from tests.engine.doubles import make_sequence
from tests.engine.kernels.triton.cases import DEVICE, random

VOCAB_SIZE = 2500  # more than the candidates of a top-k, and than two tiles
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "min_p": 0.1},
    {"temperature": 1.3, "top_k": 1},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.6, "min_p": 0.02},
]
WIDE: list[dict[str, Any]] = [
    {"temperature": 1.5, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_k": 2000, "top_p": 0.99},
    {"temperature": 1.0},
]


def tensors(sequences: list[Sequence]) -> SamplingTensors:
    """Return the sequences' settings as a step's buffers hold them."""

    def of(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=DEVICE)

    def whole(values: list[int]) -> torch.Tensor:
        signed = [(value + 2**63) % 2**64 - 2**63 for value in values]
        return torch.tensor(signed, dtype=torch.int64, device=DEVICE)

    submits = [sequence.submit for sequence in sequences]
    return SamplingTensors(
        temperatures=of([s.temperature for s in submits]),
        top_ps=of([s.top_p for s in submits]),
        min_ps=of([s.min_p for s in submits]),
        top_ks=whole([s.top_k for s in submits]),
        seeds=whole([sequence.seed for sequence in sequences]),
        positions=whole([len(sequence.token_ids) for sequence in sequences]),
    )


@pytest.mark.parametrize(
    ("settings", "effort"), [(SETTINGS, "top"), (WIDE, "sorted"), (SETTINGS[:1], "greedy")]
)
def test_device_draws_the_references_tokens(settings: list[dict[str, Any]], effort: str) -> None:
    """Every setting, at several seeds and positions; big seeds are taken modulo 2**64."""
    sequences = [
        make_sequence([1] * length, seed=seed, **fields)
        for fields in settings
        for length, seed in ((3, 0), (70, 5), (4, 2**64 - 3))
    ]
    logits = random(len(sequences), VOCAB_SIZE) * 3
    assert effort_of(sequences) == effort
    found = sample(logits, tensors(sequences), effort_of(sequences))
    expected = [token.token_id for token in Sampler().sample(logits, sequences)]
    assert found.tolist() == expected


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy
def test_row_that_is_not_finite_gives_no_token_and_harms_no_other() -> None:
    """A NaN and an infinity, beside a good row."""
    sequences = [make_sequence([1, 2], seed=n, temperature=1.0) for n in range(3)]
    logits = random(3, VOCAB_SIZE)
    expected = sample(logits, tensors(sequences), "top").tolist()[2]
    logits[0, 7], logits[1, 9] = float("nan"), float("inf")
    assert sample(logits, tensors(sequences), "top").tolist() == [-1, -1, expected]


def test_draws_follow_the_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many positions each token comes as often as it should, in small tiles as well."""
    monkeypatch.setattr(sampling, "_TILE", 16)
    sequences = [make_sequence([1] * n, seed=9, temperature=1.0) for n in range(1, 301)]
    weights = torch.tensor([0.5, 0.25, 0.25] + [0.0] * 30, device=DEVICE)
    ids = sample(weights.log().expand(300, -1).clamp(min=-1e4), tensors(sequences), "top")
    counts = ids.bincount(minlength=3)[:3] / 300
    torch.testing.assert_close(counts, weights[:3], atol=0.08, rtol=0)
