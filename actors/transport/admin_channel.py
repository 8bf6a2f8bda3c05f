"""The client's end of the admin socket."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import zmq

from actors.transport.sockets import Transport
from cortexd.errors import CortexError, DeadlineExceeded, ErrorInfo, NotRunning


class AdminChannel:
    """A synchronous client of the admin socket: one request at a time.

    Nothing listening is an error at once: ZeroMQ itself would retry in silence.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        """Connect. Raises: NotRunning."""
        self._path = path
        self._timeout_s = timeout_s
        self._num_requests = 0
        self._events: deque[dict[str, Any]] = deque()
        self._probe()
        self._transport = Transport()
        self._socket = self._transport.socket(zmq.DEALER)
        self._socket.connect(f"ipc://{path}")

    def __enter__(self) -> AdminChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, op: str, args: Mapping[str, object] | None = None) -> dict[str, Any]:
        """Return an operation's first answer; of a long one it holds "accepted" and "op_id".

        Raises: the daemon's CortexError, NotRunning, DeadlineExceeded.
        """
        self._num_requests += 1
        request_id = str(self._num_requests)
        document = {"v": 1, "id": request_id, "op": op, "args": args or {}}
        self._socket.send(msgspec.json.encode(document))
        deadline_s = time.monotonic() + self._timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            answer = self._receive(left_s)
            if answer is None:
                continue
            if "event" in answer:
                self._events.append(answer)
            elif answer["id"] == request_id:
                if not answer["ok"]:
                    raise _to_error(answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
        self._probe()
        raise DeadlineExceeded(f"no answer to {op} within {self._timeout_s} s")

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events of the operations and streams this channel began.

        Each is `{"id", "event", "data"}`, operations' with their "op_id". Ends with the daemon.
        """
        while True:
            while self._events:
                event = self._events.popleft()
                if event["event"] == "end":
                    return
                yield event
            document = self._receive(self._timeout_s)
            if document is not None and "event" in document:
                self._events.append(document)
            elif document is None:
                try:
                    self._probe()  # silence is fine while the daemon lives
                except NotRunning:
                    return

    def close(self) -> None:
        """Disconnect; streams of this channel end."""
        self._socket.close()
        self._transport.close()

    def _receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the next document; None at the timeout."""
        if not self._socket.poll(int(timeout_s * 1000) + 1):
            return None
        document: dict[str, Any] = msgspec.json.decode(self._socket.recv())
        return document

    def _probe(self) -> None:
        """Raises: NotRunning when nothing listens on the socket."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self._path))
            except OSError as error:
                raise NotRunning(
                    f"cortexd is not running: {self._path}: {os.strerror(error.errno or 0)}; "
                    'start it with "cortexd start"'
                ) from error


def _to_error(document: dict[str, Any]) -> CortexError:
    details = document.get("details") or {}
    return ErrorInfo(
        code=document["code"],
        message=document["message"],
        param=document.get("param"),
        retry_after_s=document.get("retry_after_s"),
        details=details,
    ).to_exception()
