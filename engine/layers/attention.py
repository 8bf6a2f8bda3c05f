"""Causal self-attention over the paged KV cache: the plain torch backend.

Each sequence is computed by itself from its own K and V, so its result has the same bits alone and
among others. Softmax runs in float32 inside torch's kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from engine.batch import BatchRow, StepBatch
from engine.cache.kv_cache import KVCache


def paged_attention(
    query: Tensor, cache: KVCache, layer: int, batch: StepBatch, scale: float
) -> Tensor:
    """Attend each row to its sequence's first kv_len tokens, causally.

    query (num_tokens, num_heads, head_dim), rotated; K and V of these tokens are in the cache
    already. Returns (num_tokens, num_heads * head_dim).
    """
    rows = batch.rows
    if len(rows) == 1:
        return _attend(query, cache, layer, rows[0], scale)
    return torch.cat(
        [_attend(query[row.start : row.end], cache, layer, row, scale) for row in rows]
    )


def _attend(query: Tensor, cache: KVCache, layer: int, row: BatchRow, scale: float) -> Tensor:
    num_tokens, num_heads, head_dim = query.shape
    if row.block_ids is None:
        key_value = cache.slots(layer)[row.first_slot : row.first_slot + row.kv_len]
    else:
        gathered = cache.layer(layer).index_select(0, row.block_ids)
        key_value = gathered.flatten(0, 1)[: row.kv_len]
    num_kv_heads = key_value.shape[1] // 2
    group = num_heads // num_kv_heads
    # (kv_len, 2 * num_kv_heads, head_dim) -> (2 * num_kv_heads, 1, kv_len, head_dim)
    key_value = key_value.transpose(0, 1).unsqueeze(1)
    key, value = key_value[:num_kv_heads], key_value[num_kv_heads:]
    if num_tokens == 1:
        # The heads that share one KV head stand as its query rows: K and V are read once.
        grouped = query.view(num_kv_heads, 1, group, head_dim)
        out = functional.scaled_dot_product_attention(grouped, key, value, scale=scale)
        return out.view(1, num_heads * head_dim)
    shape = (num_kv_heads, group, row.kv_len, head_dim)
    mask = row.mask()
    grouped = query.view(num_tokens, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    out = functional.scaled_dot_product_attention(
        grouped,
        key.expand(shape),
        value.expand(shape),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads * head_dim)
