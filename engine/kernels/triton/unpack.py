"""Weights of all stored types as the kernels read them: unpacked in registers, summed with tokens.

A byte's two nibbles are two columns far apart, so each step takes two halves of the input: the
columns of the low nibbles and those of the high ones. Rows of whole numbers, int8 or dense, are
simply cut in the middle. Called by the kernels of `quant_linear` and `experts`. No state.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from engine.formats.ggml import GGMLType
from engine.kernels.triton.launch import dot
from engine.kernels.triton.planes import Planes

# What a stored number needs to become a weight: flags of a kind.
_FLOATS: tl.constexpr = tl.constexpr(0)
_SCALE: tl.constexpr = tl.constexpr(1)
_SUPER_SCALE: tl.constexpr = tl.constexpr(2)
_MINIMUM: tl.constexpr = tl.constexpr(4)
_FIFTH_BIT: tl.constexpr = tl.constexpr(8)
_TWO_MORE_BITS: tl.constexpr = tl.constexpr(16)
_TABLE: tl.constexpr = tl.constexpr(32)
_GROUPS_OF_16: tl.constexpr = tl.constexpr(64)  # else of 32

# Per type: the flags; the zero point; and how many bytes have consecutive columns in their low
# nibbles and those that follow in the high ones, 0 where numbers are whole.
_LAYOUTS: Final = {
    GGMLType.BF16: (_FLOATS, 0, 0),
    GGMLType.F16: (_FLOATS, 0, 0),
    GGMLType.F32: (_FLOATS, 0, 0),
    GGMLType.Q8_0: (_SCALE, 0, 0),
    GGMLType.Q4_0: (_SCALE, 8, 16),
    GGMLType.Q4_1: (_SCALE | _MINIMUM, 0, 16),
    GGMLType.Q5_0: (_SCALE | _FIFTH_BIT, 16, 16),
    GGMLType.Q5_1: (_SCALE | _MINIMUM | _FIFTH_BIT, 0, 16),
    GGMLType.IQ4_NL: (_SCALE | _TABLE, 0, 16),
    GGMLType.Q4_K: (_SCALE | _SUPER_SCALE | _MINIMUM, 0, 32),
    GGMLType.Q5_K: (_SCALE | _SUPER_SCALE | _MINIMUM | _FIFTH_BIT, 0, 32),
    GGMLType.Q6_K: (_SCALE | _SUPER_SCALE | _TWO_MORE_BITS | _GROUPS_OF_16, 32, 64),
    GGMLType.IQ4_XS: (_SCALE | _SUPER_SCALE | _TABLE, 0, 16),
}


def constants(weight: Planes) -> dict[str, int]:
    """Return the kernels' arguments by which they are compiled for a type."""
    kind, zero_point, group_bytes = _LAYOUTS[weight.ggml_type]
    return {"KIND": kind.value, "ZERO_POINT": zero_point, "GROUP_BYTES": group_bytes}


@triton.jit
def low_columns(at: tl.tensor, GROUP_BYTES: tl.constexpr) -> tl.tensor:
    """Return the column of the low half of each byte pair position."""
    if GROUP_BYTES == 0:
        columns = at
    else:
        columns = at // GROUP_BYTES * (2 * GROUP_BYTES) + at % GROUP_BYTES
    return columns


@triton.jit
def high_columns(at: tl.tensor, num_columns: int, GROUP_BYTES: tl.constexpr) -> tl.tensor:
    """Return the column of the high half; rows of whole numbers are cut in the middle."""
    if GROUP_BYTES == 0:
        columns = at + num_columns // 2
    else:
        columns = low_columns(at, GROUP_BYTES) + GROUP_BYTES
    return columns


