"""The packed weights of a model whose whole steps are native, layer by layer.

Built by `engine.models.native`, read by `decoder`. Norms and other vectors are tensors of any float
dtype. Several parts of a projection stand side by side in its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from cortexd.models import LinearAttentionSpec
from engine.kernels.cpu.linear import PackedLinear
from engine.kernels.cpu.ops import HEAD_DIMS, LANES, Rotary

Parts = Sequence[PackedLinear]
# As in delta_net.h.
MAX_DELTA_HEAD_DIM: Final = 256
MAX_CONV_KERNEL: Final = 8


@dataclass(frozen=True, slots=True)
class NativeShape:
    """The sizes that the weights' own shapes do not tell.

    `has_output_gates`: attention is multiplied by a sigmoid gate per query element.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    norm_eps: float
    rotary: Rotary
    has_output_gates: bool = False
    linear: LinearAttentionSpec | None = None

    @property
    def is_supported(self) -> bool:
        """Whether there are kernels for these heads."""
        has_attention = self.head_dim in HEAD_DIMS and self.num_heads % self.num_kv_heads == 0
        return has_attention and (self.linear is None or _has_delta_kernels(self.linear))


@dataclass(frozen=True, slots=True)
class NativeAttention:
    """Softmax attention.

    `qkv` yields Q, K and V heads, then the output gates where the model has them; `head_norm`
    (num_heads + num_kv_heads, head_dim) norms Q and K heads before the rotation.
    """

    qkv: Parts
    head_norm: Tensor | None
    output: Parts


@dataclass(frozen=True, slots=True)
class NativeDeltaNet:
    """A Gated DeltaNet layer, with the parts of `engine.layers.gated_delta_net`."""

    projections: Parts
    conv_weight: Tensor  # (conv_kernel, conv_size)
    decay_rate: Tensor  # (num_value_heads,)
    dt_bias: Tensor  # (num_value_heads,)
    norm: Tensor  # (value_head_dim,)
    output: Parts


@dataclass(frozen=True, slots=True)
class NativeMLP:
    """A gated feed-forward; `gate_up` yields gate and up."""

    gate_up: Parts
    down: Parts

    @property
    def part_types(self) -> list[str]:
        """The stored types of both projections' parts."""
        return [part.type_name for part in (*self.gate_up, *self.down)]


@dataclass(frozen=True, slots=True)
class NativeSharedExpert:
    """The expert that every token takes, with its one-row gate."""

    mlp: NativeMLP
    gate: Parts


@dataclass(frozen=True, slots=True)
class NativeExperts:
    """A router, its experts (all of one size and of the same stored types), the shared expert."""

    router: Parts
    experts: Sequence[NativeMLP]
    shared: NativeSharedExpert | None
    num_chosen: int
    normalizes: bool


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """One layer; norms are (hidden_size,)."""

    input_norm: Tensor
    mixer: NativeAttention | NativeDeltaNet
    mlp_norm: Tensor
    feed_forward: NativeMLP | NativeExperts


def _has_delta_kernels(linear: LinearAttentionSpec) -> bool:
    sizes = (linear.key_head_dim, linear.value_head_dim)
    return (
        all(size % LANES == 0 and size <= MAX_DELTA_HEAD_DIM for size in sizes)
        and linear.num_value_heads % linear.num_key_heads == 0
        and 2 <= linear.conv_kernel <= MAX_CONV_KERNEL
    )
