"""A step's plan survives the message; what could harm a worker's memory does not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortexd.errors import InvalidValue
from cortexd.messages.rpc import GenerateStep
from engine.cache.kv_cache import CacheSize
from engine.scheduling.sequence import Sequence, SequenceState
from engine.scheduling.step_plan import PlannedRow, StepPlan
from engine.token_ids import pack_token_ids, unpack_token_ids
from engine.tp.step_codec import ReceivedStep, StepDecoder, StepEncoder
from tests.engine.doubles import make_sequence

DENSE = CacheSize(num_blocks=8, context=56)
HYBRID = CacheSize(num_blocks=8, context=56, num_state_slots=4)


def _plan(*, is_hybrid: bool = False) -> StepPlan:
    decoding = make_sequence([1, 2, 3], [4])
    decoding.block_table = [7]
    prefilling = make_sequence(list(range(20)))
    prefilling.block_table = [2, 5, 3]
    if is_hybrid:
        decoding.state_slot, prefilling.state_slot = 3, 1
    rows = [PlannedRow(decoding, 3, 1, True), PlannedRow(prefilling, 8, 10, False)]
    return StepPlan(rows, 1, [(1, 4), (2, 1)] if is_hybrid else [])


def _message(*, is_hybrid: bool = False, **fields: Any) -> GenerateStep:
    message = StepEncoder("m").encode(_plan(is_hybrid=is_hybrid))
    return msgspec.structs.replace(message, **fields)


def _decode(message: GenerateStep, size: CacheSize) -> ReceivedStep:
    return StepDecoder(size, block_size=8).decode(message)


def test_plan_is_equal_on_the_other_side() -> None:
    """Every attribute that a batch is built from."""
    plan = _plan(is_hybrid=True)
    received = _decode(_message(is_hybrid=True), HYBRID)
    assert received.state_copies == plan.state_copies
    for row, planned in zip(received.rows, plan.rows, strict=True):
        for name in ("start", "num_tokens", "num_logits", "token_ids", "block_table", "state_slot"):
            assert getattr(row, name) == getattr(planned, name), name


@pytest.mark.parametrize(
    "fields",
    [
        {"starts": b""},
        {"starts": b"\0"},
        {"starts": pack_token_ids([3])},
        {"starts": pack_token_ids([-1, 8])},
        {"starts": pack_token_ids([3, 15])},  # beyond its blocks
        {"lengths": pack_token_ids([1, 9])},
        {"lengths": pack_token_ids([11, 0])},
        {"blocks": pack_token_ids([7, 2, 5, 8])},
        {"blocks": pack_token_ids([7, 2, 5, -1])},
        {"num_new_blocks": pack_token_ids([4, 0])},  # a row without blocks
        {"num_new_blocks": pack_token_ids([5, -1])},
        {"num_new_blocks": pack_token_ids([2, 3])},
        {"num_kept_blocks": pack_token_ids([0, 1])},  # that were never sent
        {"num_kept_blocks": pack_token_ids([0, -1])},
        {"tables": pack_token_ids([0, 0])},
        {"tables": pack_token_ids([0, 1 << 20])},
        {"tables": pack_token_ids([0, -1])},
        {"dropped_tables": pack_token_ids([0])},
        {"step": 0},
        {"step": 2},
        {"num_logits": pack_token_ids([1])},
        {"num_logits": pack_token_ids([2, 0])},
        {"num_logits": pack_token_ids([0, -1])},
        {"state_slots": pack_token_ids([0])},
    ],
)
def test_inconsistent_step_is_refused(fields: dict[str, bytes]) -> None:
    """Nothing of a peer's message is taken on trust."""
    with pytest.raises(InvalidValue):
        _decode(_message(**fields), DENSE)


@pytest.mark.parametrize(
    "fields",
    [
        {"state_slots": pack_token_ids([3, 3])},  # one sequence's state in another's
        {"state_slots": pack_token_ids([0, 1])},  # the null slot
        {"state_slots": pack_token_ids([5, 1])},
        {"state_copies": pack_token_ids([1, 2, 3])},
        {"state_copies": pack_token_ids([0, 1])},
        {"state_copies": pack_token_ids([1, 5])},
    ],
)
def test_impossible_state_slots_are_refused(fields: dict[str, bytes]) -> None:
    """A slot outside of the cache, or one for two sequences."""
    with pytest.raises(InvalidValue):
        _decode(_message(is_hybrid=True, **fields), HYBRID)


def test_dense_model_has_no_states() -> None:
    """Neither rows nor copies may name a slot."""
    with pytest.raises(InvalidValue):
        _decode(_message(is_hybrid=True), DENSE)


def test_same_step_twice_is_refused() -> None:
    """It would run over the states that it has advanced already."""
    decoder, message = StepDecoder(DENSE, block_size=8), _message()
    decoder.decode(message)
    with pytest.raises(InvalidValue, match="allowed: each step once"):
        decoder.decode(message)


TABLES = st.lists(st.integers(0, 7), min_size=1, max_size=6)


@given(steps=st.lists(st.dictionaries(st.integers(0, 3), TABLES, min_size=1), max_size=12))
def test_workers_tables_are_the_leaders_however_they_change(
    steps: list[dict[int, list[int]]],
) -> None:
    """Grown, shrunk, exchanged, left out for a step, ended and begun anew."""
    encoder, decoder = StepEncoder("m"), StepDecoder(DENSE, block_size=8)
    running: dict[int, Sequence] = {}
    for tables in steps:
        for number, sequence in list(running.items()):
            if number not in tables and number % 2:  # the even ones only sit the step out
                sequence.state = SequenceState.FINISHED
                del running[number]
        for number, table in tables.items():
            sequence = running.setdefault(number, make_sequence([1, 2]))
            sequence.state, sequence.block_table = SequenceState.RUNNING, table
        rows = [PlannedRow(running[number], 0, 1, False) for number in tables]
        received = decoder.decode(encoder.encode(StepPlan(rows)))
        assert [row.block_table for row in received.rows] == list(tables.values())


def test_known_blocks_do_not_travel_again() -> None:
    """A sequence that decodes sends nothing, or its one new block."""
    sequence = make_sequence(list(range(20)))
    sequence.state, sequence.block_table = SequenceState.RUNNING, [2, 5, 3]
    encoder = StepEncoder("m")
    sent = []
    for new in ([], [], [6]):
        sequence.block_table = sequence.block_table + new
        message = encoder.encode(StepPlan([PlannedRow(sequence, 19, 1, True)]))
        sent.append(unpack_token_ids(message.blocks, "blocks"))
    assert sent == [[2, 5, 3], [], [6]]
