"""The metrics actor: one Prometheus registry for the whole daemon, rendered on its own listener.

Fronts tell it a `RequestFinished` for each request, the poller one `HostReport` a second, everyone
`Measured` and `Gauges`; nothing here is on a request's path. Its death loses counts (Prometheus
sees a counter reset) and no request. `cortexd.metrics` says what there is and how to add to it.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from actors.actor import AsyncActor, handles
from actors.metric_registry import MetricRegistry
from actors.node_gauges import NodeGauges
from cortexd import metrics
from cortexd.messages import (
    ActorDown,
    Gauges,
    HostReport,
    Measured,
    NeuronReport,
    RequestFinished,
    RequestsFinished,
    Sample,
)
from cortexd.messages.envelope import Envelope
from cortexd.neuron_list import local_node_name

# Below this the decode window is too short to divide by; the whole duration is used instead.
_MIN_DECODE_WINDOW_S = 0.1


class Metrics(AsyncActor):
    """Collect and render."""

    async def on_start(self) -> None:
        """Register all families and serve `/metrics` on the listener the root bound."""
        self._metrics = MetricRegistry()
        self._nodes = NodeGauges(self._metrics.registry)
        self._local_name = local_node_name(self.context.settings, platform.node())
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

    @handles(RequestsFinished)
    def on_requests_finished(self, message: RequestsFinished, envelope: Envelope) -> None:
        """Count ended requests."""
        for request in message.requests:
            self._metrics.add(request_samples(request))

    @handles(Measured)
    def on_measured(self, message: Measured, envelope: Envelope) -> None:
        """Count and observe what an actor saw."""
        self._metrics.add(message.samples)

    @handles(Gauges)
    def on_gauges(self, message: Gauges, envelope: Envelope) -> None:
        """Show an actor's gauges in place of those it told before."""
        self._metrics.show(envelope.src.name, message.samples)

    @handles(HostReport)
    def on_host_report(self, message: HostReport, envelope: Envelope) -> None:
        """Show this host's devices and engines."""
        self._nodes.show_host(self._local_name, message, self.context.settings.engine)

    @handles(NeuronReport)
    def on_neuron_report(self, message: NeuronReport, envelope: Envelope) -> None:
        """Show a remote neuron, or forget it while it does not answer."""
        self._nodes.show_neuron(message)

    def on_actor_down(self, down: ActorDown) -> None:
        """Count ended processes; what they showed is no longer so."""
        self._metrics.add([metrics.ACTOR_DOWNS.sample(1, actor=down.name)])
        self._metrics.forget(down.name)

    async def _render(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )


def request_samples(request: RequestFinished) -> Iterator[Sample]:
    """Yield all that one ended request adds."""
    where = {"model": request.model, "node": request.node}
    yield metrics.REQUESTS.sample(1, **where)
    if request.error_code is not None:
        yield metrics.REQUEST_ERRORS.sample(1, code=request.error_code, **where)
        reason = metrics.REJECTION_REASONS.get(request.error_code)
        if reason is not None:
            yield metrics.REJECTIONS.sample(1, reason=reason, **where)
    if request.cold_start:
        yield metrics.COLD_STARTS.sample(1, **where)
    yield metrics.DURATION.sample(request.duration_s, **where)
    yield metrics.PROMPT_TOKENS.sample(request.prompt_tokens, **where)
    yield metrics.CACHED_TOKENS.sample(request.cached_tokens, **where)
    yield metrics.COMPLETION_TOKENS.sample(request.completion_tokens, **where)
    yield metrics.RETRIES.sample(request.num_retries, **where)
    yield metrics.KEEPALIVES.sample(request.num_comments, kind="comment", **where)
    yield metrics.KEEPALIVES.sample(request.num_keepalive_events, kind="event", **where)
    if request.wait_s is not None and not request.cold_start:
        yield metrics.QUEUE_WAIT.sample(request.wait_s, **where)
    if request.ttft_s is not None:
        yield metrics.FIRST_TOKEN.sample(request.ttft_s, **where)
    if request.completion_tokens > 0:
        window_s = request.decode_s or 0.0
        if window_s < _MIN_DECODE_WINDOW_S:
            window_s = request.duration_s
        if window_s > 0:
            yield metrics.SPEED.sample(request.completion_tokens / window_s, **where)
