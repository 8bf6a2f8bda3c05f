"""Each mechanism behind a way of computing a prompt (`ways.py`), broken on purpose.

A comparison that does not fail under its mutation proves nothing. Some break what all paths share,
some the torch path (`backend="reference"`), some the native whole step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine import engine as engine_module
from engine.batch import BatchRow, StepBatch, StepRow
from engine.cache.prefix_cache import PrefixCache
from engine.cache.prefix_tree import PrefixNode
from engine.cache.state_cache import StateCache
from engine.engine import Engine
from engine.kernels.cpu.decoder import DecoderBatch, NativeDecoder, States
from engine.kernels.cpu.structs import DecoderStep
from engine.layers import gated_delta_net
from engine.layers.delta_rule import DeltaInputs, chunk_delta_rule, recurrent_delta_rule
from engine.layers.gated_delta_net import GatedDeltaNet
from engine.scheduling.sequence import Sequence

BatchChange = Callable[[StepBatch], None]


@dataclass(frozen=True, slots=True)
class Mutation:
    """What breaks, the way that must show it, and which models have the mechanism.

    `needs_state`: only a hybrid; `path`: only what computes there, "native" or "reference".
    """

    break_it: Callable[[pytest.MonkeyPatch], None]
    way: str
    needs_state: bool = False
    path: str = ""

    def concerns(self, engine: Engine) -> bool:
        """Tell whether the engine's model has the mechanism."""
        has_state = engine.cache.states is not None or not self.needs_state
        return has_state and self.path in ("", engine.backend_name)


def _in_every_batch(change: BatchChange) -> Callable[[pytest.MonkeyPatch], None]:
    def break_it(monkeypatch: pytest.MonkeyPatch) -> None:
        original = engine_module.build_batch

        def broken(rows: list[StepRow], block_size: int, device: torch.device) -> StepBatch:
            batch = original(rows, block_size, device)
            change(batch)
            return batch

        monkeypatch.setattr(engine_module, "build_batch", broken)

    return break_it


def _restart_positions(batch: StepBatch) -> None:
    for row in batch.rows:
        batch.positions[row.start : row.end] -= batch.positions[row.start].item()


def _write_decodes_nowhere(batch: StepBatch) -> None:
    batch.slots[: batch.num_single_rows] = 0


def _read_the_first_row(batch: StepBatch) -> None:
    for row in batch.rows:
        row.first_slot, row.is_consecutive = batch.rows[0].first_slot, True


def _keep_what_a_slot_held(batch: StepBatch) -> None:
    batch.is_fresh.fill_(False)
    for row in batch.rows:
        row.is_fresh = False


def _share_one_slot(batch: StepBatch) -> None:
    batch.state_slots.fill_(1)
    for row in batch.rows:
        row.state_slot = 1


def _hides_earlier_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    original = BatchRow.mask

    def broken(self: BatchRow) -> Tensor | None:
        mask = original(self)
        if mask is None:
            return None
        mask = mask.clone()
        mask[:, : self.kv_len - (self.end - self.start)] = False
        return mask

    monkeypatch.setattr(BatchRow, "mask", broken)


def _takes_blocks_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PrefixCache.take

    def broken(self: PrefixCache, sequence: Sequence, nodes: list[PrefixNode]) -> None:
        original(self, sequence, nodes)
        if nodes:
            table = sequence.block_table
            self.pool.release(table[::-1])
            sequence.block_table = self.pool.allocate(len(table))

    monkeypatch.setattr(PrefixCache, "take", broken)


def _forgets_decode_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(inputs: DeltaInputs, state: Tensor) -> tuple[Tensor, Tensor]:
        return recurrent_delta_rule(inputs, state)[0], state

    monkeypatch.setattr(gated_delta_net, "recurrent_delta_rule", broken)


def _forgets_state_between_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(inputs: DeltaInputs, state: Tensor) -> tuple[Tensor, Tensor]:
        return chunk_delta_rule(inputs, torch.zeros_like(state))

    monkeypatch.setattr(gated_delta_net, "chunk_delta_rule", broken)


