"""Makes the C++ structs of packed layers, and keeps alive what they point to.

Used by `decoder`. A size that does not fit is a programmer's error: the models check their files.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from cortexd.models import LinearAttentionSpec
from engine.kernels.cpu.native_weights import (
    NativeAttention,
    NativeDeltaNet,
    NativeExperts,
    NativeLayer,
    NativeMLP,
    NativeShape,
    Parts,
)
from engine.kernels.cpu.structs import (
    DeltaNetShape,
    DeltaNetWeights,
    ExpertWeights,
    LayerWeights,
    Matrix,
    Projection,
    SparseWeights,
)


class LayerStructs:
    """Structs of one model's layers; they live as long as this object."""

    def __init__(self, shape: NativeShape, hidden_size: int) -> None:
        self._shape = shape
        self._hidden_size = hidden_size
        self._kept: list[object] = []

    def layers(self, layers: Sequence[NativeLayer]) -> ctypes.Array[LayerWeights]:
        """Return the array of all layers."""
        native = (LayerWeights * len(layers))()
        for target, layer in zip(native, layers, strict=True):
            target.input_norm = self.pointer(layer.input_norm)
            target.mlp_norm = self.pointer(layer.mlp_norm)
            if isinstance(layer.mixer, NativeAttention):
                self._fill_attention(target, layer.mixer)
            else:
                self._fill_delta_net(target, layer.mixer)
            if isinstance(layer.feed_forward, NativeMLP):
                mlp = self._expert(layer.feed_forward)
                target.gate_up, target.down = mlp.gate_up, mlp.down
            else:
                target.experts = ctypes.pointer(self._experts(layer.feed_forward))
        return native

    def projection(self, parts: Parts, in_features: int, out_features: int) -> Projection:
        """Return the projection of these parts, which must have these sizes."""
        assert all(part.in_features == in_features for part in parts), f"not {in_features} wide"
        width = sum(part.out_features for part in parts)
        assert width == out_features, f"a projection yields {width} features, not {out_features}"
        matrices = (Matrix * len(parts))(*(part.matrix for part in parts))
        self._kept += [matrices, *parts]
        return Projection(matrices, len(parts))

    def pointer(self, vector: Tensor) -> int:
        """Return the address of the numbers as float32."""
        # Norm weights may arrive in the checkpoint's dtype.
        kept = vector.detach().to("cpu", torch.float32).contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def _fill_attention(self, target: LayerWeights, attention: NativeAttention) -> None:
        shape = self._shape
        attended = shape.num_heads * shape.head_dim
        width = attended + 2 * shape.num_kv_heads * shape.head_dim
        width += attended if shape.has_output_gates else 0
        norm = attention.head_norm
        target.input = self.projection(attention.qkv, self._hidden_size, width)
        target.head_norm = None if norm is None else self.pointer(norm)
        target.output = self.projection(attention.output, attended, self._hidden_size)

    def _fill_delta_net(self, target: LayerWeights, net: NativeDeltaNet) -> None:
        linear = self._shape.linear
        assert linear is not None, "a layer without attention in a model that is no hybrid"
        heads, size = linear.num_value_heads, linear.value_size
        assert net.conv_weight.shape == (linear.conv_kernel, linear.conv_size)
        assert net.decay_rate.shape == net.dt_bias.shape == (heads,)
        assert net.norm.shape == (linear.value_head_dim,)
        width = linear.conv_size + size + 2 * heads
        target.input = self.projection(net.projections, self._hidden_size, width)
        target.output = self.projection(net.output, size, self._hidden_size)
        target.delta_net = ctypes.pointer(
            DeltaNetWeights(
                self.pointer(net.conv_weight),
                self.pointer(net.decay_rate),
                self.pointer(net.dt_bias),
                self.pointer(net.norm),
            )
        )

    def _expert(self, mlp: NativeMLP) -> ExpertWeights:
        size = mlp.down[0].in_features
        return ExpertWeights(
            self.projection(mlp.gate_up, self._hidden_size, 2 * size),
            self.projection(mlp.down, size, self._hidden_size),
        )

    def _experts(self, block: NativeExperts) -> SparseWeights:
        kinds = {(tuple(e.part_types), e.down[0].in_features) for e in block.experts}
        assert len(kinds) == 1, f"experts differ: {kinds}"
        assert 1 <= block.num_chosen <= len(block.experts), f"{block.num_chosen} chosen"
        experts = (ExpertWeights * len(block.experts))(*map(self._expert, block.experts))
        self._kept.append(experts)
        entry, width = [*block.router], len(block.experts)
        shared_down = Projection(None, 0)
        if block.shared is not None:
            size = block.shared.mlp.down[0].in_features
            entry += [*block.shared.gate, *block.shared.mlp.gate_up]
            width += 1 + 2 * size
            shared_down = self.projection(block.shared.mlp.down, size, self._hidden_size)
        return SparseWeights(
            self.projection(entry, self._hidden_size, width),
            experts,
            shared_down,
            len(block.experts),
            block.num_chosen,
            int(block.normalizes),
        )


def delta_net_shape(linear: LinearAttentionSpec | None, norm_eps: float) -> DeltaNetShape:
    """Return the C form of the sizes; None: a model without such layers."""
    if linear is None:
        return DeltaNetShape()
    return DeltaNetShape(
        linear.num_key_heads,
        linear.num_value_heads,
        linear.key_head_dim,
        linear.value_head_dim,
        linear.conv_kernel,
        int(linear.has_tiled_heads),
        norm_eps,
    )
