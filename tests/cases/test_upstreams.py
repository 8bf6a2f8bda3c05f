"""Nodes that die, stall, or send what is no answer; three ways through a gateway.

The client's dialect and the kind of its node: OpenAI passed on, messages passed on to a neuron of
ours, messages translated for a server that has only chats.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import msgspec
import pytest
from aiohttp import web

from actors.front import proxy
from cortexd.errors import ShuttingDown
from cortexd.messages import NodeFailed, RequestFinished
from tests.actors.front.test_proxy import MODEL, NEURONS, Handler, replica, upstream
from tests.cases.case import PATHS, DialectName, check_answer, check_document
from tests.cases.table import CASES
from tests.doubles.front import ServedFront, async_test, chat_body, served_front

TEXT: Final = "Grüße, 日本 🙂 data: [DONE]\n\n: no comment"
EVENT_STREAM: Final = {"Content-Type": "text/event-stream"}


@dataclass(frozen=True, slots=True)
class Way:
    """One way through; its node streams `first`, then `rest`, which ends the answer."""

    name: str
    dialect: DialectName
    kind: str
    first: bytes
    rest: bytes

    @property
    def is_translated(self) -> bool:
        """Tell whether the client gets other bytes than the node sent."""
        return self.dialect == "anthropic" and self.kind == "openai"

    @property
    def end_mark(self) -> bytes:
        """What only a whole answer has."""
        return b"data: [DONE]\n" if self.dialect == "openai" else b'"message_stop"'


def chunk(**fields: Any) -> bytes:
    """One event of a chat stream."""
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


def event(kind: str, **fields: Any) -> bytes:
    """One event of a messages stream."""
    data = json.dumps({"type": kind, **fields}, ensure_ascii=False, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\n\n".encode()


CHUNKS: Final = (
    chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": TEXT}}]),
    chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
    + chunk(choices=[], usage={"prompt_tokens": 9, "completion_tokens": 4})
    + b"data: [DONE]\n\n",
)
EVENTS: Final = (
    event("message_start", message={"usage": {"input_tokens": 9, "output_tokens": 0}})
    + event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    + event("content_block_delta", index=0, delta={"type": "text_delta", "text": TEXT}),
    event("content_block_stop", index=0)
    + event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 4})
    + event("message_stop"),
)
WAYS: Final = (
    Way("chat", "openai", "cortex", *CHUNKS),
    Way("message", "anthropic", "cortex", *EVENTS),
    Way("translated", "anthropic", "openai", *CHUNKS),
)


def ways(number: int, *names: str) -> pytest.MarkDecorator:
    """Run a test all ways, or those of some names, under the number of its case."""
    found = [way for way in WAYS if not names or way.name in names]
    ids = [f"case{number:02}-{way.dialect}-{way.name}" for way in found]
    return pytest.mark.parametrize("way", found, ids=ids)


@asynccontextmanager
async def gateway(way: Way, *handlers: Handler, **settings: Any) -> AsyncIterator[ServedFront]:
    """A front whose replicas are these handlers, in this order."""
    async with (
        _all_served(handlers) as urls,
        served_front(neurons=NEURONS, **{"keepalive_s": 0.02, **settings}) as front,
    ):
        front.fleet.replicas = [
            replica(name, url, kind=way.kind) for name, url in zip("ab", urls, strict=False)
        ]
        yield front


@asynccontextmanager
async def _all_served(handlers: tuple[Handler, ...]) -> AsyncIterator[list[str]]:
    if not handlers:
        yield []
        return
    async with upstream(handlers[0]) as url, _all_served(handlers[1:]) as others:
        yield [url, *others]


def streaming(write: Callable[[web.StreamResponse], Awaitable[None]]) -> Handler:
    """A node that answers with a stream."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=EVENT_STREAM)
        await response.prepare(request)
        await write(response)
        return response

    return handler


def sending(data: bytes) -> Handler:
    """A node whose stream is these bytes."""

    async def write(response: web.StreamResponse) -> None:
        await response.write(data)

    return streaming(write)


