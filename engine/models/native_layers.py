"""A decoder whose steps run on the native CPU operations, one call for each.

Built by `Decoder` once its layers stand, where a whole step cannot be one native call: a rank of a
split model must stop twice a layer to add up what all ranks made. Same weights, same cache, same
interface; the torch layers stay the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from engine.batch import StepBatch
from engine.cache.kv_cache import KVCache
from engine.kernels import cpu
from engine.kernels.cpu.ops import HEAD_DIMS, LANES
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.models.attention import SelfAttention

if TYPE_CHECKING:
    from engine.models.decoder import Decoder


class NativeLayers:
    """See the module's text. A token's result has the same bits in any batch."""

    def __init__(self, decoder: Decoder) -> None:
        """Take a decoder that `native_layers` has looked at."""
        spec = decoder.spec
        self._decoder = decoder
        self._eps = spec.rms_norm_eps
        self._num_heads = spec.num_attention_heads
        self._shape = (-1, spec.num_attention_heads + 2 * spec.num_key_value_heads, spec.head_dim)
        self._scale = spec.head_dim**-0.5
        self._rotary = cpu.Rotary(decoder.rope.inverse, decoder.rope.scale)

    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Return the logits (num_logit_rows, vocab_size); K and V of all tokens go to the cache."""
        decoder, eps = self._decoder, self._eps
        hidden = decoder.embedding(batch.token_ids).contiguous()
        for index, layer in enumerate(decoder.layers):
            attention, mlp = layer.attention, layer.mlp
            assert isinstance(attention, SelfAttention), "looked at by native_layers"
            assert isinstance(mlp, GatedMLP), "looked at by native_layers"
            normed = cpu.rms_norm(hidden, layer.input_norm.weight, eps)
            attended = self._attend(attention, normed, batch, cache.layer(index))
            hidden.add_(attention.output(attended))
            normed = cpu.rms_norm(hidden, layer.mlp_norm.weight, eps)
            hidden.add_(mlp.down(cpu.silu_mul(mlp.gate_up(normed))))
        if len(batch.logit_rows) == 0:
            return hidden.new_empty(0, decoder.spec.vocab_size)
        last = hidden.index_select(0, batch.logit_rows)
        return decoder.head(cpu.rms_norm(last, decoder.norm.weight, eps))

    def _attend(
        self, attention: SelfAttention, normed: Tensor, batch: StepBatch, cache_layer: Tensor
    ) -> Tensor:
        """Return (num_tokens, num_heads * head_dim)."""
        heads = attention.qkv(normed).view(self._shape)
        norm = attention.qk_norm
        cpu.rope_and_kv_write(
            heads,
            batch.positions,
            batch.slots,
            cache_layer,
            self._rotary,
            head_norm=None if norm is None else norm.weight,
            eps=self._eps,
        )
        query = heads[:, : self._num_heads]
        return cpu.paged_attention(query, cache_layer, batch.rows, self._scale)


def native_layers(decoder: Decoder) -> NativeLayers | None:
    """Return the native form of a decoder in float32 on the CPU; None when a part has no kernel."""
    spec = decoder.spec
    is_plain = all(
        type(layer.attention) is SelfAttention
        and type(layer.mlp) is GatedMLP
        and type(layer.input_norm) is RMSNorm
        for layer in decoder.layers
    )
    fits = (
        spec.head_dim in HEAD_DIMS
        and spec.hidden_size % LANES == 0
        and spec.intermediate_size % LANES == 0
    )
    return NativeLayers(decoder) if is_plain and fits else None
