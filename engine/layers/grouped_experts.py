"""All experts of a layer as two matrices, multiplied by the Triton kernels without the host.

Made by `engine.models.experts` when the backend is Triton and has a kernel for what the experts are
stored as; it then takes the place of the experts one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.kernels.triton.activation import silu_mul
from engine.kernels.triton.experts import PairTiles, group_pairs, join_pairs, multiply_pairs
from engine.kernels.triton.planes import Planes, dense_plane, stack_planes
from engine.layers.linear import DenseProduct, Linear
from engine.layers.mlp import GatedMLP
from engine.layers.plane_linear import PlaneProduct


class GroupedExperts:
    """See the module's text."""

    def __init__(self, gate_up: list[Planes], down: list[Planes], num_experts: int) -> None:
        """Take matrices with all experts' rows, those of several types side by side."""
        self._gate_up = gate_up
        self._down = down
        self._num_experts = num_experts

    @classmethod
    def of(cls, experts: Sequence[GatedMLP]) -> GroupedExperts | None:
        """Return the experts as a group, their weights copied; None where kernels are missing."""
        gate_up = _stacked([expert.gate_up for expert in experts])
        down = _stacked([expert.down for expert in experts])
        if gate_up is None or down is None:
            return None
        return cls(gate_up, down, len(experts))

    def __call__(self, hidden: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return (num_tokens, hidden_size) for weights and expert ids (num_tokens, num_chosen)."""
        tiles = group_pairs(chosen, self._num_experts)
        gate_up = self._multiply(hidden, self._gate_up, tiles, chosen.numel())
        parts = self._multiply(silu_mul(gate_up), self._down, tiles, chosen.numel())
        return join_pairs(parts, weights)

    def _multiply(
        self, x: Tensor, matrices: list[Planes], tiles: PairTiles, num_pairs: int
    ) -> Tensor:
        widths = [matrix.shape[0] // self._num_experts for matrix in matrices]
        out = x.new_empty(num_pairs, sum(widths))
        for matrix, columns in zip(matrices, out.split(widths, dim=1), strict=True):
            multiply_pairs(x, matrix, tiles, self._num_experts, columns)
        return out


def _stacked(layers: Sequence[Linear]) -> list[Planes] | None:
    """Return the layers' products on top of each other; None where one has no planes."""
    columns = []
    for products in zip(*(layer.products for layer in layers), strict=True):
        planes = [_planes(product) for product in products]
        complete = [part for part in planes if part is not None]
        if len(complete) < len(planes) or len({part.ggml_type for part in complete}) > 1:
            return None
        columns.append(stack_planes(complete))
    return columns


def _planes(product: object) -> Planes | None:
    if isinstance(product, PlaneProduct) and product.bias is None:
        return product.planes
    if isinstance(product, DenseProduct) and product.bias is None:
        return dense_plane(product.weight)
    return None
