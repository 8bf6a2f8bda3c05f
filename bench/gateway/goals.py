"""The goals of the gateway, and the table of what was measured for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

# What nginx took in µs where the goals of CPU time were set, at most. Beside nginx here this says
# how much slower a system call is on this machine: the same program, the same work.
REFERENCE_NGINX_US: Final = {"request": 11.0, "chunk": 10.0}
# Keys of what nginx takes here.
NGINX_US: Final = {"request": "nginx request us", "chunk": "nginx chunk us"}


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound; `key` names the figure. `scale`: it was set in CPU time, of a request or a chunk."""

    row: str
    key: str
    text: str
    bound: float
    unit: str
    is_floor: bool = False
    scale: Literal["request", "chunk", ""] = ""

    def is_met(self, value: float, factor: float = 1.0) -> bool:
        """Tell whether a value is within the bound times a factor."""
        bound = self.bound * factor
        return value >= bound if self.is_floor else value <= bound


GOALS: Final = (
    Goal("P1", "unary p50", "unary, 8 at once: added, p50", 0.7, "ms"),
    Goal("P1", "unary p99", "the same, p99", 3, "ms"),
    Goal("P2", "first p50", "first token beside 100 streams: added, p50", 1, "ms"),
    Goal("P2", "first p99", "the same, p99", 4, "ms"),
    Goal("P3", "chunk p50", "chunk, 5,000 a second: added, p50", 0.3, "ms"),
    Goal("P3", "chunk p99", "the same, p99", 3, "ms"),
    Goal("P4", "chunk us", "CPU a chunk, streams begun evenly", 25, "µs", scale="chunk"),
    Goal("P4", "once us", "the same, begun at once", 25, "µs", scale="chunk"),
    Goal("P5", "message us", "CPU a chunk, to Anthropic, evenly", 30, "µs", scale="chunk"),
    Goal("P5", "once message us", "the same, begun at once", 30, "µs", scale="chunk"),
    Goal("P6", "request us", "CPU a unary request", 220, "µs", scale="request"),
    Goal("P7", "request ratio", "CPU a request, times nginx's", 15, "x"),
    Goal("P7", "chunk ratio", "CPU a chunk, times nginx's, evenly", 2.5, "x"),
    Goal("P7", "once ratio", "the same, begun at once", 2.5, "x"),
    Goal("P8", "busy mib", "memory with 1,000 streams, all processes", 200, "MiB"),
    Goal("P9", "front rss mib", "memory of one idle front, RSS", 70, "MiB"),
    Goal("P10", "start s", "cold start: exec to the first 200", 0.6, "s"),
    Goal("P11", "stall p999 ms", "event loop's stall under load and scrapes, p99.9", 5, "ms"),
    Goal("P12", "cancel p99 ms", "cancel: client closed to lease ended, p99", 250, "ms"),
    Goal("P13", "cold loads", "50 requests for one cold model: loads", 1, ""),
    Goal("P14", "cold first byte s", "first byte during a cold load, worst of 50", 1, "s"),
    Goal("P15", "soak growth pct", "soak: growth of RSS, worst process", 3, "%"),
    Goal("P15", "soak left", "soak: descriptors, tasks, leases more than before", 0, ""),
    Goal("P16", "scaling", "requests a second, 1 to 2 fronts, a core each", 1.85, "x", True),
    Goal("P17", "scrape ms", "a scrape of 500 series", 2, "ms"),
    Goal("P18", "litellm ratio", "unary p50: added, of what LiteLLM adds", 1 / 8, ""),
)


def goals_table(found: Mapping[str, float]) -> str:
    """Return the table of the goals that were measured."""
    lines = [
        "| | Goal | measured | bound | met | bound scaled | met scaled |",
        "|---|---|---|---|---|---|---|",
    ]
    for goal in GOALS:
        value = found.get(goal.key)
        if value is None:
            continue
        sign = "≥" if goal.is_floor else "≤"
        cells = [
            goal.row,
            goal.text,
            _shown(value, goal.unit),
            f"{sign} {_shown(goal.bound, goal.unit)}",
            _yes(goal.is_met(value)),
            "",
            "",
        ]
        if goal.scale:
            factor = found[NGINX_US[goal.scale]] / REFERENCE_NGINX_US[goal.scale]
            cells[5] = f"{sign} {_shown(goal.bound * factor, goal.unit)}"
            cells[6] = _yes(goal.is_met(value, factor))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(value: float, unit: str) -> str:
    digits = 0 if value == int(value) or abs(value) >= 100 else 3 if abs(value) < 0.2 else 2
    return f"{value:,.{digits}f} {unit}".strip()


def _yes(is_met: bool) -> str:
    return "yes" if is_met else "**no**"
