"""The series of all metrics of `cortexd.metrics`, kept in one Prometheus registry.

Owned by the metrics actor. Gauges belong to who told them and go with it.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.exposition import generate_latest

from cortexd.messages.metrics import Sample
from cortexd.metrics import FAMILIES, Family

# Half as many lines: each series would have another one that says when it began.
disable_created_metrics()  # type: ignore[no-untyped-call]

_Series = tuple[str, tuple[str, ...]]  # metric, label values


class MetricRegistry:
    """Add, show, forget, render."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._families = {family.name: self._register(family) for family in FAMILIES}
        self._gauges_of: dict[str, set[_Series]] = {}
        # The library's own lookup of a series takes longer than counting in it.
        self._series: dict[_Series, Counter | Histogram] = {}

    def add(self, samples: Iterable[Sample]) -> None:
        """Count or observe each sample."""
        for sample in samples:
            key = (sample.metric, tuple(sample.labels))
            series = self._series.get(key)
            if series is None:
                family = self._families[sample.metric]
                assert not isinstance(family, Gauge), f"{sample.metric} is a gauge"
                series = family.labels(*sample.labels) if sample.labels else family
                self._series[key] = series
            if isinstance(series, Histogram):
                series.observe(sample.value)
            else:
                series.inc(sample.value)

    def counter(self, family: Family, **labels: str) -> Counter:
        """Return one series of a counter, to count in it again and again."""
        found = self._families[family.name]
        assert isinstance(found, Counter), f"{family.name} is no counter"
        return found.labels(**labels)

    def histogram(self, family: Family, **labels: str) -> Histogram:
        """Return one series of a histogram, to observe in it again and again."""
        found = self._families[family.name]
        assert isinstance(found, Histogram), f"{family.name} is no histogram"
        return found.labels(**labels)

    def show(self, owner: str, samples: Iterable[Sample]) -> None:
        """Set an actor's or a node's gauges; those it told before and does not now disappear."""
        shown: set[_Series] = set()
        for sample in samples:
            self._gauge(sample.metric).labels(*sample.labels).set(sample.value)
            shown.add((sample.metric, tuple(sample.labels)))
        for name, labels in self._gauges_of.get(owner, set()) - shown:
            self._gauge(name).remove(*labels)
        self._gauges_of[owner] = shown

    def forget(self, owner: str) -> None:
        """Drop the gauges of one that is gone."""
        self.show(owner, ())
        del self._gauges_of[owner]

    def render(self) -> bytes:
        """Return all series as Prometheus text."""
        return generate_latest(self.registry)

    def _gauge(self, name: str) -> Gauge:
        gauge = self._families[name]
        assert isinstance(gauge, Gauge), f"{name} is no gauge"
        return gauge

    def _register(self, family: Family) -> Counter | Gauge | Histogram:
        if family.kind == "gauge":
            return Gauge(family.name, family.text, family.labels, registry=self.registry)
        if family.kind == "counter":
            return Counter(family.name, family.text, family.labels, registry=self.registry)
        return Histogram(
            family.name,
            family.text,
            family.labels,
            registry=self.registry,
            buckets=family.buckets,
        )
