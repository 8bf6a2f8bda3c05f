"""A whole step of a llama- or qwen3-shaped model in one native call.

Built once per model from packed weights; `step` computes embeddings → layers → norm → head. A step
of SmolLM2-135M takes some 4 ms, of which 210 separate torch calls would cost as much again. State:
references that keep the weights alive. A token's result has the same bits in any batch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.cpu import library
from engine.kernels.cpu.linear import PackedLinear
from engine.kernels.cpu.ops import HEAD_DIMS, QueryRow, Rotary, pack_rows
from engine.kernels.cpu.structs import (
    AttentionShape,
    DecoderStep,
    DecoderWeights,
    LayerWeights,
    Matrix,
    Projection,
)


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """One layer's weights; norms are float32 (hidden_size,).

    `head_norm` (num_heads + num_kv_heads, head_dim) norms Q and K heads before the rotation.
    Several parts of a projection stand side by side in its output.
    """

    input_norm: Tensor
    qkv: Sequence[PackedLinear]
    head_norm: Tensor | None
    output: Sequence[PackedLinear]
    mlp_norm: Tensor
    gate_up: Sequence[PackedLinear]
    down: Sequence[PackedLinear]


@dataclass(frozen=True, slots=True)
class NativeShape:
    """The sizes that the weights' own shapes do not tell."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    norm_eps: float
    rotary: Rotary

    @property
    def is_supported(self) -> bool:
        """Whether there are attention kernels for these heads."""
        return self.head_dim in HEAD_DIMS and self.num_heads % self.num_kv_heads == 0


class DecoderBatch(Protocol):
    """A step's int64 tensors: positions, slots (num_tokens,), logit_rows; and its sequences."""

    @property
    def positions(self) -> Tensor: ...
    @property
    def slots(self) -> Tensor: ...
    @property
    def logit_rows(self) -> Tensor: ...
    @property
    def rows(self) -> Sequence[QueryRow]: ...


@dataclass(frozen=True, slots=True)
class NativeBatch:
    """A plain `DecoderBatch`."""

    positions: Tensor
    slots: Tensor
    rows: Sequence[QueryRow]
    logit_rows: Tensor


