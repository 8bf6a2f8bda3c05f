"""The gated delta rule against float64: chunks, single tokens, any cut, hostile keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.layers import delta_rule
from engine.layers.delta_rule import DeltaInputs, chunk_delta_rule, recurrent_delta_rule

NUM_HEADS, KEY_DIM, VALUE_DIM = 3, 16, 8
TOLERANCE = 1e-5


def make_inputs(kind: str, num_tokens: int, seed: int = 0) -> DeltaInputs:
    """Return normalised inputs: "random", or "repeated" with near-identical keys and beta near 1.

    Repeated ones also forget slowly, so every token meets its own earlier writes at full strength.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(num_tokens, NUM_HEADS, *shape, generator=generator)

    query, key, value = draw(KEY_DIM), draw(KEY_DIM), draw(VALUE_DIM)
    decay, beta = -draw().abs(), draw().sigmoid()
    if kind == "repeated":
        key = key[:1] + 1e-3 * key
        decay, beta = decay * 1e-4, 1 - 1e-4 * beta
    query, key = (x / x.norm(dim=-1, keepdim=True) for x in (query, key))
    return DeltaInputs(query * KEY_DIM**-0.5, key, value, decay, beta)


def in_float64(inputs: DeltaInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the recurrence as it is written, one token after the other."""
    query, key, value, decay, beta = (part.double() for part in inputs)
    state = state.double()
    outputs = []
    for t in range(len(value)):
        state = state * decay[t].exp()[:, None, None]
        delta = beta[t, :, None] * (value[t] - torch.einsum("hkv,hk->hv", state, key[t]))
        state = state + torch.einsum("hk,hv->hkv", key[t], delta)
        outputs.append(torch.einsum("hkv,hk->hv", state, query[t]))
    return torch.stack(outputs), state


def in_one_call(inputs: DeltaInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chunked form over all tokens at once."""
    return chunk_delta_rule(inputs, state)


def in_pieces(inputs: DeltaInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chunked form over pieces that end anywhere, also inside a chunk."""
    outputs, begin = [], 0
    for end in (1, 64, 97, 161, len(inputs.value)):
        out, state = chunk_delta_rule(inputs.tokens(begin, end), state)
        outputs.append(out)
        begin = end
    return torch.cat(outputs), state


def token_by_token(inputs: DeltaInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the recurrent form."""
    outputs, states = [], state.unsqueeze(0)
    for t in range(len(inputs.value)):
        out, states = recurrent_delta_rule(inputs.tokens(t, t + 1), states)
        outputs.append(out)
    return torch.cat(outputs), states[0]


def largest_error(
    way: Callable[[DeltaInputs, Tensor], tuple[Tensor, Tensor]], kind: str, num_tokens: int = 201
) -> float:
    """Return the largest difference to float64 of outputs and state, from a non-zero state."""
    inputs = make_inputs(kind, num_tokens)
    generator = torch.Generator().manual_seed(9)
    state = torch.randn(NUM_HEADS, KEY_DIM, VALUE_DIM, generator=generator)
    kept = state.clone()
    expected, found = in_float64(inputs, state), way(inputs, state)
    assert torch.equal(state, kept), "the caller's state was written to"
    return max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["random", "repeated"])
@pytest.mark.parametrize("way", [in_one_call, in_pieces, token_by_token])
def test_every_way_equals_the_recurrence(
    way: Callable[..., tuple[Tensor, Tensor]], kind: str
) -> None:
    """All forms agree with float64, for keys that repeat as well."""
    assert largest_error(way, kind) < TOLERANCE


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 128])
def test_chunk_edges_are_exact(num_tokens: int) -> None:
    """Full, overfull and single-token chunks."""
    assert largest_error(in_one_call, "random", num_tokens) < TOLERANCE


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    """One call for many sequences equals a call for each, bit for bit."""
    inputs = make_inputs("random", 5)
    states = torch.randn(5, NUM_HEADS, KEY_DIM, VALUE_DIM)
    out, after = recurrent_delta_rule(inputs, states)
    for row in range(5):
        own, own_after = recurrent_delta_rule(inputs.tokens(row, row + 1), states[row : row + 1])
        assert torch.equal(out[row : row + 1], own)
        assert torch.equal(after[row : row + 1], own_after)


def _inverse_by_squaring(system: Tensor, right: Tensor, **_: bool) -> Tensor:
    """Solve (I + L) x = right by the product of (I + (-L)^(2^i)): right on paper only."""
    power = -system.tril(-1)
    identity = torch.eye(system.shape[-1])
    inverse = identity + power
    for _ in range(5):
        power = power @ power
        inverse = inverse @ (identity + power)
    return inverse @ right


def test_repeated_keys_tell_a_bad_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inverting by powers passes on random keys and explodes on repeated ones."""
    monkeypatch.setattr(delta_rule.torch.linalg, "solve_triangular", _inverse_by_squaring)
    assert largest_error(in_one_call, "random") < 1e-3
    assert not largest_error(in_one_call, "repeated") < 1
