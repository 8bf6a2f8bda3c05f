"""Gated DeltaNet between its projections on the Triton kernels.

Built by `FusedDecoder` from the torch layer, whose weights it uses. States are advanced in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.batch import PagedRows, StepBatch
from engine.cache.kv_cache import KVCache
from engine.kernels.triton.delta_conv import convolve
from engine.kernels.triton.delta_decode import delta_decode
from engine.kernels.triton.delta_heads import DeltaShape, HeadInputs, HeadWeights, SlotStates
from engine.kernels.triton.delta_prefill import CHUNK, delta_prefill
from engine.layers.gated_delta_net import GatedDeltaNet
from engine.models.attention import RotaryTables


class FusedDeltaNet:
    """The same as the torch layer it is made from."""

    def __init__(self, layer: GatedDeltaNet) -> None:
        self._layer = layer
        spec = layer.spec
        self._weights = HeadWeights(
            layer.decay_rate, layer.dt_bias, layer.norm.weight, layer.norm.eps
        )
        self._shape = DeltaShape(
            spec.num_key_heads,
            spec.num_value_heads,
            spec.key_head_dim,
            spec.value_head_dim,
            spec.has_tiled_heads,
        )

    def __call__(
        self, normed: Tensor, batch: StepBatch, cache: KVCache, tables: RotaryTables
    ) -> Tensor:
        """Return (num_tokens, hidden_size); positions play no part, so `tables` is not read."""
        layer = self._layer
        assert cache.states is not None, "a hybrid model runs with state slots"
        projected = layer.projections(normed)
        attended = projected.new_empty(len(projected), layer.spec.value_size)
        count = batch.num_single_rows
        for rows, group in (
            (batch.single_rows, slice(0, count)),
            (batch.run_rows, slice(count, None)),
        ):
            if rows is not None:
                states = SlotStates(
                    cache.states.recurrent[layer.layer],
                    batch.state_slots[group],
                    batch.is_fresh[group],
                )
                tails = cache.states.conv_tails[layer.layer]
                self._advance(projected[group], rows, states, tails, out=attended[group])
        return layer.output(attended)

    def _advance(
        self,
        projected: Tensor,
        rows: PagedRows,
        states: SlotStates,
        tails: Tensor,
        *,
        out: Tensor,
    ) -> None:
        """Run rows of one token each, or runs, through convolution, delta rule and gated norm."""
        layer, shape = self._layer, self._shape
        mixed, gate, b, a = projected.split(layer.widths, dim=-1)
        convolved = torch.empty(mixed.shape, dtype=mixed.dtype, device=mixed.device)
        convolve(
            mixed,
            tails,
            layer.conv_weight,
            states.slots,
            states.is_fresh,
            rows.query_starts,
            max(rows.query_lens),
            out=convolved,
        )
        heads = HeadInputs(convolved, b, a, gate)
        if max(rows.query_lens) == 1:
            delta_decode(heads, self._weights, states, shape, out=out)
        else:
            chunks = rows.chunks(CHUNK)
            delta_prefill(heads, self._weights, states, shape, rows.query_starts, chunks, out=out)
