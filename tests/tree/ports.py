"""Ports for the daemons of a test, which no other socket takes before they are bound."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from itertools import cycle

# Below those that Linux gives to clients and to listeners that ask for any: those come and go.
_FIRST, _LAST = 20_000, 32_000


def _candidates() -> Iterator[int]:
    """Yield each port in turn; test runs at the same time begin at different ones."""
    span = _LAST - _FIRST
    start = os.getpid() * 101 % span
    return cycle(_FIRST + (start + number) % span for number in range(span))


_PORTS = _candidates()


def free_port() -> int:
    """Return a free port that was not handed out before."""
    for port in _PORTS:
        with socket.socket() as probe:
            # As servers do: a port whose last connections are only fading out is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("no port is free")
