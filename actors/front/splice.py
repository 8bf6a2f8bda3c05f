"""Passes a node's stream on to a client in the very turn of the loop in which a piece arrives.

No task is woken for a piece and no timer set: the task of the request sleeps until there is
something to decide, which is silence, a client that does not keep up, a failure, or the end. Used
by `actors.front.proxy`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from actors.front.node_connection import NodeAnswer
from actors.front.record import RequestRecord
from actors.front.relayed import Relay
from actors.front.stream import EventWriter


class Splice:
    """One stream between its node and its client; `run` is called once."""

    def __init__(
        self,
        upstream: NodeAnswer,
        relay: Relay,
        writer: EventWriter,
        record: RequestRecord,
        *,
        period_s: float,
        on_silence: Callable[[float], Awaitable[None]],
    ) -> None:
        """`on_silence` is awaited after each silent period with how long the silence is, in s."""
        self._upstream = upstream
        self._relay = relay
        self._writer = writer
        self._record = record
        self._period_s = period_s
        self._on_silence = on_silence
        self._loop = asyncio.get_running_loop()
        self._heard_at = time.monotonic()
        self._is_silent = False
        self._is_ended = False
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Return when the stream has ended and all of it has been written.

        Raises: AnswerBroken, UpstreamInterrupted, Cancelled, and what `on_silence` raises.
        """
        self._timer = self._loop.call_later(self._period_s, self._on_timer)
        self._upstream.follow(self._on_data, self._on_end)
        try:
            if not self._is_ended:
                self._writer.flush()
            while True:
                if self._writer.is_full:
                    await self._writer.drained()
                    self._upstream.go_on()
                elif self._is_ended:
                    break
                elif self._is_silent:
                    self._is_silent = False
                    await self._on_silence(time.monotonic() - self._heard_at)
                else:
                    self._waiter = self._loop.create_future()
                    await self._waiter
        finally:
            self._timer.cancel()
            self._upstream.stop_following()
            if self._record.first_token is not None:
                self._record.last_token = self._heard_at
        if self._failure is not None:
            raise self._failure
        rest = self._relay.flush()
        if rest:
            self._writer.hold(rest)

    def _on_data(self, chunk: bytes, is_last: bool) -> None:
        record, relay, writer = self._record, self._relay, self._writer
        self._heard_at = now = time.monotonic()
        try:
            lines = relay.push(chunk)
        except Exception as error:  # raised where the request's task sees it
            self._upstream.hold_back()
            self._on_end(error)
            return
        if record.first_token is None and relay.has_data:
            record.first_token = now
        if not lines:
            return
        if is_last:
            writer.hold(lines)
        elif writer.send(lines, now):
            self._upstream.hold_back()
            self._wake()

    def _on_end(self, error: Exception | None) -> None:
        if not self._is_ended:
            self._is_ended, self._failure = True, error
            self._wake()

    def _on_timer(self) -> None:
        left_s = self._heard_at + self._period_s - time.monotonic()
        if left_s <= 0:
            self._is_silent = True
            self._wake()
            left_s = self._period_s
        self._timer = self._loop.call_later(left_s, self._on_timer)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
