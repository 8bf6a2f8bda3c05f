"""What the attention kernels share: K and V tiles of the paged cache, and the online softmax.

Sums are float32. Slots beyond a row's length are never read: they may hold a NaN. No state.

Source: FlashAttention (arXiv 2205.14135), the online softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import dot


@triton.jit
def load_keys_values(
    cache: tl.tensor,
    table: tl.tensor,
    positions: tl.tensor,
    inside: tl.tensor,
    kv_head: int,
    dims: tl.tensor,
    block_size: int,
    num_kv_heads: int,
    HEAD_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the K and V rows (positions, dims) of one head, 0 where not `inside`.

    `table` points to the row's block ids.
    """
    blocks = tl.load(table + positions // block_size, mask=inside, other=0).to(tl.int64)
    slots = blocks * block_size + positions % block_size
    slot_stride = 2 * num_kv_heads * HEAD_DIM
    keys = cache + slots[:, None] * slot_stride + kv_head * HEAD_DIM + dims[None, :]
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    k = tl.load(keys, mask=mask, other=0.0)
    v = tl.load(keys + num_kv_heads * HEAD_DIM, mask=mask, other=0.0)
    return k, v


@triton.jit
def add_scored(
    best: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    scores: tl.tensor,
    v: tl.tensor,
    WIDEN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take a tile of scores (queries, positions) and its values into an online softmax.

    Returns the largest score, the sum of weights and the weighted values, all still to be scaled.
    """
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    weights = tl.exp(scores - new_best[:, None])
    shrink = tl.exp(best - new_best)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None] + dot(weights.to(v.dtype), v, WIDEN)
    return new_best, total, acc


def check_layout(query: Tensor, cache_layer: Tensor, block_tables: Tensor) -> None:
    """Check the strides that the kernels count on."""
    assert query.stride()[1:] == (query.shape[2], 1), f"query has strides {query.stride()}"
    assert cache_layer.is_contiguous(), f"the cache has strides {cache_layer.stride()}"
    assert block_tables.stride(1) == 1, f"the block tables have strides {block_tables.stride()}"
