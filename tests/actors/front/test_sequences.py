"""The delta queue and the sequence table, without HTTP."""

from __future__ import annotations

import asyncio

import pytest

from actors.front.sequences import DeltaQueue, RunningSequence, SequenceTable
from cortexd.errors import Cancelled, EngineRestarting
from cortexd.messages import TokenBatch
from cortexd.messages.inference import SequenceDelta
from tests.doubles.front import async_test


def delta(sequence_id: int, *tokens: int) -> SequenceDelta:
    """Return a delta of these tokens."""
    return SequenceDelta(sequence_id, list(tokens))


def new_queue(max_pending_tokens: int = 100) -> tuple[DeltaQueue, list[str]]:
    """Return a queue and the list its overflow is noted in."""
    overflows: list[str] = []
    return DeltaQueue(max_pending_tokens, lambda: overflows.append("now")), overflows


@async_test
async def test_queue_gives_all_that_is_queued_in_order() -> None:
    """One get takes everything that came since the last."""
    queue, _ = new_queue()
    queue.put(0, delta(1, 5))
    queue.put(1, delta(2, 6))
    assert [(index, item.token_ids) for index, item in await queue.get(1)] == [(0, [5]), (1, [6])]
    assert await queue.get(0.001) == []


@async_test
async def test_queue_wakes_a_waiting_reader() -> None:
    """A reader that waits gets the next delta at once."""
    queue, _ = new_queue()
    reader = asyncio.create_task(queue.get(10))
    await asyncio.sleep(0)
    queue.put(0, delta(1, 5))
    assert len(await reader) == 1


@async_test
async def test_queue_overflow_fails_the_reader_and_calls_back_once() -> None:
    """A reader too far behind: the callback runs at once, queued tokens come, then the error."""
    queue, overflows = new_queue(max_pending_tokens=2)
    for token in range(5):
        queue.put(0, delta(1, token))
    assert overflows == ["now"]
    assert len(await queue.get(1)) == 3
    with pytest.raises(Cancelled, match="3 tokens behind"):
        await queue.get(1)


@async_test
async def test_table_fails_only_the_dead_incarnation_and_epoch() -> None:
    """Another incarnation's or epoch's death does not concern a sequence."""
    table = SequenceTable()
    queue, _ = new_queue()
    sequence_id = table.open(RunningSequence(queue, 3, "m/0", incarnation=4, epoch=2))
    error = EngineRestarting("gone")
    table.fail_leader("m/0", 3, error)
    table.fail_leader("x/0", 4, error)
    table.fail_group("m", 1, error)
    assert await queue.get(0) == []
    table.dispatch(TokenBatch(2, 1, [delta(sequence_id, 9), delta(77, 1)]))
    table.fail_group("m", 2, error)
    assert [index for index, _ in await queue.get(1)] == [3]
    with pytest.raises(EngineRestarting):
        await queue.get(1)
