"""Passes a node's stream on to a client in the very turn of the loop in which a piece arrives.

No task is woken for a piece and no timer set: the task of the request sleeps until there is
something to decide, which is silence, a client that does not keep up, a failure, or the end. Used
by `actors.front.proxy`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from actors.front.answer_parser import chunk_line
from actors.front.node_connection import NodeAnswer
from actors.front.record import RequestRecord
from actors.front.relayed import Relay
from actors.front.stream import EventWriter


class Splice(asyncio.Protocol):
    """One stream between its node and its client; `run` is called once.

    A protocol, since it borrows the node's connection while whole events pass in whole chunks.
    """

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
        """`on_silence` is awaited when the client has been sent nothing for `period_s`, in s.

        It is given how long the node has said nothing; after it another period begins.
        """
        self._upstream = upstream
        self._relay = relay
        self._writer = writer
        self._record = record
        self._period_s = period_s
        self._on_silence = on_silence
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._heard_at = time.monotonic()
        self._is_silent = False
        self._is_ended = False
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._sink: asyncio.Transport | None = None

    async def run(self) -> None:
        """Return when the stream has ended and all of it has been written.

        Raises: AnswerBroken, UpstreamInterrupted, Cancelled, and what `on_silence` raises.
        """
        self._timer = self._loop.call_later(self._period_s, self._on_timer)
        self._writer.on_full(self._on_full)
        self._upstream.follow(self._on_data, self._on_end)
        try:
            if not self._is_ended:
                self._writer.flush()
            while True:
                if self._writer.is_full:
                    self._upstream.hold_back()
                    await self._writer.drained()
                    self._upstream.go_on()
                elif self._is_ended:
                    break
                elif self._is_silent:
                    self._is_silent = False
                    self._writer.note_event(self._sent_at)
                    await self._on_silence(time.monotonic() - self._last_heard)
                else:
                    self._waiter = self._loop.create_future()
                    await self._waiter
        finally:
            self._timer.cancel()
            self._upstream.stop_following()
            self._writer.on_full(None)
            if self._record.first_token is not None:
                self._record.last_token = self._last_heard
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
            self._fail(error)
            return
        if record.first_token is None and relay.has_data:
            record.first_token = now
        if lines and is_last:
            writer.hold(lines)
        elif lines:
            self._sent_at = now
            writer.send(lines)
        if record.first_token is not None and not is_last and relay.takes_chunks:
            self._sink = writer.chunk_sink
            if self._sink is not None:
                self._upstream.lend(self)

    def data_received(self, data: bytes) -> None:
        """Pass on one HTTP chunk of whole events; give back anything else.

        Nearly all of a stream comes so. To unpack and pack it again costs more than the rest of its
        way through here.
        """
        line = chunk_line(len(data))
        if not (data.startswith(line) and data.endswith(b"\n\n\r\n")):
            self._upstream.take_back(data)
            return
        now = time.monotonic()
        try:
            framed = self._relay.push_chunk(data, len(line))
        except Exception as error:
            self._fail(error)
            return
        assert self._sink is not None, "chunks are asked for when there is one"
        if not framed:
            self._heard_at = now
        elif not self._sink.is_closing():  # else the request's task is cancelled already
            self._sent_at = now
            self._sink.write(framed)

    def connection_lost(self, exc: Exception | None) -> None:
        """Hand it on."""
        self._upstream.connection_lost(exc)

    @property
    def _last_heard(self) -> float:
        # What is sent has been heard: a piece need not set both.
        return max(self._heard_at, self._sent_at)

    def _on_full(self) -> None:
        self._upstream.hold_back()
        self._wake()

    def _fail(self, error: Exception) -> None:
        self._upstream.hold_back()
        self._on_end(error)

    def _on_end(self, error: Exception | None) -> None:
        if not self._is_ended:
            self._is_ended, self._failure = True, error
            self._wake()

    def _on_timer(self) -> None:
        left_s = self._sent_at + self._period_s - time.monotonic()
        if left_s <= 0:
            self._is_silent = True
            self._wake()
            left_s = self._period_s
        self._timer = self._loop.call_later(left_s, self._on_timer)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
