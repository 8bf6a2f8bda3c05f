"""Answers written to the connection as bytes, in one piece or head first, past the HTTP library.

Its responses cost a relay as much as its parser and the loop of its connection together. What it is
handed in the end is a `WrittenAnswer`, which tells it only whether the connection goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from email.utils import formatdate
from http import HTTPStatus
from typing import Final

from aiohttp import HttpVersion11, web

from actors.front.cross_origin import ORIGIN_FIELDS
from actors.front.services import REQUEST_ID, SERVICES
from cortexd.errors import SlowClient

WRITE_TIMEOUT_S = 120.0
_PHRASES: Final = {status.value: status.phrase for status in HTTPStatus}
# Larger bodies go out as they are; to join a smaller one to its head is cheaper than two writes.
_JOINED_BYTES: Final = 64 * 1024
_NO_BODY: Final = frozenset({204, 304})

Fields = Iterable[tuple[str, str]]


class WrittenAnswer(web.StreamResponse):
    """An answer of which nothing is left for the library to send.

    A stream's head waits for its first piece, and its last piece may wait for the end mark: each
    write of its own costs as much as the rest of a piece's way.
    """

    def __init__(
        self,
        request: web.Request,
        status: int,
        *,
        is_kept: bool,
        is_chunked: bool = False,
        head: bytes = b"",
    ) -> None:
        # Without the library's own part: it would make what this answer does not have.
        self._transport = request.transport
        self._status = status
        self._keep_alive = is_kept
        self._is_chunked = is_chunked
        self._waiting = head
        self._end = b"0\r\n\r\n" if is_chunked else b""

    @property
    def prepared(self) -> bool:
        """Tell that the head has been sent."""
        return True

    async def prepare(self, request: web.BaseRequest) -> None:
        """Do nothing: the head has been sent."""

    async def write_eof(self, data: bytes = b"") -> None:
        """End the body, if that has not been done. Raises: ConnectionError."""
        self.finish()

    @property
    def chunk_sink(self) -> asyncio.Transport | None:
        """Return where chunks may be written framed already; None: not now, or not to this client.

        Whoever does looks first whether it is closing.
        """
        return self._transport if self._is_chunked and not self._waiting else None

    def send(self, data: bytes) -> None:
        """Write a piece of a stream, which is not empty, after what waits.

        On a connection that is lost nothing is written: the request's task is cancelled already.
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._is_chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._waiting:
            data, self._waiting = self._waiting + data, b""
        transport.write(data)

    def hold(self, data: bytes) -> None:
        """Let the last piece of a stream wait for `finish`."""
        self._waiting += b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data

    def flush(self) -> None:
        """Write what waits, so that a client sees the head of a stream that has not begun."""
        self._write(b"")

    def finish(self) -> None:
        """End a stream's body; done twice it is done once. Raises: ConnectionError."""
        end, self._end = self._end, b""
        self._write(end)

    def _write(self, end: bytes) -> None:
        waiting, self._waiting = self._waiting, b""
        if not waiting and not end:
            return
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the client went away")
        self._transport.write(waiting + end)


async def write_whole(
    request: web.Request, status: int, fields: Fields, body: bytes
) -> WrittenAnswer:
    """Write a whole answer. Raises: ConnectionError, SlowClient."""
    transport = _transport(request)
    is_kept = request.keep_alive and not request[SERVICES].is_draining
    length = "" if status in _NO_BODY else f"Content-Length: {len(body)}\r\n"
    head = _head(request, status, fields, length, is_kept=is_kept)
    request.writer.output_size += len(head)  # by which the library knows that a head was sent
    if len(body) <= _JOINED_BYTES:
        transport.write(head + body)
    else:
        transport.writelines((head, body))
    if request.protocol.writing_paused:
        await drained(request)
    return WrittenAnswer(request, status, is_kept=is_kept)


def begin_stream(request: web.Request, status: int, fields: Fields) -> WrittenAnswer:
    """Begin a stream; the end of one to an old client is that of its connection.

    Raises: ConnectionError.
    """
    _transport(request)
    is_chunked = request.version >= HttpVersion11
    is_kept = is_chunked and request.keep_alive and not request[SERVICES].is_draining
    framing = "Transfer-Encoding: chunked\r\n" if is_chunked else ""
    head = _head(request, status, fields, framing, is_kept=is_kept)
    request.writer.output_size += len(head)
    return WrittenAnswer(request, status, is_kept=is_kept, is_chunked=is_chunked, head=head)


async def drained(request: web.Request) -> None:
    """Wait until the client has read. Raises: SlowClient, ConnectionError."""
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await request.writer.drain()
    except TimeoutError:
        raise SlowClient(f"the client read nothing for {WRITE_TIMEOUT_S:g} s") from None


def _transport(request: web.Request) -> asyncio.Transport:
    transport = request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client went away")
    return transport


def _head(
    request: web.Request, status: int, fields: Fields, framing: str, *, is_kept: bool
) -> bytes:
    """Return a head. `fields` hold nothing of the connection, and no line ends: they were read."""
    request_id = request[REQUEST_ID]
    is_old = request.version < HttpVersion11
    lines = "".join([f"{name}: {value}\r\n" for name, value in (*fields, *request[ORIGIN_FIELDS])])
    connection = ""
    if is_old and is_kept:
        connection = "Connection: keep-alive\r\n"
    elif not is_old and not is_kept:
        connection = "Connection: close\r\n"
    return (
        f"HTTP/1.{0 if is_old else 1} {status} {_PHRASES.get(status, '')}\r\n"
        f"{lines}{framing}{connection}Date: {_now.text()}\r\n"
        f"x-request-id: {request_id}\r\nrequest-id: {request_id}\r\n\r\n"
    ).encode("utf-8", "surrogateescape")


class _Date:
    """The date of an answer, made once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = ""

    def text(self) -> str:
        """Return the date as HTTP writes it."""
        second = int(time.time())
        if second != self._second:
            self._second, self._text = second, formatdate(second, usegmt=True)
        return self._text


_now = _Date()
