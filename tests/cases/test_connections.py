"""Clients that break the rules of the wire, read nothing, or leave: over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from aiohttp import web

from actors.front import body as body_module
from actors.front import written
from actors.front.connection import Connection
from cortexd.messages import Cancel, EndRequest, Place, Route
from tests.actors.front.test_proxy import MODEL as REMOTE
from tests.actors.front.test_proxy import NEURONS, replica, upstream
from tests.cases.case import DIALECTS, PATHS, DialectName, check_document
from tests.cases.table import CASES
from tests.doubles.front import ServedFront, async_test, chat_body, served_front


def parameters(number: int) -> pytest.MarkDecorator:
    """Run a test in both dialects, under the number of its case."""
    names = [pytest.param(name, id=f"case{number:02}-{name}") for name in DIALECTS]
    return pytest.mark.parametrize("dialect", names)


def head(dialect: DialectName, *lines: str) -> bytes:
    """Return a request's head with these header lines."""
    first = f"POST {PATHS[dialect]} HTTP/1.1"
    return "\r\n".join((first, "Host: x", *lines, "", "")).encode()


def request(dialect: DialectName, **fields: object) -> bytes:
    """Return a whole good request."""
    data = msgspec.json.encode(chat_body(**{"max_tokens": 100, "stream": True, **fields}))
    return head(dialect, f"Content-Length: {len(data)}") + data


@asynccontextmanager
async def connected(
    front: ServedFront, data: bytes, *, limit: int = 2**16
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection and send bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port, limit=limit)
    writer.write(data)
    try:
        yield reader, writer
    finally:
        writer.close()


async def refusal(reader: asyncio.StreamReader) -> tuple[int, object]:
    """Return the status and the document of the answer after which the server ends it all."""
    return parsed(await reader.read())


def parsed(answer: bytes) -> tuple[int, object]:
    """Return status and document of an answer."""
    start, _, body = answer.partition(b"\r\n\r\n")
    return int(start.split()[1]), msgspec.json.decode(body)


BAD_HEADS = {
    "two-lengths": ("Content-Length: 5", "Content-Length: 6"),
    "length-and-chunks": ("Content-Length: 5", "Transfer-Encoding: chunked"),
    "chunks-and-length": ("Transfer-Encoding: chunked", "Content-Length: 5"),
    "unknown-coding": ("Transfer-Encoding: chunked, weird",),
    "negative-length": ("Content-Length: -1",),
    "length-in-words": ("Content-Length: 5x",),
    "oversize-header": ("X: " + "a" * 20_000,),
    "name-with-space": ("Content-Length : 5",),
    "folded": ("X: a", " b"),
}


@pytest.mark.parametrize(
    ("lines", "dialect"),
    [
        pytest.param(lines, dialect, id=f"case13-{dialect}-{label}")
        for label, lines in BAD_HEADS.items()
        for dialect in DIALECTS
    ],
)
@async_test
async def test_ambiguous_head_is_refused_and_nothing_after_it_is_read(
    lines: tuple[str, ...], dialect: DialectName
) -> None:
    """400 and the end of the connection: a request smuggled behind it is never seen."""
    async with served_front() as front:
        smuggled = b"0\r\n\r\n" + request("openai", stream=False)
        async with connected(front, head(dialect, *lines) + smuggled) as (reader, _):
            status, document = await refusal(reader)
        assert status == 400
        check_document(CASES[13].refusal(dialect), dialect, document)
        assert front.fleet.all_sent(Route) == []


@parameters(13)
@async_test
async def test_bad_chunk_is_refused_in_the_dialect(dialect: DialectName) -> None:
    """The head was good, so the path is known; the connection ends all the same."""
    async with served_front() as front:
        data = head(dialect, "Transfer-Encoding: chunked") + b"zz\r\nhello\r\n0\r\n\r\n"
        async with connected(front, data) as (reader, _):
            status, document = await refusal(reader)
        assert status == 400
        check_document(CASES[13].refusal(dialect), dialect, document)
        assert front.fleet.all_sent(Route) == []


