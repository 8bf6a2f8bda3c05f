"""Causal attention of runs of query tokens over the paged cache.

One program per row, query head and tile of query tokens. The queries are the last ones of their
sequence: the first of n sees kv_len - n + 1 tokens, so a chunk behind a cached prefix and a whole
prompt are the same case.

Source: FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import WIDEN, dot, tile
from engine.kernels.triton.paged import add_scored, check_layout, load_keys_values

_QUERY_TILE: Final = 64
_KEY_TILE: Final = 64


@triton.jit
def _attend_tile(
    query: tl.tensor,
    cache: tl.tensor,
    block_tables: tl.tensor,
    kv_lens: tl.tensor,
    query_starts: tl.tensor,
    out: tl.tensor,
    scale: float,
    query_stride: int,
    table_stride: int,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    # The last tiles see the most keys: they start first.
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    start = tl.load(query_starts + row)
    num_queries = (tl.load(query_starts + row + 1) - start).to(tl.int32)
    if first_query >= num_queries:
        return
    kv_len = tl.load(kv_lens + row).to(tl.int32)
    kv_head = head // (num_heads // num_kv_heads)
    dims = tl.arange(0, DIM_TILE)
    has_dim = dims < HEAD_DIM
    members = first_query + tl.arange(0, QUERIES)
    is_member = members < num_queries
    mask_q = is_member[:, None] & has_dim[None, :]
    tokens = (start + members).to(tl.int64)
    q = tl.load(
        query + tokens[:, None] * query_stride + head * HEAD_DIM + dims[None, :],
        mask=mask_q,
        other=0.0,
    )
    last_seen = kv_len - num_queries + members
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, DIM_TILE], tl.float32)
    table = block_tables + row * table_stride
    end = tl.minimum(kv_len - num_queries + first_query + QUERIES, kv_len)
    for first in range(0, end, TOKENS):
        positions = first + tl.arange(0, TOKENS)
        inside = positions < end
        k, v = load_keys_values(
            cache, table, positions, inside, kv_head, dims, block_size, num_kv_heads, HEAD_DIM
        )
        scores = dot(q, tl.trans(k), WIDEN) * scale
        is_seen = (positions[None, :] <= last_seen[:, None]) & inside[None, :]
        scores = tl.where(is_seen, scores, float("-inf"))
        best, total, acc = add_scored(best, total, acc, scores, v, WIDEN)
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    target = out + (tokens[:, None] * num_heads + head) * HEAD_DIM + dims[None, :]
    tl.store(target, result, mask=mask_q)


def attend_prefill(
    query: Tensor,
    cache_layer: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    query_starts: Tensor,
    max_query_len: int,
    *,
    scale: float,
) -> Tensor:
    """Attend each row's query tokens causally; return (num_tokens, num_heads * head_dim).

    query (num_tokens, num_heads, head_dim), rotated; cache_layer (num_blocks, block_size,
    2 * num_kv_heads, head_dim); row i has the query tokens query_starts[i]..query_starts[i + 1]-1;
    block_tables (num_rows, max_blocks), kv_lens (num_rows,), query_starts (num_rows + 1,) of any
    integer dtype. Every token belongs to a row.
    """
    num_tokens, num_heads, head_dim = query.shape
    _, block_size, kv_heads, _ = cache_layer.shape
    check_layout(query, cache_layer, block_tables)
    out = torch.empty(num_tokens, num_heads * head_dim, dtype=query.dtype, device=query.device)
    num_rows, dim_tile = kv_lens.shape[0], tile(head_dim)
    # Twice the bytes of a head: half the tile, so that it fits into Ada's 99 KiB.
    shrink = (2 if dim_tile > 128 else 1) * (2 if query.dtype == torch.float32 else 1)
    queries = min(_QUERY_TILE // (2 if shrink > 2 else 1), tile(max_query_len))
    _attend_tile[(triton.cdiv(max_query_len, queries), num_heads, num_rows)](
        query,
        cache_layer,
        block_tables,
        kv_lens,
        query_starts,
        out,
        scale,
        query.stride(0),
        block_tables.stride(0),
        block_size,
        num_heads,
        kv_heads // 2,
        HEAD_DIM=head_dim,
        DIM_TILE=dim_tile,
        QUERIES=queries,
        TOKENS=_KEY_TILE // shrink,
        WIDEN=WIDEN,
        num_warps=8 if dim_tile > 128 else 4,
        num_stages=2,
    )
    return out
