"""Waiting for a seat: races of turns, time-outs and requests that ask again."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

from actors.router.seat_queue import SeatQueue
from cortexd.errors import DeadlineExceeded
from cortexd.messages import Place
from tests.waiting import DEADLINE_S

MODEL = "org/m"


def new_queue() -> SeatQueue[Place, str]:
    """A queue whose answers are names of seats."""
    return SeatQueue("option", 4, 60.0)


def serve(queue: SeatQueue[Place, str], *free: str) -> list[str]:
    """Give these seats away; return what was taken of them."""
    left = list(free)
    queue.serve(MODEL, Counter, lambda message, front: left.pop(0) if left else None)
    return [seat for seat in free if seat not in left]


def waiting(
    queue: SeatQueue[Place, str], request: str, wait_s: float = DEADLINE_S
) -> asyncio.Task[str]:
    """Let a request wait."""
    message = Place(MODEL, request, True)
    return asyncio.create_task(queue.wait(MODEL, message, "f", time.monotonic() + wait_s))


def test_request_that_is_over_takes_no_seat() -> None:
    """Also in the moment before its own next step."""

    async def work() -> None:
        queue = new_queue()
        task = waiting(queue, "r")
        await asyncio.sleep(0)
        task.cancel()
        assert serve(queue, "seat") == []
        with pytest.raises(asyncio.CancelledError):
            await task
        assert queue.depths() == {}

    asyncio.run(work())


def test_request_that_asks_again_keeps_its_new_place() -> None:
    """The end of the first ask does not give the second one's place up."""

    async def work() -> None:
        queue = new_queue()
        first = waiting(queue, "r", 0.01)
        await asyncio.sleep(0)
        second = waiting(queue, "r")
        with pytest.raises(DeadlineExceeded):
            await first
        assert queue.depths() == {MODEL: 1}
        assert serve(queue, "seat", "other") == ["seat"]
        assert await second == "seat"
        assert queue.depths() == {}

    asyncio.run(work())
