"""What a second front adds, and what limits that here.

Client, mock and gateway share the cores, so the rate on the clock says little where there are two.
What says more: the CPU time of a request in the fronts, and how evenly they share the connections.
With a core for each front the busiest one sets the rate.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import uvloop

from bench.gateway import targets
from bench.gateway.client import unary
from bench.gateway.processes import cpu_ns

_CHAT: Final = "/v1/chat/completions"
_CONCURRENCY: Final = 64
_NUM_REQUESTS: Final = 3200


def measure_scaling(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Run closed loops through one and two fronts in turns; print and return the scaling."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    used: dict[int, list[Counter[str]]] = {1: [], 2: []}
    with ExitStack() as stack:
        upstream = stack.enter_context(targets.mock(0.02))
        gateways = {
            fronts: stack.enter_context(
                targets.cortexd(folder / f"scaling{fronts}", upstream.port, fronts)
            )
            for fronts in (1, 2)
        }
        for number in range(options.rounds + 1):
            for fronts, gateway in gateways.items():
                rate, used_us = _one_round(gateway)
                if number:  # the first is the warm-up
                    rates[fronts].append(rate)
                    used[fronts].append(used_us)
    one_us = statistics.median(_fronts(parts).total() for parts in used[1])
    two_us = statistics.median(_fronts(parts).total() for parts in used[2])
    busiest_us = statistics.median(max(_fronts(parts).values()) for parts in used[2])
    # Rounds stand beside each other, and the machine's other work changes from round to round.
    pairs = zip(used[1], used[2], strict=True)
    scaling = statistics.median(
        _fronts(one).total() / max(_fronts(two).values()) for one, two in pairs
    )
    for fronts in (1, 2):
        rest = Counter({name: us for name, us in used[fronts][-1].items() if us >= 1})
        shown = ", ".join(f"{name} {us:.0f}" for name, us in rest.most_common())
        print(
            f"{fronts} front(s): {statistics.median(rates[fronts]):.0f} requests/s on the clock, "
            f"CPU µs/request: {shown}"
        )
    print(
        f"CPU of the fronts {one_us:.0f} and {two_us:.0f} µs a request; the busier of two has "
        f"{100 * busiest_us / two_us:.0f} % of it: with a core each {scaling:.2f} times the rate "
        f"(on the clock, {os.cpu_count()} cores for all: "
        f"{statistics.median(rates[2]) / statistics.median(rates[1]):.2f})"
    )
    return {"scaling": scaling}


def _one_round(gateway: targets.Gateway) -> tuple[float, Counter[str]]:
    """Return requests a second, and the CPU time of each process in µs a request."""
    before = cpu_ns(gateway.pid)
    started = time.perf_counter()
    latencies = uvloop.run(
        unary(gateway.port, _CHAT, concurrency=_CONCURRENCY, count=_NUM_REQUESTS)
    )
    rate = len(latencies) / (time.perf_counter() - started)
    used = cpu_ns(gateway.pid)
    used.subtract(before)
    return rate, Counter({name: ns / 1e3 / len(latencies) for name, ns in used.items()})


def _fronts(used: Counter[str]) -> Counter[str]:
    return Counter({name: us for name, us in used.items() if ":front" in name})
