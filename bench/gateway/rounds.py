"""What a relay adds: rounds of requests and streams through all targets, in turns.

Streams begin in two ways: evenly over the time of a chunk, so that chunks come one by one, and all
at once, so that they come in bursts. The second is how the goals' CPU times were measured.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import uvloop

from bench.gateway import targets
from bench.gateway.client import StreamFigures, paced, streams, unary
from bench.gateway.figures import Figures, quantile, relay_goals, relay_table
from bench.gateway.processes import cpu_ns, rss_bytes
from bench.gateway.targets import Target

_CHAT: Final = "/v1/chat/completions"
_MESSAGES: Final = "/v1/messages"
# 100 streams of 50 chunks a second; the memory round has 1,000 of ten, for five seconds.
_CHUNK_INTERVAL_S: Final = 0.02
_GOLDEN_RATIO: Final = (5**0.5 - 1) / 2
_MANY_STREAMS: Final = 1000
_IDLE_INTERVAL_S: Final = 0.1
_IDLE_CHUNKS: Final = 50
# Latency is that of an open loop: eight connections with 25 requests a second each, and streams
# that begin evenly over the time that one takes; capacity is that of a closed one.
_UNARY_INTERVAL_S: Final = 0.04


def measure_relay(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Run the rounds and print their table; return the goals' figures.

    Raises: RuntimeError when streams did not get all their chunks.
    """
    with ExitStack() as stack:
        running = _start(stack, folder, options)
        figures = {target.name: Figures() for target in running}
        for number in range(options.rounds):
            order = random.sample(running, len(running))
            print(f"round {number + 1}: " + " · ".join(target.name for target in order))
            for target in order:
                _one_round(target, figures[target.name], options)
        for target in running:
            _memory_round(target, figures[target.name])
    print(f"\n{relay_table(figures)}\n")
    for name, one in figures.items():
        parts = {process: statistics.median(parts) for process, parts in one.unary_split.items()}
        shown = sorted(parts.items(), key=lambda part: -part[1])
        print(f"CPU µs/request, {name}: " + ", ".join(f"{p} {us:.1f}" for p, us in shown if us > 1))
    broken = sum(one.num_broken for one in figures.values())
    if broken:
        raise RuntimeError(f"{broken} streams did not get all their chunks")
    return relay_goals(figures)


def _start(stack: ExitStack, folder: Path, options: argparse.Namespace) -> list[Target]:
    direct = stack.enter_context(targets.mock(_CHUNK_INTERVAL_S))
    running = [direct, stack.enter_context(targets.nginx(folder / "nginx", direct.port))]
    if not options.no_litellm:
        proxy = targets.litellm(folder / "litellm", direct.port, options.litellm_venv)
        running.append(stack.enter_context(proxy))
    for fronts in (1, 2):
        gateway = targets.cortexd(folder / f"cortexd{fronts}", direct.port, fronts)
        running.append(stack.enter_context(gateway))
    return running


def _one_round(target: Target, figures: Figures, options: argparse.Namespace) -> None:
    uvloop.run(unary(target.port, _CHAT, concurrency=8, count=64))  # warm-up
    before = cpu_ns(target.pid)
    latencies = uvloop.run(unary(target.port, _CHAT, concurrency=8, count=options.requests))
    used = cpu_ns(target.pid)
    used.subtract(before)
    used_s = used.total() / 1e9
    for name, used_ns in used.items():
        figures.unary_split.setdefault(name, []).append(used_ns / len(latencies) / 1e3)
    figures.full_p50.append(quantile(latencies, 0.5) * 1e3)
    figures.unary_cpu.append(used_s / len(latencies) * 1e6)
    figures.unary_rate.append(len(latencies) / used_s)
    latencies = uvloop.run(
        paced(
            target.port,
            _CHAT,
            concurrency=8,
            count=options.requests,
            interval_s=_UNARY_INTERVAL_S,
        )
    )
    figures.unary_p50.append(quantile(latencies, 0.5) * 1e3)
    figures.unary_p99.append(quantile(latencies, 0.99) * 1e3)
    num_streams = options.streams
    begins = {
        "even": [_CHUNK_INTERVAL_S * number / num_streams for number in range(num_streams)],
        "once": [0.0] * num_streams,
    }
    for relayed, begins_s in ((figures.even, begins["even"]), (figures.once, begins["once"])):
        seen, used_us = _stream_round(target, _CHAT, options.chunks, begins_s)
        relayed.add(seen, used_us)
        figures.num_broken += seen.num_broken
        if target.speaks_anthropic:
            seen, used_us = _stream_round(target, _MESSAGES, options.chunks, begins_s)
            relayed.message_cpu.append(used_us)
            figures.num_broken += seen.num_broken
    _steady_round(target, figures, options)


def _stream_round(
    target: Target, path: str, num_chunks: int, begins_s: Sequence[float]
) -> tuple[StreamFigures, float]:
    """Return what the clients saw, and the target's CPU time for each chunk in µs."""
    before = cpu_ns(target.pid)
    seen = uvloop.run(streams(target.port, path, begins_s=begins_s, num_chunks=num_chunks))
    used_ns = cpu_ns(target.pid).total() - before.total()
    return seen, used_ns / 1e3 / max(1, len(seen.chunk_delay_s))


def _steady_round(target: Target, figures: Figures, options: argparse.Namespace) -> None:
    """Begin streams at even times; once as many run as are wanted, note their first tokens.

    Streams so far apart that as many run as are wanted begin a whole number of halves of the chunk
    interval apart: the chunks of all would come in one or two bursts, and each stream would begin
    in one. So each begins later by a part of the interval, the fractions of the multiples of the
    golden ratio, of which any number in a row are spread evenly; the same for all targets.
    """
    apart_s = _CHUNK_INTERVAL_S * options.chunks / options.streams
    seen = uvloop.run(
        streams(
            target.port,
            _CHAT,
            begins_s=[
                number * apart_s + number * _GOLDEN_RATIO % 1 * _CHUNK_INTERVAL_S
                for number in range(2 * options.streams)
            ],
            num_chunks=options.chunks,
        )
    )
    first_token_s = seen.first_token_s[options.streams :]
    figures.first_p50.append(quantile(first_token_s, 0.5) * 1e3)
    figures.first_p99.append(quantile(first_token_s, 0.99) * 1e3)
    figures.num_broken += seen.num_broken


def _memory_round(target: Target, figures: Figures) -> None:
    """Hold 1,000 streams and look at the memory in their middle."""
    begins_s = [number / 1000 for number in range(_MANY_STREAMS)]
    figures.idle_mib = rss_bytes(target.pid) / 2**20

    async def hold() -> StreamFigures:
        running = asyncio.create_task(
            streams(
                target.port,
                _CHAT,
                begins_s=begins_s,
                num_chunks=_IDLE_CHUNKS,
                mock={"interval_s": _IDLE_INTERVAL_S},
            )
        )
        await asyncio.sleep(3.0)
        figures.busy_mib = rss_bytes(target.pid) / 2**20
        return await running

    figures.num_broken += uvloop.run(hold()).num_broken
