"""The metrics actor: one Prometheus registry for the whole daemon, rendered on its own listener.

Fronts tell it one `RequestFinished` per request, the poller one `HostReport` a second; nothing here
is on a request's path. Its death loses counts (Prometheus sees a counter reset) and no request.
Names and labels are the reference system's where those exist.
"""

from __future__ import annotations

import platform

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from actors.actor import AsyncActor, handles
from actors.node_gauges import NodeGauges
from cortexd.messages import (
    ActorDown,
    HostReport,
    NeuronReport,
    RequestFinished,
)
from cortexd.messages.envelope import Envelope
from cortexd.neuron_list import local_node_name

_DURATION_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)
_FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS_PER_S = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 400)
# Below this the decode window is too short to divide by; the whole duration is used instead.
_MIN_DECODE_WINDOW_S = 0.1
_BY_MODEL = ("model", "node")


class Metrics(AsyncActor):
    """Collect and render."""

    async def on_start(self) -> None:
        """Register all families and serve `/metrics` on the listener the root bound."""
        self._registry = CollectorRegistry()
        self._requests = self._counter("cortex_requests", "Requests ended", _BY_MODEL)
        self._errors = self._counter(
            "cortex_request_errors", "Requests that ended in an error", (*_BY_MODEL, "code")
        )
        self._cold_starts = self._counter(
            "cortex_cold_starts", "Requests that waited for a model to load", _BY_MODEL
        )
        self._duration = self._histogram(
            "cortex_request_duration_seconds", "Request duration", _DURATION_S
        )
        self._first_token = self._histogram(
            "cortex_time_to_first_token_seconds", "Time to the first token", _FIRST_TOKEN_S
        )
        self._speed = self._histogram(
            "cortex_tokens_per_second", "Decode speed of one request", _TOKENS_PER_S
        )
        self._prompt = self._counter("cortex_prompt_tokens", "Prompt tokens", _BY_MODEL)
        self._cached = self._counter(
            "cortex_cached_prompt_tokens", "Prompt tokens served from the prefix cache", _BY_MODEL
        )
        self._completion = self._counter("cortex_completion_tokens", "Generated tokens", _BY_MODEL)
        self._nodes = NodeGauges(self._registry)
        self._local_name = local_node_name(self.context.settings, platform.node())
        self._actor_downs = self._counter(
            "cortexd_actor_downs", "Actor processes that ended", ("actor",)
        )
        app = web.Application()
        app.router.add_get("/metrics", self._render)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        listener = self.context.listeners.get("metrics")
        if listener is not None:
            await web.SockSite(self._runner, listener).start()

    async def on_stop(self) -> None:
        """Close the listener's connections."""
        await self._runner.cleanup()

    @handles(RequestFinished)
    def on_request_finished(self, message: RequestFinished, envelope: Envelope) -> None:
        """Count one ended request."""
        labels = (message.model, message.node)
        self._requests.labels(*labels).inc()
        if message.error_code is not None:
            self._errors.labels(*labels, message.error_code).inc()
        if message.cold_start:
            self._cold_starts.labels(*labels).inc()
        self._duration.labels(*labels).observe(message.duration_s)
        self._prompt.labels(*labels).inc(message.prompt_tokens)
        self._cached.labels(*labels).inc(message.cached_tokens)
        self._completion.labels(*labels).inc(message.completion_tokens)
        if message.ttft_s is not None:
            self._first_token.labels(*labels).observe(message.ttft_s)
        if message.completion_tokens > 0:
            window_s = message.decode_s or 0.0
            if window_s < _MIN_DECODE_WINDOW_S:
                window_s = message.duration_s
            if window_s > 0:
                self._speed.labels(*labels).observe(message.completion_tokens / window_s)

    @handles(HostReport)
    def on_host_report(self, message: HostReport, envelope: Envelope) -> None:
        """Show this host's devices and engines."""
        self._nodes.show_host(self._local_name, message)

    @handles(NeuronReport)
    def on_neuron_report(self, message: NeuronReport, envelope: Envelope) -> None:
        """Show a remote neuron, or forget it while it does not answer."""
        self._nodes.show_neuron(message)

    def on_actor_down(self, down: ActorDown) -> None:
        """Count ended processes."""
        self._actor_downs.labels(down.name).inc()

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, _BY_MODEL, registry=self._registry, buckets=buckets)

    async def _render(self, request: web.Request) -> web.Response:
        body = generate_latest(self._registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})
