"""Runs the rounds of the gateway benchmark and prints the tables."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import uvloop

from bench.gateway import targets
from bench.gateway.client import StreamFigures, paced, streams, unary
from bench.gateway.processes import cpu_ns, rss_bytes
from bench.gateway.targets import Target

_CHAT: Final = "/v1/chat/completions"
_MESSAGES: Final = "/v1/messages"
# 100 streams of 50 chunks a second; the memory round has 1,000 of five.
_CHUNK_INTERVAL_S: Final = 0.02
_MANY_STREAMS: Final = 1000
# Latency is that of an open loop: eight connections with 25 requests a second each, and streams
# that begin evenly over the time that one takes. Capacity is that of a closed one.
_UNARY_INTERVAL_S: Final = 0.04


@dataclass(slots=True)
class Figures:
    """All rounds of one target. Times in ms, CPU in µs."""

    unary_p50: list[float] = field(default_factory=list)
    unary_p99: list[float] = field(default_factory=list)
    full_p50: list[float] = field(default_factory=list)  # unary, closed loop
    unary_cpu: list[float] = field(default_factory=list)
    unary_split: dict[str, list[float]] = field(default_factory=dict)  # CPU by process
    unary_rate: list[float] = field(default_factory=list)
    first_token_p50: list[float] = field(default_factory=list)
    first_token_p99: list[float] = field(default_factory=list)
    burst_p50: list[float] = field(default_factory=list)  # first tokens, all streams at once
    chunk_p50: list[float] = field(default_factory=list)
    chunk_p99: list[float] = field(default_factory=list)
    chunk_cpu: list[float] = field(default_factory=list)
    message_cpu: list[float] = field(default_factory=list)
    idle_mib: float = 0.0
    busy_mib: float = 0.0
    num_broken: int = 0


def run(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench gateway")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=800, help="unary requests of a round")
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--chunks", type=int, default=100, help="chunks of a stream")
    parser.add_argument("--no-litellm", action="store_true")
    parser.add_argument(
        "--litellm-venv",
        type=Path,
        default=Path.home() / ".cache" / "cortexd-bench" / "litellm",
        help="environment of the LiteLLM proxy; made when it is not there",
    )
    options = parser.parse_args(arguments)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 16384)), hard))
    print(f"load before: {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cx-gw-")))
        running = _start(stack, folder, options)
        figures = {target.name: Figures() for target in running}
        for number in range(options.rounds):
            order = random.sample(running, len(running))
            print(f"round {number + 1}: " + " · ".join(target.name for target in order))
            for target in order:
                _one_round(target, figures[target.name], options)
        for target in running:
            _memory_round(target, figures[target.name])
    print(f"load after: {os.getloadavg()[0]:.2f}")
    _print_tables(figures)
    for name, one in figures.items():
        parts = {process: statistics.median(parts) for process, parts in one.unary_split.items()}
        shown = sorted(parts.items(), key=lambda part: -part[1])
        print(f"CPU µs/request, {name}: " + ", ".join(f"{p} {us:.1f}" for p, us in shown if us > 1))
    broken = sum(one.num_broken for one in figures.values())
    if broken:
        print(f"{broken} streams did not get all their chunks", file=sys.stderr)
    return 1 if broken else 0


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
    figures.full_p50.append(_quantile(latencies, 0.5) * 1e3)
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
    figures.unary_p50.append(_quantile(latencies, 0.5) * 1e3)
    figures.unary_p99.append(_quantile(latencies, 0.99) * 1e3)
    seen, used_us = _stream_round(target, _CHAT, options)
    figures.burst_p50.append(_quantile(seen.first_token_s, 0.5) * 1e3)
    _steady_round(target, figures, options)
    figures.chunk_p50.append(_quantile(seen.chunk_delay_s, 0.5) * 1e3)
    figures.chunk_p99.append(_quantile(seen.chunk_delay_s, 0.99) * 1e3)
    figures.chunk_cpu.append(used_us)
    figures.num_broken += seen.num_broken
    if target.speaks_anthropic:
        seen, used_us = _stream_round(target, _MESSAGES, options)
        figures.message_cpu.append(used_us)
        figures.num_broken += seen.num_broken


def _stream_round(
    target: Target, path: str, options: argparse.Namespace
) -> tuple[StreamFigures, float]:
    """Return what the clients saw, and the target's CPU time for each chunk in µs."""
    before = cpu_ns(target.pid)
    seen = uvloop.run(
        streams(
            target.port,
            path,
            num_streams=options.streams,
            num_chunks=options.chunks,
            stagger_s=_CHUNK_INTERVAL_S / options.streams,
        )
    )
    used_ns = cpu_ns(target.pid).total() - before.total()
    return seen, used_ns / 1e3 / max(1, len(seen.chunk_delay_s))


