"""A decoder whose step runs on the Triton kernels, built from the layers of the torch one.

Built by `Decoder` once its layers stand; same weights, same cache, same interface, and the torch
layers stay the reference. What the kernels fuse: the residual addition with the norm behind it,
head norms with rotation and cache write, a whole Gated DeltaNet between its projections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from torch import Tensor

from engine.batch import StepBatch
from engine.cache.kv_cache import KVCache
from engine.kernels.triton.activation import silu_mul
from engine.kernels.triton.norm import add_rms_norm
from engine.layers.gated_delta_net import GatedDeltaNet
from engine.layers.mlp import GatedMLP
from engine.layers.sparse_mlp import SparseMLP
from engine.models.attention import RotaryTables, SelfAttention
from engine.models.fused_attention import FusedAttention
from engine.models.fused_delta_net import FusedDeltaNet

if TYPE_CHECKING:
    from engine.models.decoder import Decoder, DecoderLayer

# A head is one tile: wider ones do not fit into a multiprocessor's registers.
MAX_HEAD_DIM: Final = 256


class Mixer(Protocol):
    """What mixes the tokens of a sequence: (num_tokens, hidden_size) to the same shape."""

    def __call__(
        self, normed: Tensor, batch: StepBatch, cache: KVCache, tables: RotaryTables
    ) -> Tensor: ...


class FusedDecoder:
    """See the module's text."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._eps = decoder.spec.rms_norm_eps
        self._mixers = [_mixer(layer) for layer in decoder.layers]
        experts = [layer.mlp for layer in decoder.layers if isinstance(layer.mlp, SparseMLP)]
        self.is_capturable = all(block.is_capturable for block in experts)

    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Return the logits (num_logit_rows, vocab_size); K and V of all tokens go to the cache."""
        decoder, eps = self._decoder, self._eps
        tables = decoder.rope.tables(batch.positions)
        residual = decoder.embedding(batch.token_ids)
        delta: Tensor | None = None
        for layer, mixer in zip(decoder.layers, self._mixers, strict=True):
            normed = add_rms_norm(delta, residual, layer.input_norm.weight, eps)
            mixed = mixer(normed, batch, cache, tables)
            normed = add_rms_norm(mixed, residual, layer.mlp_norm.weight, eps)
            delta = _feed_forward(layer.mlp, normed)
        if len(batch.logit_rows) == 0:
            return residual.new_empty(0, decoder.spec.vocab_size)
        last = residual.index_select(0, batch.logit_rows)
        if delta is not None:
            delta = delta.index_select(0, batch.logit_rows)
        return decoder.head(add_rms_norm(delta, last, decoder.norm.weight, eps))


def why_unfused(decoder: Decoder) -> str:
    """Say in one line which size the kernels do not take; empty when they take all."""
    spec = decoder.spec
    sizes = {"head_dim": spec.head_dim}
    if spec.linear_attention is not None:
        sizes["linear key_head_dim"] = spec.linear_attention.key_head_dim
        sizes["linear value_head_dim"] = spec.linear_attention.value_head_dim
    wide = [f"{name} is {size}" for name, size in sizes.items() if size > MAX_HEAD_DIM]
    return f"{', '.join(wide)}; the kernels take {MAX_HEAD_DIM} at most" if wide else ""


def _mixer(layer: DecoderLayer) -> Mixer:
    attention = layer.attention
    if isinstance(attention, GatedDeltaNet):
        return FusedDeltaNet(attention)
    assert isinstance(attention, SelfAttention), f"no kernels for {type(attention).__name__}"
    return FusedAttention(attention)


def _feed_forward(mlp: GatedMLP | SparseMLP, normed: Tensor) -> Tensor:
    if isinstance(mlp, SparseMLP):
        return mlp(normed)
    return mlp.down(silu_mul(mlp.gate_up(normed)))
