"""Reads the metrics of a daemon of ours: one scrape, its series, quantiles of a histogram."""

from __future__ import annotations

import http.client
import re
from typing import Final

_LINE: Final = re.compile(r"^([a-z_]+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LE: Final = re.compile(r'le="([^"]+)"')


def scrape(port: int) -> str:
    """Return the text of `/metrics`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def total(text: str, name: str, label: str = "") -> float:
    """Return the sum of a metric's series, of those with this piece in their labels."""
    return sum(
        float(value)
        for found, labels, value in _LINE.findall(text)
        if found == name and label in labels
    )


def num_series(text: str) -> int:
    """Return the number of samples."""
    return len(_LINE.findall(text))


def bucket_counts(text: str, name: str) -> dict[float, float]:
    """Return what a histogram without labels has counted up to each bound."""
    return {
        float(_LE.findall(labels)[0]): float(value)
        for found, labels, value in _LINE.findall(text)
        if found == f"{name}_bucket"
    }


def bucket_quantile(counts: dict[float, float], share: float) -> float:
    """Return the upper bound of the bucket that holds a quantile."""
    wanted = share * counts[float("inf")]
    return next(bound for bound, count in sorted(counts.items()) if count >= wanted)
