"""An OpenAI-compatible server that is none of ours, in a thread; it keeps what it was sent."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

MODEL = "ext/stub"
ANSWER = (
    b'{"id":"x","object":"chat.completion","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"from the stub"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}'
)
EVENTS = (
    b'data: {"choices":[{"index":0,"delta":{"content":"from"}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{"content":" the stub"},"finish_reason":"stop"}]}\n\n'
    b"data: [DONE]\n\n"
)


@dataclass(slots=True)
class Received:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Stub:
    """Serve one model; `status` and `error_body` replace the answer when set."""

    received: list[Received] = field(default_factory=list)
    status: int = 200
    error_body: bytes = b"<html>busy</html>"
    breaks_off: bool = False
    server: ThreadingHTTPServer = field(init=False)

    def __enter__(self) -> Self:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                """Keep the test's output clean."""

            def do_GET(self) -> None:
                models = {"object": "list", "data": [{"id": MODEL, "max_model_len": 2048}]}
                self._send(200, "application/json", json.dumps(models).encode())

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                stub.received.append(Received(self.path, headers, body))
                if stub.status != 200:
                    self._send(stub.status, "text/html", stub.error_body)
                elif json.loads(body).get("stream"):
                    self._stream()
                else:
                    self._send(200, "application/json", ANSWER)

            def _stream(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                data = EVENTS[:70] if stub.breaks_off else EVENTS
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                if stub.breaks_off:
                    self.close_connection = True
                else:
                    self.wfile.write(b"0\r\n\r\n")

            def _send(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                if status == 503:
                    self.send_header("Retry-After", "7")
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        """Return the base URL."""
        return f"http://127.0.0.1:{self.server.server_address[1]}"
