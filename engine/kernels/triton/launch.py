"""What all kernels share: tile sizes, and the matrix product that also the interpreter gets right.

No state.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton import is_interpreted

# The interpreter multiplies bfloat16 bit patterns as if they were integers: widen first.
WIDEN: Final = is_interpreted()
# A tensor-core tile has no side below this.
MIN_TILE: Final = 16


def tile(size: int) -> int:
    """Return the side of a tile that holds `size` elements."""
    return max(MIN_TILE, int(triton.next_power_of_2(size)))


def flags(values: Tensor) -> Tensor:
    """Return booleans as bytes, and integers as they are."""
    return values.view(torch.uint8) if values.dtype == torch.bool else values


@triton.jit
def dot(left: tl.tensor, right: tl.tensor, WIDEN: tl.constexpr) -> tl.tensor:
    """Multiply tiles of one dtype with a float32 sum; float32 is not rounded to TF32."""
    if WIDEN:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    return tl.dot(left, right, input_precision="ieee")
