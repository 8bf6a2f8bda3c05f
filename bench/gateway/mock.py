"""The upstream of the gateway benchmark: as cheap as an OpenAI-compatible server can be in Python.

`python -m bench.gateway.mock PORT INTERVAL_S`. A streamed answer has `max_tokens` chunks, one each
interval; the content of a chunk is the monotonic clock in ns, so that a client on the same machine
can subtract. A unary answer comes at once. A field "mock" of the body asks for something else:
`{"interval_s": S}` for another pace, `{"is_mute": true}` for no answer at all, `{"status": N}` for
an error. `GET /closed` tells when requests were given up: the clock in ns, one for each.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Final, cast

import uvloop

MODEL: Final = "mock"
# All answer the same: models have series of their own in the metrics.
MODELS: Final = (MODEL, *(f"mock-{number}" for number in range(1, 16)))
_MODELS: Final = json.dumps(
    {
        "object": "list",
        "data": [{"id": model, "object": "model", "max_model_len": 32768} for model in MODELS],
    }
).encode()
_ERROR: Final = json.dumps(
    {"error": {"message": "as asked", "type": "mock", "code": "mock"}}
).encode()
_ANSWER: Final = json.dumps(
    {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "word " * 170},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 170, "total_tokens": 270},
    }
).encode()
_STREAM_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_CHUNK: Final = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1,"model":"mock",'
    b'"choices":[{"index":0,"delta":{"content":"t%d "},"finish_reason":null}]}\n\n'
)
_LAST: Final = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1,"model":"mock",'
    b'"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1,"model":"mock",'
    b'"choices":[],"usage":{"prompt_tokens":100,"completion_tokens":%d,"total_tokens":%d}}\n\n'
    b"data: [DONE]\n\n"
)


class Mock(asyncio.Protocol):
    """One connection; requests on it come one after the other."""

    def __init__(self, interval_s: float, closed_ns: list[int]) -> None:
        self._default_interval_s = self._interval_s = interval_s
        self._closed_ns = closed_ns
        self._is_answering = False
        self._buffer = b""
        self._left = 0
        self._num_chunks = 0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but type

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop streaming."""
        self._left = -1
        if self._is_answering:
            self._closed_ns.append(time.monotonic_ns())

    def data_received(self, data: bytes) -> None:
        """Take in a request; answer when it is whole."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            begin = head.find(b"\r\ncontent-length:")
            size = int(head[begin + 17 :].split(b"\r\n", 1)[0]) if begin >= 0 else 0
            if len(self._buffer) < end + 4 + size:
                return
            body = self._buffer[end + 4 : end + 4 + size]
            self._buffer = self._buffer[end + 4 + size :]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if not body:
            is_log = head.startswith(b"get /closed ")
            self._send(json.dumps(self._closed_ns).encode() if is_log else _MODELS)
            return
        request = json.loads(body)
        wish = request.get("mock") or {}
        self._is_answering = bool(wish.get("is_mute"))
        if self._is_answering:
            return
        self._interval_s = wish.get("interval_s", self._default_interval_s)
        if "status" in wish:
            self._send(_ERROR, wish["status"])
            return
        if not request.get("stream"):
            self._send(_ANSWER)
            return
        self._is_answering = True
        self._transport.write(_STREAM_HEAD)
        self._left = self._num_chunks = int(request["max_tokens"])
        self._next_chunk(asyncio.get_running_loop().time())

    def _send(self, body: bytes, status: int = 200) -> None:
        head = b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % (status, len(body)) + body)

    def _next_chunk(self, due_s: float) -> None:
        if self._left < 0:
            return
        if self._left == 0:
            self._is_answering = False
            last = _LAST % (self._num_chunks, 100 + self._num_chunks)
            self._transport.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(last), last))
            return
        self._left -= 1
        chunk = _CHUNK % time.monotonic_ns()
        self._transport.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        due_s += self._interval_s
        asyncio.get_running_loop().call_at(due_s, self._next_chunk, due_s)


async def serve(port: int, interval_s: float) -> None:
    """Serve until killed."""
    loop = asyncio.get_running_loop()
    closed_ns: list[int] = []
    server = await loop.create_server(
        lambda: Mock(interval_s, closed_ns), "127.0.0.1", port, backlog=2048
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), float(sys.argv[2])))
