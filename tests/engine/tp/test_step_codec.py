"""A step's plan survives the message; what could harm a worker's memory does not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cortexd.errors import InvalidValue
from cortexd.messages.rpc import GenerateStep
from engine.kv_cache import CacheSize
from engine.scheduler import PlannedRow, StepPlan
from engine.token_ids import pack_token_ids
from engine.tp.step_codec import decode_step, encode_step
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
    message = encode_step("m", 1, _plan(is_hybrid=is_hybrid))
    return msgspec.structs.replace(message, **fields)


def test_plan_is_equal_on_the_other_side() -> None:
    """Every attribute that a batch is built from."""
    plan = _plan(is_hybrid=True)
    received = decode_step(_message(is_hybrid=True), HYBRID, block_size=8)
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
        {"num_blocks": pack_token_ids([4, 0])},
        {"num_logits": pack_token_ids([1])},
        {"num_logits": pack_token_ids([2, 0])},
        {"num_logits": pack_token_ids([0, -1])},
        {"state_slots": pack_token_ids([0])},
    ],
)
def test_inconsistent_step_is_refused(fields: dict[str, bytes]) -> None:
    """Nothing of a peer's message is taken on trust."""
    with pytest.raises(InvalidValue):
        decode_step(_message(**fields), DENSE, block_size=8)


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
        decode_step(_message(is_hybrid=True, **fields), HYBRID, block_size=8)


def test_dense_model_has_no_states() -> None:
    """Neither rows nor copies may name a slot."""
    with pytest.raises(InvalidValue):
        decode_step(_message(is_hybrid=True), DENSE, block_size=8)
