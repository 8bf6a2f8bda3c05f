"""A neuron in a thread that behaves as badly as its test says; its answers name it."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

EVENT = 'data: {"choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n'


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a gateway that went away: tests make it do so."""


@dataclass(slots=True)
class ScriptedNeuron:
    """Serve `states` (model → state). `load_s`: how long a load takes, told as progress.

    Answers and loads that have begun can be held back until what they are to overlap has happened.
    """

    name: str
    states: dict[str, str] = field(default_factory=dict)
    seats: int = 0  # 0: not told
    answer_s: float = 0.0
    load_s: float = 0.0
    is_up: bool = True  # down: every connection is closed without an answer
    hangs: bool = False  # accepts and never answers, polls included
    num_chats: int = 0
    num_loads: int = 0
    running: int = 0
    max_running: int = 0
    _loading_since: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _may_finish: threading.Event = field(default_factory=threading.Event)
    _end: threading.Event = field(default_factory=threading.Event)
    _server: _Server = field(init=False)

    def __enter__(self) -> Self:
        self._may_finish.set()
        neuron = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                """Keep the test's output clean."""

            def do_GET(self) -> None:
                if self._behaves():
                    self._send(neuron._document(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not self._behaves():
                    return
                if self.path == "/models/load":
                    neuron._load(body["model_id"])
                    self._send({"status": "loaded"})
                elif body.get("stream"):
                    neuron._chat()
                    self._stream()
                else:
                    neuron._chat()
                    message = {"role": "assistant", "content": neuron.name}
                    self._send({"choices": [{"index": 0, "message": message}]})

            def _behaves(self) -> bool:
                if neuron.hangs:
                    neuron._end.wait()
                self.close_connection = not neuron.is_up or neuron.hangs
                return not self.close_connection

            def _stream(self) -> None:
                data = (EVENT % neuron.name + "data: [DONE]\n\n").encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _send(self, document: object) -> None:
                data = json.dumps(document).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._may_finish.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Return the base URL."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def hold(self) -> None:
        """Finish no answer and no load from now on."""
        self._may_finish.clear()

    def release(self) -> None:
        """Finish what was held back, and all that follows."""
        self._may_finish.set()

    def _document(self, path: str) -> object:
        if path == "/discovery":
            return {"devices": [{"index": 0, "vram_total_mb": 8000}]}
        if path == "/health":
            models = [
                {"id": model, "in_flight": self.running, "max_in_flight": self.seats}
                for model, state in self.states.items()
                if state == "loaded"
            ]
            return {"devices": [{"index": 0, "vram_free_mb": 8000}], "models": models}
        return [self._entry(model, state) for model, state in self.states.items()]

    def _entry(self, model: str, state: str) -> dict[str, object]:
        entry: dict[str, object] = {"id": model, "status": state}
        if state == "loading":
            done_s = time.monotonic() - self._loading_since[model]
            entry |= {
                "stage": "loading weights",
                "progress": min(done_s / self.load_s, 1.0),
                "eta_s": max(self.load_s - done_s, 0.0),
                "servable": {"ok": False},
            }
        return entry

    def _load(self, model: str) -> None:
        with self._lock:
            self.num_loads += 1
            self._loading_since[model] = time.monotonic()
            self.states[model] = "loading"
        self._end.wait(self.load_s)
        self._may_finish.wait()
        self.states[model] = "loaded"

    def _chat(self) -> None:
        with self._lock:
            self.num_chats += 1
            self.running += 1
            self.max_running = max(self.max_running, self.running)
        self._end.wait(self.answer_s)
        self._may_finish.wait()
        with self._lock:
            self.running -= 1
