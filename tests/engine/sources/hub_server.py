"""A hub in miniature: enough of its HTTP interface for the real client to list and download."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one repository, `org/model`; `requests` lists what was asked."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.status = 200
        self.error_code = ""
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def downloads(self) -> list[str]:
        """The files whose bodies were fetched."""
        return [path.rsplit("/", 1)[-1] for path in self.requests if path.startswith("GET /org")]


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.status != 200:
            headers = {"X-Error-Code": self.server.error_code, "X-Error-Message": "refused here"}
            self._send(self.server.status, b"{}", headers)
        elif self.path.startswith("/api/models/org/model"):
            siblings = [
                {"rfilename": name, "size": len(data)} for name, data in self.server.files.items()
            ]
            answer = {"id": "org/model", "sha": COMMIT, "siblings": siblings}
            self._send(200, json.dumps(answer).encode(), {})
        else:
            prefix = f"/org/model/resolve/{COMMIT}/"
            data = self.server.files.get(self.path.removeprefix(prefix))
            if data is None:  # the client asks for other things of the real hub as well
                self._send(404, b"", {})
                return
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self._send(200, data, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            try:
                self.wfile.write(body)
            except ConnectionError:  # a client that cancelled
                self.close_connection = True


@contextmanager
def serve_hub(files: dict[str, bytes]) -> Iterator[Hub]:
    """Run the hub for as long as the block lasts."""
    with Hub(files) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
