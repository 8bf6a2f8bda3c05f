"""What the native kernels compute, in plain torch: the definition the tests hold them to.

Used by tests only. `linear` has the same bits as the kernels; the other operations agree with them
to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from engine.kernels.cpu.ops import QueryRow, Rotary

BLOCK: Final = 32
# The largest integer of an activation, fast and exact.
LARGEST: Final = {False: 127.0, True: 32512.0}
# Below it LARGEST / largest would overflow; such a block counts as zeros.
SMALLEST: Final = 1e-30


def quantize_activation(x: Tensor, *, is_exact: bool) -> tuple[Tensor, Tensor]:
    """Return int16 values and float32 scales (num_tokens, in / 32[, 32]): x is about q * scale.

    The scale is that of the block's largest value, or NaN for one that holds NaN or infinity.
    """
    top = LARGEST[is_exact]
    blocks = x.reshape(x.shape[0], -1, BLOCK)
    largest = blocks.abs().amax(-1)
    is_poisoned = ~blocks.isfinite().all(-1)
    is_zero = is_poisoned | (largest < SMALLEST)
    inverse = torch.where(is_zero, 0.0, top / largest)
    values = torch.where(is_zero[..., None], 0.0, blocks * inverse[..., None]).round()
    scale = torch.where(is_zero, 0.0, largest / top)
    return values.to(torch.int16), torch.where(is_poisoned, torch.nan, scale)


def linear(
    integers: Tensor,
    scales: Tensor,
    minima: Tensor | None,
    x: Tensor,
    *,
    is_exact: bool,
) -> Tensor:
    """Return (num_tokens, out) as the kernels add it up, bit by bit.

    The weight is integers (out, in) times scales (out, in / size), plus minima (out, in / 32);
    size is 32, or 16 for types that scale the halves of a block. Integer sums are exact
    and rounded once to float32, as is every other product and sum; blocks in ascending order.
    """
    values, x_scale = quantize_activation(x, is_exact=is_exact)
    num_tokens, num_blocks = x_scale.shape
    scales = scales.reshape(scales.shape[0], num_blocks, -1)
    parts = scales.shape[-1]  # 1, or 2 halves
    shape = (-1, num_blocks, parts, BLOCK // parts)
    out = torch.zeros(num_tokens, integers.shape[0])
    blocks = integers.reshape(shape).double()
    token_blocks = values.reshape(shape).double()
    x_sum = values.reshape(num_tokens, num_blocks, BLOCK).float().sum(-1)
    for b in range(num_blocks):
        sums = torch.einsum("rpk,tpk->ptr", blocks[:, b], token_blocks[:, b]).float()
        token_scale = x_scale[:, b, None]
        if parts == 1:
            term = scales[:, b, 0] * token_scale * sums[0]
        else:
            term = (scales[:, b, 0] * sums[0] + scales[:, b, 1] * sums[1]) * token_scale
        if minima is not None:
            term = term + minima[:, b] * (x_scale[:, b] * x_sum[:, b])[:, None]
        out = out + term
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up: (num_tokens, 2 * size) to (num_tokens, size)."""
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


def rope_and_kv_write(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache_layer: Tensor,
    rotary: Rotary,
    *,
    head_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """See `ops.rope_and_kv_write`."""
    num_kv_heads = cache_layer.shape[2] // 2
    heads = qkv[:, : qkv.shape[1] - num_kv_heads]
    if head_norm is not None:
        heads.copy_(functional.rms_norm(heads, (heads.shape[-1],), None, eps) * head_norm)
    angles = torch.outer(positions.float(), rotary.inverse_frequencies)[:, None]
    cos, sin = angles.cos() * rotary.scale, angles.sin() * rotary.scale
    half = cos.shape[-1]
    first, second = heads[..., :half].clone(), heads[..., half : 2 * half].clone()
    heads[..., :half] = first * cos - second * sin
    heads[..., half : 2 * half] = second * cos + first * sin
    cache_layer.flatten(0, 1)[slots] = qkv[:, -2 * num_kv_heads :]


def paged_attention(
    query: Tensor, cache_layer: Tensor, rows: Sequence[QueryRow], scale: float
) -> Tensor:
    """See `ops.paged_attention`."""
    slots = cache_layer.flatten(0, 1)
    block_size = cache_layer.shape[1]
    num_kv_heads = cache_layer.shape[2] // 2
    out = torch.empty(query.shape[0], query.shape[1] * query.shape[2])
    for row in rows:
        seen = torch.arange(row.kv_len)
        if row.block_ids is None:
            at = row.first_slot + seen
        else:
            at = row.block_ids[seen // block_size] * block_size + seen % block_size
        group = query.shape[1] // num_kv_heads
        key, value = slots[at].repeat_interleave(group, 1).transpose(0, 1).chunk(2)
        positions = torch.arange(row.kv_len - (row.end - row.start), row.kv_len)
        attended = functional.scaled_dot_product_attention(
            query[row.start : row.end].transpose(0, 1),
            key,
            value,
            attn_mask=seen <= positions[:, None],
            scale=scale,
        )
        out[row.start : row.end] = attended.transpose(0, 1).flatten(1)
    return out
