"""A small OpenAI-like server for tests of the terminal chat: one scripted answer per request."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.waiting import DEADLINE_S

Document = dict[str, object]


class FakeApi(ThreadingHTTPServer):
    """Serves `models`, answers each chat with the next of `replies`, records the bodies."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: list[Document] = []
        self.replies: list[bytes | tuple[int, Document]] = []
        self.bodies: list[Document] = []
        self.api_key: str | None = None  # asked for
        self.client_left = threading.Event()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeApi

    def do_GET(self) -> None:
        if self._is_refused():
            return
        self._json(200, {"object": "list", "data": self.server.models})

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        if self._is_refused():
            return
        self.server.bodies.append(body)
        reply = self.server.replies.pop(0)
        if isinstance(reply, tuple):
            self._json(*reply)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(reply)
        self.wfile.flush()
        if b"[DONE]" not in reply and b"error" not in reply and b"END" not in reply:
            # A stream without an end: hold it open until the client goes.
            self.connection.settimeout(DEADLINE_S)
            if self.connection.recv(1) == b"":
                self.server.client_left.set()

    def _is_refused(self) -> bool:
        key = self.server.api_key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return False
        self._json(401, {"error": {"code": "invalid_api_key", "message": "no key was given"}})
        return True

    def _json(self, status: int, document: Document) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def sse(*pieces: str, done: bool = True) -> bytes:
    """Return a stream of chat chunks with these texts."""
    events = [{"choices": [{"delta": {"role": "assistant"}}]}]
    events += [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    lines = [": keep-alive\n\n", *(f"data: {json.dumps(event)}\n\n" for event in events)]
    return "".join(lines + ["data: [DONE]\n\n"] * done).encode()


@contextmanager
def running_api() -> Iterator[FakeApi]:
    """Run the server for the time of a test."""
    server = FakeApi()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
