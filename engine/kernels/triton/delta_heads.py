"""What the Gated DeltaNet kernels share: their arguments, and what they do with one head.

No state of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DeltaShape:
    """The heads of a layer; V head i reads K head i % num_key_heads when they are tiled."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    has_tiled_heads: bool

    @property
    def constants(self) -> dict[str, int | bool]:
        """Return the kernels' arguments by which they are compiled."""
        return {"KEY_DIM": self.key_dim, "VALUE_DIM": self.value_dim, "TILED": self.has_tiled_heads}


class HeadInputs(NamedTuple):
    """What tokens bring, in the model's dtype, tokens first.

    `mixed` (num_tokens, conv_size) is convolved, activated and contiguous; of `b`, `a` (num_tokens,
    num_value_heads) and `gate` (num_tokens, num_value_heads * value_dim) tokens may be strided.
    """

    mixed: Tensor
    b: Tensor
    a: Tensor
    gate: Tensor

    def check(self) -> None:
        """Check the strides."""
        assert self.mixed.is_contiguous(), f"mixed has strides {self.mixed.stride()}"
        for part in (self.b, self.a, self.gate):
            assert part.stride(1) == 1, f"a part has strides {part.stride()}"


class HeadWeights(NamedTuple):
    """A layer's `decay_rate`, `dt_bias` (num_value_heads,) float32 and `norm` (value_dim,)."""

    decay_rate: Tensor
    dt_bias: Tensor
    norm: Tensor
    eps: float


class SlotStates(NamedTuple):
    """S by slot, (num_slots, num_value_heads, key_dim, value_dim) float32, advanced in place.

    Row i's is in slots[i], and of no meaning when is_fresh[i] (bool).
    """

    states: Tensor
    slots: Tensor
    is_fresh: Tensor

    def check(self) -> None:
        """Check the strides."""
        assert self.states.is_contiguous(), f"states have strides {self.states.stride()}"


@triton.jit
def key_head_of(
    value_head: int, num_key_heads: int, num_value_heads: int, TILED: tl.constexpr
) -> int:
    """Return the K head that a V head reads."""
    if TILED:
        head = value_head % num_key_heads
    else:
        head = value_head // (num_value_heads // num_key_heads)
    return head


@triton.jit
def l2_normalized(heads: tl.tensor) -> tl.tensor:
    """Return float32 rows of (num_tokens, key_dim) divided by their length."""
    return heads * tl.rsqrt(tl.sum(heads * heads, axis=1) + 1e-6)[:, None]


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """Return the sigmoid of a float32 tile."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def decay_of(a: tl.tensor, rate: tl.tensor, bias: tl.tensor) -> tl.tensor:
    """Return rate * softplus(a + bias), float32, at most 0."""
    x = a.to(tl.float32) + bias
    # log(1 + y) to full precision also for small y: what rounding adds to 1 + y is divided out.
    y = tl.exp(-tl.abs(x))
    rounded = 1.0 + y
    is_lost = rounded == 1.0
    log1p = tl.where(is_lost, y, tl.log(rounded) * (y / tl.where(is_lost, 1.0, rounded - 1.0)))
    return rate * (tl.maximum(x, 0.0) + log1p)


@triton.jit
def gated_norm(
    x: tl.tensor, gate: tl.tensor, weight: tl.tensor, inside: tl.tensor, size: int, eps: float
) -> tl.tensor:
    """Return norm(x) * weight * silu(gate), float32 rows (num_tokens, value_dim), yet to round.

    `x` is in the model's dtype; norm and product with the weight are rounded to it.
    """
    wide = tl.where(inside, x.to(tl.float32), 0.0)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / size + eps)
    normed = (wide * inverse[:, None]).to(x.dtype).to(tl.float32)
    weighted = (normed * weight.to(tl.float32)).to(x.dtype).to(tl.float32)
    wide_gate = gate.to(tl.float32)
    return weighted * wide_gate * sigmoid(wide_gate)
