"""The metrics actor: one Prometheus registry for the whole daemon, rendered on its own listener.

Fronts tell it a `RequestFinished` for each request, the poller one `HostReport` a second, everyone
`Measured` and `Gauges`; nothing here is on a request's path. Its death loses counts (Prometheus
sees a counter reset) and no request. `cortexd.metrics` says what there is and how to add to it.
"""

from __future__ import annotations

import platform

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from actors.actor import AsyncActor, handles
from actors.metric_registry import MetricRegistry
from actors.node_gauges import NodeGauges
from actors.request_counts import RequestCounts
from cortexd import metrics
from cortexd.messages import (
    ActorDown,
    Gauges,
    HostReport,
    Measured,
    NeuronReport,
    RequestsFinished,
)
from cortexd.messages.envelope import Envelope
from cortexd.neuron_list import local_node_name


class Metrics(AsyncActor):
    """Collect and render."""

    async def on_start(self) -> None:
        """Register all families and serve `/metrics` on the listener the root bound."""
        self._metrics = MetricRegistry()
        self._requests = RequestCounts(self._metrics)
        self._nodes = NodeGauges(self._metrics)
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
            self._requests.add(request)

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
