"""The tensors of one decoder layer, part by part: names after `model.layers.{i}.`, and shapes.

Used by the tensor plans. Pure. Rows first, as the files of Hugging Face hold them.
"""

from __future__ import annotations

from collections.abc import Iterable

from cortexd.models import LinearAttentionSpec, ModelSpec

Shape = tuple[int, ...]


def attention_shapes(spec: ModelSpec, has_qk_norm: bool, has_output_gate: bool) -> dict[str, Shape]:
    """Return the tensors of softmax attention; a gated q_proj has a gate row per query row."""
    hidden = spec.hidden_size
    query_rows = spec.num_attention_heads * spec.head_dim
    kv_rows = spec.num_key_value_heads * spec.head_dim
    shapes: dict[str, Shape] = {
        "self_attn.q_proj.weight": (query_rows * (2 if has_output_gate else 1), hidden),
        "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.weight": (kv_rows, hidden),
        "self_attn.o_proj.weight": (hidden, query_rows),
    }
    if spec.attention_bias or spec.qkv_bias:
        parts = "qkvo" if spec.attention_bias else "qkv"
        shapes.update(_biases(shapes, [f"self_attn.{part}_proj.weight" for part in parts]))
    if has_qk_norm:
        shapes["self_attn.q_norm.weight"] = (spec.head_dim,)
        shapes["self_attn.k_norm.weight"] = (spec.head_dim,)
    return shapes


def mlp_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Return the tensors of a plain gated feed-forward block."""
    shapes = _gated_mlp("mlp.", spec.intermediate_size, spec.hidden_size)
    if spec.mlp_bias:
        shapes.update(_biases(shapes, list(shapes)))
    return shapes


def moe_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Return the tensors of a mixture of experts, in the layout that the file has."""
    moe, hidden = spec.moe, spec.hidden_size
    assert moe is not None, f"{spec.model_type} has no experts"
    shapes: dict[str, Shape] = {"mlp.gate.weight": (moe.num_experts, hidden)}
    if moe.expert_tensors == "separate":
        for expert in range(moe.num_experts):
            shapes.update(_gated_mlp(f"mlp.experts.{expert}.", moe.intermediate_size, hidden))
    else:
        gate_up = (moe.num_experts, moe.intermediate_size, hidden)
        if moe.expert_tensors == "stacked":
            shapes["mlp.experts.gate_proj"] = shapes["mlp.experts.up_proj"] = gate_up
        else:
            shapes["mlp.experts.gate_up_proj"] = (gate_up[0], 2 * gate_up[1], hidden)
        shapes["mlp.experts.down_proj"] = (moe.num_experts, hidden, moe.intermediate_size)
    if moe.shared_intermediate_size:
        shapes.update(_gated_mlp("mlp.shared_expert.", moe.shared_intermediate_size, hidden))
        shapes["mlp.shared_expert_gate.weight"] = (1, hidden)
    return shapes


def linear_attention_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Return the tensors of a Gated DeltaNet layer, in the layout that the file has."""
    linear, hidden = spec.linear_attention, spec.hidden_size
    assert linear is not None, f"{spec.model_type} has no linear attention"
    heads, values = linear.num_value_heads, linear.value_size
    shapes: dict[str, Shape] = {
        "conv1d.weight": (linear.conv_size, 1, linear.conv_kernel),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "norm.weight": (linear.value_head_dim,),
        "out_proj.weight": (hidden, values),
        **{f"{name}.weight": (rows, hidden) for name, rows in input_projections(linear)},
    }
    return {f"linear_attn.{name}": shape for name, shape in shapes.items()}


def input_projections(linear: LinearAttentionSpec) -> list[tuple[str, int]]:
    """Return name and rows of the stored input projections of a Gated DeltaNet layer."""
    heads, conv, values = linear.num_value_heads, linear.conv_size, linear.value_size
    if linear.projections == "fused":
        return [("in_proj_qkvz", conv + values), ("in_proj_ba", 2 * heads)]
    separate = [("in_proj_qkv", conv), ("in_proj_z", values)]
    if linear.projections == "fused_ba":
        return [*separate, ("in_proj_ba", 2 * heads)]
    return [*separate, ("in_proj_b", heads), ("in_proj_a", heads)]


def _gated_mlp(prefix: str, intermediate: int, hidden: int) -> dict[str, Shape]:
    return {
        f"{prefix}gate_proj.weight": (intermediate, hidden),
        f"{prefix}up_proj.weight": (intermediate, hidden),
        f"{prefix}down_proj.weight": (hidden, intermediate),
    }


def _biases(shapes: dict[str, Shape], names: Iterable[str]) -> dict[str, Shape]:
    return {name.removesuffix("weight") + "bias": shapes[name][:1] for name in names}
