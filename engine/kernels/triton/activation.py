"""The products with an activated gate: of the feed-forward block, and of gated attention.

The activated gate is rounded to the tensors' dtype before the product, as in the reference.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

_TILE: Final = 1024


@triton.jit
def _silu_mul(gate_up: tl.tensor, out: tl.tensor, size: int, TILE: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < size
    gate = tl.load(gate_up + row * 2 * size + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask=inside, other=0.0)
    x = gate.to(tl.float32)
    activated = (x / (1.0 + tl.exp(-x))).to(gate.dtype).to(tl.float32)
    product = (activated * up.to(tl.float32)).to(gate.dtype)
    tl.store(out + row * size + columns, product, mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Map (num_tokens, 2 * size), gate and up side by side, to (num_tokens, size)."""
    assert gate_up.is_contiguous(), f"gate_up has strides {gate_up.stride()}"
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, size)
    tile = min(_TILE, int(triton.next_power_of_2(size)))
    _silu_mul[(num_tokens, triton.cdiv(size, tile))](gate_up, out, size, TILE=tile, num_warps=4)
    return out


@triton.jit
def _sigmoid_mul(
    x: tl.tensor, gate: tl.tensor, size: int, gate_stride: int, TILE: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < size
    value = tl.load(x + row * size + columns, mask=inside, other=0.0)
    wide = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    activated = (1.0 / (1.0 + tl.exp(-wide))).to(value.dtype).to(tl.float32)
    product = (value.to(tl.float32) * activated).to(value.dtype)
    tl.store(x + row * size + columns, product, mask=inside)


def sigmoid_mul_(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply x (num_tokens, size) by sigmoid(gate) in place; rows of `gate` may be strided."""
    assert x.is_contiguous(), f"x has strides {x.stride()}"
    assert gate.stride(1) == 1, f"gate has strides {gate.stride()}"
    num_tokens, size = x.shape
    tile = min(_TILE, int(triton.next_power_of_2(size)))
    grid = (num_tokens, triton.cdiv(size, tile))
    _sigmoid_mul[grid](x, gate, size, gate.stride(0), TILE=tile, num_warps=4)
    return x
