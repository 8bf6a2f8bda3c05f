"""Softmax attention between its projections on the Triton kernels.

Built by `FusedDecoder` from the torch layer, whose weights it uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.batch import StepBatch
from engine.cache.kv_cache import KVCache
from engine.kernels.triton.activation import sigmoid_mul_
from engine.kernels.triton.attention_decode import attend_decode, choose_splits
from engine.kernels.triton.attention_prefill import attend_prefill
from engine.kernels.triton.rope import norm_rotate_write
from engine.models.attention import RotaryTables, SelfAttention


class FusedAttention:
    """The same as the torch layer it is made from, gated or not."""

    def __init__(self, layer: SelfAttention) -> None:
        self._layer = layer
        norm = layer.qk_norm
        self._head_norm = None if norm is None else norm.weight
        self._eps = 0.0 if norm is None else norm.eps

    def __call__(
        self, normed: Tensor, batch: StepBatch, cache: KVCache, tables: RotaryTables
    ) -> Tensor:
        """Return (num_tokens, hidden_size)."""
        layer = self._layer
        projected = layer.qkv(normed)
        heads = projected[:, : layer.heads_width].unflatten(-1, layer.heads_shape)
        query = norm_rotate_write(
            heads, cache.slots(layer.layer), batch.slots, tables, self._head_norm, self._eps
        )
        attended = self._attend(query, batch, cache)
        gates = projected[:, layer.heads_width :]
        return layer.output(sigmoid_mul_(attended, gates) if gates.shape[1] else attended)

    def _attend(self, query: Tensor, batch: StepBatch, cache: KVCache) -> Tensor:
        """Attend rows of one token and runs, each by its kernel; (num_tokens, num_heads * dim)."""
        layer = self._layer
        blocks = cache.layer(layer.layer)
        singles, runs = batch.single_rows, batch.run_rows
        parts = []
        if singles is not None:
            count = batch.num_single_rows
            splits = choose_splits(count, blocks.shape[2] // 2, singles.max_kv_len, query.device)
            part = attend_decode(
                query[:count],
                blocks,
                singles.block_tables,
                singles.kv_lens,
                scale=layer.scale,
                num_splits=splits,
            )
            parts.append(part)
        if runs is not None:
            queries = query[batch.num_single_rows :]
            part = attend_prefill(
                queries,
                blocks,
                runs.block_tables,
                runs.kv_lens,
                runs.query_starts,
                max(runs.query_lens),
                scale=layer.scale,
            )
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)
