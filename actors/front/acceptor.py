"""Takes connections from a listener that several fronts share, so that they get equal shares.

The loop's own server takes all that wait at once: the front that wakes first gets nearly all of a
burst, and keeps it as long as its clients keep their connections. Of 64 connections one front had
up to 86 %, which made the second one worth a third of a core. Here a front that is ahead leaves a
connection to the others for a moment; one that nobody has taken by then it takes. A connection
costs 15 µs more than through the loop's server, which is why a front that shares with nobody has
that.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

from actors.connection_share import ConnectionShare

# Long enough for an idle front to wake, and so short that nobody notices: a front that seems to be
# ahead of others that are gone still takes a thousand a second.
_PATIENCE_S: Final = 0.001
# With no descriptor left the listener stays readable: look again when some may have been closed.
_RETRY_S: Final = 0.2


class Acceptor:
    """Accepts until it is closed; the listener stays open."""

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        share: ConnectionShare,
    ) -> None:
        """Begin; `listener` listens and does not block; a lost protocol tells `share` itself."""
        self._listener = listener
        self._make_protocol = make_protocol
        self._share = share
        self._loop = asyncio.get_running_loop()
        self._beginning: set[asyncio.Task[object]] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._resume()

    def __repr__(self) -> str:
        return f"Acceptor({self._listener.fileno()}, {len(self._beginning)} beginning)"

    def close(self) -> None:
        """Accept no more; what was accepted goes on."""
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._listener.fileno())

    def _resume(self) -> None:
        self._retry = None
        self._loop.add_reader(self._listener.fileno(), self._on_readable)

    def _pause(self, seconds: float, then: Callable[[], None]) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._retry = self._loop.call_later(seconds, then)

    def _on_readable(self) -> None:
        if self._share.is_ahead:
            self._pause(_PATIENCE_S, self._take_what_is_left)
        else:
            self._accept()

    def _take_what_is_left(self) -> None:
        self._resume()
        self._accept()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # another front was quicker, or the client has left
        except OSError:
            self._pause(_RETRY_S, self._resume)
            return
        self._share.opened()
        task = self._loop.create_task(
            self._loop.connect_accepted_socket(self._make_protocol, client)
        )
        self._beginning.add(task)
        task.add_done_callback(self._begun)

    def _begun(self, task: asyncio.Task[object]) -> None:
        self._beginning.discard(task)
        if task.cancelled() or task.exception() is not None:  # the client has left
            self._share.closed()