@triton.jit
def _values(
    quants: tl.tensor,
    columns: tl.tensor,
    rows: tl.tensor,
    mask: tl.tensor,
    scales: tl.tensor,
    minima: tl.tensor,
    super_scales: tl.tensor,
    super_minima: tl.tensor,
    num_columns: int,
    KIND: tl.constexpr,
    ZERO_POINT: tl.constexpr,
) -> tl.tensor:
    """Turn stored integers (rows, columns) into float32 weights."""
    size: tl.constexpr = 16 if _GROUPS_OF_16 & KIND else 32
    group = rows[:, None] * (num_columns // size) + columns[None, :] // size
    block = rows[:, None] * (num_columns // 256) + columns[None, :] // 256
    scale = tl.load(scales + group, mask=mask, other=0).to(tl.float32)
    if _SUPER_SCALE & KIND:
        scale *= tl.load(super_scales + block, mask=mask, other=0.0).to(tl.float32)
    values = scale * (quants - ZERO_POINT).to(tl.float32)
    if _MINIMUM & KIND:
        least = tl.load(minima + group, mask=mask, other=0).to(tl.float32)
        if _SUPER_SCALE & KIND:
            least *= tl.load(super_minima + block, mask=mask, other=0.0).to(tl.float32)
        values -= least
    return values


@triton.jit
def _integers(
    quants: tl.tensor,
    high: tl.tensor,
    rows: tl.tensor,
    at: tl.tensor,
    mask: tl.tensor,
    num_columns: int,
    KIND: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the numbers (rows, positions) of both halves as they are stored."""
    if GROUP_BYTES == 0:
        row = quants + rows[:, None] * num_columns
        low = tl.load(row + low_columns(at, GROUP_BYTES)[None, :], mask=mask, other=0)
        top = tl.load(row + high_columns(at, num_columns, GROUP_BYTES)[None, :], mask=mask, other=0)
    else:
        pairs = tl.load(
            quants + rows[:, None] * (num_columns // 2) + at[None, :], mask=mask, other=0
        ).to(tl.int32)
        low = pairs & 15
        top = pairs >> 4
        if _TABLE & KIND:
            low = tl.load(high + low)
            top = tl.load(high + top)
        if _FIFTH_BIT & KIND:
            # Those of four pairs, 32 apart, share a byte.
            stride = (num_columns // 2 + 127) // 128 * 32
            places = (at // 128 * 32 + at % 32)[None, :]
            packed = tl.load(high + rows[:, None] * stride + places, mask=mask, other=0)
            packed = packed.to(tl.int32) >> (at % 128 // 32 * 2)[None, :]
            low |= (packed & 1) << 4
            top |= (packed & 2) << 3
        if _TWO_MORE_BITS & KIND:
            # Four columns, 32 apart, share a byte.
            packed = tl.load(
                high + rows[:, None] * (num_columns // 4) + (at // 64 * 32 + at % 32)[None, :],
                mask=mask,
                other=0,
            ).to(tl.int32)
            shift = (at % 64 // 32 * 2)[None, :]
            low |= ((packed >> shift) & 3) << 4
            top |= ((packed >> (shift + 4)) & 3) << 4
    return low, top


@triton.jit
def both_halves(
    quants: tl.tensor,
    high: tl.tensor,
    scales: tl.tensor,
    minima: tl.tensor,
    super_scales: tl.tensor,
    super_minima: tl.tensor,
    rows: tl.tensor,
    at: tl.tensor,
    mask: tl.tensor,
    num_columns: int,
    KIND: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the weights (rows, positions) of the low and of the high columns.

    Unpacked ones are float32, dense ones as they are stored.
    """
    low, top = _integers(quants, high, rows, at, mask, num_columns, KIND, GROUP_BYTES)
    if KIND:
        low = _values(
            low,
            low_columns(at, GROUP_BYTES),
            rows,
            mask,
            scales,
            minima,
            super_scales,
            super_minima,
            num_columns,
            KIND,
            ZERO_POINT,
        )
        top = _values(
            top,
            high_columns(at, num_columns, GROUP_BYTES),
            rows,
            mask,
            scales,
            minima,
            super_scales,
            super_minima,
            num_columns,
            KIND,
            ZERO_POINT,
        )
    return low, top


@triton.jit
def row_sums(
    own: tl.tensor,
    has_token: tl.tensor,
    rows: tl.tensor,
    has_row: tl.tensor,
    quants: tl.tensor,
    high: tl.tensor,
    scales: tl.tensor,
    minima: tl.tensor,
    super_scales: tl.tensor,
    super_minima: tl.tensor,
    num_columns: int,
    KIND: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """Return the float32 products (TOKENS, ROWS) of tokens and matrix rows.

    `own` (TOKENS, 1) points to the tokens' numbers. A single token is multiplied and summed; more
    go through the tensor cores.
    """
    num_pairs = num_columns // 2
    if TOKENS == 1:
        total = tl.zeros([ROWS, BYTES], tl.float32)
    else:
        total = tl.zeros([TOKENS, ROWS], tl.float32)
    for first in range(0, num_pairs, BYTES):
        at = first + tl.arange(0, BYTES)
        inside = at < num_pairs
        lower, upper = both_halves(
            quants,
            high,
            scales,
            minima,
            super_scales,
            super_minima,
            rows,
            at,
            has_row[:, None] & inside[None, :],
            num_columns,
            KIND,
            ZERO_POINT,
            GROUP_BYTES,
        )
        mask = has_token[:, None] & inside[None, :]
        low_x = tl.load(own + low_columns(at, GROUP_BYTES)[None, :], mask=mask, other=0.0)
        high_x = tl.load(
            own + high_columns(at, num_columns, GROUP_BYTES)[None, :], mask=mask, other=0.0
        )
        if TOKENS == 1:
            total += lower.to(tl.float32) * low_x.to(tl.float32)
            total += upper.to(tl.float32) * high_x.to(tl.float32)
        else:
            total += dot(low_x, tl.trans(lower.to(low_x.dtype)), WIDEN)
            total += dot(high_x, tl.trans(upper.to(high_x.dtype)), WIDEN)
    if TOKENS == 1:
        total = tl.sum(total, axis=1)[None, :]
    return total
