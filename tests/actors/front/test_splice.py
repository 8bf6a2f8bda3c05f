"""Streams of a node whose bytes the network cuts anywhere: real sockets, both dialects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import pytest

from tests.actors.front.test_foreign_messages import message_events
from tests.actors.front.test_proxy import CHAT, MODEL, NEURONS, finished, replica
from tests.doubles.front import ServedFront, async_test, chat_body, served_front

_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_WORDS: Final = ["one ", "t" * 30, "caf\u00e9 ", "x" * 240, "y" * 300, "z" * 5000, "last"]
MESSAGES: Final = "/v1/messages"
_END: Final = (
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":7}}\n\n'
    b"data: [DONE]\n\n"
)


def word_event(word: str) -> bytes:
    """One chunk of a chat completion."""
    choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
    return b"data: " + msgspec.json.encode({"choices": [choice]}) + b"\n\n"


def framed(data: bytes, line: bytes = b"%x\r\n") -> bytes:
    """One chunk of HTTP."""
    return line % len(data) + data + b"\r\n"


def two_at_once(pieces: list[bytes]) -> list[bytes]:
    """Join each two pieces that follow one another."""
    return [b"".join(pieces[at : at + 2]) for at in range(0, len(pieces), 2)]


def cut(pieces: list[bytes], size: int) -> list[bytes]:
    """Cut the whole into segments of a size."""
    data = b"".join(pieces)
    return [data[at : at + size] for at in range(0, len(data), size)]


EVENTS: Final = [*map(word_event, _WORDS)]
CHUNKS: Final = [framed(event) for event in EVENTS]
LAST: Final = framed(_END) + b"0\r\n\r\n"
# What the node writes at a time.
SEGMENTS: Final = {
    "a chunk at a time": [*CHUNKS, LAST],
    "the end apart": [*CHUNKS, framed(_END), b"0\r\n\r\n"],
    "two chunks at a time": two_at_once([*CHUNKS, LAST]),
    "anywhere": cut([*CHUNKS, LAST], 97),
    "two events in a chunk": [*map(framed, two_at_once(EVENTS)), LAST],
    "an event in two chunks": [
        *(framed(part) for event in EVENTS for part in (event[:-9], event[-9:])),
        LAST,
    ],
    "a line end apart": [*(framed(part) for e in EVENTS for part in (e[:-1], e[-1:])), LAST],
    "a comment and half an event": [
        CHUNKS[0],
        *(framed(part) for event in EVENTS[1:] for part in (b": ping\n\n", event[:5], event[5:])),
        LAST,
    ],
    "capitals": [*(framed(event, b"%X\r\n") for event in EVENTS), LAST],
    "noughts": [*(framed(event, b"00%x\r\n") for event in EVENTS), LAST],
    "extensions": [*(framed(event, b"%x;a=b\r\n") for event in EVENTS), LAST],
}


@asynccontextmanager
async def node(segments: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """Answer one request with a head and these segments; yield the base URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
        writer.write(_HEAD)
        async for segment in segments:
            writer.write(segment)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def apart(segments: list[bytes]) -> AsyncIterator[bytes]:
    """Yield them so that the network mostly shows them one by one; no test counts on it."""
    for segment in segments:
        yield segment
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("name", SEGMENTS)
@async_test
async def test_stream_is_the_same_however_it_comes(name: str) -> None:
    """Every event reaches the client once and unchanged, and is counted; in both dialects."""
    for kind in ("cortex", "openai"):
        async with node(apart(SEGMENTS[name])) as url, served_front(neurons=NEURONS) as front:
            front.fleet.replicas = [replica("a", url, kind)]
            answer = await answered(front, CHAT)
            assert answer.replace(b": ping\n\n", b"") == b"".join([*EVENTS, _END])
            record = await finished(front)
            assert (record.prompt_tokens, record.completion_tokens) == (9, 7)
            assert (record.finish_reason, record.error_code) == ("stop", None)
    async with node(apart(SEGMENTS[name])) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url, "openai")]
        events = message_events(await answered(front, MESSAGES))
        assert [event["delta"]["text"] for event in events if "text" in event.get("delta", ())] == [
            *_WORDS
        ]
        assert events[-1]["type"] == "message_stop"
        assert (await finished(front)).completion_tokens == 7


@async_test
async def test_client_is_kept_awake_while_a_node_says_only_what_it_cannot_be_told() -> None:
    """Comments of a server in another dialect end where they are translated; ours take over."""
    heard = asyncio.Event()

    async def segments() -> AsyncIterator[bytes]:
        yield CHUNKS[0]
        while not heard.is_set():
            yield framed(b": still reading the prompt\n\n")
            await asyncio.sleep(0.005)
        yield LAST

    async with (
        node(segments()) as url,
        served_front(neurons=NEURONS, first_byte_hold_ms=10, keepalive_s=0.05) as front,
    ):
        front.fleet.replicas = [replica("a", url, "openai")]
        body = chat_body(model=MODEL, stream=True, max_tokens=9)
        async with front.http.post(front.url + MESSAGES, json=body) as response:
            while await response.content.readline() != b"event: ping\n":
                assert not response.content.at_eof()
            heard.set()
            assert message_events(await response.read())[-1]["type"] == "message_stop"


async def answered(front: ServedFront, path: str) -> bytes:
    """Return the stream that answers a request."""
    body = chat_body(model=MODEL, stream=True, max_tokens=9)
    async with front.http.post(front.url + path, json=body) as response:
        assert response.status == 200
        return await response.read()
