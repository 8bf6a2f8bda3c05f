"""The native whole-step form of a decoder, when all of its matrices are packed for it.

Built by `Decoder` once its layers stand. The torch layers stay the reference: same weights, same
cache, the same interface.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.kernels import cpu
from engine.layers.gated_delta_net import GatedDeltaNet
from engine.layers.mlp import GatedMLP
from engine.layers.sparse_mlp import SeparateExperts, SharedExpert, SparseMLP
from engine.models.attention import SelfAttention

if TYPE_CHECKING:
    from engine.models.decoder import Decoder, DecoderLayer


def native_decoder(decoder: Decoder) -> cpu.NativeDecoder | None:
    """Return one native call for all of `decoder`; None when a part of it has no kernel."""
    spec = decoder.spec
    attentions = [layer.attention for layer in decoder.layers]
    shape = cpu.NativeShape(
        num_heads=spec.num_attention_heads,
        num_kv_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        scale=spec.head_dim**-0.5,
        norm_eps=spec.rms_norm_eps,
        rotary=cpu.Rotary(decoder.rope.inverse, decoder.rope.scale),
        has_output_gates=any(isinstance(a, SelfAttention) and a.is_gated for a in attentions),
        linear=spec.linear_attention,
    )
    head = decoder.head.packed_parts
    if head is None or not shape.is_supported:
        return None
    layers = [_layer(layer) for layer in decoder.layers]
    complete = [layer for layer in layers if layer is not None]
    if len(complete) < len(layers):
        return None
    return cpu.NativeDecoder(shape, complete, decoder.norm.weight, head)


def _layer(layer: DecoderLayer) -> cpu.NativeLayer | None:
    attention, mlp = layer.attention, layer.mlp
    mixer: cpu.NativeAttention | cpu.NativeDeltaNet | None = None
    if isinstance(attention, GatedDeltaNet):
        mixer = _delta_net(attention)
    elif isinstance(attention, SelfAttention):
        mixer = _attention(attention)
    feed_forward = _mlp(mlp) if isinstance(mlp, GatedMLP) else _experts(mlp)
    if mixer is None or feed_forward is None:
        return None
    return cpu.NativeLayer(layer.input_norm.weight, mixer, layer.mlp_norm.weight, feed_forward)


def _attention(attention: SelfAttention) -> cpu.NativeAttention | None:
    qkv, output = attention.qkv.packed_parts, attention.output.packed_parts
    if qkv is None or output is None:
        return None
    norm = attention.qk_norm
    return cpu.NativeAttention(qkv, None if norm is None else norm.weight, output)


def _delta_net(net: GatedDeltaNet) -> cpu.NativeDeltaNet | None:
    projections, output = net.projections.packed_parts, net.output.packed_parts
    if projections is None or output is None:
        return None
    return cpu.NativeDeltaNet(
        projections, net.conv_weight, net.decay_rate, net.dt_bias, net.norm.weight, output
    )


def _mlp(mlp: GatedMLP) -> cpu.NativeMLP | None:
    gate_up, down = mlp.gate_up.packed_parts, mlp.down.packed_parts
    return None if gate_up is None or down is None else cpu.NativeMLP(gate_up, down)


def _experts(block: SparseMLP) -> cpu.NativeExperts | None:
    router = block.router.packed_parts
    assert isinstance(block.experts, SeparateExperts), "only Triton's kernels take them together"
    experts = [_mlp(expert) for expert in block.experts.experts]
    complete = [expert for expert in experts if expert is not None]
    # Exactly this class: one that is split among ranks stops to add up what all of them made.
    if type(block) is not SparseMLP or router is None or len(complete) < len(experts):
        return None
    if len({tuple(expert.part_types) for expert in complete}) > 1:
        return None
    shared = None
    if block.shared is not None:
        shared = _shared_expert(block.shared)
        if shared is None:
            return None
    return cpu.NativeExperts(router, complete, shared, block.num_chosen, block.normalizes)


def _shared_expert(shared: SharedExpert) -> cpu.NativeSharedExpert | None:
    mlp, gate = _mlp(shared.mlp), shared.gate.packed_parts
    return None if mlp is None or gate is None else cpu.NativeSharedExpert(mlp, gate)
