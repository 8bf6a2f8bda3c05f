"""silu(gate) * up of the feed-forward block, from the merged projection's output.

silu is rounded to the tensors' dtype before the product, as in the reference.
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
