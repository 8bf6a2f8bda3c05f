"""One series of a metric: what it has counted, and its lines of Prometheus text.

What of a line does not change (name and labels) is put together once: a scrape of five hundred
series is then mostly the writing of numbers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

# Source: Prometheus text format 0.0.4, "Line format" and "Histograms and summaries".
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPES: Final = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


class Value:
    """A series of a counter or a gauge."""

    __slots__ = ("_begin", "value")

    def __init__(self, name: str, labels: Sequence[tuple[str, str]]) -> None:
        self._begin = f"{name}{_label_text(labels)} "
        self.value = 0.0

    def inc(self, amount: float) -> None:
        """Add to a counter."""
        self.value += amount

    def text(self) -> str:
        """Return its line."""
        return f"{self._begin}{float(self.value)!r}\n"


class Distribution:
    """A series of a histogram."""

    __slots__ = ("_begins", "_bounds", "_counts", "_sum", "_sum_begin")

    def __init__(
        self, name: str, labels: Sequence[tuple[str, str]], bounds: tuple[float, ...]
    ) -> None:
        ends = [*(repr(float(bound)) for bound in bounds), "+Inf"]
        own = _label_text(labels)
        self._begins = [f"{name}_bucket{_label_text([*labels, ('le', end)])} " for end in ends]
        self._begins.append(f"{name}_count{own} ")
        self._sum_begin = f"{name}_sum{own} "
        self._bounds = bounds
        self._counts = [0] * len(ends)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value in its bucket; a bound belongs to the bucket below it."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def text(self) -> str:
        """Return its lines; the buckets' counts include those of the buckets below."""
        total = 0.0
        totals = [total := total + count for count in self._counts]
        totals.append(total)
        lines = [f"{begin}{number!r}\n" for begin, number in zip(self._begins, totals, strict=True)]
        return f"{''.join(lines)}{self._sum_begin}{self._sum!r}\n"


def _label_text(labels: Sequence[tuple[str, str]]) -> str:
    if not labels:
        return ""
    pairs = (f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels)
    return f"{{{','.join(pairs)}}}"
