"""Hands a request to the node that serves its model, and the node's answer back, byte for byte.

The body goes out as it came in; only an alias is replaced by the model it means, and a messages
request to a server that speaks OpenAI's dialect alone is translated, as its answer is. A stream's
bytes are passed on as they arrive; while the node is silent, or the model loads there, the client
gets keep-alives. A request is tried once more elsewhere as long as no byte of an answer was
received.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web

from actors.front.dialect import Answer, Dialect
from actors.front.dispatch import Dispatch
from actors.front.error_response import (
    CODE_HEADER,
    anthropic_error_response,
    error_response,
    speaks_anthropic,
)
from actors.front.foreign_messages import ForeignStream, whole_message
from actors.front.load_note import load_note
from actors.front.node_connection import AnswerBroken, NodeAnswer
from actors.front.node_watch import is_accepted, is_done_by
from actors.front.record import RequestRecord
from actors.front.relayed import Relay, RelayedStream, read_whole
from actors.front.services import REQUEST_ID, SERVICES
from actors.front.splice import Splice
from actors.front.stream import STREAM_HEADERS, EventWriter, guarded
from actors.front.upstream import returned_fields
from actors.front.whole_answer import WholeAnswer
from actors.front.written import Fields, WrittenAnswer, begin_stream, write_whole
from cortexd.errors import (
    CortexError,
    DeadlineExceeded,
    NoHealthyNode,
    UpstreamError,
    UpstreamInterrupted,
    UpstreamProtocol,
    UpstreamStalled,
)
from cortexd.foreign_error import foreign_error
from cortexd.neuron_wire import answered_error
from cortexd.token_estimate import estimate_answer

# A neuron says something every second of a stream; another server may be silent for a long prompt.
_MAX_SILENCE_S: Final = {"cortex": 60.0, "openai": 300.0}
_Result = TypeVar("_Result")


class _Wanted(msgspec.Struct):
    """All that is read of a body that is handed on."""

    model: str
    stream: Any = None


_wanted_decoder = msgspec.json.Decoder(_Wanted)


async def forward(
    request: web.Request, record: RequestRecord, dialect: Dialect, body: bytes
) -> web.StreamResponse | None:
    """Answer through a remote node, or return None when this host serves the request itself.

    A body that names no model is not handed on: the caller's own checks say what is wrong with it.
    """
    try:
        wanted = _wanted_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    record.principal.check_model(wanted.model)
    forwarding = _Forwarding(request, record, dialect, body, wanted)
    try:
        return await forwarding.answer()
    finally:
        forwarding.release()


class _Forwarding:
    """One request on its way through this gateway."""

    def __init__(
        self,
        request: web.Request,
        record: RequestRecord,
        dialect: Dialect,
        body: bytes,
        wanted: _Wanted,
    ) -> None:
        self._request = request
        self._services = request[SERVICES]
        self._gateway = self._services.settings.gateway
        self._record = record
        self._deadline = asyncio.get_running_loop().time() + self._gateway.request_timeout_s
        self._is_stream = wanted.stream is True
        self._model = wanted.model
        self._dispatch = Dispatch(request, record, body, wanted.model, is_stream=self._is_stream)
        self._opening: asyncio.Task[NodeAnswer | None] | None = None
        self._dialect = dialect
        self._answer_id = dialect.id_prefix + self._dispatch.lease_id

    def release(self) -> None:
        """Close the node's socket at once and end the lease; nothing here waits."""
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
        elif self._opening is not None and not self._opening.cancelled():
            self._opening.exception()  # seen: it has ended the request, or nobody waits for it
        self._dispatch.release()

    async def answer(self) -> web.StreamResponse | None:
        """Return the client's answer, None when this host is to serve the request."""
        if not self._is_stream:
            return await self._limited(self._unary())
        upstream = self._dispatch.begin()
        until = asyncio.get_running_loop().time() + self._gateway.first_byte_hold_ms / 1000
        if upstream is None or not await is_accepted(upstream, until):
            self._opening = asyncio.create_task(self._dispatch.open())
            if not await is_done_by(self._opening, until):
                return await self._stream_from_now(self._opening)
            upstream = self._opening.result()
        else:
            upstream = await self._dispatch.open()  # its head is there: nothing is waited for
        if upstream is None:
            return None
        if upstream.status != 200:
            return await self._limited(self._whole(upstream))
        fields = returned_fields(upstream.headers)
        if not upstream.is_event_stream:
            fields = [*_without_type(fields), *STREAM_HEADERS.items()]
        return await self._stream(fields, upstream)

    async def _unary(self) -> web.StreamResponse | None:
        upstream = await self._dispatch.open()
        return None if upstream is None else await self._whole(upstream)

    async def _limited(self, work: Awaitable[_Result]) -> _Result:
        """Return the result.

        Raises: DeadlineExceeded when the request has lived too long, ShuttingDown.
        """
        task = asyncio.current_task()
        assert task is not None, "a request has its task"
        is_over = False

        def end() -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                task.cancel()

        timer = asyncio.get_running_loop().call_at(self._deadline, end)
        try:
            self._services.tell_of_end(end)
            return await work
        except asyncio.CancelledError:
            if not is_over or task.uncancel() > 0:
                raise  # the client has left too
            if self._services.ending is not None:
                raise self._services.ending from None
            raise DeadlineExceeded(
                f"the request took longer than {self._gateway.request_timeout_s:g} s "
                "(gateway.request_timeout_s)"
            ) from None
        finally:
            is_over = True
            self._services.forget_end(end)
            timer.cancel()

    # From the node: a whole answer

    async def _whole(self, upstream: NodeAnswer) -> web.StreamResponse:
        """Return an answer that is no stream; errors that are no JSON get our envelope.

        Raises: UpstreamProtocol when it is one: a client that asked for none cannot read it.
        """
        if upstream.status == 200 and upstream.is_event_stream:
            raise UpstreamProtocol(
                f'node "{self._dispatch.node}" answered a request without "stream" with an event '
                'stream; ask it with "stream": true, or try another',
                retry_after_s=2,
            )
        body = await self._read(upstream)
        record, status = self._record, upstream.status
        counts, record.finish_reason = read_whole(body)
        if counts is not None:
            record.prompt_tokens = counts.prompt_tokens
            record.completion_tokens = counts.completion_tokens
            record.cached_tokens = counts.cached_tokens
        elif status == 200:
            record.completion_tokens = estimate_answer(body)
            record.is_estimated = True
        fields = returned_fields(upstream.headers)
        if self._dispatch.is_translated:
            if status >= 400:
                raise self._answered(upstream, body)
            body = whole_message(
                body, message_id=self._answer_id, model=self._model, node=self._dispatch.node
            )
        elif status >= 400:
            error = self._answered(upstream, body)
            record.fail(error, status=status)
            if not _is_error_object(body):
                fields = _without_type(fields)
                fields.append(("Content-Type", "application/json"))
                body = self._envelope(error)
        record.status = status
        return await write_whole(self._request, status, fields, body)

    async def _read(self, upstream: NodeAnswer) -> bytes:
        try:
            return await upstream.read()
        except AnswerBroken as error:
            raise self._interrupted(error) from None

    def _answered(self, upstream: NodeAnswer, body: bytes) -> CortexError:
        node, status = self._dispatch.node, upstream.status
        if self._dispatch.is_translated:
            return foreign_error(node, status, body, _retry_after_s(upstream))
        if _is_error_object(body):
            if self._dispatch.kind == "openai":
                return foreign_error(node, status, body, _retry_after_s(upstream))
            return answered_error(node, status, body, upstream.headers.get(CODE_HEADER))
        return UpstreamError(
            f'node "{node}" answered HTTP {status} without an error object',
            retry_after_s=_retry_after_s(upstream),
        )

    def _envelope(self, error: CortexError) -> bytes:
        answer = (
            anthropic_error_response(error, self._request[REQUEST_ID])
            if speaks_anthropic(self._request)
            else error_response(error)
        )
        assert isinstance(answer.body, bytes), "an error is one piece"
        return answer.body

    # From the node: a stream

    async def _stream_from_now(
        self, opening: asyncio.Task[NodeAnswer | None]
    ) -> web.StreamResponse:
        """Begin the answer before the node has: the model loads, or a prompt is read."""
        response, writer = self._begin(STREAM_HEADERS.items())
        writer.flush()

        async def run() -> None:
            while not opening.done():
                await writer.write_keepalive(await load_note(self._services, self._model))
                await asyncio.wait({opening}, timeout=self._gateway.keepalive_s)
            upstream = opening.result()
            if upstream is None:
                raise NoHealthyNode("the node of this model went away; try again", retry_after_s=2)
            if upstream.status != 200:
                raise self._answered(upstream, await self._read(upstream))
            await self._relay(upstream, writer)

        return await self._guarded(response, writer, run())

    async def _stream(self, fields: Fields, upstream: NodeAnswer) -> web.StreamResponse:
        response, writer = self._begin(fields)
        return await self._guarded(response, writer, self._relay(upstream, writer))

    def _begin(self, fields: Fields) -> tuple[WrittenAnswer, EventWriter]:
        response = begin_stream(self._request, 200, fields)
        answer = Answer(
            id=self._answer_id,
            created=self._services.created,
            model=self._model,
            request_id=self._request[REQUEST_ID],
        )
        encoder = self._dialect.encoder(answer)
        return response, EventWriter(self._request, response, encoder, self._record)

    async def _guarded(
        self, response: WrittenAnswer, writer: EventWriter, work: Awaitable[None]
    ) -> web.StreamResponse:
        limited = self._limited(work)
        return await guarded(self._request, response, writer, self._record, limited)

    async def _relay(self, upstream: NodeAnswer, writer: EventWriter) -> None:
        """Pass the bytes on as they arrive. Raises: UpstreamInterrupted, Cancelled."""
        stream = self._new_relay()
        if not upstream.is_event_stream:
            stream = WholeAnswer(stream, self._dispatch.node)
        self._record.progress = lambda: (0, stream.num_tokens)
        splice = Splice(
            upstream,
            stream,
            writer,
            self._record,
            period_s=self._gateway.keepalive_s,
            on_silence=partial(self._on_silence, stream, writer),
        )
        try:
            await splice.run()
        except AnswerBroken as error:
            await self._end_event(stream, writer)
            raise self._interrupted(error) from None
        except UpstreamInterrupted:
            await self._end_event(stream, writer)
            raise
        finally:
            self._note(stream)

    def _new_relay(self) -> Relay:
        if not self._dispatch.is_translated:
            return RelayedStream()
        return ForeignStream(
            message_id=self._answer_id, model=self._model, node=self._dispatch.node
        )

    async def _on_silence(self, stream: Relay, writer: EventWriter, silence_s: float) -> None:
        """Fill a silence, or give up on the node. Raises: UpstreamStalled."""
        max_silence_s = _MAX_SILENCE_S[self._dispatch.kind]
        if silence_s > max_silence_s:
            self._dispatch.failed(f"silent for {max_silence_s:g} s")
            raise UpstreamStalled(
                f'node "{self._dispatch.node}" said nothing for {max_silence_s:g} s; try again',
                retry_after_s=2,
            )
        if stream.is_between_events:
            await writer.write_keepalive()

    async def _end_event(self, stream: Relay, writer: EventWriter) -> None:
        """Close an event that the node left open, so that ours is one of its own."""
        if not stream.is_between_events:
            await writer.write_event(b"\n")

    def _note(self, stream: Relay) -> None:
        counts = stream.counts()
        record = self._record
        record.progress = None
        record.prompt_tokens = counts.prompt_tokens
        record.completion_tokens = counts.completion_tokens
        record.cached_tokens = counts.cached_tokens
        record.is_estimated = counts.is_estimated
        record.finish_reason = stream.finish_reason
        record.error_code = stream.error_code

    def _interrupted(self, error: Exception) -> UpstreamInterrupted:
        cause = str(error) or type(error).__name__
        self._dispatch.failed(cause)
        return UpstreamInterrupted(
            f'node "{self._dispatch.node}" ended in the middle of its answer ({cause}); try again',
            retry_after_s=2,
        )


def _without_type(fields: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [field for field in fields if field[0].lower() != "content-type"]


def _retry_after_s(upstream: NodeAnswer) -> float | None:
    """Return the node's own hint; its other form, a date, is left out."""
    value = upstream.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else None


def _is_error_object(body: bytes) -> bool:
    """Tell whether a client can read the body as an error of either dialect."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(document, dict) and isinstance(document.get("error"), dict)
