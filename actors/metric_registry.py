"""The series of all metrics of `cortexd.metrics`, and their text for a scrape.

Owned by the metrics actor. Gauges belong to who told them and go with it.
"""

from __future__ import annotations

from collections.abc import Iterable

from actors.metric_series import Distribution, Value
from cortexd.messages.metrics import Sample
from cortexd.metrics import FAMILIES, Family

_Labels = tuple[str, ...]  # label values
_Key = tuple[str, _Labels]  # metric, label values


class _Metric:
    """One family with its series."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.series: dict[_Labels, Value | Distribution] = {}
        self._head = f"# HELP {family.name} {family.text}\n# TYPE {family.name} {family.kind}\n"

    def at(self, labels: _Labels) -> Value | Distribution:
        """Return one series, which begins at nought."""
        found = self.series.get(labels)
        if found is None:
            family = self.family
            pairs = list(zip(family.labels, labels, strict=True))
            if family.kind == "histogram":
                found = Distribution(family.name, pairs, family.buckets)
            else:
                found = Value(family.name, pairs)
            self.series[labels] = found
        return found

    def text(self) -> str:
        return self._head + "".join([series.text() for series in self.series.values()])


class MetricRegistry:
    """Add, show, forget, render."""

    def __init__(self) -> None:
        self._metrics = {family.name: _Metric(family) for family in FAMILIES}
        self._gauges_of: dict[str, set[_Key]] = {}

    def add(self, samples: Iterable[Sample]) -> None:
        """Count or observe each sample."""
        for sample in samples:
            metric = self._metrics[sample.metric]
            assert metric.family.kind != "gauge", f"{sample.metric} is a gauge"
            series = metric.at(tuple(sample.labels))
            if isinstance(series, Distribution):
                series.observe(sample.value)
            else:
                series.inc(sample.value)

    def counter(self, family: Family, **labels: str) -> Value:
        """Return one series of a counter, to count in it again and again."""
        found = self._at(family, labels)
        assert isinstance(found, Value), f"{family.name} is no counter"
        return found

    def histogram(self, family: Family, **labels: str) -> Distribution:
        """Return one series of a histogram, to observe in it again and again."""
        found = self._at(family, labels)
        assert isinstance(found, Distribution), f"{family.name} is no histogram"
        return found

    def show(self, owner: str, samples: Iterable[Sample]) -> None:
        """Set an actor's or a node's gauges; those it told before and does not now disappear."""
        shown: set[_Key] = set()
        for sample in samples:
            labels = tuple(sample.labels)
            series = self._metrics[sample.metric].at(labels)
            assert isinstance(series, Value), f"{sample.metric} is no gauge"
            series.value = sample.value
            shown.add((sample.metric, labels))
        for name, labels in self._gauges_of.get(owner, set()) - shown:
            self._metrics[name].series.pop(labels, None)  # two may have told the same
        self._gauges_of[owner] = shown

    def forget(self, owner: str) -> None:
        """Drop the gauges of one that is gone."""
        self.show(owner, ())
        del self._gauges_of[owner]

    def render(self) -> bytes:
        """Return all series as Prometheus text."""
        return "".join([metric.text() for metric in self._metrics.values()]).encode()

    def _at(self, family: Family, labels: dict[str, str]) -> Value | Distribution:
        return self._metrics[family.name].at(tuple(labels[name] for name in family.labels))
