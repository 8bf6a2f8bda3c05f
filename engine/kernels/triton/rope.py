"""Norm and rotate Q and K heads, write K and V to the paged cache: one kernel per layer.

One program per token and head. Rounding points are the reference's: a head norm with a weight in
the model's dtype rounds before the weight (`HeadRMSNorm`), one with a float32 factor once after it
(`ZeroCentredRMSNorm`); the rotation rounds the product with cos.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import tile


@triton.jit
def _normed(
    x: tl.tensor,
    inverse: tl.tensor,
    weight: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
    ROUNDS_FIRST: tl.constexpr,
) -> tl.tensor:
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    y = x.to(tl.float32) * inverse
    if ROUNDS_FIRST:
        y = y.to(x.dtype).to(tl.float32)
    return (y * factor).to(x.dtype)


@triton.jit
def _norm_rotate_write(
    heads: tl.tensor,
    query: tl.tensor,
    cache: tl.tensor,
    slots: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    weight: tl.tensor,
    eps: float,
    token_stride: int,
    num_heads: int,
    num_kv_heads: int,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    columns = tl.arange(0, TILE)
    inside = columns < HEAD_DIM
    source = heads + token * token_stride + head * HEAD_DIM
    x = tl.load(source + columns, mask=inside, other=0.0)
    if head < num_heads + num_kv_heads:
        # The partner that each element turns with; beyond the rotated part nothing turns.
        half: tl.constexpr = ROTARY_DIM // 2
        turned = columns < ROTARY_DIM
        partner_columns = tl.where(columns < half, columns + half, columns - half)
        partner = tl.load(source + partner_columns, mask=turned, other=0.0)
        if HAS_NORM:
            wide = x.to(tl.float32)
            inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / HEAD_DIM + eps)
            factors = weight + head * HEAD_DIM
            x = _normed(x, inverse, factors, columns, inside, ROUNDS_FIRST)
            partner = _normed(partner, inverse, factors, partner_columns, turned, ROUNDS_FIRST)
        c = tl.load(cos + token * ROTARY_DIM + columns, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + token * ROTARY_DIM + columns, mask=turned, other=0.0).to(tl.float32)
        along = (x.to(tl.float32) * c).to(x.dtype).to(tl.float32)
        x = (along + partner.to(tl.float32) * s).to(x.dtype)
    if head < num_heads:
        target = query + (token * num_heads + head) * HEAD_DIM
    else:
        slot = tl.load(slots + token)
        target = cache + (slot * 2 * num_kv_heads + head - num_heads) * HEAD_DIM
    tl.store(target + columns, x, mask=inside)


def norm_rotate_write(
    heads: Tensor,
    cache_slots: Tensor,
    slots: Tensor,
    tables: tuple[Tensor, Tensor],
    head_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Return the normed and rotated queries (num_tokens, num_heads, head_dim); keep K and V.

    heads (num_tokens, num_heads + 2 * num_kv_heads, head_dim), tokens may be strided; cache_slots
    (num_slots, 2 * num_kv_heads, head_dim); slots (num_tokens,) int64; tables as
    `RotaryEmbedding.tables` gives them; head_norm (num_heads + num_kv_heads, head_dim), float32 for
    the zero-centred form.
    """
    num_tokens, total_heads, head_dim = heads.shape
    num_kv_heads = cache_slots.shape[1] // 2
    num_heads = total_heads - 2 * num_kv_heads
    cos, sin = tables
    assert heads.stride()[1:] == (head_dim, 1), f"heads have strides {heads.stride()}"
    assert cache_slots.is_contiguous(), f"the cache has strides {cache_slots.stride()}"
    assert cos.is_contiguous(), f"cos has strides {cos.stride()}"
    assert sin.is_contiguous(), f"sin has strides {sin.stride()}"
    query = torch.empty(num_tokens, num_heads, head_dim, dtype=heads.dtype, device=heads.device)
    _norm_rotate_write[(num_tokens, total_heads)](
        heads,
        query,
        cache_slots,
        slots,
        cos,
        sin,
        cos if head_norm is None else head_norm,
        eps,
        heads.stride(0),
        num_heads,
        num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=cos.shape[-1],
        HAS_NORM=head_norm is not None,
        ROUNDS_FIRST=head_norm is not None and head_norm.dtype == heads.dtype,
        TILE=tile(head_dim),
        num_warps=1,
    )
    return query
