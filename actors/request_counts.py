"""What ended requests add to the metrics. Part of the metrics actor.

The series of a model on a node are looked up once: the look-up of one costs more than counting in
it, and each request counts in ten.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Final

from actors.metric_registry import MetricRegistry
from cortexd import metrics
from cortexd.messages import RequestFinished, Sample

# Below this the decode window is too short to divide by; the whole duration is used instead.
_MIN_DECODE_WINDOW_S: Final = 0.1


class RequestCounts:
    """Count each request in the series of its model and node."""

    def __init__(self, registry: MetricRegistry) -> None:
        self._registry = registry
        self._series: dict[tuple[str, str], _Series] = {}

    def add(self, request: RequestFinished) -> None:
        """Count one ended request."""
        where = (request.model, request.node)
        series = self._series.get(where)
        if series is None:
            series = self._series[where] = _Series(self._registry, *where)
        series.add(request)
        if request.error_code is not None:
            self._registry.add(_error_samples(request))


class _Series:
    def __init__(self, registry: MetricRegistry, model: str, node: str) -> None:
        def counter(family: metrics.Family, **labels: str) -> Callable[[float], None]:
            return registry.counter(family, model=model, node=node, **labels).inc

        self._registry, self._model, self._node = registry, model, node
        self._requests = counter(metrics.REQUESTS)
        self._cold_starts = counter(metrics.COLD_STARTS)
        self._prompt_tokens = counter(metrics.PROMPT_TOKENS)
        self._cached_tokens = counter(metrics.CACHED_TOKENS)
        self._completion_tokens = counter(metrics.COMPLETION_TOKENS)
        self._retries = counter(metrics.RETRIES)
        self._comments = counter(metrics.KEEPALIVES, kind="comment")
        self._events = counter(metrics.KEEPALIVES, kind="event")

    def _histogram(self, family: metrics.Family) -> Callable[[float], None]:
        return self._registry.histogram(family, model=self._model, node=self._node).observe

    # A histogram of which nothing was observed would be shown as one of noughts.

    @cached_property
    def _duration(self) -> Callable[[float], None]:
        return self._histogram(metrics.DURATION)

    @cached_property
    def _queue_wait(self) -> Callable[[float], None]:
        return self._histogram(metrics.QUEUE_WAIT)

    @cached_property
    def _first_token(self) -> Callable[[float], None]:
        return self._histogram(metrics.FIRST_TOKEN)

    @cached_property
    def _speed(self) -> Callable[[float], None]:
        return self._histogram(metrics.SPEED)

    def add(self, request: RequestFinished) -> None:
        self._requests(1)
        self._duration(request.duration_s)
        if request.cold_start:
            self._cold_starts(1)
        elif request.wait_s is not None:
            self._queue_wait(request.wait_s)
        if request.prompt_tokens:
            self._prompt_tokens(request.prompt_tokens)
        if request.cached_tokens:
            self._cached_tokens(request.cached_tokens)
        if request.num_retries:
            self._retries(request.num_retries)
        if request.num_comments:
            self._comments(request.num_comments)
        if request.num_keepalive_events:
            self._events(request.num_keepalive_events)
        if request.ttft_s is not None:
            self._first_token(request.ttft_s)
        if request.completion_tokens > 0:
            self._completion_tokens(request.completion_tokens)
            window_s = request.decode_s or 0.0
            if window_s < _MIN_DECODE_WINDOW_S:
                window_s = request.duration_s
            if window_s > 0:
                self._speed(request.completion_tokens / window_s)


def _error_samples(request: RequestFinished) -> list[Sample]:
    """Return what a request that ended in an error adds beside."""
    code = request.error_code
    assert code is not None, "it failed"
    where = {"model": request.model, "node": request.node}
    samples = [metrics.REQUEST_ERRORS.sample(1, code=code, **where)]
    reason = metrics.REJECTION_REASONS.get(code)
    if reason is not None:
        samples.append(metrics.REJECTIONS.sample(1, reason=reason, **where))
    return samples
