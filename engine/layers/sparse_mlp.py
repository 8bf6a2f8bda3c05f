"""The mixture of experts: a router sends each token through a few of many gated feed-forwards.

Plain and exact: every expert that was chosen computes its tokens alone, whatever its weights are
stored as. Experts are added up in their order, so a token's sum does not depend on the batch. On
CUDA `GroupedExperts` take their place, where the kernels have all they need.

Source: transformers 5.23 models/qwen3_moe and models/qwen3_5_moe (SparseMoeBlock).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP


class SharedExpert:
    """A feed-forward that every token takes, weighted by a gate of its own."""

    def __init__(self, mlp: GatedMLP, gate: Linear) -> None:
        self.mlp = mlp
        self.gate = gate

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return (num_tokens, hidden_size)."""
        return self.gate(hidden).sigmoid() * self.mlp(hidden)


class Experts(Protocol):
    """Adds up what the chosen experts make of each token."""

    def __call__(self, hidden: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return (num_tokens, hidden_size) for weights and expert ids (num_tokens, num_chosen)."""
        ...


class SeparateExperts:
    """Runs the experts one after the other; which ones is decided on the host."""

    def __init__(self, experts: Sequence[GatedMLP]) -> None:
        self.experts = experts

    def __call__(self, hidden: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return (num_tokens, hidden_size) for weights and expert ids (num_tokens, num_chosen)."""
        out = torch.zeros_like(hidden)
        # The tokens of each expert, experts ascending: (num_tokens * num_chosen,) sorted by expert.
        by_expert, order = chosen.flatten().sort(stable=True)
        tokens = order // chosen.shape[1]
        factors = weights.flatten()[order].unsqueeze(-1)
        ids, counts = by_expert.unique_consecutive(return_counts=True)
        begin = 0
        for expert, count in zip(ids.tolist(), counts.tolist(), strict=True):
            end = begin + count
            rows = tokens[begin:end]
            result = self.experts[expert](hidden.index_select(0, rows))
            out.index_add_(0, rows, result * factors[begin:end])
            begin = end
        return out


class SparseMLP:
    """See the module's text. `num_chosen` experts of all take a token."""

    def __init__(
        self,
        router: Linear,
        experts: Experts,
        shared: SharedExpert | None,
        *,
        num_chosen: int,
        normalizes: bool,
    ) -> None:
        self.router = router
        self.experts = experts
        self.shared = shared
        self.num_chosen = num_chosen
        self.normalizes = normalizes

    @property
    def is_capturable(self) -> bool:
        """Whether it runs without the host."""
        return not isinstance(self.experts, SeparateExperts)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return (num_tokens, hidden_size)."""
        weights, chosen = self._route(hidden)
        out = self.experts(hidden, weights, chosen)
        return out if self.shared is None else out.add_(self.shared(hidden))

    def _route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights, in the dtype of `hidden`, and expert ids, each (num_tokens, chosen)."""
        probabilities = self.router(hidden).softmax(dim=-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.num_chosen, dim=-1)
        if self.normalizes:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(hidden.dtype), chosen
