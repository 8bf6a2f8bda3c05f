"""Batched log lines: none is lost or reordered, and bad news does not wait."""

from __future__ import annotations

import asyncio
import io
import logging

from cortexd.log_batch import BatchHandler
from tests.waiting import DEADLINE_S


class CountingStream(io.StringIO):
    """Counts its writes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_writes = 0
        self.written = asyncio.Event()

    def write(self, text: str) -> int:
        """Keep the text."""
        self.num_writes += 1
        self.written.set()
        return super().write(text)


def logger_to(stream: CountingStream) -> tuple[logging.Logger, BatchHandler]:
    """A logger of its own."""
    handler = BatchHandler(logging.Formatter("%(message)s"), stream)
    log = logging.Logger("test", logging.INFO)
    log.addHandler(handler)
    return log, handler


def test_lines_of_a_moment_are_one_write() -> None:
    """They appear by themselves, in order."""
    stream = CountingStream()
    log, _ = logger_to(stream)

    async def run() -> None:
        for number in range(10):
            log.info("line %d", number)
        assert stream.num_writes == 0
        await asyncio.wait_for(stream.written.wait(), DEADLINE_S)
        stream.written.clear()
        log.info("again")
        await asyncio.wait_for(stream.written.wait(), DEADLINE_S)

    asyncio.run(run())
    assert stream.getvalue().split("\n") == [*(f"line {n}" for n in range(10)), "again", ""]


def test_warning_goes_out_at_once_after_what_waits() -> None:
    """The lines before it are not overtaken."""
    stream = CountingStream()
    log, _ = logger_to(stream)

    async def run() -> None:
        log.info("first")
        log.warning("second")
        assert stream.getvalue() == "first\nsecond\n"

    asyncio.run(run())


def test_many_lines_do_not_pile_up() -> None:
    """A loop that never rests still writes."""
    stream = CountingStream()
    log, _ = logger_to(stream)

    async def run() -> None:
        for number in range(1000):
            log.info("line %d", number)
        assert stream.num_writes >= 10

    asyncio.run(run())


def test_without_a_loop_and_at_the_end_nothing_waits() -> None:
    """Another thread's lines, and those that a stopped loop left, are written."""
    stream = CountingStream()
    log, handler = logger_to(stream)
    log.info("no loop")
    assert stream.getvalue() == "no loop\n"

    async def run() -> None:
        log.info("left")

    asyncio.run(run())
    handler.flush()  # as logging.shutdown does
    assert stream.getvalue() == "no loop\nleft\n"
