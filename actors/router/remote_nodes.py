"""The remote nodes of the fleet: what each said last, what runs there for us, who is left alone.

Part of the router actor (same loop). Nothing is kept on disk: a restarted router knows all of it
again after one round of polls and the fronts' word on what they have running.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from actors.router.managed_model import Lease
from actors.router.remote_node import RemoteNode
from cortexd.breaker import BreakerState
from cortexd.log import event
from cortexd.messages import NeuronReport, NodeFailed, NodeView
from cortexd.settings import NeuronEntry

if TYPE_CHECKING:
    from actors.router.router import Router


class RemoteNodes:
    """Find a node, count what is sent there, take in what is heard of it."""

    def __init__(
        self, router: Router, neurons: Iterable[NeuronEntry], on_change: Callable[[], None]
    ) -> None:
        """`on_change` is called when a node may serve more, or less, than before."""
        self._router = router
        self._by_name = {entry.name: RemoteNode(entry) for entry in neurons}
        self._on_change = on_change

    def __iter__(self) -> Iterator[RemoteNode]:
        return iter(self._by_name.values())

    def find(self, name: str) -> RemoteNode | None:
        """Return a node; None: it is not configured, or is this host."""
        return self._by_name.get(name)

    def have_all_answered(self) -> bool:
        """Tell whether each node has answered a poll at least once."""
        return all(node.has_answered for node in self)

    # Leases

    def begin(self, node: RemoteNode, request_id: str, lease: Lease, prefix: list[int]) -> None:
        """Count a request that goes to a node."""
        node.leases[request_id] = lease
        node.breaker.sent(request_id, time.monotonic())
        node.prefixes.remember(lease.model_id, prefix)

    def take_over(self, name: str, request_id: str, lease: Lease) -> None:
        """Hold a lease that was granted before this router was started."""
        node = self.find(name)
        if node is not None:
            node.leases[request_id] = lease

    def end(self, request_id: str, *, is_answered: bool) -> list[str]:
        """Close a request's leases; return the models that have seats again."""
        freed = []
        for node in self:
            lease = node.leases.pop(request_id, None)
            if lease is None:
                continue
            before = node.breaker.state(time.monotonic())
            if is_answered:
                node.breaker.succeeded(request_id, time.monotonic())
            else:
                node.breaker.ended(request_id)
            self._tell_breaker(node, before)
            freed.append(lease.model_id)
        return freed

    def leases(self) -> Iterator[tuple[str, str, Lease]]:
        """Yield node, id and lease of every request that runs on one of them."""
        for node in self:
            for request_id, lease in node.leases.items():
                yield node.entry.name, request_id, lease

    def num_running(self, model_id: str) -> Counter[str]:
        """Return how many requests for a model run, by account."""
        return Counter(lease.account for _, _, lease in self.leases() if lease.model_id == model_id)

    # What others report

    def on_report(self, report: NeuronReport) -> None:
        """Take over what a poll saw; say so when the node comes or goes."""
        node = self.find(report.name)
        if node is None:
            return
        was_healthy, before = node.is_healthy, node.breaker.state(time.monotonic())
        node.heard(report)
        self._tell_breaker(node, before)
        if node.is_healthy != was_healthy:
            name = "node.healthy" if node.is_healthy else "node.unhealthy"
            event(self._router.log, name, node=report.name, error=report.error)
        self._on_change()

    def on_node_failed(self, message: NodeFailed) -> None:
        """Count a failure; a node that refuses connections is not used until it answers a poll.

        What fails while the polls fail too is the same outage: its end is the polls' to tell.
        """
        node = self.find(message.node)
        if node is None:
            return
        before = node.breaker.state(time.monotonic())
        if node.report is not None and not node.report.is_healthy:
            node.breaker.ended(message.request_id)
        else:
            node.breaker.failed(message.request_id, time.monotonic())
        self._tell_breaker(node, before)
        if message.is_refusing and not node.is_refusing:
            node.is_refusing = True
            event(self._router.log, "node.refused", 30, node=message.node, error=message.reason)
            self._on_change()

    def view(self, name: str, model_id: str) -> NodeView:
        """Return what the last poll of a node said of a model's requests."""
        node = self.find(name)
        if node is None or node.report is None:
            return NodeView(False)
        found = [model for model in node.report.models if model.model_id == model_id]
        knows_load = found and found[0].max_in_flight is not None
        in_flight = found[0].in_flight + found[0].queue_depth if knows_load else None
        return NodeView(node.is_healthy, in_flight)

    def _tell_breaker(self, node: RemoteNode, before: BreakerState) -> None:
        now = time.monotonic()
        state = node.breaker.state(now)
        if state != before:
            event(
                self._router.log,
                f"node.breaker_{state}",
                30 if state == "open" else 20,
                node=node.entry.name,
                hold_s=round(node.breaker.left_s(now), 1),
            )
            self._router.show_gauges()