def answering(status: int, body: bytes, **headers: str) -> Handler:
    """A node that answers whole."""

    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status, body=body, headers=headers)

    return handler


async def leaving(request: web.Request) -> web.Response:
    """A node that takes the request and is gone."""
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def ask(front: ServedFront, way: Way, **fields: Any) -> tuple[int, bytes, Any]:
    """Ask; return status, body and headers."""
    body = chat_body(model=MODEL, max_tokens=50, **fields)
    async with front.http.post(front.url + PATHS[way.dialect], json=body) as response:
        return response.status, await response.read(), response.headers


async def record(front: ServedFront) -> RequestFinished:
    """Return the record of the only request."""
    (found,) = await front.fleet.wait_for_finished()
    return found


def text_of(way: Way, data: bytes) -> str:
    """Return the text of a stream as its client reads it."""
    documents = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
    if way.dialect == "anthropic":
        deltas = [document.get("delta", {}) for document in documents]
        return "".join(delta.get("text", "") for delta in deltas)
    choices = [choice for document in documents for choice in document["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def last_error(way: Way, data: bytes) -> Any:
    """Return the document of the error event that a stream ends with."""
    assert way.end_mark not in data.replace(TEXT.encode(), b"")
    events = data.removesuffix(b"\n\n").split(b"\n\n")
    lines = events[-1].split(b"\n")
    assert lines[-1].startswith(b"data: ")
    if way.dialect == "anthropic":
        assert b"event: error" in lines
    return msgspec.json.decode(lines[-1][6:])


@ways(32)
@async_test
async def test_node_that_dies_before_its_answer_is_left_for_another(way: Way) -> None:
    """One retry, never two; without another replica the client is told to come back."""
    good = answering(200, b'{"choices":[{"message":{"content":"x"}}]}')
    async with gateway(way, leaving, good) as front:
        assert (await ask(front, way))[0] == 200
        failed = [one.node for one in front.fleet.all_sent(NodeFailed)]  # type: ignore[attr-defined]
        assert failed == ["a"]
        front.fleet.replicas.pop()
        for stream in (False, True):
            status, body, headers = await ask(front, way, stream=stream)
            check_answer(CASES[32], way.dialect, status, json.loads(body), headers)


@ways(33)
@async_test
async def test_node_that_dies_in_mid_stream_ends_it_with_an_error(way: Way) -> None:
    """What came stays, the error follows, no end mark; what was used is recorded."""

    first_is_read = asyncio.Event()

    async def write(response: web.StreamResponse) -> None:
        await response.write(way.first)
        await first_is_read.wait()
        raise ConnectionResetError

    async with gateway(way, streaming(write)) as front:
        response = await front.http.post(
            front.url + PATHS[way.dialect],
            json=chat_body(model=MODEL, max_tokens=50, stream=True),
        )
        data = b""
        while "日本".encode() not in data:
            data += await response.content.readline()
        first_is_read.set()
        assert (response.status, text_of(way, data)) == (200, TEXT)
        data += await response.read()
        check_document(CASES[33].refusal(way.dialect), way.dialect, last_error(way, data))
        seen = await record(front)
        assert (seen.status, seen.error_code) == (200, "upstream_interrupted")


@ways(34)
@async_test
async def test_node_that_stalls_in_mid_stream_is_given_up(way: Way) -> None:
    """Keep-alives meanwhile; its socket is closed, the router hears of it."""
    closed = asyncio.Event()

    async def write(response: web.StreamResponse) -> None:
        await response.write(way.first)
        try:
            await asyncio.Event().wait()
        finally:
            closed.set()

    with pytest.MonkeyPatch.context() as patch:
        async with gateway(way, streaming(write)) as front:
            body = chat_body(model=MODEL, max_tokens=50, stream=True)
            response = await front.http.post(front.url + PATHS[way.dialect], json=body)
            data = b""
            while b": ping\n" not in data:
                data += await response.content.readline()
            patch.setattr(proxy, "_MAX_SILENCE_S", {"cortex": 0.1, "openai": 0.1})
            data += await response.read()
            check_document(CASES[34].refusal(way.dialect), way.dialect, last_error(way, data))
            await closed.wait()
            await front.fleet.wait_for(NodeFailed)
            assert (await record(front)).error_code == "upstream_stalled"


@ways(35, "chat", "message")
@async_test
async def test_bad_event_is_passed_on_as_it_is(way: Way) -> None:
    """In its own dialect nothing of a stream is judged."""
    data = way.first + b"data: {no json\n\n" * 5 + way.rest
    async with gateway(way, sending(data)) as front:
        assert (await ask(front, way, stream=True))[1] == data


@ways(35, "translated")
@async_test
async def test_bad_event_is_left_out_of_a_translation(way: Way) -> None:
    """Two are forgiven, the third ends the answer."""
    for count in (2, 3):
        data = way.first + b"data: {no json\n\n" * count + way.rest
        async with gateway(way, sending(data)) as front:
            _, got, _ = await ask(front, way, stream=True)
            if count == 2:
                assert (text_of(way, got), way.end_mark in got) == (TEXT, True)
                continue
            check_document(CASES[35].refusal(way.dialect), way.dialect, last_error(way, got))
            assert (await record(front)).error_code == "upstream_protocol"


@ways(36)
@async_test
async def test_odd_but_valid_events_are_read(way: Way) -> None:
    """CRLF, comments, no space after the colon, data of several lines; end marks inside text."""
    plain = way.first + way.rest
    odd = b": hello\n\n" + plain.replace(b"\ndata: {", b"\ndata:{").replace(b"\n", b"\r\n")
    if way.is_translated:
        odd = odd.replace(b'"choices": [', b'"choices":\r\ndata: [')
    async with gateway(way, sending(odd)) as front:
        _, data, _ = await ask(front, way, stream=True)
        if way.is_translated:
            assert (text_of(way, data), way.end_mark in data) == (TEXT, True)
        else:
            assert data == odd
        seen = await record(front)
        assert (seen.prompt_tokens, seen.completion_tokens) == (9, 4)


@ways(37)
@async_test
async def test_single_bytes_give_the_same_text(way: Way) -> None:
    """Each byte in a segment of its own, multi-byte characters and all."""

    async def write(response: web.StreamResponse) -> None:
        for byte in way.first + way.rest:
            await response.write(bytes([byte]))

    async with gateway(way, streaming(write)) as front:
        _, data, _ = await ask(front, way, stream=True)
        assert (text_of(way, data), way.end_mark in data) == (TEXT, True)
        if not way.is_translated:
            lines = [line for line in data.split(b"\n") if not line.startswith(b": ping")]
            assert b"\n".join(lines) == way.first + way.rest


@ways(38)
def test_missing_usage_is_counted_and_flagged(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    """Streamed and whole; what a node counts itself bears no flag."""
    caplog.set_level("INFO")
    rest = b"\n\n".join(part for part in way.rest.split(b"\n\n") if b'"usage"' not in part)
    whole = b'{"choices":[{"message":{"content":"one two three"}}]}'
    first = way.first.replace(b'"usage":{"input_tokens":9,"output_tokens":0}', b"")

    @async_test
    async def run() -> None:
        for handler, stream in (
            (sending(way.first + way.rest), True),
            (sending(first + rest), True),
            (answering(200, whole), False),
        ):
            async with gateway(way, handler) as front:
                assert (await ask(front, way, stream=stream))[0] == 200
                assert (await record(front)).completion_tokens > 0

    run()
    lines = [entry for entry in caplog.records if entry.getMessage() == "request.finished"]
    flags = [line.cortexd_fields["estimated"] for line in lines]  # type: ignore[attr-defined]
    assert flags == [False, True, True]


@pytest.mark.parametrize("body", [b"<html>down</html>", b""], ids=["html", "empty"])
@ways(39)
@async_test
async def test_error_that_is_no_object_gets_the_dialects_envelope(way: Way, body: bytes) -> None:
    """502 as it is; of a 503 the class and the hint are kept."""
    for stream in (False, True):
        async with gateway(way, answering(502, body)) as front:
            status, got, headers = await ask(front, way, stream=stream)
            check_answer(CASES[39], way.dialect, status, json.loads(got), headers)
            assert headers["Content-Type"].startswith("application/json")
        async with gateway(way, answering(503, body, **{"Retry-After": "7"})) as front:
            status, got, headers = await ask(front, way, stream=stream)
            assert (status, headers["Retry-After"]) == (529 if way.is_translated else 503, "7")
            assert json.loads(got)["error"]["message"]


@ways(44)
@async_test
async def test_stream_outlives_the_polls_of_its_node(way: Way) -> None:
    """A node that answers no poll any more, and whose stream flows, is not given up."""
    first_is_read = asyncio.Event()

    async def write(response: web.StreamResponse) -> None:
        await response.write(way.first)
        await first_is_read.wait()
        await response.write(way.rest)

    async with gateway(way, streaming(write)) as front:
        body = chat_body(model=MODEL, max_tokens=50, stream=True)
        async with front.http.post(front.url + PATHS[way.dialect], json=body) as response:
            line = b""
            while "日本".encode() not in line:
                line = await response.content.readline()
            front.fleet.lost_nodes.add("a")
            first_is_read.set()
            assert way.end_mark in await response.read()
        assert (await record(front)).error_code is None


@ways(48, "chat", "message")
@async_test
async def test_node_without_the_model_is_left_for_another(way: Way) -> None:
    """A neuron that took over an address: it is a stale view of ours, no fault of the client's."""
    async with served_front() as neuron, gateway(way, answering(200, b"{}")) as front:
        stale = replica("stale", neuron.url)  # a real one, which has another model
        front.fleet.replicas.insert(0, stale)
        assert (await ask(front, way))[0] == 200
        front.fleet.replicas = [stale]
        for stream in (False, True):
            status, body, headers = await ask(front, way, stream=stream)
            check_answer(CASES[48], way.dialect, status, json.loads(body), headers)


@ways(48, "chat", "message")
@async_test
async def test_node_that_drains_is_left_for_another(way: Way) -> None:
    """Its refusal bears the code in both dialects."""
    async with served_front() as neuron, gateway(way, answering(200, b"{}")) as front:
        neuron.services.is_draining = True
        front.fleet.replicas.insert(0, replica("leaving", neuron.url))
        assert (await ask(front, way))[0] == 200


@ways(53)
@async_test
async def test_shutdown_ends_forwarded_streams_with_an_error(way: Way) -> None:
    """Those that a node still answers, and those that still wait for one."""

    async def write(response: web.StreamResponse) -> None:
        await response.write(way.first)
        await asyncio.Event().wait()

    async with gateway(way, streaming(write), first_byte_hold_ms=10) as front:
        url = front.url + PATHS[way.dialect]
        body = chat_body(model=MODEL, max_tokens=50, stream=True)
        flowing = await front.http.post(url, json=body)
        await flowing.content.readline()
        front.fleet.placing.clear()
        waiting = await front.http.post(url, json=body)
        assert [flowing.status, waiting.status] == [200, 200]
        await _check_shutdown(front, way, flowing, waiting)


@ways(53, "chat", "message")
@async_test
async def test_shutdown_ends_local_streams_with_an_error(way: Way) -> None:
    """Those of an engine here, and those that still wait for the model to load."""
    async with served_front(first_byte_hold_ms=10, keepalive_s=0.02) as front:
        url = front.url + PATHS[way.dialect]
        body = chat_body(max_tokens=50, stream=True)
        front.fleet.pause_after = 3
        flowing = await front.http.post(url, json=body)
        await flowing.content.readline()
        front.fleet.begin_loading()
        waiting = await front.http.post(url, json=body)
        await _check_shutdown(front, way, flowing, waiting)


async def _check_shutdown(front: ServedFront, way: Way, *responses: aiohttp.ClientResponse) -> None:
    front.services.end_all(ShuttingDown("this server is shutting down"))
    for response in responses:
        document = last_error(way, await response.read())
        check_document(CASES[53].refusal(way.dialect), way.dialect, document)
