"""A connection to a node and the one answer it carries, as protocol callbacks without tasks.

An answer's body is gathered until somebody reads or follows it; who follows gets each piece in the
loop's turn in which it came. `actors.front.upstream` opens connections and keeps the idle ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, cast

from multidict import CIMultiDict

from actors.front.answer_parser import AnswerParser, BadAnswer

# What may wait in memory for somebody who reads it; a stream that nobody follows is held back.
_MAX_WAITING_BYTES: Final = 256 * 1024
# A whole answer is held in memory; 128 choices of 100,000 tokens with their probabilities fit.
MAX_BODY_BYTES: Final = 256 * 2**20


class AnswerBroken(Exception):
    """The node ended, or talked nonsense, before its answer was whole."""


class NodeAnswer:
    """One answer on its way. Its head is there once `has_head` has returned True."""

    def __init__(self, connection: NodeConnection) -> None:
        self._connection = connection
        self._parser = AnswerParser()
        self.status = 0  # 0: the head has not come
        self.is_event_stream = False  # whether the body is one of server-sent events
        self._waiting: list[bytes] = []
        self._num_waiting = 0
        self._waiter: asyncio.Future[None] | None = None
        self._on_data: Callable[[bytes, bool], None] | None = None
        self._on_end: Callable[[Exception | None], None] | None = None
        self._is_ended = False
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return f"NodeAnswer({self.status}, ended={self._is_ended}, error={self._error!r})"

    @property
    def headers(self) -> CIMultiDict[str]:
        """Return the headers."""
        return self._parser.headers

    async def has_head(self, timeout_s: float) -> bool:
        """Return True when the head has come, False when it has not within the time.

        Raises: AnswerBroken.
        """
        if not self.status and self._error is None:
            await self._wait(timeout_s)
        if not self.status and self._error is not None:
            raise self._error
        return self.status > 0

    async def read(self) -> bytes:
        """Return the whole body. Raises: AnswerBroken, also for one over `MAX_BODY_BYTES`."""
        self._on_data = self._gather
        self._connection.resume()
        while not self._is_ended:
            await self._wait(None)
        if self._error is not None:
            raise self._error
        body = self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting)
        self._waiting = [body]
        return body

    def follow(
        self, on_data: Callable[[bytes, bool], None], on_end: Callable[[Exception | None], None]
    ) -> None:
        """Hand over each piece of the body, beginning with those that wait; then the end, once.

        `on_data` is told too whether the piece is known to be the last one; `on_end` is given what
        broke the answer, None when it is whole.
        """
        self._on_data, self._on_end = on_data, on_end
        waiting, self._waiting = self._waiting, []
        if waiting:
            on_data(b"".join(waiting), self._parser.is_complete)
        if self._is_ended:
            on_end(self._error)
        else:
            self._connection.resume()

    def lend(self, borrower: asyncio.Protocol) -> None:
        """Let who follows get the connection's bytes unread, straight from the event loop.

        The borrower keeps whole chunks of the body, one at a time, and gives anything else to
        `take_back`; it hands a lost connection on to `connection_lost`. Between chunks only;
        anywhere else nothing happens.
        """
        if self._parser.is_before_chunk and not self._is_ended:
            self._connection.lend(borrower)

    def take_back(self, data: bytes) -> None:
        """Read what the borrower did not keep, and all that follows."""
        self._connection.take_back()
        self._connection.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Hear from the borrower that the connection is lost."""
        self._connection.connection_lost(exc)

    def hold_back(self) -> None:
        """Read nothing more from the node until `go_on`."""
        if not self._is_ended:
            self._connection.pause()

    def go_on(self) -> None:
        """Read again."""
        if not self._is_ended:
            self._connection.resume()

    def stop_following(self) -> None:
        """Hand nothing over any more; what still comes waits for `close`."""
        self._on_data = self._on_end = None
        self._connection.take_back()
        self.hold_back()

    def close(self) -> None:
        """Drop the connection unless the answer is whole; nothing is handed over any more."""
        self._on_data = self._on_end = None
        if not self._is_ended:
            self._is_ended = True
            self._connection.abort()

    # For the connection

    def take(self, data: bytes) -> bool:
        """Take in what the node sent; return True when the answer is whole. Raises: BadAnswer."""
        parser = self._parser
        body = parser.push(data)
        if not self.status:
            self.status = parser.status
            if self.status:
                media_type = parser.headers.get("Content-Type", "").partition(";")[0]
                self.is_event_stream = media_type.strip().lower() == "text/event-stream"
                self._wake()
        if body:
            if self._on_data is not None:
                self._on_data(body, parser.is_complete)
            else:
                self._gather(body, parser.is_complete)
                if self._num_waiting > _MAX_WAITING_BYTES:
                    self._connection.pause()
        return parser.is_complete

    def end_of_input(self) -> None:
        """Note that the node has closed its side. Raises: BadAnswer."""
        self._parser.end()

    @property
    def keeps_alive(self) -> bool:
        """Tell whether another request may follow on the connection."""
        return self._parser.keeps_alive

    def finish(self, error: Exception | None) -> None:
        """Tell who waits or follows that nothing comes any more."""
        if self._is_ended:
            return
        self._is_ended, self._error = True, error
        if self._waiter is not None:
            self._wake()
        if self._on_end is not None:
            self._on_end(error)

    def _gather(self, body: bytes, is_last: bool) -> None:
        self._num_waiting += len(body)
        if self._num_waiting > MAX_BODY_BYTES:
            raise BadAnswer(f"its body is over {MAX_BODY_BYTES} bytes")
        self._waiting.append(body)

    async def _wait(self, timeout_s: float | None) -> None:
        """Return when something has come, or after the time."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None if timeout_s is None else loop.call_later(timeout_s, self._wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class NodeConnection(asyncio.Protocol):
    """One connection; at most one request is on it. `on_free` hears when another may follow."""

    def __init__(self, on_free: Callable[[NodeConnection], None]) -> None:
        self._on_free = on_free
        self._transport: asyncio.Transport
        self._answer: NodeAnswer | None = None
        self._is_paused = False
        self.is_lost = False
        self.idle_since = 0.0
        self._is_lent = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but type

    def send(self, request: bytes) -> NodeAnswer:
        """Send a whole request and return its answer to come."""
        assert self._answer is None, "one request at a time"
        self._answer = NodeAnswer(self)
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        """Hand bytes to the answer; bytes that nobody asked for end the connection."""
        answer = self._answer
        if answer is None:
            self.abort()
            return
        try:
            is_whole = answer.take(data)
        except BadAnswer as error:
            self._fail(str(error))
            return
        if is_whole and self._answer is answer:
            self._release(answer)

    def eof_received(self) -> None:
        """Close when the node closes: its answer is as whole as it will be."""

    def connection_lost(self, exc: Exception | None) -> None:
        """End what still runs on the connection."""
        self.is_lost = True
        self._is_lent = False
        answer, self._answer = self._answer, None
        if answer is None:
            return
        if exc is not None:
            answer.finish(AnswerBroken(str(exc) or type(exc).__name__))
            return
        try:
            answer.end_of_input()
        except BadAnswer as error:
            answer.finish(AnswerBroken(str(error)))
        else:
            answer.finish(None)

    def lend(self, borrower: asyncio.Protocol) -> None:
        """Let another protocol get the bytes."""
        self._is_lent = True
        self._transport.set_protocol(borrower)

    def take_back(self) -> None:
        """Get the bytes again, if they were lent."""
        if self._is_lent:
            self._is_lent = False
            self._transport.set_protocol(self)

    def pause(self) -> None:
        """Read nothing for now."""
        if not self._is_paused and not self.is_lost:
            self._is_paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self._is_paused and not self.is_lost:
            self._is_paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close at once; what is under way is lost."""
        self._answer = None
        self.is_lost = True
        self._transport.abort()

    def _release(self, answer: NodeAnswer) -> None:
        self._answer = None
        if answer.keeps_alive and not self._transport.is_closing():
            self.resume()
            self._on_free(self)
        else:
            self.is_lost = True
            self._transport.close()
        answer.finish(None)

    def _fail(self, what: str) -> None:
        answer = self._answer
        self.abort()
        if answer is not None:
            answer.finish(AnswerBroken(what))
