"""How long it takes until a request that its client has given up is ended everywhere.

Three kinds: a stream that flows, one that is silent, and a request that has no answer yet. The mock
tells when its connection closed, the router when the lease is gone (asked again and again).
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import time
import urllib.request
from pathlib import Path
from typing import Final

from actors.transport.admin_channel import AdminChannel
from bench.gateway import targets
from bench.gateway.client import request_bytes
from bench.gateway.figures import quantile
from bench.servers import wait_until

_TIMEOUT_S: Final = 10.0
_KINDS: Final[dict[str, tuple[bool, dict[str, object]]]] = {
    "flowing": (True, {}),
    "silent": (True, {"interval_s": 3600}),
    "unanswered": (False, {"is_mute": True}),
}
# Longer than a front collects ends before it tells them: cancels come at any time of that.
_MAX_PAUSE_S: Final = 0.07


def measure_cancel(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Cancel requests one by one; print the times and return the goal's."""
    freed_s: list[float] = []
    with (
        targets.mock(0.02) as upstream,
        targets.cortexd(folder / "cancel", upstream.port, 1) as gateway,
        AdminChannel(gateway.runtime_dir / "admin.s", timeout_s=_TIMEOUT_S) as admin,
    ):
        for kind, (stream, wish) in _KINDS.items():
            sent = request_bytes(
                "/v1/chat/completions", stream=stream, max_tokens=100_000, mock=wish
            )
            closed, freed = _cancels(upstream, gateway, admin, sent, options.cancels)
            freed_s += freed
            print(
                f"cancel, {kind}: upstream closed after p50 {quantile(closed, 0.5) * 1e3:.1f}, "
                f"p99 {quantile(closed, 0.99) * 1e3:.1f} ms; lease ended after p50 "
                f"{quantile(freed, 0.5) * 1e3:.1f}, p99 {quantile(freed, 0.99) * 1e3:.1f} ms "
                f"({len(freed)} times)"
            )
    return {"cancel p99 ms": quantile(freed_s, 0.99) * 1e3}


def _cancels(
    upstream: targets.Target,
    gateway: targets.Target,
    admin: AdminChannel,
    sent: bytes,
    count: int,
) -> tuple[list[float], list[float]]:
    """Return the seconds to the upstream's close and to the lease's end, of each cancel."""

    def num_leases() -> int:
        return len(admin.request("requests")["requests"])

    def wait_for_leases(number: int) -> None:
        wait_until(
            lambda: num_leases() == number, f"{number} leases", timeout_s=_TIMEOUT_S, period_s=0.001
        )

    clients = [
        socket.create_connection(("127.0.0.1", gateway.port), _TIMEOUT_S) for _ in range(count)
    ]
    for client in clients:
        client.sendall(sent)
    wait_for_leases(count)
    first = len(_closed_ns(upstream))
    given_up_ns, freed = [], []
    for left, client in reversed(list(enumerate(clients))):
        time.sleep(random.uniform(0, _MAX_PAUSE_S))
        given_up_ns.append(time.monotonic_ns())
        client.close()
        wait_for_leases(left)
        freed.append((time.monotonic_ns() - given_up_ns[-1]) / 1e9)
    wait_until(
        lambda: len(_closed_ns(upstream)) == first + count,
        "closing all of the mock's connections",
        timeout_s=_TIMEOUT_S,
        period_s=0.05,
    )
    closed_ns = _closed_ns(upstream)[first:]
    # A lease ends after its connection is closed: the n-th close is that of the n-th cancel.
    closed = [(end - begin) / 1e9 for begin, end in zip(given_up_ns, closed_ns, strict=True)]
    return closed, freed


def _closed_ns(upstream: targets.Target) -> list[int]:
    with urllib.request.urlopen(f"http://127.0.0.1:{upstream.port}/closed", timeout=5) as answer:
        closed: list[int] = json.load(answer)
    return closed
