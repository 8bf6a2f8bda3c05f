"""A whole step of a model in one native call: dense, hybrid, with or without experts.

Built once per model from packed weights; `step` computes embeddings → layers → norm → head. A step
of SmolLM2-135M takes some 4 ms, of which 210 separate torch calls would cost as much again. State:
references that keep the weights alive. A token's result has the same bits in any batch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.cpu import library
from engine.kernels.cpu.layer_structs import LayerStructs, delta_net_shape
from engine.kernels.cpu.native_weights import NativeDeltaNet, NativeLayer, NativeShape, Parts
from engine.kernels.cpu.ops import QueryRow, pack_rows
from engine.kernels.cpu.structs import AttentionShape, DecoderStep, DecoderWeights

# A hybrid's states by layer and slot, float32: S (num_linear_layers, num_slots, num_value_heads,
# key_head_dim, value_head_dim) and the convolutions' last inputs (num_linear_layers, num_slots,
# conv_kernel - 1, conv_size).
States = tuple[Tensor, Tensor]


class DecoderBatch(Protocol):
    """A step's int64 tensors: positions, slots (num_tokens,), logit_rows; and its sequences.

    Of a hybrid also `state_slots` and (bool) `is_fresh`, one per sequence.
    """

    @property
    def positions(self) -> Tensor: ...
    @property
    def slots(self) -> Tensor: ...
    @property
    def logit_rows(self) -> Tensor: ...
    @property
    def rows(self) -> Sequence[QueryRow]: ...
    @property
    def state_slots(self) -> Tensor: ...
    @property
    def is_fresh(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class NativeBatch:
    """A plain `DecoderBatch`."""

    positions: Tensor
    slots: Tensor
    rows: Sequence[QueryRow]
    logit_rows: Tensor
    state_slots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    is_fresh: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))


class NativeDecoder:
    """All layers, the final norm and the head."""

    def __init__(
        self, shape: NativeShape, layers: Sequence[NativeLayer], final_norm: Tensor, head: Parts
    ) -> None:
        assert shape.is_supported, f"no kernel for {shape}"
        self.hidden_size = final_norm.numel()
        self.vocab_size = sum(part.out_features for part in head)
        self._shape = shape
        self._num_linear = sum(isinstance(layer.mixer, NativeDeltaNet) for layer in layers)
        self._structs = structs = LayerStructs(shape, self.hidden_size)
        self._weights = DecoderWeights(
            attention=AttentionShape(  # block_size is that of each step's cache
                shape.num_heads, shape.num_kv_heads, shape.head_dim, 0, shape.scale
            ),
            has_output_gates=int(shape.has_output_gates),
            delta_net=delta_net_shape(shape.linear, shape.norm_eps),
            hidden_size=self.hidden_size,
            rotary_half=shape.rotary.inverse_frequencies.numel(),
            inverse_frequencies=structs.pointer(shape.rotary.inverse_frequencies),
            rope_scale=shape.rotary.scale,
            norm_eps=shape.norm_eps,
            num_layers=len(layers),
            layers=structs.layers(layers),
            final_norm=structs.pointer(final_norm),
            head=structs.projection(head, self.hidden_size, self.vocab_size),
        )

    def step(
        self, hidden: Tensor, batch: DecoderBatch, cache: Tensor, states: States | None = None
    ) -> Tensor:
        """Return the logits (num_logit_rows, vocab_size) float32.

        hidden (num_tokens, hidden_size) float32 holds the embeddings and is overwritten with the
        residual stream; cache (num_attention_layers, num_blocks, block_size, 2 * num_kv_heads,
        head_dim) float32 receives K and V; a hybrid's `states` are advanced in place.
        """
        self._check(hidden, batch, cache)
        self._weights.attention.block_size = cache.shape[2]
        logits = torch.empty(batch.logit_rows.numel(), self.vocab_size)
        step = DecoderStep(
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
        if self._num_linear:
            assert states is not None, "a hybrid model runs with state slots"
            self._set_states(step, batch, states)
        done = library.load().cortexd_decoder_step(ctypes.byref(self._weights), ctypes.byref(step))
        assert done != -2, f"an index of a step of {hidden.shape[0]} tokens is out of range"
        if done != 0:
            raise MemoryError(f"no memory for the scratch space of {hidden.shape[0]} tokens")
        return logits

    def _set_states(self, step: DecoderStep, batch: DecoderBatch, states: States) -> None:
        linear = self._shape.linear
        assert linear is not None, "only a hybrid has states"
        recurrent, tails = states
        outer = (self._num_linear, recurrent.shape[1])
        heads = (linear.num_value_heads, linear.key_head_dim, linear.value_head_dim)
        assert recurrent.shape == (*outer, *heads), f"states are {tuple(recurrent.shape)}"
        tail = (linear.conv_kernel - 1, linear.conv_size)
        assert tails.shape == (*outer, *tail), f"tails are {tuple(tails.shape)}"
        _check_floats(recurrent, tails)
        _check_integers(batch.state_slots)
        num_rows = (len(batch.rows),)
        assert batch.state_slots.shape == batch.is_fresh.shape == num_rows, "a slot for each row"
        assert batch.is_fresh.dtype == torch.bool, f"{batch.is_fresh.dtype} instead of bool"
        step.state_slots = batch.state_slots.data_ptr()
        step.is_fresh = batch.is_fresh.data_ptr()
        step.recurrent, step.recurrent_stride = recurrent.data_ptr(), recurrent.stride(0)
        step.tails, step.tails_stride = tails.data_ptr(), tails.stride(0)
        step.num_state_slots = recurrent.shape[1]

    def _check(self, hidden: Tensor, batch: DecoderBatch, cache: Tensor) -> None:
        num_tokens = hidden.shape[0]
        shape = self._shape
        assert hidden.shape == (num_tokens, self.hidden_size), f"hidden is {tuple(hidden.shape)}"
        assert batch.positions.shape == batch.slots.shape == (num_tokens,), (
            f"{num_tokens} tokens, positions {tuple(batch.positions.shape)}"
        )
        _check_floats(hidden, cache)
        _check_integers(batch.positions, batch.slots, batch.logit_rows)
        expected = (2 * shape.num_kv_heads, shape.head_dim)
        num_layers = self._weights.num_layers - self._num_linear
        assert cache.shape[0] == num_layers, f"cache of {cache.shape[0]} layers"
        assert cache.shape[3:] == expected, f"cache is {tuple(cache.shape)}, not of {expected}"


def _check_floats(*tensors: Tensor) -> None:
    for floats in tensors:
        assert floats.dtype == torch.float32, f"{floats.dtype} instead of float32"
        assert floats.is_contiguous(), f"strides {floats.stride()} are not contiguous"


def _check_integers(*tensors: Tensor) -> None:
    for integers in tensors:
        assert integers.dtype == torch.int64, f"{integers.dtype} instead of int64"
        assert integers.is_contiguous(), f"strides {integers.stride()} are not contiguous"
