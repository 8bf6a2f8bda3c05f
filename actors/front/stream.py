"""Writes one answer as server-sent events.

The 200 is held back until the first token or `gateway.first_byte_hold_ms`, so that quick failures
keep their honest status. After that silence is a bug: a comment line every `keepalive_s` for hops
that count bytes, an event that changes nothing every `event_keepalive_s` for clients that count
events. A failure after the first byte is an error event and the end of the stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from aiohttp import web

from actors.front.choice import ChoiceOutput
from actors.front.connection import Connection
from actors.front.dialect import Answer, ChunkEncoder, encoded
from actors.front.generation import Generation
from actors.front.load_note import load_note
from actors.front.record import CLIENT_GONE_STATUS, RequestRecord
from actors.front.services import SERVICES, Services
from actors.front.written import WrittenAnswer, begin_stream, drained
from cortexd.errors import Cancelled, CortexError, Internal
from cortexd.log import event

STREAM_HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


async def stream_answer(
    request: web.Request,
    generation: Generation,
    answer: Answer,
    encoder: ChunkEncoder,
    record: RequestRecord,
) -> web.StreamResponse:
    """Run the generation and write its events; errors before the first byte are raised."""
    gateway = request[SERVICES].settings.gateway
    outputs = await generation.next(gateway.first_byte_hold_ms / 1000)
    response = begin_stream(request, 200, STREAM_HEADERS.items())
    writer = EventWriter(request, response, encoder, record)
    if not outputs:
        writer.flush()

    async def run() -> None:
        nonlocal outputs
        while True:
            answer.fingerprint = generation.fingerprint
            if outputs:
                await writer.write_event(await encoded(outputs, partial(_chunks, encoder, outputs)))
            else:
                is_waiting = not generation.is_submitted
                services = request[SERVICES]
                await writer.write_keepalive(
                    await load_note(services, answer.model) if is_waiting else b""
                )
            if generation.is_finished:
                break
            outputs = await generation.next(gateway.keepalive_s)
        writer.hold(encoder.end(generation.usage()))

    return await guarded(request, response, writer, record, run())


async def guarded(
    request: web.Request,
    response: WrittenAnswer,
    writer: EventWriter,
    record: RequestRecord,
    work: Awaitable[None],
) -> web.StreamResponse:
    """Run what writes a stream and end it; a failure is its last event, without an end mark."""
    try:
        await work
        await writer.finish()
    except Cancelled as error:
        record.fail(error, status=CLIENT_GONE_STATUS)
        abort_connection(request)
    except CortexError as error:
        record.fail(error, status=response.status)
        await writer.write_error(error)
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception as error:
        await _tell_fault(request[SERVICES], record, writer, error)
    return response


async def _tell_fault(
    services: Services, record: RequestRecord, writer: EventWriter, error: Exception
) -> None:
    """End a stream that failed in a way nobody foresaw: called where the error is handled.

    It is too late for a status: the client gets an error event, the log the traceback.
    """
    event(services.log, "http.failed", 40, exc_info=True, id=record.request_id, error=repr(error))
    fault = Internal("the server failed; see its log")
    record.fail(fault, status=record.status)
    await writer.write_error(fault)


def _chunks(encoder: ChunkEncoder, outputs: list[ChoiceOutput]) -> bytes:
    return b"".join(map(encoder.chunk, outputs))


class EventWriter:
    """Writes to one stream, with the clocks of both kinds of keep-alive."""

    def __init__(
        self,
        request: web.Request,
        response: WrittenAnswer,
        encoder: ChunkEncoder,
        record: RequestRecord,
    ) -> None:
        assert request.transport is not None, "the head has been written"
        record.status = response.status
        self._record = record
        self._request = request
        assert isinstance(request.protocol, Connection), "the server makes no others"
        self._protocol = request.protocol
        self._transport = request.transport
        self._response = response
        self._event_period_s = request[SERVICES].settings.gateway.event_keepalive_s
        self._encoder = encoder
        self._clock = time.monotonic
        self._last_event = self._clock()

    @property
    def is_full(self) -> bool:
        """Tell whether as much waits for the client as may."""
        return self._protocol.writing_paused

    def on_full(self, hear: Callable[[], None] | None) -> None:
        """Have `hear` called each time that `is_full` becomes true; None: no more."""
        self._protocol.on_full = hear

    def note_event(self, at: float) -> None:
        """Note when an event was sent by `send` or `chunk_sink`; monotonic, s."""
        self._last_event = max(self._last_event, at)

    @property
    def chunk_sink(self) -> asyncio.Transport | None:
        """Return where chunks may be written framed already; None: not now, or not to this client.

        Whoever does looks first whether it is closing.
        """
        return self._response.chunk_sink

    def send(self, data: bytes) -> None:
        """Write event bytes, which are not empty, without waiting."""
        self._response.send(data)

    def hold(self, data: bytes) -> None:
        """Let the last event bytes of a stream go out with its end mark."""
        self._response.hold(data)

    def flush(self) -> None:
        """Show the client the head of a stream that has not begun. Raises: ConnectionError."""
        self._response.flush()

    async def finish(self) -> None:
        """End the stream, after what is held. Raises: SlowClient, ConnectionError."""
        self._response.finish()
        if self.is_full:
            await self.drained()

    async def drained(self) -> None:
        """Wait until the client has read. Raises: SlowClient, ConnectionError."""
        await drained(self._request)

    async def write_event(self, data: bytes) -> None:
        """Write event bytes. Raises: Cancelled when the client does not read."""
        await self._write(data, self._clock())

    async def write_keepalive(self, note: bytes = b"") -> None:
        """Write a comment, or an event when the last one is too long ago.

        `note` is a comment line that says what the silence is for, in either case.
        """
        if self._clock() - self._last_event >= self._event_period_s:
            self._record.num_keepalive_events += 1
            await self.write_event(note + self._encoder.keepalive())
        else:
            self._record.num_comments += 1
            await self._write(note or self._encoder.comment(), self._last_event)

    async def write_error(self, error: CortexError) -> None:
        """Write the error event; the body then ends properly.

        The connection stays open: the head has promised that it may be used again, and a client
        that does so must not meet a closed one.
        """
        await self.write_event(self._encoder.error(error))

    async def _write(self, data: bytes, event_at: float) -> None:
        if self._transport.is_closing():
            raise ConnectionResetError("the client went away")
        if not data:
            return  # an empty chunk would end the body
        self.note_event(event_at)
        self.send(data)
        if self.is_full:
            await self.drained()


def abort_connection(request: web.Request) -> None:
    """Drop the connection and what is still buffered for it."""
    if request.transport is not None:
        request.transport.abort()
