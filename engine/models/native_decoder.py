"""The whole decoder step in one native call, where every part of the model allows it.

Between the matrix products a step of separate torch calls spends as much time again (SmolLM2-135M,
one sequence: 3.8 of 10 ms). Built once per model; None means that the layers run one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.batch import StepBatch
from engine.kernels.cpu import (
    AttentionRow,
    NativeBatch,
    NativeDecoder,
    NativeLayer,
    NativeShape,
    Rotary,
)
from engine.kv_cache import KVCache

if TYPE_CHECKING:
    from engine.models.decoder import Decoder, DecoderLayer


class NativeStep:
    """Runs batches on the native decoder, with the cache it was built for."""

    def __init__(self, decoder: NativeDecoder, cache: KVCache) -> None:
        self._decoder = decoder
        self._blocks = cache.blocks

    def __call__(self, hidden: Tensor, batch: StepBatch) -> Tensor:
        """Return the logits (num_logit_rows, vocab_size) float32; `hidden` is overwritten."""
        rows = [
            AttentionRow(row.start, row.end, row.kv_len, row.first_slot, row.block_ids)
            for row in batch.rows
        ]
        native_batch = NativeBatch(batch.positions, batch.slots, rows, batch.logit_rows)
        return self._decoder.step(hidden, native_batch, self._blocks)


def build_native_step(decoder: Decoder, cache: KVCache) -> NativeStep | None:
    """Return the native step; None unless all weights are packed and the cache is float32."""
    spec = decoder.spec
    if cache.blocks.dtype != torch.float32 or cache.blocks.device.type != "cpu":
        return None
    shape = NativeShape(
        num_heads=spec.num_attention_heads,
        num_kv_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        block_size=cache.block_size,
        scale=spec.head_dim**-0.5,
        norm_eps=spec.rms_norm_eps,
        rotary=Rotary(decoder.rope.inverse, decoder.rope.scale),
    )
    layers = [_native_layer(layer) for layer in decoder.layers]
    head = decoder.head.native_parts()
    if not shape.is_supported or head is None:
        return None
    native_layers = [layer for layer in layers if layer is not None]
    if len(native_layers) < len(layers):
        return None
    return NativeStep(NativeDecoder(shape, native_layers, decoder.norm.weight, head), cache)


def _native_layer(layer: DecoderLayer) -> NativeLayer | None:
    attention, mlp = layer.attention, layer.mlp
    qkv, output = attention.qkv.native_parts(), attention.output.native_parts()
    gate_up, down = mlp.gate_up.native_parts(), mlp.down.native_parts()
    if qkv is None or output is None or gate_up is None or down is None:
        return None
    return NativeLayer(
        input_norm=layer.input_norm.weight,
        qkv=qkv,
        head_norm=None if attention.qk_norm is None else attention.qk_norm.weight,
        output=output,
        mlp_norm=layer.mlp_norm.weight,
        gate_up=gate_up,
        down=down,
    )
