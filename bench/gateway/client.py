"""The client of the gateway benchmark: keep-alive unary requests and many streams at once."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from bench.gateway.mock import MODEL

# About 0.85 KB, as a short chat turn has.
_PROMPT: Final = "Tell me about gateways. " * 30
_STAMP: Final = re.compile(rb'"t(\d{6,}) "')


@dataclass(slots=True)
class StreamFigures:
    """What one round of streams saw; seconds."""

    first_token_s: list[float] = field(default_factory=list)
    chunk_delay_s: list[float] = field(default_factory=list)
    num_broken: int = 0


def request_bytes(path: str, *, stream: bool, max_tokens: int, **fields: object) -> bytes:
    """Return a whole HTTP request; the same body serves both dialects. `fields` go into it."""
    document = {
        "model": MODEL,
        "max_tokens": max_tokens,
        "stream": stream,
        "messages": [{"role": "user", "content": _PROMPT}],
        **fields,
    }
    body = json.dumps(document).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer none\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def unary(port: int, path: str, *, concurrency: int, count: int) -> list[float]:
    """Return the latencies, in seconds, of `count` requests over `concurrency` connections."""
    latencies: list[float] = []
    request = request_bytes(path, stream=False, max_tokens=16)

    async def one_connection(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(number):
            started = time.perf_counter()
            writer.write(request)
            await read_answer(reader)
            latencies.append(time.perf_counter() - started)
        writer.close()

    await asyncio.gather(*(one_connection(count // concurrency) for _ in range(concurrency)))
    return latencies


async def paced(
    port: int, path: str, *, concurrency: int, count: int, interval_s: float
) -> list[float]:
    """Return the latencies, in seconds, of requests that come at fixed times: an open loop.

    Each connection has one every `interval_s`, the connections in turn. A request that is held up
    by the one before it counts from when it was due.
    """
    latencies: list[float] = []
    request = request_bytes(path, stream=False, max_tokens=16)
    # Not the loop's clock: uvloop's counts whole milliseconds.
    begin = time.perf_counter() + 0.1

    async def one_connection(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for turn in range(count // concurrency):
            started = due = begin + (turn + number / concurrency) * interval_s
            if (early_s := due - time.perf_counter()) > 0:
                await asyncio.sleep(early_s)
                started = time.perf_counter()
            writer.write(request)
            await read_answer(reader)
            latencies.append(time.perf_counter() - started)
        writer.close()

    await asyncio.gather(*(one_connection(number) for number in range(concurrency)))
    return latencies


async def streams(
    port: int, path: str, *, begins_s: Sequence[float], num_chunks: int, **fields: object
) -> StreamFigures:
    """Run a stream from each of these times to its end; first tokens are noted as they come.

    `fields` go into the bodies.
    uvloop's timers count milliseconds, here and in the mock: times within one are the same.
    """
    figures = StreamFigures()
    request = request_bytes(path, stream=True, max_tokens=num_chunks, **fields)

    async def one_stream(begin_s: float) -> None:
        await asyncio.sleep(begin_s)
        started = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        writer.write(request)
        rest, num_seen = b"", 0
        while data := await reader.read(65536):
            now_ns = time.monotonic_ns()
            rest += data
            end = 0
            for stamp in _STAMP.finditer(rest):
                if not num_seen:
                    figures.first_token_s.append(time.perf_counter() - started)
                num_seen += 1
                figures.chunk_delay_s.append((now_ns - int(stamp[1])) / 1e9)
                end = stamp.end()
            rest = rest[end:]
            if rest.endswith(b"\r\n0\r\n\r\n"):  # a head may end in a nought as well
                break
        figures.num_broken += num_seen != num_chunks
        writer.close()

    await asyncio.gather(*map(one_stream, begins_s))
    return figures


async def read_answer(reader: asyncio.StreamReader, *, status: int = 200) -> None:
    """Read one answer. Raises: RuntimeError unless it has this status."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith((b"http/1.1 %d" % status, b"http/1.0 %d" % status)):
        rest = await reader.read(2000)
        raise RuntimeError(f"the answer is not {status}: {(head + rest).decode(errors='replace')}")
    begin = head.find(b"\r\ncontent-length:")
    if begin >= 0:
        await reader.readexactly(int(head[begin + 17 :].split(b"\r\n", 1)[0]))
        return
    while size := int(await reader.readline(), 16):
        await reader.readexactly(size + 2)
    await reader.readexactly(2)
