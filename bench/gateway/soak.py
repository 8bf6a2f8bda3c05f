"""A long run of everything, and what it leaves behind: memory, descriptors, tasks, leases.

Of a hundred requests 85 are unary, ten streams, two streams that their client gives up, and three
errors: one of the upstream, one for an unknown model, one that is no JSON. The first tenth fills
what is bounded (rings of log lines, series of metrics, pools); growth counts from there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import uvloop

from bench.gateway import targets
from bench.gateway.client import read_answer, request_bytes, streams

_CHAT: Final = "/v1/chat/completions"
_CONCURRENCY: Final = 16
_NUM_CHUNKS: Final = 5
# A front keeps idle connections to nodes for 15 s, and looks each third of that.
_SETTLE_S: Final = 22.0

_UNARY: Final = request_bytes(_CHAT, stream=False, max_tokens=16)
_GIVEN_UP: Final = request_bytes(_CHAT, stream=True, max_tokens=10_000)
_UNKNOWN: Final = request_bytes(_CHAT, stream=False, max_tokens=16, model="nobody/knows-it")
_REFUSED: Final = request_bytes(_CHAT, stream=False, max_tokens=16, mock={"status": 400})
_BROKEN: Final = (
    f"POST {_CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    "Content-Length: 5\r\n\r\n{]..."
).encode()


@dataclass(frozen=True, slots=True)
class _State:
    """What the gateway holds when nothing runs."""

    rss_mib: dict[str, float]
    num_fds: dict[str, int]
    num_tasks: int  # of the front
    num_leases: int


def measure_soak(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Run the requests; print each process before and after; return the worst."""
    num_first = max(options.soak_requests // 10, 1000)
    with (
        targets.mock(0.02) as upstream,
        targets.cortexd(folder / "soak", upstream.port, 1) as gateway,
    ):
        uvloop.run(_requests(gateway.port, num_first))
        before = _state(gateway)
        started = time.perf_counter()
        uvloop.run(_requests(gateway.port, options.soak_requests))
        seconds = time.perf_counter() - started
        after = _state(gateway)
    growth = {name: 100 * (after.rss_mib[name] / mib - 1) for name, mib in before.rss_mib.items()}
    print(f"{options.soak_requests} requests after the first {num_first}, {seconds:.0f} s")
    for name, mib in before.rss_mib.items():
        print(
            f"{name}: RSS {mib:.1f} to {after.rss_mib[name]:.1f} MiB ({growth[name]:+.1f} %), "
            f"descriptors {before.num_fds[name]} to {after.num_fds[name]}"
        )
    print(
        f"tasks of the front {before.num_tasks} to {after.num_tasks}, "
        f"leases {before.num_leases} to {after.num_leases}"
    )
    left = max(0, after.num_tasks - before.num_tasks) + after.num_leases
    left += sum(max(0, after.num_fds[name] - number) for name, number in before.num_fds.items())
    return {"soak growth pct": max(growth.values()), "soak left": left}


def _state(gateway: targets.Gateway) -> _State:
    """Wait until nothing lingers, then look."""
    time.sleep(_SETTLE_S)
    processes = {name: psutil.Process(pid) for name, pid in gateway.pids().items()}
    with urllib.request.urlopen(f"http://127.0.0.1:{gateway.port}/health", timeout=5) as answer:
        health = json.load(answer)
    return _State(
        {name: one.memory_info().rss / 2**20 for name, one in processes.items()},
        {name: one.num_fds() for name, one in processes.items()},
        health["tasks"],
        len(gateway.request("requests")["requests"]),
    )


async def _requests(port: int, count: int) -> None:
    """Run this many. Raises: RuntimeError at the first that is not answered as it must be."""
    numbers = iter(range(count))

    async def one_client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            match number % 100:
                case 20 | 70:
                    await _give_up(port)
                case 40:
                    writer.write(_REFUSED)
                    await read_answer(reader, status=400)
                case 60:
                    writer.write(_UNKNOWN)
                    await read_answer(reader, status=404)
                case 80:
                    writer.write(_BROKEN)
                    await read_answer(reader, status=400)
                case kind if kind % 10 == 5:
                    await _stream(port)
                case _:
                    writer.write(_UNARY)
                    await read_answer(reader)
        writer.close()

    await asyncio.gather(*(one_client() for _ in range(_CONCURRENCY)))


async def _stream(port: int) -> None:
    wish = {"interval_s": 0.002}
    seen = await streams(port, _CHAT, begins_s=[0.0], num_chunks=_NUM_CHUNKS, mock=wish)
    if seen.num_broken:
        raise RuntimeError("a stream did not get all its chunks")


async def _give_up(port: int) -> None:
    """Leave a stream after its first bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_GIVEN_UP)
    await reader.read(65536)
    writer.close()