@parameters(12)
@async_test
async def test_head_that_never_ends_is_cut_off(dialect: DialectName) -> None:
    """However slowly it trickles; no seat is taken, other connections are left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "head_timeout_s", 0.1)
        async with served_front() as front:
            async with connected(front, head(dialect, "X: a")[:-4]) as (reader, writer):
                trickle = asyncio.create_task(_trickle(writer))
                # One piece: what the trickle sends after it may reset the connection.
                status, document = parsed(await reader.read(65536))
                trickle.cancel()
            assert status == 408
            check_document(CASES[12].refusal(dialect), dialect, document)
            assert front.fleet.all_sent(Route) == []
            patch.undo()  # which a good head on a busy machine might not meet either
            assert (await front.chat())[0] == 200


async def _trickle(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b" ")
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("dialect", "is_idle"),
    [
        pytest.param(name, is_idle, id=f"case12-{name}-{'idle' if is_idle else 'trickle'}")
        for name in DIALECTS
        for is_idle in (True, False)
    ],
)
@async_test
async def test_slow_body_is_cut_off(dialect: DialectName, is_idle: bool) -> None:
    """Silence for too long, or a rate that is only there to hold a place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body_module, "_IDLE_TIMEOUT_S", 0.1 if is_idle else 30.0)
        patch.setattr(body_module, "_GRACE_S", 30.0 if is_idle else 0.1)
        async with served_front() as front:
            data = head(dialect, "Content-Length: 100000") + b"{"
            async with connected(front, data) as (reader, writer):
                trickle = None if is_idle else asyncio.create_task(_trickle(writer))
                line = await reader.readline()
                fields = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
                (length,) = [field[15:] for field in fields if field.startswith("content-length:")]
                document = msgspec.json.decode(await reader.readexactly(int(length)))
                if trickle is not None:
                    trickle.cancel()
            assert line.split()[1] == b"408"
            check_document(CASES[12].refusal(dialect), dialect, document)
            assert front.fleet.all_sent(Route) == []


