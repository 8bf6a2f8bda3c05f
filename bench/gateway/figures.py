"""What the rounds of the gateway benchmark find, target by target, and its table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.gateway.client import StreamFigures
from bench.gateway.goals import NGINX_US


@dataclass(slots=True)
class Relayed:
    """Rounds of streams that begin in one way. Times in ms, CPU in µs."""

    chunk_p50: list[float] = field(default_factory=list)
    chunk_p99: list[float] = field(default_factory=list)
    first_p50: list[float] = field(default_factory=list)
    chunk_cpu: list[float] = field(default_factory=list)
    message_cpu: list[float] = field(default_factory=list)

    def add(self, seen: StreamFigures, used_us: float) -> None:
        """Take in one round."""
        self.chunk_p50.append(quantile(seen.chunk_delay_s, 0.5) * 1e3)
        self.chunk_p99.append(quantile(seen.chunk_delay_s, 0.99) * 1e3)
        self.first_p50.append(quantile(seen.first_token_s, 0.5) * 1e3)
        self.chunk_cpu.append(used_us)


@dataclass(slots=True)
class Figures:
    """All rounds of one target. Times in ms, CPU in µs."""

    unary_p50: list[float] = field(default_factory=list)
    unary_p99: list[float] = field(default_factory=list)
    full_p50: list[float] = field(default_factory=list)  # unary, closed loop
    unary_cpu: list[float] = field(default_factory=list)
    unary_split: dict[str, list[float]] = field(default_factory=dict)  # CPU by process
    unary_rate: list[float] = field(default_factory=list)
    first_p50: list[float] = field(default_factory=list)
    first_p99: list[float] = field(default_factory=list)
    even: Relayed = field(default_factory=Relayed)
    once: Relayed = field(default_factory=Relayed)
    idle_mib: float = 0.0
    busy_mib: float = 0.0
    num_broken: int = 0


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of the others lies."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def relay_table(figures: dict[str, Figures]) -> str:
    """Return the table of all targets."""
    direct, nginx = figures["direct"], figures["nginx"]
    rows: list[tuple[str, Callable[[Figures], str]]] = [
        ("unary +p50 ms", lambda one: _added(one.unary_p50, direct.unary_p50)),
        ("unary +p99 ms", lambda one: _added(one.unary_p99, direct.unary_p99)),
        ("unary +p50 ms, closed loop", lambda one: _added(one.full_p50, direct.full_p50)),
        ("CPU µs/request", lambda one: _median(one.unary_cpu)),
        ("requests/s/core", lambda one: _median(one.unary_rate, 0)),
        ("TTFT +p50 ms", lambda one: _added(one.first_p50, direct.first_p50)),
        ("TTFT +p99 ms", lambda one: _added(one.first_p99, direct.first_p99)),
        ("chunk +p50 ms", lambda one: _added(one.even.chunk_p50, direct.even.chunk_p50)),
        ("chunk +p99 ms", lambda one: _added(one.even.chunk_p99, direct.even.chunk_p99)),
        ("CPU µs/chunk", lambda one: _median(one.even.chunk_cpu)),
        ("CPU µs/chunk, to Anthropic", lambda one: _median(one.even.message_cpu)),
        ("at once: TTFT +p50 ms", lambda one: _added(one.once.first_p50, direct.once.first_p50)),
        ("at once: chunk +p50 ms", lambda one: _added(one.once.chunk_p50, direct.once.chunk_p50)),
        ("at once: chunk +p99 ms", lambda one: _added(one.once.chunk_p99, direct.once.chunk_p99)),
        ("at once: CPU µs/chunk", lambda one: _median(one.once.chunk_cpu)),
        ("at once: CPU µs/chunk, to Anthropic", lambda one: _median(one.once.message_cpu)),
        ("memory idle MiB", lambda one: f"{one.idle_mib:.0f}"),
        ("memory 1,000 streams MiB", lambda one: f"{one.busy_mib:.0f}"),
        ("requests/core vs nginx", lambda one: _ratio(one.unary_cpu, nginx.unary_cpu)),
        ("chunks/core vs nginx", lambda one: _ratio(one.even.chunk_cpu, nginx.even.chunk_cpu)),
        ("at once: the same", lambda one: _ratio(one.once.chunk_cpu, nginx.once.chunk_cpu)),
    ]
    lines = ["| | " + " | ".join(figures) + " |", "|---|" + "---|" * len(figures)]
    for title, cell in rows:
        lines.append(f"| {title} | " + " | ".join(map(cell, figures.values())) + " |")
    return "\n".join(lines)


def relay_goals(figures: dict[str, Figures]) -> dict[str, float]:
    """Return the figures of the goals, of one front, by the goals' keys."""
    direct, nginx, ours = figures["direct"], figures["nginx"], figures["cortexd, 1 front"]
    middle = statistics.median
    found = {
        "unary p50": _difference(ours.unary_p50, direct.unary_p50),
        "unary p99": _difference(ours.unary_p99, direct.unary_p99),
        "first p50": _difference(ours.first_p50, direct.first_p50),
        "first p99": _difference(ours.first_p99, direct.first_p99),
        "chunk p50": _difference(ours.even.chunk_p50, direct.even.chunk_p50),
        "chunk p99": _difference(ours.even.chunk_p99, direct.even.chunk_p99),
        "chunk us": middle(ours.even.chunk_cpu),
        "once us": middle(ours.once.chunk_cpu),
        "message us": middle(ours.even.message_cpu),
        "once message us": middle(ours.once.message_cpu),
        "request us": middle(ours.unary_cpu),
        "request ratio": middle(ours.unary_cpu) / middle(nginx.unary_cpu),
        "chunk ratio": middle(ours.even.chunk_cpu) / middle(nginx.even.chunk_cpu),
        "once ratio": middle(ours.once.chunk_cpu) / middle(nginx.once.chunk_cpu),
        "busy mib": ours.busy_mib,
        NGINX_US["request"]: middle(nginx.unary_cpu),
        # Begun at once, as they were where the goals were set.
        NGINX_US["chunk"]: middle(nginx.once.chunk_cpu),
    }
    if "LiteLLM" in figures:
        added = _difference(figures["LiteLLM"].unary_p50, direct.unary_p50)
        found["litellm ratio"] = found["unary p50"] / added
    return found


def _difference(values: list[float], base: list[float]) -> float:
    """Return the median difference to the direct figures of the same rounds."""
    return statistics.median(a - b for a, b in zip(values, base, strict=True))


def _added(values: list[float], base: list[float]) -> str:
    return f"{_difference(values, base):.2f}"


def _median(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f}" if values else "-"


def _ratio(values: list[float], base: list[float]) -> str:
    return f"1/{statistics.median(values) / statistics.median(base):.1f}"
