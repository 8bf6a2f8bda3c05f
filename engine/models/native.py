"""The native whole-step form of a decoder, when all of its matrices are packed for it.

Built by `Decoder` once its layers stand. The torch layers stay the reference: same weights, same
cache, the same interface.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.kernels import cpu
from engine.layers.mlp import GatedMLP
from engine.models.attention import SelfAttention

if TYPE_CHECKING:
    from engine.models.decoder import Decoder, DecoderLayer


def native_decoder(decoder: Decoder) -> cpu.NativeDecoder | None:
    """Return one native call for all of `decoder`; None when a part of it has no kernel."""
    spec = decoder.spec
    shape = cpu.NativeShape(
        num_heads=spec.num_attention_heads,
        num_kv_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        scale=spec.head_dim**-0.5,
        norm_eps=spec.rms_norm_eps,
        rotary=cpu.Rotary(decoder.rope.inverse, decoder.rope.scale),
    )
    head = decoder.head.packed_parts
    layers = [_layer(layer) for layer in decoder.layers]
    complete = [layer for layer in layers if layer is not None]
    if head is None or len(complete) < len(layers) or not shape.is_supported:
        return None
    return cpu.NativeDecoder(shape, complete, decoder.norm.weight, head)


def _layer(layer: DecoderLayer) -> cpu.NativeLayer | None:
    attention, mlp = layer.attention, layer.mlp
    # Exactly these: a gated or linear attention and experts have no kernel.
    if type(attention) is not SelfAttention or not isinstance(mlp, GatedMLP):
        return None
    qkv, output = attention.qkv.packed_parts, attention.output.packed_parts
    gate_up, down = mlp.gate_up.packed_parts, mlp.down.packed_parts
    if qkv is None or output is None or gate_up is None or down is None:
        return None
    return cpu.NativeLayer(
        input_norm=layer.input_norm.weight,
        qkv=qkv,
        head_norm=None if attention.qk_norm is None else attention.qk_norm.weight,
        output=output,
        mlp_norm=layer.mlp_norm.weight,
        gate_up=gate_up,
        down=down,
    )
