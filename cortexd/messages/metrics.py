"""What actors tell the metrics actor; `cortexd.metrics` names the metrics."""

from __future__ import annotations

import msgspec

from cortexd.messages.control import Message


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One value of one series; `labels` in the order of the metric's label names."""

    metric: str
    value: float
    labels: list[str]


class Measured(Message, frozen=True, tag="Measured"):
    """Anyone → metrics: events to count or to observe."""

    samples: list[Sample]


class Gauges(Message, frozen=True, tag="Gauges"):
    """Anyone → metrics: all gauges of this actor, whole; series of before that lack are dropped."""

    samples: list[Sample]
