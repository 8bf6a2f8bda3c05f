"""Builds a layer's mixture of experts from the stored tensors, whichever layout they have."""

from __future__ import annotations

from cortexd.models import ModelSpec, MoeSpec
from engine.layers.mlp import GatedMLP
from engine.layers.sparse_mlp import Experts, SeparateExperts, SharedExpert, SparseMLP
from engine.loading.loader import Weights


def build_sparse_mlp(weights: Weights, spec: ModelSpec, prefix: str) -> SparseMLP:
    """Return the block whose tensors begin with `prefix` ("model.layers.0.mlp.")."""
    moe, hidden = spec.moe, spec.hidden_size
    assert moe is not None, f"{spec.model_type} has no experts"
    shared = None
    if moe.shared_intermediate_size:
        mlp = build_gated_mlp(
            weights, f"{prefix}shared_expert.", moe.shared_intermediate_size, hidden, sums=False
        )
        gate = weights.linear(f"{prefix}shared_expert_gate.weight", 1, hidden, is_exact=True)
        shared = SharedExpert(mlp, gate)
    experts = [
        _expert(weights, moe, f"{prefix}experts.", expert, hidden)
        for expert in range(moe.num_experts)
    ]
    experts_and_router = SparseMLP(
        weights.linear(f"{prefix}gate.weight", moe.num_experts, hidden, is_exact=True),
        _together(weights, experts),
        shared,
        num_chosen=moe.num_experts_per_tok,
        normalizes=moe.norm_topk_prob,
    )
    return weights.summed(experts_and_router)


def build_gated_mlp(
    weights: Weights,
    prefix: str,
    intermediate: int,
    hidden: int,
    *,
    has_bias: bool = False,
    sums: bool = True,
) -> GatedMLP:
    """Return the feed-forward block whose tensors begin with `prefix`; `sums`: see `linear`."""
    names = [f"{prefix}gate_proj", f"{prefix}up_proj"]
    gate_up = weights.merged_linear(
        [f"{name}.weight" for name in names],
        [intermediate] * 2,
        hidden,
        [f"{name}.bias" for name in names] if has_bias else None,
    )
    down = weights.linear(
        f"{prefix}down_proj.weight",
        hidden,
        intermediate,
        f"{prefix}down_proj.bias" if has_bias else None,
        sums=sums,
    )
    return GatedMLP(gate_up, down)


def _together(weights: Weights, experts: list[GatedMLP]) -> Experts:
    """Return what runs the experts: one group where the backend's kernels take them all."""
    if weights.backend == "triton":
        from engine.layers.grouped_experts import GroupedExperts  # imports Triton

        grouped = GroupedExperts.of(experts)
        if grouped is not None:
            return grouped
    return SeparateExperts(experts)


def _expert(weights: Weights, moe: MoeSpec, prefix: str, expert: int, hidden: int) -> GatedMLP:
    size = moe.intermediate_size
    if moe.expert_tensors == "separate":
        return build_gated_mlp(weights, f"{prefix}{expert}.", size, hidden, sums=False)
    if moe.expert_tensors == "stacked":
        names, sizes = [f"{prefix}gate_proj", f"{prefix}up_proj"], [size] * 2
    else:
        names, sizes = [f"{prefix}gate_up_proj"], [2 * size]
    gate_up = weights.merged_linear(names, sizes, hidden, selections=[expert] * len(names))
    down = weights.merged_linear([f"{prefix}down_proj"], [hidden], size, selections=[expert])
    return GatedMLP(gate_up, down)
