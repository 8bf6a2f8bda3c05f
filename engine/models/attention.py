"""Softmax attention of a decoder layer, from the projections to the output.

Built by the decoders, run by their layers; K and V go to the paged cache.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from cortexd.models import ModelSpec
from engine.batch import StepBatch
from engine.cache.kv_cache import KVCache
from engine.layers.attention import paged_attention
from engine.layers.linear import Linear
from engine.layers.norm import Norm
from engine.layers.rope import RotaryEmbedding

RotaryTables = tuple[Tensor, Tensor]


class Attention(Protocol):
    """What mixes the tokens of a sequence: (num_tokens, hidden_size) to the same shape."""

    def __call__(
        self, hidden: Tensor, batch: StepBatch, cache: KVCache, tables: RotaryTables
    ) -> Tensor: ...


class SelfAttention:
    """Projections, optional head norms, rotation, cache write, attention."""

    is_gated = False  # whether `qkv` yields output gates behind the heads

    def __init__(
        self,
        spec: ModelSpec,
        cache_layer: int,
        *,
        qkv: Linear,
        output: Linear,
        qk_norm: Norm | None,
        rope: RotaryEmbedding,
    ) -> None:
        self.qkv = qkv
        self.output = output
        self.qk_norm = qk_norm
        self.rope = rope
        self.layer = cache_layer
        self.scale = spec.head_dim**-0.5
        self._num_heads = spec.num_attention_heads
        self._num_rotated = spec.num_attention_heads + spec.num_key_value_heads
        # Q heads, K heads, V heads: what the first `heads_width` outputs of `qkv` are.
        self.heads_shape = (self._num_rotated + spec.num_key_value_heads, spec.head_dim)
        self.heads_width = self.heads_shape[0] * spec.head_dim

    def __call__(
        self, hidden: Tensor, batch: StepBatch, cache: KVCache, tables: RotaryTables
    ) -> Tensor:
        """Return (num_tokens, hidden_size)."""
        heads = self.qkv(hidden).unflatten(-1, self.heads_shape)
        return self.output(self._attend(heads, batch, cache, tables))

    def _attend(
        self, heads: Tensor, batch: StepBatch, cache: KVCache, tables: RotaryTables
    ) -> Tensor:
        """Norm, rotate, keep and attend; return (num_tokens, num_heads * head_dim)."""
        rotated = heads[:, : self._num_rotated]
        if self.qk_norm is not None:
            rotated.copy_(self.qk_norm(rotated))
        self.rope.rotate_(rotated, tables)
        cache.slots(self.layer).index_copy_(0, batch.slots, heads[:, self._num_heads :])
        query = heads[:, : self._num_heads]
        return paged_attention(query, cache, self.layer, batch, self.scale)
