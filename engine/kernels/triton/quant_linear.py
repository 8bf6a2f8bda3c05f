"""Products with quantised weights: numbers are unpacked in registers, never stored as floats.

One program per tile of output features walks along the rows (`unpack`). `dequantize_rows` writes
whole rows as floats, for embeddings and for many tokens, where a dense product is faster.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import WIDEN, tile
from engine.kernels.triton.planes import Planes
from engine.kernels.triton.unpack import (
    both_halves,
    constants,
    high_columns,
    low_columns,
    row_sums,
)

# The most tokens of one call: with more, the unpacking is repeated too often.
MAX_TOKENS: Final = 64
# Bytes of a row in one step; more tokens leave less of a multiprocessor's memory for weights.
_BYTES: Final = 128
_FEW_TOKENS: Final = 16


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
    ZERO_POINT: tl.constexpr,
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
    result = row_sums(
        x + tokens[:, None] * num_columns,
        has_token,
        rows,
        has_row,
        quants,
        high,
        scales,
        minima,
        super_scales,
        super_minima,
        num_columns,
        KIND,
        ZERO_POINT,
        GROUP_BYTES,
        TOKENS,
        ROWS,
        BYTES,
        WIDEN,
    )
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
    ZERO_POINT: tl.constexpr,
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
    lower, upper = both_halves(
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
        ZERO_POINT,
        GROUP_BYTES,
    )
    own = out + target * num_columns
    low = low_columns(at, GROUP_BYTES)[None, :]
    top = high_columns(at, num_columns, GROUP_BYTES)[None, :]
    tl.store(own + low, lower.to(out.dtype.element_ty), mask=mask)
    tl.store(own + top, upper.to(out.dtype.element_ty), mask=mask)


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
        **constants(weight),
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
        **constants(weight),
        HAS_IDS=ids is not None,
        BYTES=bytes_per_program,
        num_warps=4,
    )
    return out
