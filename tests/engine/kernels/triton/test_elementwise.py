"""Norms, rotation with the cache write, and the activation, against the torch layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cortexd.models import RopeSpec
from engine.kernels.triton.activation import silu_mul
from engine.kernels.triton.norm import add_rms_norm
from engine.kernels.triton.rope import norm_rotate_write
from engine.layers.norm import HeadRMSNorm, RMSNorm, ZeroCentredRMSNorm
from engine.layers.rope import RotaryEmbedding
from tests.engine.kernels.triton.cases import DEVICE, close, random

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [48, 576, 1024])
@pytest.mark.parametrize("zero_centred", [False, True])
def test_add_and_norm_equal_the_reference(
    zero_centred: bool, size: int, dtype: torch.dtype
) -> None:
    """The residual stream gets the rounded sum, and that is what is normed."""
    residual, delta = random(3, size, dtype=dtype), random(3, size, dtype=dtype, seed=1)
    weight = 1 + random(size, seed=2) / 10
    norm = ZeroCentredRMSNorm(weight, EPS) if zero_centred else RMSNorm(weight.to(dtype), EPS)
    total = residual + delta
    close(add_rms_norm(None, total, norm.weight, EPS), norm(total))
    found = add_rms_norm(delta, residual, norm.weight, EPS)
    # The interpreter cuts off bits where the hardware rounds, so not equal but close.
    close(residual, total)
    close(found, norm(residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [96, 1536])
def test_silu_mul_equals_the_reference(size: int, dtype: torch.dtype) -> None:
    """Sizes below a tile, and several tiles with a rest."""
    gate_up = random(3, 2 * size, dtype=dtype) * 4
    gate, up = gate_up.chunk(2, -1)
    close(silu_mul(gate_up), functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_kind", ["none", "plain", "zero-centred"])
@pytest.mark.parametrize(("head_dim", "rotated"), [(64, 1.0), (80, 0.4), (128, 1.0), (256, 0.25)])
def test_heads_are_normed_rotated_and_written(
    head_dim: int, rotated: float, norm_kind: str, dtype: torch.dtype
) -> None:
    """Queries come back; K and V go to their slots and nothing else of the cache changes."""
    num_tokens, num_heads, num_kv_heads = 5, 6, 2
    # A slice of a wider projection, as with gated attention.
    wide = random(num_tokens, (num_heads + 2 * num_kv_heads + 1) * head_dim, dtype=dtype)
    heads = wide[:, :-head_dim].unflatten(-1, (-1, head_dim))
    rope = RotaryEmbedding(RopeSpec(partial_rotary_factor=rotated), head_dim, dtype, DEVICE)
    tables = rope.tables(torch.tensor([0, 1, 7, 100, 1000], device=DEVICE))
    slots = torch.tensor([9, 3, 4, 11, 0], device=DEVICE)
    cache = random(12, 2 * num_kv_heads, head_dim, dtype=dtype, seed=1)
    norm = None
    if norm_kind != "none":
        weight = 1 + random(num_heads + num_kv_heads, head_dim, seed=2) / 10
        is_plain = norm_kind == "plain"
        norm = HeadRMSNorm(weight.to(dtype), EPS) if is_plain else ZeroCentredRMSNorm(weight, EPS)
    expected_cache = cache.clone()
    query = _in_torch(heads.clone(), norm, rope, tables, cache=expected_cache, slots=slots)
    weight_of_norm = None if norm is None else norm.weight
    close(norm_rotate_write(heads, cache, slots, tables, weight_of_norm, EPS), query)
    close(cache, expected_cache)


def _in_torch(
    heads: Tensor,
    norm: HeadRMSNorm | ZeroCentredRMSNorm | None,
    rope: RotaryEmbedding,
    tables: tuple[Tensor, Tensor],
    *,
    cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Do what `SelfAttention` does before it attends."""
    num_kv_heads = cache.shape[1] // 2
    num_heads = heads.shape[1] - 2 * num_kv_heads
    rotated = heads[:, : num_heads + num_kv_heads]
    if norm is not None:
        rotated.copy_(norm(rotated))
    rope.rotate_(rotated, tables)
    cache.index_copy_(0, slots, heads[:, num_heads:])
    return heads[:, :num_heads]
