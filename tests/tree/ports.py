"""Ports for the daemons of a test, which nobody else takes before they are bound.

A port is claimed by a name that only one process of this machine can have, and that goes with the
process: test runs at the same time, in other checkouts too, never share one.
"""

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
_CLAIMS: list[socket.socket] = []


def free_port() -> int:
    """Return a free port that was not handed out before."""
    for port in _PORTS:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0cortexd-test-port-{port}")
            with socket.socket() as probe:
                # As servers do: a port whose last connections are only fading out is free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            continue
        _CLAIMS.append(claim)
        return port
    raise AssertionError("no port is free")
