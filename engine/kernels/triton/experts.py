"""A mixture of experts without the host: which experts compute what is decided on the device.

A pair is a token and one of its experts. Pairs of one expert are brought together in tiles, each
multiplied with that expert's rows of a matrix that holds all experts' rows on top of each other.
The grid is as large as the most tiles there can be, so that a captured graph holds for any routing;
tiles without pairs end at once. Few pairs hardly ever share an expert: each is a tile of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import MIN_TILE, WIDEN, tile
from engine.kernels.triton.planes import Planes
from engine.kernels.triton.unpack import constants, row_sums

_MAX_TILE: Final = 64
# Registers of the grouping program: pairs at a time times experts.
_MATCHES: Final = 8192
_COLUMNS: Final = 1024


@dataclass(frozen=True, slots=True)
class PairTiles:
    """Tile t has the pairs `order[firsts[t]:ends[t]]`, at most `size`, all of `experts[t]`.

    A pair is token * num_chosen + choice. All int32; a tile whose first is its end has none.
    """

    order: Tensor
    experts: Tensor
    firsts: Tensor
    ends: Tensor
    size: int


@triton.jit
def _group_pairs(
    chosen: tl.tensor,
    order: tl.tensor,
    tile_experts: tl.tensor,
    firsts: tl.tensor,
    ends: tl.tensor,
    num_pairs: int,
    num_tiles: int,
    num_experts: int,
    SIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    experts = tl.arange(0, EXPERTS)
    counts = tl.zeros([EXPERTS], tl.int32)
    for begin in range(0, num_pairs, PAIRS):
        at = begin + tl.arange(0, PAIRS)
        expert = tl.load(chosen + at, mask=at < num_pairs, other=num_experts).to(tl.int32)
        counts += tl.sum((expert[None, :] == experts[:, None]).to(tl.int32), axis=1)
    counts = tl.where(experts < num_experts, counts, 0)
    group_ends = tl.cumsum(counts, axis=0)
    group_firsts = group_ends - counts
    tiles = (counts + SIZE - 1) // SIZE
    tile_ends = tl.cumsum(tiles, axis=0)
    tile_firsts = tile_ends - tiles
    # Pairs keep their order within an expert.
    filled = group_firsts
    for begin in range(0, num_pairs, PAIRS):
        at = begin + tl.arange(0, PAIRS)
        expert = tl.load(chosen + at, mask=at < num_pairs, other=num_experts).to(tl.int32)
        matches = ((expert[None, :] == experts[:, None]) & (at < num_pairs)[None, :]).to(tl.int32)
        places = filled[:, None] + tl.cumsum(matches, axis=1) - 1
        place = tl.sum(places * matches, axis=0)
        tl.store(order + place, at, mask=at < num_pairs)
        filled += tl.sum(matches, axis=1)
    for begin in range(0, num_tiles, PAIRS):
        at = begin + tl.arange(0, PAIRS)
        is_of = (tile_firsts[:, None] <= at[None, :]) & (at[None, :] < tile_ends[:, None])
        is_of = is_of.to(tl.int32)
        first = group_firsts[:, None] + (at[None, :] - tile_firsts[:, None]) * SIZE
        first = tl.sum(is_of * first, axis=0)
        end = tl.minimum(first + SIZE, tl.sum(is_of * group_ends[:, None], axis=0))
        inside = at < num_tiles
        tl.store(tile_experts + at, tl.sum(is_of * experts[:, None], axis=0), mask=inside)
        tl.store(firsts + at, first, mask=inside)
        tl.store(ends + at, end, mask=inside)


@triton.jit
def _multiply_pairs(
    x: tl.tensor,
    order: tl.tensor,
    tile_experts: tl.tensor,
    firsts: tl.tensor,
    ends: tl.tensor,
    quants: tl.tensor,
    high: tl.tensor,
    scales: tl.tensor,
    minima: tl.tensor,
    super_scales: tl.tensor,
    super_minima: tl.tensor,
    out: tl.tensor,
    out_stride: int,
    num_rows: int,
    num_columns: int,
    pairs_per_x: int,
    KIND: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    number = tl.program_id(0)
    first = tl.load(firsts + number)
    end = tl.load(ends + number)
    if first >= end:
        return
    places = first + tl.arange(0, TOKENS)
    has_pair = places < end
    pairs = tl.load(order + places, mask=has_pair, other=0).to(tl.int64)
    own_rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    has_row = own_rows < num_rows
    expert = tl.load(tile_experts + number).to(tl.int64)
    result = row_sums(
        x + (pairs // pairs_per_x)[:, None] * num_columns,
        has_pair,
        expert * num_rows + own_rows,
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
    target = out + pairs[:, None] * out_stride + own_rows[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=has_pair[:, None] & has_row[None, :])


@triton.jit
def _join_pairs(
    parts: tl.tensor,
    factors: tl.tensor,
    out: tl.tensor,
    num_chosen: int,
    size: int,
    TILE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < size
    total = tl.zeros([TILE], tl.float32)
    for choice in range(0, num_chosen):
        pair = token * num_chosen + choice
        part = tl.load(parts + pair * size + columns, mask=inside, other=0.0).to(tl.float32)
        total += part * tl.load(factors + pair).to(tl.float32)
    tl.store(out + token * size + columns, total.to(out.dtype.element_ty), mask=inside)


def group_pairs(chosen: Tensor, num_experts: int) -> PairTiles:
    """Return tiles of the pairs of `chosen` (num_tokens, num_chosen), int64 expert ids."""
    num_pairs = chosen.numel()
    flat = chosen.flatten()
    if 2 * num_pairs <= num_experts:
        order = torch.arange(num_pairs + 1, dtype=torch.int32, device=chosen.device)
        return PairTiles(order, flat.to(torch.int32), order, order[1:], 1)
    size = min(_MAX_TILE, tile(triton.cdiv(num_pairs, num_experts)))
    # Each expert that has pairs fills up one tile at most with less.
    num_partial = min(num_pairs, num_experts)
    num_tiles = (num_pairs + num_partial * (size - 1)) // size
    order, experts, firsts, ends = (
        torch.empty(count, dtype=torch.int32, device=chosen.device)
        for count in (num_pairs, num_tiles, num_tiles, num_tiles)
    )
    width = tile(num_experts)
    _group_pairs[(1,)](
        flat,
        order,
        experts,
        firsts,
        ends,
        num_pairs,
        num_tiles,
        num_experts,
        SIZE=size,
        EXPERTS=width,
        PAIRS=max(MIN_TILE, _MATCHES // width),
        num_warps=8,
    )
    return PairTiles(order, experts, firsts, ends, size)


def multiply_pairs(
    x: Tensor, weight: Planes, tiles: PairTiles, num_experts: int, out: Tensor
) -> None:
    """Multiply each pair with its expert's rows into `out` (num_pairs, rows of an expert).

    x (num_tokens, in) has a row for each token, or (num_pairs, in) one for each pair; weight
    (num_experts * rows, in); `out` may be some columns of a wider one.
    """
    num_rows, num_columns = weight.shape[0] // num_experts, weight.shape[1]
    num_pairs = len(out)
    assert x.is_contiguous(), f"x has strides {x.stride()}"
    assert x.shape[1] == num_columns, f"x is {tuple(x.shape)}, the weight {weight.shape}"
    assert num_columns % 2 == 0, f"{num_columns} columns; a row is read in two halves"
    assert out.shape[1] == num_rows, f"out is {tuple(out.shape)} for {num_rows} rows"
    assert out.stride(1) == 1, f"out has strides {out.stride()}"
    is_single, is_wide = tiles.size == 1, x.element_size() > 2
    rows = 8 if is_single else 32 if is_wide else 64
    _multiply_pairs[(len(tiles.experts), triton.cdiv(num_rows, rows))](
        x,
        tiles.order,
        tiles.experts,
        tiles.firsts,
        tiles.ends,
        *weight.tensors,
        out,
        out.stride(0),
        num_rows,
        num_columns,
        num_pairs // len(x),
        **constants(weight),
        TOKENS=tiles.size,
        ROWS=rows,
        BYTES=128 if is_single else 32 if is_wide else 64,
        WIDEN=WIDEN,
        num_warps=4,
        num_stages=2,
    )


def join_pairs(parts: Tensor, factors: Tensor) -> Tensor:
    """Return (num_tokens, size): the sum of parts (num_pairs, size), each times its factor.

    factors (num_tokens, num_chosen). Sums are float32, in the order of the choices.
    """
    num_tokens, num_chosen = factors.shape
    size = parts.shape[1]
    assert parts.is_contiguous(), f"parts have strides {parts.stride()}"
    assert factors.is_contiguous(), f"factors have strides {factors.stride()}"
    out = parts.new_empty(num_tokens, size)
    columns = min(_COLUMNS, int(triton.next_power_of_2(size)))
    _join_pairs[(num_tokens, triton.cdiv(size, columns))](
        parts, factors, out, num_chosen, size, TILE=columns, num_warps=4
    )
    return out
