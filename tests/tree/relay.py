"""A TCP relay between two daemons whose link can be cut without a word, and mended.

Cut, it forwards nothing and closes nothing, and takes connections that lead nowhere: what a
dropped network looks like to both ends. A relay, not a network namespace, so that the tests run
without privileges.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 65536


@dataclass(slots=True)
class Relay:
    """Forward connections to a local port while the link is whole."""

    port: int  # of the daemon behind it
    _whole: threading.Event = field(default_factory=threading.Event)
    _is_over: bool = False
    _sockets: list[socket.socket] = field(default_factory=list)
    _listener: socket.socket = field(init=False)

    def __enter__(self) -> Self:
        self._whole.set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        threading.Thread(target=self._accept_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over = True
        self._whole.set()
        self._listener.close()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    @property
    def url(self) -> str:
        """Return the base URL of the daemon behind the link."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """Let nothing through from now on."""
        self._whole.clear()

    def mend(self) -> None:
        """Let everything through again, what was held back included."""
        self._whole.set()

    def _accept_forever(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._sockets.append(near)
                threading.Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        self._whole.wait()
        with contextlib.suppress(OSError):
            far = socket.create_connection(("127.0.0.1", self.port))
            self._sockets.append(far)
            threading.Thread(target=self._pass_on, args=(far, near), daemon=True).start()
            self._pass_on(near, far)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                self._whole.wait()
                if self._is_over:
                    return
                target.sendall(data)
            self._whole.wait()
            target.shutdown(socket.SHUT_WR)
