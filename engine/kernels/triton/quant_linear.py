"""Products with quantised weights: numbers are unpacked in registers, never stored as floats.

One program per tile of output features walks along the rows. A byte's two nibbles are two columns
far apart, so each step takes two halves of the input: the columns of the low nibbles and those of
the high ones. A single token is multiplied and summed; more tokens go through the tensor cores.
`dequantize_rows` writes whole rows as floats, for embeddings and for many tokens, where a dense
product is faster.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.formats.ggml import GGMLType
from engine.kernels.triton.launch import WIDEN, dot, tile
from engine.kernels.triton.planes import Planes

# The most tokens of one call: with more, the unpacking is repeated too often.
MAX_TOKENS: Final = 64
# Bytes of a row in one step; more tokens leave less of a multiprocessor's memory for weights.
_BYTES: Final = 128
_FEW_TOKENS: Final = 16
_KINDS: Final = {GGMLType.Q8_0: 0, GGMLType.Q4_0: 1, GGMLType.Q4_K: 2, GGMLType.Q6_K: 3}
# The low nibbles of so many bytes are consecutive columns, the high ones those that follow.
_GROUP_BYTES: Final = {GGMLType.Q8_0: 0, GGMLType.Q4_0: 16, GGMLType.Q4_K: 32, GGMLType.Q6_K: 64}


@triton.jit
def _low_columns(at: tl.tensor, GROUP_BYTES: tl.constexpr) -> tl.tensor:
    """Return the column of the low half of each byte pair position."""
    if GROUP_BYTES == 0:
        columns = at
    else:
        columns = at // GROUP_BYTES * (2 * GROUP_BYTES) + at % GROUP_BYTES
    return columns


@triton.jit
def _high_columns(at: tl.tensor, num_columns: int, GROUP_BYTES: tl.constexpr) -> tl.tensor:
    """Return the column of the high half; int8 rows are simply cut in the middle."""
    if GROUP_BYTES == 0:
        columns = at + num_columns // 2
    else:
        columns = _low_columns(at, GROUP_BYTES) + GROUP_BYTES
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
) -> tl.tensor:
    """Turn integers (rows, columns) into float32 weights."""
    if KIND < 2:
        group = rows[:, None] * (num_columns // 32) + columns[None, :] // 32
        scale = tl.load(scales + group, mask=mask, other=0.0).to(tl.float32)
        values = quants.to(tl.float32) * scale
    else:
        block = rows[:, None] * (num_columns // 256) + columns[None, :] // 256
        scale = tl.load(super_scales + block, mask=mask, other=0.0).to(tl.float32)
        size: tl.constexpr = 32 if KIND == 2 else 16
        group = rows[:, None] * (num_columns // size) + columns[None, :] // size
        scale *= tl.load(scales + group, mask=mask, other=0).to(tl.float32)
        values = scale * quants.to(tl.float32)
        if KIND == 2:
            least = tl.load(super_minima + block, mask=mask, other=0.0).to(tl.float32)
            values -= least * tl.load(minima + group, mask=mask, other=0).to(tl.float32)
    return values


@triton.jit
def _both_halves(
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
    GROUP_BYTES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the float32 weights (rows, positions) of the low and of the high columns."""
    low_columns = _low_columns(at, GROUP_BYTES)
    high_columns = _high_columns(at, num_columns, GROUP_BYTES)
    if KIND == 0:
        row = quants + rows[:, None] * num_columns
        low = tl.load(row + low_columns[None, :], mask=mask, other=0).to(tl.int32)
        top = tl.load(row + high_columns[None, :], mask=mask, other=0).to(tl.int32)
    else:
        pairs = tl.load(
            quants + rows[:, None] * (num_columns // 2) + at[None, :], mask=mask, other=0
        ).to(tl.int32)
        low = pairs & 15
        top = pairs >> 4
        if KIND == 1:
            low -= 8
            top -= 8
        if KIND == 3:
            # Four columns, 32 apart, share a byte of two-bit fields.
            packed = tl.load(
                high + rows[:, None] * (num_columns // 4) + (at // 64 * 32 + at % 32)[None, :],
                mask=mask,
                other=0,
            ).to(tl.int32)
            shift = (at % 64 // 32 * 2)[None, :]
            low = (low | ((packed >> shift) & 3) << 4) - 32
            top = (top | ((packed >> (shift + 4)) & 3) << 4) - 32
    lower = _values(
        low,
        low_columns,
        rows,
        mask,
        scales,
        minima,
        super_scales,
        super_minima,
        num_columns,
        KIND,
    )
    upper = _values(
        top,
        high_columns,
        rows,
        mask,
        scales,
        minima,
        super_scales,
        super_minima,
        num_columns,
        KIND,
    )
    return lower, upper


@triton.jit
def _multiply(
    x: tl.tensor,
    quants: tl.tensor,
    high: tl.tensor,
    scales: tl.tensor,
    minima: tl.tensor,
    super_scales: tl.tensor,
    super_minima: tl.tensor,
    out: tl.tensor,
    num_tokens: int,
    num_rows: int,
    num_columns: int,
    KIND: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    has_row = rows < num_rows
    tokens = tl.arange(0, TOKENS)
    has_token = tokens < num_tokens
    num_pairs = num_columns // 2
    if TOKENS == 1:
        total = tl.zeros([ROWS, BYTES], tl.float32)
    else:
        total = tl.zeros([TOKENS, ROWS], tl.float32)
    for first in range(0, num_pairs, BYTES):
        at = first + tl.arange(0, BYTES)
        inside = at < num_pairs
        lower, upper = _both_halves(
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
            GROUP_BYTES,
        )
        own = x + tokens[:, None] * num_columns
        mask = has_token[:, None] & inside[None, :]
        low_x = tl.load(own + _low_columns(at, GROUP_BYTES)[None, :], mask=mask, other=0.0)
        high_x = tl.load(
            own + _high_columns(at, num_columns, GROUP_BYTES)[None, :], mask=mask, other=0.0
        )
        if TOKENS == 1:
            total += lower * low_x.to(tl.float32) + upper * high_x.to(tl.float32)
        else:
            total += dot(low_x, tl.trans(lower.to(low_x.dtype)), WIDEN)
            total += dot(high_x, tl.trans(upper.to(high_x.dtype)), WIDEN)
    if TOKENS == 1:
        result = tl.sum(total, axis=1)[None, :]
    else:
        result = total
    target = out + tokens[:, None] * num_rows + rows[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=has_token[:, None] & has_row[None, :])


@triton.jit
def _dequantize(
    ids: tl.tensor,
    quants: tl.tensor,
    high: tl.tensor,
    scales: tl.tensor,
    minima: tl.tensor,
    super_scales: tl.tensor,
    super_minima: tl.tensor,
    out: tl.tensor,
    first_row: int,
    num_columns: int,
    KIND: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    target = tl.program_id(0).to(tl.int64)
    if HAS_IDS:
        row = tl.load(ids + target).to(tl.int64)
    else:
        row = target + first_row
    rows = row + tl.zeros([1], tl.int64)
    at = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    mask = (at < num_columns // 2)[None, :]
    lower, upper = _both_halves(
        quants,
        high,
        scales,
        minima,
        super_scales,
        super_minima,
        rows,
        at,
        mask,
        num_columns,
        KIND,
        GROUP_BYTES,
    )
    own = out + target * num_columns
    low_columns = _low_columns(at, GROUP_BYTES)[None, :]
    high_columns = _high_columns(at, num_columns, GROUP_BYTES)[None, :]
    tl.store(own + low_columns, lower.to(out.dtype.element_ty), mask=mask)
    tl.store(own + high_columns, upper.to(out.dtype.element_ty), mask=mask)


def _constants(weight: Planes) -> dict[str, int]:
    """Return the kernels' arguments by which they are compiled for a type."""
    kind = weight.ggml_type
    return {"KIND": _KINDS[kind], "GROUP_BYTES": _GROUP_BYTES[kind]}


def multiply(x: Tensor, weight: Planes) -> Tensor:
    """Return x @ weight.T: (num_tokens, in) to (num_tokens, out), 1 to MAX_TOKENS tokens."""
    num_tokens = x.shape[0]
    num_rows, num_columns = weight.shape
    assert x.is_contiguous(), f"x has strides {x.stride()}"
    assert 1 <= num_tokens <= MAX_TOKENS, f"{num_tokens} tokens; at most {MAX_TOKENS}"
    assert x.shape[1] == num_columns, f"x is {tuple(x.shape)}, the weight {weight.shape}"
    out = x.new_empty(num_tokens, num_rows)
    # One token: few rows a program, so that all multiprocessors read.
    rows = 8 if num_tokens == 1 else 32
    _multiply[(triton.cdiv(num_rows, rows),)](
        x,
        *weight.tensors,
        out,
        num_tokens,
        num_rows,
        num_columns,
        **_constants(weight),
        TOKENS=1 if num_tokens == 1 else tile(num_tokens),
        ROWS=rows,
        BYTES=_BYTES if num_tokens <= _FEW_TOKENS else _BYTES // 2,
        WIDEN=WIDEN,
        num_warps=4,
        num_stages=2,
    )
    return out


def dequantize_rows(weight: Planes, dtype: torch.dtype, rows: Tensor | tuple[int, int]) -> Tensor:
    """Return (num_selected, num_columns) in `dtype`; `rows` are ids, or begin and end."""
    ids = rows if isinstance(rows, Tensor) else None
    begin, end = (0, len(rows)) if isinstance(rows, Tensor) else rows
    num_columns = weight.shape[1]
    out = torch.empty(end - begin, num_columns, dtype=dtype, device=weight.device)
    bytes_per_program = min(1024, int(triton.next_power_of_2(num_columns // 2)))
    _dequantize[(end - begin, triton.cdiv(num_columns // 2, bytes_per_program))](
        weight.quants if ids is None else ids,
        *weight.tensors,
        out,
        begin,
        num_columns,
        **_constants(weight),
        HAS_IDS=ids is not None,
        BYTES=bytes_per_program,
        num_warps=4,
    )
    return out
