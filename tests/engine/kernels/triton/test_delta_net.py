"""Gated DeltaNet on Triton against the torch layer: one token a row, runs, hostile keys."""

from __future__ import annotations

from typing import Final

import msgspec
import pytest
import torch
from torch import Tensor

from cortexd.models import LinearAttentionSpec
from engine.batch import StepBatch
from engine.cache.kv_cache import CacheSize, KVCache
from engine.layers.gated_delta_net import GatedDeltaNet
from engine.layers.linear import Linear
from engine.layers.norm import GatedRMSNorm
from engine.models.fused_delta_net import FusedDeltaNet
from tests.engine.doubles import TINY
from tests.engine.kernels.triton.cases import DEVICE, Lengths, make_batch, random

HIDDEN: Final = 16
SMALL = LinearAttentionSpec(num_key_heads=2, num_value_heads=4, key_head_dim=16, value_head_dim=24)
TILED = msgspec.structs.replace(SMALL, has_tiled_heads=True)
LARGE = LinearAttentionSpec(
    num_key_heads=1, num_value_heads=1, key_head_dim=128, value_head_dim=128
)
# Rows of one token, the first of them new; then runs: new, of over a chunk, and continued ones.
MIXED: Lengths = [(1, 1), (1, 9), (66, 66), (2, 7), (5, 70)]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def make_layer(spec: LinearAttentionSpec, dtype: torch.dtype, *, sharp: bool) -> GatedDeltaNet:
    """Return a random layer; a sharp one writes at full strength and hardly forgets."""
    heads = spec.num_value_heads
    weight = random(spec.conv_size + spec.value_size + 2 * heads, HIDDEN, seed=1) * 0.3
    rate = -random(heads, seed=2).exp()
    if sharp:
        weight[-2 * heads : -heads] *= 40
        rate = rate * 1e-3
    return GatedDeltaNet(
        spec,
        0,
        projections=Linear(weight.to(dtype), backend="reference"),
        conv_weight=random(spec.conv_kernel, spec.conv_size, seed=3) * 0.5,
        decay_rate=rate,
        dt_bias=random(heads, seed=4) * 0.5,
        norm=GatedRMSNorm((1 + random(spec.value_head_dim, seed=5) / 10).to(dtype), 1e-6),
        output=Linear(torch.eye(spec.value_size, device=DEVICE, dtype=dtype), backend="reference"),
    )


def make_cache(spec: LinearAttentionSpec, num_slots: int, dtype: torch.dtype) -> KVCache:
    """Return state slots full of what earlier steps may have left there."""
    model = msgspec.structs.replace(
        TINY, num_hidden_layers=1, linear_layers=(0,), linear_attention=spec
    )
    cache = KVCache(model, CacheSize(2, 64, num_slots), 16, dtype, DEVICE)
    assert cache.states is not None
    cache.states.recurrent.copy_(random(*cache.states.recurrent.shape, seed=6) * 0.3)
    cache.states.conv_tails.copy_(random(*cache.states.conv_tails.shape, seed=7))
    return cache


def run(
    layer: GatedDeltaNet | FusedDeltaNet, hidden: Tensor, batch: StepBatch, cache: KVCache
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, states and tails after a step."""
    tables = (hidden, hidden)  # positions play no part
    out = layer(hidden, batch, cache, tables)
    assert cache.states is not None
    return out, cache.states.recurrent, cache.states.conv_tails


def errors(
    spec: LinearAttentionSpec, lengths: Lengths, dtype: torch.dtype, hidden: Tensor, sharp: bool
) -> list[float]:
    """Return the largest differences of output, states and tails, relative to the largest value."""
    layer = make_layer(spec, dtype, sharp=sharp)
    batch, _ = make_batch(lengths, 16)
    both = [
        run(way, hidden, batch, make_cache(spec, len(lengths), dtype))
        for way in (layer, FusedDeltaNet(layer))
    ]
    return [
        float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
        for expected, found in zip(*both, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [SMALL, TILED])
def test_mixed_rows_equal_the_reference(spec: LinearAttentionSpec, dtype: torch.dtype) -> None:
    """Outputs, and what stays in the slots, for every kind of row in one batch."""
    hidden = random(sum(count for count, _ in MIXED), HIDDEN, dtype=dtype)
    assert max(errors(spec, MIXED, dtype, hidden, sharp=False)) < TOLERANCE[dtype]


def test_large_heads_equal_the_reference() -> None:
    """Heads of the size that models have."""
    lengths = [(1, 3), (66, 66)]
    hidden = random(67, HIDDEN)
    assert max(errors(LARGE, lengths, torch.float32, hidden, sharp=False)) < 1e-4


def repeated(num_tokens: int) -> Tensor:
    """Return near-identical tokens: their keys are near-identical as well."""
    return random(1, HIDDEN) + 1e-3 * random(num_tokens, HIDDEN, seed=1)


def test_repeated_keys_equal_the_reference() -> None:
    """Every token meets its own earlier writes at full strength."""
    assert max(errors(SMALL, [(130, 130)], torch.float32, repeated(130), sharp=True)) < 1e-3
