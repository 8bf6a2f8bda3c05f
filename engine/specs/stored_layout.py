"""How one checkpoint stores what the same architecture stores in several ways. Pure.

Called by the pre-flight check with the opened headers: which tensors are there says which layout it
is. What is there in no known layout is left as it is, for the plan to name what is missing.
"""

from __future__ import annotations

from collections.abc import Container

import msgspec

from cortexd.models import LinearAttentionSpec, ModelSpec, MoeSpec


def with_stored_layout(spec: ModelSpec, names: Container[str]) -> ModelSpec:
    """Return the spec with the layouts of experts and projections; `names` are canonical ones."""
    moe, linear = spec.moe, spec.linear_attention
    if moe is not None:
        moe = _with_expert_tensors(moe, names, _first_sparse_layer(spec))
    if linear is not None and spec.linear_layers:
        linear = _with_projections(linear, names, spec.linear_layers[0])
    return msgspec.structs.replace(spec, moe=moe, linear_attention=linear)


def _first_sparse_layer(spec: ModelSpec) -> int:
    return next((i for i in range(spec.num_hidden_layers) if spec.is_sparse(i)), 0)


def _with_expert_tensors(moe: MoeSpec, names: Container[str], layer: int) -> MoeSpec:
    experts = f"model.layers.{layer}.mlp.experts."
    if f"{experts}gate_up_proj" in names:
        return msgspec.structs.replace(moe, expert_tensors="stacked_gate_up")
    if f"{experts}gate_proj" in names:
        return msgspec.structs.replace(moe, expert_tensors="stacked")
    return moe


def _with_projections(
    linear: LinearAttentionSpec, names: Container[str], layer: int
) -> LinearAttentionSpec:
    attention = f"model.layers.{layer}.linear_attn."
    if f"{attention}in_proj_qkvz.weight" in names:
        return msgspec.structs.replace(linear, projections="fused")
    if f"{attention}in_proj_ba.weight" in names:
        return msgspec.structs.replace(linear, projections="fused_ba")
    return linear
