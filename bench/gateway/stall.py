"""How long the event loop of a front is held up while it relays and its metrics are scraped.

The front's own histogram says it (`cortexd_front_loop_lag_seconds`: a timer each 10 ms). It holds
the front's waits for a core too, so the front has one that nothing else of this benchmark uses, and
real-time priority there where that is allowed. How long it waited all the same is told beside: what
else runs on the machine shows there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import Final

import psutil
import uvloop

from bench.gateway import targets
from bench.gateway.client import paced, streams
from bench.gateway.metrics_text import bucket_counts, bucket_quantile, scrape
from bench.gateway.processes import tree, wait_s

_CHAT: Final = "/v1/chat/completions"
_LAG: Final = "cortexd_front_loop_lag_seconds"
_INTERVAL_S: Final = 0.02
_UNARY_INTERVAL_S: Final = 0.04
_SCRAPE_PERIOD_S: Final = 0.1
_NUM_STREAMS: Final = 100
_RAMP_S: Final = 2.0  # streams begin and end over this: a burst of them is work, not a stall
_TOLD_S: Final = 1.5  # lags are told once a second


def measure_stall(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Relay 100 streams and 200 requests a second, scrape ten times a second; return the goal."""
    with (
        targets.mock(_INTERVAL_S) as upstream,
        targets.cortexd(folder / "stall", upstream.port, 1) as gateway,
    ):
        front = gateway.pids()["front.0"]
        _give_core(front, [upstream.pid, gateway.pid, os.getpid()])
        try:
            before, waited_s = bucket_counts(scrape(gateway.metrics_port), _LAG), wait_s(front)
            num_scrapes = uvloop.run(_load(gateway, options.seconds))
            waited_s = wait_s(front) - waited_s
            time.sleep(_TOLD_S)
            after = bucket_counts(scrape(gateway.metrics_port), _LAG)
        finally:
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
    counts = {bound: count - before.get(bound, 0) for bound, count in after.items()}
    shown = [
        f"{name} ≤ {bucket_quantile(counts, share) * 1e3:g} ms"
        for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("all", 1.0))
    ]
    print(
        f"loop lag of the front, {counts[float('inf')]:.0f} timers in {options.seconds} s with "
        f"{num_scrapes} scrapes: {', '.join(shown)}; the front waited {waited_s:.2f} s for its core"
    )
    return {"stall p999 ms": bucket_quantile(counts, 0.999) * 1e3}


def _give_core(front: int, others: list[int]) -> None:
    """Move these process trees, of which the front is a part, off the core that it gets."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return
    for pid in others:
        for process in tree(pid):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, cores[:-1])
    for thread in psutil.Process(front).threads():
        os.sched_setaffinity(thread.id, cores[-1:])
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(thread.id, os.SCHED_FIFO, os.sched_param(1))


async def _load(gateway: targets.Gateway, seconds: int) -> int:
    """Make the load; return how often was scraped."""
    num_chunks = round(seconds / _INTERVAL_S)
    begins_s = [_RAMP_S * number / _NUM_STREAMS for number in range(_NUM_STREAMS)]
    work = asyncio.gather(
        streams(gateway.port, _CHAT, begins_s=begins_s, num_chunks=num_chunks),
        paced(
            gateway.port,
            _CHAT,
            concurrency=8,
            count=8 * round(seconds / _UNARY_INTERVAL_S),
            interval_s=_UNARY_INTERVAL_S,
        ),
    )
    num_scrapes = 0
    while not work.done():
        await asyncio.wait({work}, timeout=_SCRAPE_PERIOD_S)
        await asyncio.to_thread(scrape, gateway.metrics_port)
        num_scrapes += 1
    seen, _ = await work
    if seen.num_broken:
        raise RuntimeError(f"{seen.num_broken} streams did not get all their chunks")
    return num_scrapes