@parameters(40)
@async_test
async def test_client_that_reads_nothing_is_dropped(dialect: DialectName) -> None:
    """An engine's stream: cancelled there, and told as what it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(written, "WRITE_TIMEOUT_S", 0.1)
        async with served_front(send_buffer_bytes=4096) as front:
            front.fleet.context = 10_000
            front.fleet.reply = b"x" * 5000
            async with connected(front, request(dialect, max_tokens=9000), limit=1):
                await front.fleet.wait_for(Cancel)
                (record,) = await front.fleet.wait_for_finished()
            assert (record.status, record.error_code) == (499, "slow_client")
            assert front.fleet.num_running == 0


@parameters(40)
@async_test
async def test_node_is_held_back_by_a_client_that_reads_nothing(dialect: DialectName) -> None:
    """A relayed stream: what is buffered between the two is bounded, then both ends are closed."""
    piece = b'data: {"type":"content_block_delta","text":"' + b"x" * 65_000 + b'"}\n\n'
    num_sent = 0
    closed = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal num_sent
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            for _ in range(4000):
                await response.write(piece)
                num_sent += len(piece)
        finally:
            closed.set()
        return response

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(written, "WRITE_TIMEOUT_S", 0.3)
        async with (
            upstream(handler) as url,
            served_front(neurons=NEURONS, send_buffer_bytes=4096) as front,
        ):
            front.fleet.replicas = [replica("a", url)]
            async with connected(front, request(dialect, model=REMOTE), limit=1):
                await closed.wait()
                (record,) = await front.fleet.wait_for_finished()
        assert (record.status, record.error_code) == (499, "slow_client")
        # Of 260 MB: the kernel's buffers of two connections, and one of ours on each side.
        assert num_sent < 32 * 2**20


@parameters(41)
@async_test
async def test_half_closed_connection_counts_as_gone(dialect: DialectName) -> None:
    """A client that ends its half while its answer streams frees its seat at once."""
    async with served_front() as front:
        front.fleet.pause_after = 3
        async with connected(front, request(dialect)) as (_, writer):
            await front.fleet.paused.wait()
            writer.write_eof()
            await front.fleet.wait_for(Cancel)
            await front.fleet.wait_for(EndRequest)
            (record,) = await front.fleet.wait_for_finished()
        assert (record.status, record.error_code) == (499, "request_cancelled")


@pytest.mark.parametrize(
    ("dialect", "stage", "stream"),
    [
        pytest.param(name, stage, stream, id=f"case{case}-{name}-{stage}-{kind}")
        for name in DIALECTS
        for case, stage in (("24", "loading"), ("42", "prefill"), ("42", "decode"))
        for stream, kind in ((True, "stream"), (False, "unary"))
    ],
)
@async_test
async def test_client_that_leaves_frees_what_it_held(
    dialect: DialectName, stage: str, stream: bool
) -> None:
    """Whatever the stage: lease and sequence end, the record says 499 and the tokens so far."""
    async with served_front(first_byte_hold_ms=10) as front:
        if stage == "loading":
            front.fleet.begin_loading()
        front.fleet.pause_after = 3 if stage == "decode" else 0
        async with connected(front, request(dialect, stream=stream)) as (_, writer):
            await front.fleet.wait_for(Route)
            if stage != "loading":
                await front.fleet.paused.wait()
            writer.transport.abort()
        await front.fleet.wait_for(EndRequest)
        if stage != "loading":
            await front.fleet.wait_for(Cancel)
        (record,) = await front.fleet.wait_for_finished()
        assert (record.status, record.error_code) == (499, "request_cancelled")
        assert record.completion_tokens == (3 if stage == "decode" else 0)
        assert front.fleet.num_running == 0
        assert (front.fleet.submits == []) == (stage == "loading")


@pytest.mark.parametrize(
    ("dialect", "stream"),
    [
        pytest.param(name, stream, id=f"case42-{name}-queued-{kind}")
        for name in DIALECTS
        for stream, kind in ((True, "stream"), (False, "unary"))
    ],
)
@async_test
async def test_client_that_leaves_the_queue_gives_its_place_up(
    dialect: DialectName, stream: bool
) -> None:
    """While a gateway's router holds it back: the wait is ended there."""
    async with served_front(neurons=NEURONS, first_byte_hold_ms=10) as front:
        front.fleet.placing.clear()
        data = request(dialect, stream=stream, model=REMOTE)
        async with connected(front, data) as (_, writer):
            await front.fleet.wait_for(Place)
            writer.transport.abort()
        await front.fleet.wait_for(EndRequest)
        (record,) = await front.fleet.wait_for_finished()
        assert (record.status, record.error_code) == (499, "request_cancelled")


@parameters(22)
@async_test
async def test_cold_load_keeps_the_stream_alive(dialect: DialectName) -> None:
    """200 after the hold, keep-alives of both kinds, then the tokens; recorded as cold."""
    quick = {"first_byte_hold_ms": 10, "keepalive_s": 0.005, "event_keepalive_s": 0.02}
    async with served_front(**quick) as front:
        front.fleet.begin_loading()
        body = msgspec.json.encode(chat_body(max_tokens=50, stream=True))
        async with front.http.post(front.url + PATHS[dialect], data=body) as response:
            assert response.status == 200
            marks = [b": ping", b'"delta":{}' if dialect == "openai" else b"event: ping"]
            while marks:
                line = await response.content.readline()
                marks = [mark for mark in marks if mark not in line]
            front.fleet.finish_loading()
            rest = await response.read()
        ends = {"openai": b"data: [DONE]\n\n", "anthropic": b'data: {"type":"message_stop"}\n\n'}
        assert rest.endswith(ends[dialect])
        (record,) = await front.fleet.wait_for_finished()
        assert (record.status, record.cold_start) == (200, True)
