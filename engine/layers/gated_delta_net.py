"""The Gated DeltaNet layer: linear attention with a state of fixed size per sequence.

Projections, a short causal convolution, the gated delta rule, a gated norm. The state and the last
inputs of the convolution live in the step's state slots and are advanced in place; a sequence that
begins in this step begins from zero, whatever its slot holds.

Source: transformers 5.23 models/qwen3_5/modeling_qwen3_5.py (Qwen3_5GatedDeltaNet).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from cortexd.models import LinearAttentionSpec
from engine.batch import StepBatch
from engine.cache.kv_cache import KVCache
from engine.layers.delta_rule import DeltaInputs, chunk_delta_rule, recurrent_delta_rule
from engine.layers.linear import Linear
from engine.layers.norm import GatedRMSNorm

_L2_EPS: Final = 1e-6


class GatedDeltaNet:
    """See the module's text. `layer` counts the model's linear-attention layers."""

    def __init__(
        self,
        spec: LinearAttentionSpec,
        layer: int,
        *,
        projections: Linear,
        conv_weight: Tensor,
        decay_rate: Tensor,
        dt_bias: Tensor,
        norm: GatedRMSNorm,
        output: Linear,
    ) -> None:
        """Take the parts.

        `projections` yields queries, keys, values; the output gate z; b; a. `conv_weight`
        (conv_kernel, conv_size), `decay_rate` (= -exp(A_log)) and `dt_bias` (num_value_heads,) are
        float32.
        """
        self.spec = spec
        self.layer = layer
        self.projections = projections
        self.conv_weight = conv_weight
        self.decay_rate = decay_rate
        self.dt_bias = dt_bias
        self.norm = norm
        self.output = output
        heads = spec.num_value_heads
        self.widths = [spec.conv_size, spec.value_size, heads, heads]

    def __call__(
        self, hidden: Tensor, batch: StepBatch, cache: KVCache, tables: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return (num_tokens, hidden_size); positions play no part, so `tables` is not read."""
        spec = self.spec
        mixed, gate, b, a = self.projections(hidden).split(self.widths, dim=-1)
        assert cache.states is not None, "a hybrid model runs with state slots"
        tails = cache.states.conv_tails[self.layer]
        mixed = functional.silu(self._convolve(mixed, batch, tails))
        beta = b.sigmoid().float()
        decay = self.decay_rate * functional.softplus(a.float() + self.dt_bias)
        inputs = DeltaInputs(*self._split_heads(mixed), decay, beta)
        attended = self._attend(inputs, batch, cache.states.recurrent[self.layer])
        shape = (-1, spec.num_value_heads, spec.value_head_dim)
        normed = self.norm(attended.to(hidden.dtype), gate.reshape(shape))
        return self.output(normed.flatten(1))

    def _convolve(self, mixed: Tensor, batch: StepBatch, tails: Tensor) -> Tensor:
        """Convolve (num_tokens, conv_size) row by row and keep each row's last inputs."""
        parts = []
        num_single = batch.num_single_rows
        if num_single:
            slots = batch.state_slots[:num_single]
            previous = tails.index_select(0, slots)
            previous = previous.masked_fill(batch.is_fresh[:num_single, None, None], 0)
            window = torch.cat([previous, mixed[:num_single].unsqueeze(1)], dim=1)
            tails.index_copy_(0, slots, window[:, 1:])
            parts.append(self._weigh(window).squeeze(1))
        for row in batch.rows[num_single:]:
            tail = tails[row.state_slot]
            previous = torch.zeros_like(tail) if row.is_fresh else tail
            window = torch.cat([previous, mixed[row.start : row.end]])
            tail.copy_(window[-len(tail) :])
            parts.append(self._weigh(window))
        return torch.cat(parts)

    def _weigh(self, window: Tensor) -> Tensor:
        """Sum (..., conv_kernel - 1 + num_tokens, conv_size) over the kernel, in float32."""
        kernel = len(self.conv_weight)
        num_tokens = window.shape[-2] - kernel + 1
        total = window[..., :num_tokens, :].float() * self.conv_weight[0]
        for offset in range(1, kernel):
            part = window[..., offset : offset + num_tokens, :]
            total.addcmul_(part.float(), self.conv_weight[offset])
        return total.to(window.dtype)

    def _split_heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return float32 queries and keys, normed, one per value head, and values."""
        spec = self.spec
        query, key, value = mixed.float().split(
            [spec.key_size, spec.key_size, spec.value_size], dim=-1
        )
        value = value.unflatten(-1, (spec.num_value_heads, spec.value_head_dim))
        query, key = (
            self._per_value_head(
                _l2_normalized(x.unflatten(-1, (spec.num_key_heads, spec.key_head_dim)))
            )
            for x in (query, key)
        )
        return query * spec.key_head_dim**-0.5, key, value

    def _per_value_head(self, heads: Tensor) -> Tensor:
        """Repeat (num_tokens, num_key_heads, key_dim) so that each V head has its K head."""
        group = self.spec.num_value_heads // self.spec.num_key_heads
        if self.spec.has_tiled_heads:
            return heads.repeat(1, group, 1)
        return heads.repeat_interleave(group, dim=1)

    def _attend(self, inputs: DeltaInputs, batch: StepBatch, states: Tensor) -> Tensor:
        """Run the delta rule; return float32 (num_tokens, num_value_heads, value_head_dim)."""
        parts = []
        num_single = batch.num_single_rows
        if num_single:
            slots = batch.state_slots[:num_single]
            state = states.index_select(0, slots)
            state = state.masked_fill(batch.is_fresh[:num_single, None, None, None], 0)
            out, state = recurrent_delta_rule(inputs.tokens(0, num_single), state)
            states.index_copy_(0, slots, state)
            parts.append(out)
        for row in batch.rows[num_single:]:
            slot = states[row.state_slot]
            state = torch.zeros_like(slot) if row.is_fresh else slot
            out, state = chunk_delta_rule(inputs.tokens(row.start, row.end), state)
            slot.copy_(state)
            parts.append(out)
        return torch.cat(parts)


def _l2_normalized(heads: Tensor) -> Tensor:
    return heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + _L2_EPS)
