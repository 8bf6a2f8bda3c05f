"""The pre-norm decoder of llama, qwen2, qwen3 and qwen3_moe, and the base of the hybrid one.

Built by the model classes from `Weights`, run by the engine. The hidden state is a flat run of
tokens (num_tokens, hidden_size); the residual stream is added to in place.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cortexd.log import event
from cortexd.models import ModelSpec
from engine.batch import StepBatch
from engine.cache.kv_cache import KVCache
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.layers.norm import HeadRMSNorm, Norm, RMSNorm
from engine.layers.rope import RotaryEmbedding
from engine.layers.sparse_mlp import SparseMLP
from engine.loading.loader import Weights
from engine.models.attention import Attention, RotaryTables, SelfAttention
from engine.models.experts import build_gated_mlp, build_sparse_mlp
from engine.models.native import native_decoder
from engine.models.native_layers import NativeLayers, native_layers
from engine.specs.tensor_plan import EMBEDDING, FINAL_NORM

if TYPE_CHECKING:
    from engine.models.fused import FusedDecoder

FeedForward = GatedMLP | SparseMLP


class DecoderLayer:
    """Attention and feed-forward, each on its own normed copy of the residual stream."""

    def __init__(
        self, input_norm: Norm, attention: Attention, mlp_norm: Norm, mlp: FeedForward
    ) -> None:
        self.input_norm = input_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def __call__(
        self, hidden: Tensor, batch: StepBatch, cache: KVCache, tables: RotaryTables
    ) -> None:
        """Add this layer's result to `hidden` (num_tokens, hidden_size) in place."""
        hidden.add_(self.attention(self.input_norm(hidden), batch, cache, tables))
        hidden.add_(self.mlp(self.mlp_norm(hidden)))


class Decoder:
    """Embedding, layers, final norm, head. `has_qk_norm` as the subclass says."""

    has_qk_norm = False

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        self.spec = spec
        self.embedding = weights.embedding(EMBEDDING, spec.vocab_size, spec.hidden_size)
        self.rope = RotaryEmbedding(
            spec.rope, spec.head_dim, weights.dtype, weights.device, weights.rope_factors()
        )
        self._cache_index = {layer: index for index, layer in enumerate(spec.attention_layers)}
        self.layers = [self._build_layer(weights, index) for index in range(spec.num_hidden_layers)]
        self.norm = self._build_norm(weights, FINAL_NORM)
        self.head = weights.head(self.embedding)
        self._native = native_decoder(self) if weights.dtype == torch.float32 else None
        self._has_native_linears = weights.has_native_layers
        self.native_layers: NativeLayers | None = None
        if self._native is None and weights.dtype == torch.float32 and self._has_native_linears:
            self.native_layers = native_layers(self)
        self.fused = fused_decoder(self) if weights.backend == "triton" else None

    @property
    def backend_name(self) -> str:
        """What computes.

        "native" (a step is one native call), "native layers" (an operation is one), "native
        linears", "triton", or "reference".
        """
        if self._native is not None:
            return "native"
        if self.fused is not None:
            return "triton"
        if self.native_layers is not None:
            return "native layers"
        return "native linears" if self._has_native_linears else "reference"

    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Return the logits (num_logit_rows, vocab_size); K and V of all tokens go to the cache."""
        if self.fused is not None:
            return self.fused.forward(batch, cache)
        if self.native_layers is not None:
            return self.native_layers.forward(batch, cache)
        hidden = self.embedding(batch.token_ids)
        if self._native is not None:
            states = None if cache.states is None else cache.states.tensors
            return self._native.step(hidden, batch, cache.blocks, states)
        tables = self.rope.tables(batch.positions)
        for layer in self.layers:
            layer(hidden, batch, cache, tables)
        if len(batch.logit_rows) == 0:
            return hidden.new_empty(0, self.spec.vocab_size)
        return self.head(self.norm(hidden.index_select(0, batch.logit_rows)))

    def _build_layer(self, weights: Weights, index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}."
        return DecoderLayer(
            self._build_norm(weights, prefix + "input_layernorm.weight"),
            self._build_attention(weights, prefix + "self_attn.", index),
            self._build_norm(weights, prefix + "post_attention_layernorm.weight"),
            self._build_mlp(weights, prefix + "mlp.", index),
        )

    def _build_norm(self, weights: Weights, name: str) -> Norm:
        return RMSNorm(weights.vector(name, self.spec.hidden_size), self.spec.rms_norm_eps)

    def _build_attention(self, weights: Weights, prefix: str, index: int) -> SelfAttention:
        spec = self.spec
        query_size = spec.num_attention_heads * spec.head_dim
        kv_size = spec.num_key_value_heads * spec.head_dim
        names = [f"{prefix}{part}_proj" for part in "qkv"]
        has_bias = spec.attention_bias or spec.qkv_bias
        qkv = weights.merged_linear(
            [f"{name}.weight" for name in names],
            [query_size, kv_size, kv_size],
            spec.hidden_size,
            [f"{name}.bias" for name in names] if has_bias else None,
        )
        return SelfAttention(
            spec,
            self._cache_index[index],
            qkv=qkv,
            output=self._build_attention_output(weights, prefix),
            qk_norm=self._build_qk_norm(weights, prefix) if self.has_qk_norm else None,
            rope=self.rope,
        )

    def _build_attention_output(self, weights: Weights, prefix: str) -> Linear:
        spec = self.spec
        return weights.linear(
            f"{prefix}o_proj.weight",
            spec.hidden_size,
            spec.num_attention_heads * spec.head_dim,
            f"{prefix}o_proj.bias" if spec.attention_bias else None,
        )

    def _build_qk_norm(self, weights: Weights, prefix: str) -> Norm:
        spec = self.spec
        query = weights.vector(f"{prefix}q_norm.weight", spec.head_dim)
        key = weights.vector(f"{prefix}k_norm.weight", spec.head_dim)
        per_head = [query] * spec.num_attention_heads + [key] * spec.num_key_value_heads
        return HeadRMSNorm(torch.stack(per_head), spec.rms_norm_eps)

    def _build_mlp(self, weights: Weights, prefix: str, index: int) -> FeedForward:
        spec = self.spec
        if spec.is_sparse(index):
            return build_sparse_mlp(weights, spec, prefix)
        return build_gated_mlp(
            weights, prefix, spec.intermediate_size, spec.hidden_size, has_bias=spec.mlp_bias
        )


def fused_decoder(decoder: Decoder) -> FusedDecoder | None:
    """Return the decoder's step on the Triton kernels; None, and one log line, when too wide."""
    from engine.models.fused import FusedDecoder, why_unfused  # imports Triton

    reason = why_unfused(decoder)
    if not reason:
        return FusedDecoder(decoder)
    event(logging.getLogger("cortexd.engine"), "backend.reference", logging.WARNING, reason=reason)
    return None
