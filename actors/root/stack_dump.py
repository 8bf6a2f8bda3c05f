"""What a process prints when it is told to dump its stacks, read from its output.

The process writes the dump in its signal handler as soon as it gets a turn, which on a busy machine
is not at once. The dump has no end mark: it is over when nothing more has come for a moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from actors.root.logs import LogHub

# Each thread of the dump begins with a line that says this.
_BEGIN: Final = b"most recent call first"
# A busy machine may stop the process between two lines, which then would be killed for the first.
_SILENCE_S: Final = 0.5


async def stack_dump(
    logs: LogHub, actor: str, tell: Callable[[], None], *, deadline_s: float
) -> list[bytes]:
    """Return the lines that an actor prints from `tell`, which asks for a dump, to the dump's end.

    Without a dump by the deadline these are whatever it printed.
    """
    lines: list[bytes] = []
    has_printed = asyncio.Event()

    def collect(name: str, line: bytes) -> None:
        if name == actor:
            lines.append(line)
            has_printed.set()

    loop = asyncio.get_running_loop()
    ends_at = loop.time() + deadline_s
    logs.follow(collect)
    try:
        tell()
        while (left_s := ends_at - loop.time()) > 0:
            has_printed.clear()
            has_begun = any(_BEGIN in line for line in lines)
            try:
                async with asyncio.timeout(min(left_s, _SILENCE_S) if has_begun else left_s):
                    await has_printed.wait()
            except TimeoutError:
                break
    finally:
        logs.unfollow(collect)
    return lines