def _forgets_convolution_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    original = GatedDeltaNet._convolve

    def broken(self: GatedDeltaNet, mixed: Tensor, batch: StepBatch, tails: Tensor) -> Tensor:
        return original(self, mixed, batch, tails.zero_())

    monkeypatch.setattr(GatedDeltaNet, "_convolve", broken)


def _native_states_as(change: Callable[[States], States]) -> Callable[[pytest.MonkeyPatch], None]:
    def break_it(monkeypatch: pytest.MonkeyPatch) -> None:
        original = NativeDecoder._set_states

        def broken(
            self: NativeDecoder, step: DecoderStep, batch: DecoderBatch, states: States
        ) -> None:
            # Kept by the step: what it points to must live until it is computed.
            step.kept = change(states)
            original(self, step, batch, step.kept)

        monkeypatch.setattr(NativeDecoder, "_set_states", broken)

    return break_it


def _recurrent_of_nobody(states: States) -> States:
    return torch.zeros_like(states[0]), states[1]


def _tails_of_nobody(states: States) -> States:
    return states[0], torch.zeros_like(states[1])


def _computes_on_after_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    original = engine_module.Scheduler._preempt

    def broken(self: engine_module.Scheduler, sequence: Sequence) -> None:
        num_computed, num_blocks = sequence.num_computed, len(sequence.block_table)
        original(self, sequence)
        sequence.num_computed = num_computed
        sequence.block_table = self.pool.allocate(num_blocks)

    monkeypatch.setattr(engine_module.Scheduler, "_preempt", broken)


def _loses_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateCache, "copy", lambda *_: None)


_LOST_AT_PREEMPTION = Mutation(_computes_on_after_preemption, "after_preemption")


def _on_torch(
    break_it: Callable[[pytest.MonkeyPatch], None], way: str, *, needs_state: bool = True
) -> Mutation:
    return Mutation(break_it, way, needs_state=needs_state, path="reference")


def _on_native(change: Callable[[States], States], way: str) -> Mutation:
    return Mutation(_native_states_as(change), way, needs_state=True, path="native")


MUTATIONS: dict[str, Mutation] = {
    "positions restart": Mutation(_in_every_batch(_restart_positions), "in_uneven_chunks"),
    "chunks see themselves only": _on_torch(
        _hides_earlier_chunks, "in_chunks_of_64", needs_state=False
    ),
    "decode keeps no KV": Mutation(_in_every_batch(_write_decodes_nowhere), "token_by_token"),
    "rows read one KV": Mutation(_in_every_batch(_read_the_first_row), "among_others"),
    "work lost at preemption": _LOST_AT_PREEMPTION,
    "hit without its blocks": Mutation(_takes_blocks_of_nobody, "after_a_hit"),
    "decode forgets": _on_torch(_forgets_decode_state, "token_by_token"),
    "chunks forget": _on_torch(_forgets_state_between_chunks, "in_uneven_chunks"),
    "tail lost, chunks": _on_torch(_forgets_convolution_tail, "in_chunks_of_64"),
    "tail lost, decode": _on_torch(_forgets_convolution_tail, "token_by_token"),
    "native decode forgets": _on_native(_recurrent_of_nobody, "token_by_token"),
    "native chunks forget": _on_native(_recurrent_of_nobody, "in_uneven_chunks"),
    "native tail lost, chunks": _on_native(_tails_of_nobody, "in_chunks_of_64"),
    "native tail lost, decode": _on_native(_tails_of_nobody, "token_by_token"),
    "slot not cleared": Mutation(
        _in_every_batch(_keep_what_a_slot_held), "after_another", needs_state=True
    ),
    "slot shared": Mutation(_in_every_batch(_share_one_slot), "among_others", needs_state=True),
    "state lost at a hit": Mutation(_loses_snapshots, "after_a_hit", needs_state=True),
    "snapshot lost": Mutation(_loses_snapshots, "after_a_snapshot", needs_state=True),
}
