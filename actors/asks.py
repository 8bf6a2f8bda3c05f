"""Asks on an asyncio loop: a future for each, and one timer for the earliest deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from actors.mailbox import AskTable, Outcome
from cortexd.errors import CortexError, DeadlineExceeded
from cortexd.messages.control import Message
from cortexd.messages.envelope import Address, Envelope

# Loop clocks tick in milliseconds; without it a timer can fire just before its deadline.
_TIMER_SLACK_S: Final = 0.001


class AsyncAsks:
    """Awaits answers. Owned by one loop; `send` is given the ask's id and deadline."""

    def __init__(self, next_id: Callable[[], int]) -> None:
        self._next_id = next_id
        self._table = AskTable()
        self._timer: asyncio.TimerHandle | None = None
        self._armed_ns = 0

    async def ask(
        self, dst: Address, deadline_s: float, send: Callable[[int, int], None]
    ) -> Message:
        """Send and await the one answer. Raises: what `send` raises, or the ask's error ending."""
        if deadline_s <= 0:
            raise DeadlineExceeded(f'no time left to ask actor "{dst.name}"')
        ask_id = self._next_id()
        deadline_ns = time.monotonic_ns() + int(deadline_s * 1e9)
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._table.open(ask_id, dst, deadline_ns, lambda outcome: _complete(future, outcome))
        try:
            send(ask_id, deadline_ns)
            self._arm()
            return await future
        finally:
            self._table.discard(ask_id)

    def resolve(self, envelope: Envelope) -> bool:
        """Hand an answer to its ask; False when nobody awaits it."""
        return self._table.resolve(envelope)

    def fail_peer(self, gone: Address, reason: str) -> None:
        """End all asks to a dead incarnation."""
        self._table.fail_peer(gone, reason)

    def _arm(self) -> None:
        """Keep the one timer at the earliest deadline."""
        deadline_ns = self._table.next_deadline_ns
        if deadline_ns is None or (self._timer is not None and self._armed_ns <= deadline_ns):
            return  # a timer that is too early finds nothing and arms itself again
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        wait_s = max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9)
        self._armed_ns = deadline_ns
        self._timer = loop.call_later(wait_s + _TIMER_SLACK_S, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self._table.expire(time.monotonic_ns())
        self._arm()


def _complete(future: asyncio.Future[Message], outcome: Outcome) -> None:
    if future.done():  # the caller was cancelled in the same loop turn
        return
    if isinstance(outcome, CortexError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
