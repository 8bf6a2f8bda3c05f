"""What a scrape of many series takes: on the clock, and of each process's CPU time.

The metrics actor renders it, in a process of its own: no front's event loop is held up.
"""

from __future__ import annotations

import argparse
import http.client
import time
from pathlib import Path
from typing import Final

import uvloop

from bench.gateway import targets
from bench.gateway.client import streams
from bench.gateway.figures import quantile
from bench.gateway.metrics_text import num_series, scrape
from bench.gateway.mock import MODELS
from bench.gateway.processes import cpu_ns
from bench.servers import wait_until

_CHAT: Final = "/v1/chat/completions"
_MIN_SERIES: Final = 500
_NUM_SCRAPES: Final = 300


def measure_scrape(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Give each of 16 models its series, then scrape; print and return the times."""
    with (
        targets.mock(0.001) as upstream,
        targets.cortexd(folder / "scrape", upstream.port, 1) as gateway,
    ):
        for model in MODELS:
            uvloop.run(streams(gateway.port, _CHAT, begins_s=[0.0], num_chunks=20, model=model))
        wait_until(
            lambda: num_series(scrape(gateway.metrics_port)) >= _MIN_SERIES,
            "500 series",
            timeout_s=10,
            period_s=0.1,
        )
        times_s = []
        connection = http.client.HTTPConnection("127.0.0.1", gateway.metrics_port, timeout=10)
        before = cpu_ns(gateway.pid)
        for _ in range(_NUM_SCRAPES):
            started = time.perf_counter()
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
            times_s.append(time.perf_counter() - started)
        used = cpu_ns(gateway.pid)
        connection.close()
    used.subtract(before)
    parts = [f"{name} {ns / _NUM_SCRAPES / 1e3:.0f}" for name, ns in used.most_common(2)]
    print(
        f"scrape of {num_series(text)} series: p50 {quantile(times_s, 0.5) * 1e3:.2f} ms, p99 "
        f"{quantile(times_s, 0.99) * 1e3:.2f} ms; CPU µs a scrape: {', '.join(parts)}"
    )
    return {"scrape ms": quantile(times_s, 0.5) * 1e3}
