"""The hybrid decoder that qwen3_5 and qwen3_next share: Gated DeltaNet and gated full attention.

Most layers keep a recurrent state, every few a KV cache. Norm weights are stored as w for a factor
of 1 + w in safetensors, and as that factor in GGUF; so is the decay rate -exp(A_log).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from cortexd.models import LinearAttentionSpec, ModelSpec
from engine.batch import StepBatch
from engine.cache.kv_cache import KVCache
from engine.layers.gated_delta_net import GatedDeltaNet
from engine.layers.linear import Linear
from engine.layers.norm import GatedRMSNorm, ZeroCentredRMSNorm
from engine.loading.loader import Weights
from engine.loading.stored_tensors import RowSelection
from engine.models.attention import RotaryTables, SelfAttention
from engine.models.decoder import Decoder, DecoderLayer
from engine.specs.layer_shapes import input_projections


class GatedSelfAttention(SelfAttention):
    """Attention whose output is multiplied by a sigmoid gate per query element.

    `qkv` yields Q heads, K heads, V heads, then the gates.
    """

    is_gated = True

    def __call__(
        self, hidden: Tensor, batch: StepBatch, cache: KVCache, tables: RotaryTables
    ) -> Tensor:
        """Return (num_tokens, hidden_size)."""
        projected = self.qkv(hidden)
        gates = projected[:, self.heads_width :]
        heads = projected[:, : self.heads_width].unflatten(-1, self.heads_shape)
        attended = self._attend(heads, batch, cache, tables)
        return self.output(attended * gates.sigmoid())


class HybridDecoder(Decoder):
    """Layers of both kinds. Experts instead of a plain feed-forward where the spec has them."""

    has_qk_norm = True

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        """Build all layers from `weights`."""
        self._linear_index = {layer: index for index, layer in enumerate(spec.linear_layers)}
        super().__init__(spec, weights)

    def _build_layer(self, weights: Weights, index: int) -> DecoderLayer:
        if index not in self._linear_index:
            return super()._build_layer(weights, index)
        prefix = f"model.layers.{index}."
        return DecoderLayer(
            self._build_norm(weights, prefix + "input_layernorm.weight"),
            self._build_delta_net(weights, prefix + "linear_attn.", self._linear_index[index]),
            self._build_norm(weights, prefix + "post_attention_layernorm.weight"),
            self._build_mlp(weights, prefix + "mlp.", index),
        )

    def _build_norm(self, weights: Weights, name: str) -> ZeroCentredRMSNorm:
        factor = self._norm_factor(weights, name, self.spec.hidden_size)
        return ZeroCentredRMSNorm(factor, self.spec.rms_norm_eps)

    def _build_qk_norm(self, weights: Weights, prefix: str) -> ZeroCentredRMSNorm:
        spec = self.spec
        query = self._norm_factor(weights, f"{prefix}q_norm.weight", spec.head_dim)
        key = self._norm_factor(weights, f"{prefix}k_norm.weight", spec.head_dim)
        per_head = [query] * spec.num_attention_heads + [key] * spec.num_key_value_heads
        return ZeroCentredRMSNorm(torch.stack(per_head), spec.rms_norm_eps)

    def _norm_factor(self, weights: Weights, name: str, size: int) -> Tensor:
        stored = weights.vector(name, size, torch.float32)
        return stored if self.spec.has_folded_weights else 1.0 + stored

    def _build_attention(self, weights: Weights, prefix: str, index: int) -> SelfAttention:
        spec, size = self.spec, self.spec.head_dim
        query_rows = spec.num_attention_heads * size
        kv_rows = spec.num_key_value_heads * size
        # q_proj has for each head its query rows and then its gate rows.
        rows = torch.arange(2 * query_rows).view(-1, 2, size)
        queries, gates = rows[:, 0].flatten(), rows[:, 1].flatten()
        names = [f"{prefix}{part}_proj" for part in ("q", "k", "v", "q")]
        has_bias = spec.attention_bias or spec.qkv_bias
        qkv = weights.merged_linear(
            [f"{name}.weight" for name in names],
            [query_rows, kv_rows, kv_rows, query_rows],
            spec.hidden_size,
            [f"{name}.bias" for name in names] if has_bias else None,
            selections=[queries, None, None, gates],
        )
        return GatedSelfAttention(
            spec,
            self._cache_index[index],
            qkv=qkv,
            output=self._build_attention_output(weights, prefix),
            qk_norm=self._build_qk_norm(weights, prefix),
            rope=self.rope,
        )

    def _build_delta_net(self, weights: Weights, prefix: str, index: int) -> GatedDeltaNet:
        spec = self.spec
        linear = spec.linear_attention
        assert linear is not None, f"{spec.model_type} has no linear attention"
        heads, kernel = linear.num_value_heads, linear.conv_kernel
        rate = weights.vector(f"{prefix}A_log", heads, torch.float32)
        conv = weights.tensor(f"{prefix}conv1d.weight", (linear.conv_size, kernel), torch.float32)
        norm = weights.vector(f"{prefix}norm.weight", linear.value_head_dim)
        return GatedDeltaNet(
            linear,
            index,
            projections=_build_projections(weights, prefix, linear, spec.hidden_size),
            conv_weight=conv.T.contiguous(),
            decay_rate=rate if spec.has_folded_weights else -rate.exp(),
            dt_bias=weights.vector(f"{prefix}dt_bias", heads, torch.float32),
            norm=GatedRMSNorm(norm, spec.rms_norm_eps),
            output=weights.linear(f"{prefix}out_proj.weight", spec.hidden_size, linear.value_size),
        )


def _build_projections(
    weights: Weights, prefix: str, linear: LinearAttentionSpec, hidden: int
) -> Linear:
    """Return the layer that yields q, k, v, z, b, a, from tensors fused or not."""
    stored = {name: f"{prefix}{name}.weight" for name, _ in input_projections(linear)}
    heads, key, value = linear.num_value_heads, linear.key_size, linear.value_size
    names: list[str] = []
    sizes: list[int] = []
    selections: list[RowSelection] = []

    def take(name: str, size: int, selection: RowSelection = None) -> None:
        names.append(stored[name])
        sizes.append(size)
        selections.append(selection)

    if "in_proj_qkvz" in stored:
        group = value // linear.num_key_heads
        parts = [linear.key_head_dim, linear.key_head_dim, group, group]
        order = _deinterleaved(linear.num_key_heads, parts)
        take("in_proj_qkvz", 2 * key + 2 * value, order)
    else:
        take("in_proj_qkv", linear.conv_size)
        take("in_proj_z", value)
    if "in_proj_ba" in stored:
        group = heads // linear.num_key_heads
        order = _deinterleaved(linear.num_key_heads, [group, group])
        take("in_proj_ba", 2 * heads, order)
    else:
        take("in_proj_b", heads)
        take("in_proj_a", heads)
    # b and a decide how fast a state is forgotten: a few rows, kept as exact as they are stored.
    is_exact = [name.endswith(("_ba.weight", "_b.weight", "_a.weight")) for name in names]
    return weights.merged_linear(names, sizes, hidden, selections=selections, is_exact=is_exact)


def _deinterleaved(num_groups: int, widths: list[int]) -> Tensor:
    """Return the row order that puts part after part, of rows stored group after group.

    Each of `num_groups` groups holds, one behind the other, parts of these widths.
    """
    rows = torch.arange(num_groups * sum(widths)).view(num_groups, -1)
    ends = [0]
    for width in widths:
        ends.append(ends[-1] + width)
    return torch.cat([rows[:, begin:end].flatten() for begin, end in pairwise(ends)])