class NativeDecoder:
    """All layers, the final norm and the head."""

    def __init__(
        self,
        shape: NativeShape,
        layers: Sequence[NativeLayer],
        final_norm: Tensor,
        head: Sequence[PackedLinear],
    ) -> None:
        assert shape.is_supported, f"no attention kernel for {shape}"
        self.hidden_size = final_norm.numel()
        self.vocab_size = sum(part.out_features for part in head)
        self._shape = shape
        self._kept: list[object] = []  # whatever the structs point to
        native_layers = (LayerWeights * len(layers))()
        for target, layer in zip(native_layers, layers, strict=True):
            self._fill_layer(target, layer)
        self._weights = DecoderWeights(
            attention=AttentionShape(  # block_size is that of each step's cache
                shape.num_heads, shape.num_kv_heads, shape.head_dim, 0, shape.scale
            ),
            hidden_size=self.hidden_size,
            intermediate_size=layers[0].down[0].in_features,
            rotary_half=shape.rotary.inverse_frequencies.numel(),
            inverse_frequencies=self._pointer(shape.rotary.inverse_frequencies),
            rope_scale=shape.rotary.scale,
            norm_eps=shape.norm_eps,
            num_layers=len(layers),
            layers=native_layers,
            final_norm=self._pointer(final_norm),
            head=self._projection(head, self.hidden_size, self.vocab_size),
        )

    def step(self, hidden: Tensor, batch: DecoderBatch, cache: Tensor) -> Tensor:
        """Return the logits (num_logit_rows, vocab_size) float32.

        hidden (num_tokens, hidden_size) float32 holds the embeddings and is overwritten with the
        residual stream; cache (num_layers, num_blocks, block_size, 2 * num_kv_heads, head_dim)
        float32 receives K and V.
        """
        self._check(hidden, batch, cache)
        self._weights.attention.block_size = cache.shape[2]
        logits = torch.empty(batch.logit_rows.numel(), self.vocab_size)
        done = library.load().cortexd_decoder_step(
            ctypes.byref(self._weights),
            ctypes.byref(
                DecoderStep(
                    num_tokens=hidden.shape[0],
                    hidden=hidden.data_ptr(),
                    positions=batch.positions.data_ptr(),
                    slots=batch.slots.data_ptr(),
                    num_rows=len(batch.rows),
                    rows=pack_rows(batch.rows),
                    cache=cache.data_ptr(),
                    layer_stride=cache.stride(0),
                    num_slots=cache.shape[1] * cache.shape[2],
                    num_logit_rows=batch.logit_rows.numel(),
                    logit_rows=batch.logit_rows.data_ptr(),
                    logits=logits.data_ptr(),
                )
            ),
        )
        assert done != -2, f"a slot, block or logit row of {hidden.shape[0]} tokens is out of range"
        if done != 0:
            raise MemoryError(f"no memory for the scratch space of {hidden.shape[0]} tokens")
        return logits

    def _check(self, hidden: Tensor, batch: DecoderBatch, cache: Tensor) -> None:
        num_tokens = hidden.shape[0]
        shape = self._shape
        assert hidden.shape == (num_tokens, self.hidden_size), f"hidden is {tuple(hidden.shape)}"
        assert batch.positions.shape == batch.slots.shape == (num_tokens,), (
            f"{num_tokens} tokens, positions {tuple(batch.positions.shape)}"
        )
        for floats in (hidden, cache):
            assert floats.dtype == torch.float32, f"{floats.dtype} instead of float32"
            assert floats.is_contiguous(), f"strides {floats.stride()} are not contiguous"
        for integers in (batch.positions, batch.slots, batch.logit_rows):
            assert integers.dtype == torch.int64, f"{integers.dtype} instead of int64"
            assert integers.is_contiguous(), f"strides {integers.stride()} are not contiguous"
        expected = (2 * shape.num_kv_heads, shape.head_dim)
        assert cache.shape[0] == self._weights.num_layers, f"cache of {cache.shape[0]} layers"
        assert cache.shape[3:] == expected, f"cache is {tuple(cache.shape)}, not of {expected}"

    def _fill_layer(self, target: LayerWeights, layer: NativeLayer) -> None:
        shape = self._shape
        attended = shape.num_heads * shape.head_dim
        qkv_size = attended + 2 * shape.num_kv_heads * shape.head_dim
        intermediate = layer.down[0].in_features
        target.input_norm = self._pointer(layer.input_norm)
        target.qkv = self._projection(layer.qkv, self.hidden_size, qkv_size)
        target.head_norm = None if layer.head_norm is None else self._pointer(layer.head_norm)
        target.output = self._projection(layer.output, attended, self.hidden_size)
        target.mlp_norm = self._pointer(layer.mlp_norm)
        target.gate_up = self._projection(layer.gate_up, self.hidden_size, 2 * intermediate)
        target.down = self._projection(layer.down, intermediate, self.hidden_size)

    def _projection(
        self, parts: Sequence[PackedLinear], in_features: int, out_features: int
    ) -> Projection:
        assert all(part.in_features == in_features for part in parts), f"not {in_features} wide"
        width = sum(part.out_features for part in parts)
        assert width == out_features, f"a projection yields {width} features, not {out_features}"
        matrices = (Matrix * len(parts))(*(part.matrix for part in parts))
        self._kept += [matrices, *parts]
        return Projection(matrices, len(parts))

    def _pointer(self, vector: Tensor) -> int:
        # Norm weights may arrive in the checkpoint's dtype.
        kept = vector.detach().to("cpu", torch.float32).contiguous()
        self._kept.append(kept)
        return kept.data_ptr()