def _steady_round(target: Target, figures: Figures, options: argparse.Namespace) -> None:
    """Begin streams at even times; once as many run as are wanted, note their first tokens."""
    seen = uvloop.run(
        streams(
            target.port,
            _CHAT,
            num_streams=2 * options.streams,
            num_chunks=options.chunks,
            stagger_s=_CHUNK_INTERVAL_S * options.chunks / options.streams,
        )
    )
    first_token_s = seen.first_token_s[options.streams :]
    figures.first_token_p50.append(_quantile(first_token_s, 0.5) * 1e3)
    figures.first_token_p99.append(_quantile(first_token_s, 0.99) * 1e3)
    figures.num_broken += seen.num_broken


def _memory_round(target: Target, figures: Figures) -> None:
    """Hold 1,000 streams and look at the memory in their middle."""
    figures.idle_mib = rss_bytes(target.pid) / 2**20

    async def hold() -> StreamFigures:
        running = asyncio.create_task(
            streams(target.port, _CHAT, num_streams=_MANY_STREAMS, num_chunks=200, stagger_s=0.001)
        )
        await asyncio.sleep(3.0)
        figures.busy_mib = rss_bytes(target.pid) / 2**20
        return await running

    figures.num_broken += uvloop.run(hold()).num_broken


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def _print_tables(figures: dict[str, Figures]) -> None:
    direct = figures["direct"]
    nginx = figures["nginx"]
    columns: list[tuple[str, Callable[[Figures], str]]] = [
        ("unary +p50 ms", lambda one: _added(one.unary_p50, direct.unary_p50)),
        ("unary +p99 ms", lambda one: _added(one.unary_p99, direct.unary_p99)),
        ("unary +p50 ms, closed loop", lambda one: _added(one.full_p50, direct.full_p50)),
        ("CPU µs/request", lambda one: _median(one.unary_cpu)),
        ("requests/s/core", lambda one: _median(one.unary_rate, 0)),
        ("TTFT +p50 ms", lambda one: _added(one.first_token_p50, direct.first_token_p50)),
        ("TTFT +p99 ms", lambda one: _added(one.first_token_p99, direct.first_token_p99)),
        ("TTFT +p50 ms, burst", lambda one: _added(one.burst_p50, direct.burst_p50)),
        ("chunk +p50 ms", lambda one: _added(one.chunk_p50, direct.chunk_p50)),
        ("chunk +p99 ms", lambda one: _added(one.chunk_p99, direct.chunk_p99)),
        ("CPU µs/chunk", lambda one: _median(one.chunk_cpu)),
        ("CPU µs/chunk, to Anthropic", lambda one: _median(one.message_cpu)),
        ("memory idle MiB", lambda one: f"{one.idle_mib:.0f}"),
        ("memory 1,000 streams MiB", lambda one: f"{one.busy_mib:.0f}"),
        ("requests/core vs nginx", lambda one: _ratio(one.unary_cpu, nginx.unary_cpu)),
        ("chunks/core vs nginx", lambda one: _ratio(one.chunk_cpu, nginx.chunk_cpu)),
    ]
    print("\n| | " + " | ".join(figures) + " |")
    print("|---|" + "---|" * len(figures))
    for title, cell in columns:
        print(f"| {title} | " + " | ".join(cell(one) for one in figures.values()) + " |")


def _added(values: list[float], base: list[float]) -> str:
    """Return the median difference to the direct figures of the same rounds."""
    return f"{statistics.median(a - b for a, b in zip(values, base, strict=True)):.2f}"


def _median(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f}" if values else "-"


def _ratio(values: list[float], base: list[float]) -> str:
    return f"1/{statistics.median(values) / statistics.median(base):.1f}"
