"""The gated feed-forward block: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from engine.layers.linear import Linear


class GatedMLP:
    """`gate_up` yields gate and up side by side: (num_tokens, 2 * intermediate_size)."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return (num_tokens, hidden_size)."""
        gate, up = self.gate_up(hidden).chunk(2, -1)
        return self.down(functional.silu(gate).mul_(up))
