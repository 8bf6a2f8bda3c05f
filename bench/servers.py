"""What the benchmarks need to start a server: a port, and patience until it answers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable


def free_port() -> int:
    """Return a port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(
    is_ready: Callable[[], bool], what: str, *, timeout_s: float, period_s: float
) -> None:
    """Look until it is ready. Raises: TimeoutError, and what `is_ready` raises."""
    deadline = time.monotonic() + timeout_s
    while not is_ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not answer within {timeout_s:g} s")
        time.sleep(period_s)
