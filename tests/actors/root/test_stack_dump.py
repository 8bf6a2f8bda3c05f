"""Reading a stack dump from an actor's output."""

from __future__ import annotations

import asyncio
from pathlib import Path

from actors.root.logs import LogHub
from actors.root.stack_dump import stack_dump
from cortexd.settings import Logging
from tests.waiting import DEADLINE_S

DUMP = [b'{"text":"Thread 0x1 (most recent call first):"}', b'{"text":"File x, line 1 in f"}']


def hub(folder: Path) -> LogHub:
    """Return a hub whose files are in this folder."""
    return LogHub(folder, Logging(), on_failure=lambda error: None)


def test_dump_that_begins_late_is_waited_for_to_its_end(tmp_path: Path) -> None:
    """A busy process writes it when it gets its turns; what others print is left out."""

    async def work() -> None:
        logs = hub(tmp_path)
        loop = asyncio.get_running_loop()

        def tell() -> None:
            logs.add("peer", b'{"text":"not yet"}')
            logs.add("other", DUMP[0])
            loop.call_later(0.4, logs.add, "peer", DUMP[0])
            loop.call_later(0.6, logs.add, "peer", DUMP[1])

        lines = await stack_dump(logs, "peer", tell, deadline_s=DEADLINE_S)
        assert lines == [b'{"text":"not yet"}', *DUMP]
        logs.close()

    asyncio.run(work())


def test_dump_that_never_comes_ends_the_wait(tmp_path: Path) -> None:
    """A process that cannot be interrupted is given up, with what it printed."""

    async def work() -> None:
        logs = hub(tmp_path)
        lines = await stack_dump(
            logs, "peer", lambda: logs.add("peer", b'{"text":"x"}'), deadline_s=0.05
        )
        assert lines == [b'{"text":"x"}']
        logs.close()

    asyncio.run(work())
