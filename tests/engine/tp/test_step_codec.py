"""A step's plan survives the message; what could harm a worker's memory does not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cortexd.errors import InvalidValue
from cortexd.messages.rpc import GenerateStep
from engine.scheduler import PlannedRow
from engine.token_ids import pack_token_ids
from engine.tp.step_codec import decode_step, encode_step
from tests.engine.doubles import make_sequence


def _rows() -> list[PlannedRow]:
    decoding = make_sequence([1, 2, 3], [4])
    decoding.block_table = [7]
    prefilling = make_sequence(list(range(20)))
    prefilling.block_table = [2, 5, 3]
    return [PlannedRow(decoding, 3, 1, True), PlannedRow(prefilling, 8, 10, False)]


def _message(**fields: Any) -> GenerateStep:
    return msgspec.structs.replace(encode_step("m", 1, _rows()), **fields)


def test_plan_is_equal_on_the_other_side() -> None:
    """Every attribute that a batch is built from."""
    received = decode_step(_message(), block_size=8, num_blocks=8)
    for row, planned in zip(received, _rows(), strict=True):
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
        decode_step(_message(**fields), block_size=8, num_blocks=8)
