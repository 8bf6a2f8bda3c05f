"""Attention of single query tokens over the paged cache, each sequence cut into splits.

One program per row, KV head and split: the query heads that share a KV head are the rows of one
tile, so K and V are read once. How much a split covers is computed from the row's length on the
device, so a captured graph holds for any length. A second kernel joins the splits.

Source: "Flash-Decoding for long-context inference" (2023), the split.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import WIDEN, dot, tile
from engine.kernels.triton.paged import add_scored, check_layout, load_keys_values

_BLOCK_TOKENS: Final = 64
_MAX_SPLITS: Final = 32
# Enough programs for two rounds on every multiprocessor.
_ROUNDS: Final = 2


@triton.jit
def _attend_split(
    query: tl.tensor,
    cache: tl.tensor,
    block_tables: tl.tensor,
    kv_lens: tl.tensor,
    partial: tl.tensor,
    partial_max: tl.tensor,
    partial_sum: tl.tensor,
    scale: float,
    query_stride: int,
    table_stride: int,
    block_size: int,
    num_kv_heads: int,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    kv_len = tl.load(kv_lens + row).to(tl.int32)
    per_split = tl.cdiv(tl.cdiv(kv_len, num_splits), TOKENS) * TOKENS
    begin = split * per_split
    end = tl.minimum(begin + per_split, kv_len)

    members = tl.arange(0, GROUP_TILE)
    dims = tl.arange(0, DIM_TILE)
    has_dim = dims < HEAD_DIM
    is_member = members < GROUP
    heads = kv_head * GROUP + members
    q = tl.load(
        query + row * query_stride + heads[:, None] * HEAD_DIM + dims[None, :],
        mask=is_member[:, None] & has_dim[None, :],
        other=0.0,
    )
    best = tl.full([GROUP_TILE], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_TILE], tl.float32)
    acc = tl.zeros([GROUP_TILE, DIM_TILE], tl.float32)
    table = block_tables + row * table_stride
    for first in range(begin, end, TOKENS):
        positions = first + tl.arange(0, TOKENS)
        inside = positions < end
        k, v = load_keys_values(
            cache, table, positions, inside, kv_head, dims, block_size, num_kv_heads, HEAD_DIM
        )
        scores = dot(q, tl.trans(k), WIDEN) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        best, total, acc = add_scored(best, total, acc, scores, v, WIDEN)
    num_heads = num_kv_heads * GROUP
    at = (row * num_heads + heads) * num_splits + split
    # A split without tokens leaves a sum of 0 and a maximum of -inf: the join skips it.
    tl.store(partial_max + at, best, mask=is_member)
    tl.store(partial_sum + at, total, mask=is_member)
    tl.store(
        partial + at[:, None] * HEAD_DIM + dims[None, :],
        acc,
        mask=is_member[:, None] & has_dim[None, :],
    )


@triton.jit
def _join_splits(
    partial: tl.tensor,
    partial_max: tl.tensor,
    partial_sum: tl.tensor,
    out: tl.tensor,
    num_splits: int,
    HEAD_DIM: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
) -> None:
    row_head = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLIT_TILE)
    dims = tl.arange(0, DIM_TILE)
    at = row_head * num_splits + splits
    exists = splits < num_splits
    maxima = tl.load(partial_max + at, mask=exists, other=float("-inf"))
    sums = tl.load(partial_sum + at, mask=exists, other=0.0)
    factors = tl.exp(maxima - tl.max(maxima, axis=0))
    parts = tl.load(
        partial + at[:, None] * HEAD_DIM + dims[None, :],
        mask=exists[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    joined = tl.sum(parts * factors[:, None], axis=0) / tl.sum(sums * factors, axis=0)
    target = out + row_head * HEAD_DIM + dims
    tl.store(target, joined.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # the interpreter: a few splits, so that tests join some
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def choose_splits(num_rows: int, num_kv_heads: int, max_kv_len: int, device: torch.device) -> int:
    """Return into how many parts to cut sequences of at most `max_kv_len` tokens."""
    wanted = triton.cdiv(_ROUNDS * _num_multiprocessors(device), num_rows * num_kv_heads)
    return max(1, min(_MAX_SPLITS, wanted, triton.cdiv(max_kv_len, _BLOCK_TOKENS)))


def attend_decode(
    query: Tensor,
    cache_layer: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    *,
    scale: float,
    num_splits: int,
) -> Tensor:
    """Attend one query token per row to the row's first kv_len tokens.

    query (num_rows, num_heads, head_dim), rotated; cache_layer (num_blocks, block_size,
    2 * num_kv_heads, head_dim); block_tables (num_rows, max_blocks) and kv_lens (num_rows,) of any
    integer dtype. Returns (num_rows, num_heads * head_dim).
    """
    num_rows, num_heads, head_dim = query.shape
    _, block_size, kv_heads, _ = cache_layer.shape
    num_kv_heads = kv_heads // 2
    group = num_heads // num_kv_heads
    check_layout(query, cache_layer, block_tables)
    partial = query.new_empty(num_rows * num_heads * num_splits, head_dim, dtype=torch.float32)
    partial_max = partial.new_empty(partial.shape[0])
    partial_sum = torch.empty_like(partial_max)
    dim_tile = tile(head_dim)
    _attend_split[(num_rows, num_kv_heads, num_splits)](
        query,
        cache_layer,
        block_tables,
        kv_lens,
        partial,
        partial_max,
        partial_sum,
        scale,
        query.stride(0),
        block_tables.stride(0),
        block_size,
        num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        GROUP_TILE=tile(group),
        DIM_TILE=dim_tile,
        TOKENS=_BLOCK_TOKENS if dim_tile <= 128 else _BLOCK_TOKENS // 2,
        WIDEN=WIDEN,
        num_warps=4,
        num_stages=2,
    )
    out = torch.empty(num_rows, num_heads * head_dim, dtype=query.dtype, device=query.device)
    _join_splits[(num_rows * num_heads,)](
        partial,
        partial_max,
        partial_sum,
        out,
        num_splits,
        HEAD_DIM=head_dim,
        SPLIT_TILE=triton.next_power_of_2(num_splits),
        DIM_TILE=dim_tile,
        num_warps=2,
    )
    return out
