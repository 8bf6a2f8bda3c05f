"""The router's view of all nodes: remote reports, our own dispatches, who may go where.

Part of the router actor (same loop). Nothing here is kept on disk: a restarted router knows all of
it again after one round of polls. The rules are pure (`cortexd.placement`, `cortexd.breaker`,
`cortexd.affinity`); loads at nodes are `actors.router.remote_loads`, waiting for a seat is
`actors.router.seat_queue`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from actors.router.fleet_views import catalogue_cards, known_names, loading_of, node_statuses
from actors.router.managed_model import Lease
from actors.router.open_waits import OpenWaits
from actors.router.remote_loads import RemoteLoads
from actors.router.remote_node import RemoteNode, local_view
from actors.router.seat_queue import SeatQueue
from cortexd.affinity import PrefixMemory
from cortexd.breaker import BreakerState
from cortexd.catalogue import Catalogue, CatalogueModel
from cortexd.errors import CortexError, DeadlineExceeded, ModelLoading, QueueTimeout
from cortexd.log import event
from cortexd.messages import (
    HeldLease,
    Loading,
    NeuronReport,
    NodeFailed,
    NodeView,
    Place,
    RoutedHere,
    RoutedRemote,
    UnloadOnNode,
)
from cortexd.messages.envelope import Envelope
from cortexd.messages.neurons import CatalogueCard, NodeStatus
from cortexd.models import LoadOptions
from cortexd.placement import Node, Placement, load_options, place
from cortexd.settings import NeuronEntry

if TYPE_CHECKING:
    from actors.router.router import Router

Answer = RoutedHere | RoutedRemote
# A gateway that has just started knows nothing yet, and neurons are often started with it: one that
# has not answered any poll may be about to.
_FIRST_POLL_S: Final = 10.0
_RECHECK_S: Final = 1.0
_LOADING_RETRY_AFTER_S: Final = 2.0
_MAX_RETRY_AFTER_S: Final = 60.0
# Half of a poll: what the choice rests on is as old as that anyway.
_OPEN_S: Final = 0.5
_UNLOAD_DEADLINE_S: Final = 600.0


class Fleet:
    """Place requests on this host or a neuron, loading the model there first when it is cold."""

    def __init__(
        self, router: Router, neurons: list[NeuronEntry], catalogue: Catalogue, local_name: str
    ) -> None:
        settings = router.context.settings
        self._router = router
        self._nodes = {entry.name: RemoteNode(entry) for entry in neurons}
        self._catalogue = {model.id: model for model in catalogue.models}
        self._local_name = local_name
        self._local_prefixes = PrefixMemory()
        self._turns: Counter[str] = Counter()
        self._serves_here = settings.role != "gateway"
        self._loads = RemoteLoads(router, self._wake)
        self._seats: SeatQueue[Place, Answer] = SeatQueue(
            "gateway.max_queue_depth",
            settings.gateway.max_queue_depth,
            settings.gateway.queue_wait_s,
        )
        self._waits = OpenWaits()
        self._started_at = time.monotonic()
        self._changed = asyncio.Event()

    def use_catalogue(self, catalogue: Catalogue) -> None:
        """Place by another catalogue from now on."""
        self._catalogue = {model.id: model for model in catalogue.models}
        self._wake()

    # Requests

    async def place(self, message: Place, envelope: Envelope) -> Answer:
        """Return where the request goes; a remote one holds a lease.

        Raises: ModelNotFound, ModelNotFeasible, WrongModality, NoHealthyNode, ModelLoading,
        ModelLoadFailed, Overloaded, QueueTimeout.
        """
        model_id = self._router.local.resolve(message.model)
        self._router.local.catalogue.check_generates(message.model)
        front = f"{envelope.src.name}.{envelope.src.incarnation}"
        was_cold = False
        while True:
            placement = await self._placement(model_id, message, envelope)
            if placement is None:
                continue
            if placement.action in {"run", "queue"}:
                # Nobody overtakes those who wait already.
                if placement.action == "run" and not self._seats.depth(model_id):
                    return self._assign(model_id, message, front, placement.node, was_cold)
                return await self._wait_for_seat(model_id, message, front, envelope)
            if placement.node == self._local_name:
                return RoutedHere(model_id)  # asking for a lease loads it
            was_cold = True
            if placement.action == "load":
                self._begin_load(model_id, placement.node)
            if not message.wait:
                raise self._loading_error(model_id, placement.node)
            await self._wait(message, envelope, f'model "{model_id}" is still loading')

    async def _placement(
        self, model_id: str, message: Place, envelope: Envelope
    ) -> Placement | None:
        """Return the placement, None when a first look at the nodes was awaited instead."""
        load = self._loads.running(model_id)
        if load is not None:
            return Placement("wait", load.node)
        try:
            placement = self._choose(model_id, message)
        except CortexError:
            if not message.wait or not self._is_first_look():
                raise
            await self._wait(message, envelope, "no node that has the model has answered yet")
            return None
        if placement.action == "load":
            self._loads.check(model_id, placement.node)
        return placement

    def _choose(self, model_id: str, message: Place) -> Placement:
        depths = (
            {
                name: node.prefixes.depth(model_id, message.prefix)
                for name, node in self._nodes.items()
            }
            if message.prefix
            else {}
        )
        if message.prefix:
            depths[self._local_name] = self._local_prefixes.depth(model_id, message.prefix)
        return place(
            model_id,
            self._views(model_id, exclude=message.exclude),
            self._catalogue.get(model_id),
            lambda: known_names(self._router, self._catalogue, self._nodes.values()),
            depths,
        )

    def _assign(
        self, model_id: str, message: Place, front: str, name: str, was_cold: bool
    ) -> Answer:
        """Send a request to a node; a remote one counts there from now on."""
        node = self._nodes.get(name)
        if node is None:
            self._count_turn(name)
            self._local_prefixes.remember(model_id, message.prefix)
            return RoutedHere(model_id)
        report = node.report
        assert report is not None, "a node that serves has been heard of"
        lease = Lease(model_id, front, message.account)
        self._count_in(node, message.request_id, lease, message.prefix)
        is_open = self._is_open(model_id, node)
        return RoutedRemote(
            name,
            node.entry.kind,
            report.base_url,
            model_id,
            report.sequence,
            was_cold,
            time.monotonic() + _OPEN_S if is_open else 0.0,
        )

    def _count_in(self, node: RemoteNode, request_id: str, lease: Lease, prefix: list[int]) -> None:
        self._count_turn(node.entry.name)
        node.leases[request_id] = lease
        node.breaker.sent(request_id, time.monotonic())
        node.prefixes.remember(lease.model_id, prefix)

    def _count_turn(self, name: str) -> None:
        self._turns[name] = self._turns.total() + 1

    def _is_open(self, model_id: str, node: RemoteNode) -> bool:
        """Tell whether requests for a model need not be asked for one by one: nothing is chosen.

        That is so of an external server that alone has the model, whose seats nobody counts and
        that has not failed of late. Our own neurons load and unload, so each request is asked for.
        """
        if node.entry.kind != "openai" or node.entry.max_in_flight:
            return False
        if node.breaker.state(time.monotonic()) != "closed":
            return False
        here = self._router.models.get(model_id)
        return here is None and not any(
            other is not node and other.has_model(model_id) for other in self._nodes.values()
        )

    def begun(self, held: HeldLease, front: str) -> None:
        """Count a request that a front has sent to a node that was open to it."""
        node = self._nodes.get(held.node)
        if node is not None:
            lease = Lease(held.model_id, front, held.account)
            self._count_in(node, held.request_id, lease, held.prefix)

    async def _wait_for_seat(
        self, model_id: str, message: Place, front: str, envelope: Envelope
    ) -> Answer:
        if not message.wait:
            raise QueueTimeout(f'model "{model_id}" has no free seat; retry later', retry_after_s=2)
        asyncio.get_running_loop().call_soon(self._serve_queue, model_id)
        return await self._seats.wait(model_id, message, front, envelope.deadline_ns / 1e9)

    def _serve_queue(self, model_id: str) -> None:
        """Give the free seats of a model to those who wait for one."""

        def running() -> Counter[str]:
            return Counter(
                lease.account
                for node in self._nodes.values()
                for lease in node.leases.values()
                if lease.model_id == model_id
            )

        def lease(message: Place, front: str) -> Answer | None:
            placement = self._choose(model_id, message)
            if placement.action == "queue":
                return None
            if placement.action != "run":
                raise self._loading_error(model_id, placement.node)  # the front asks again
            return self._assign(model_id, message, front, placement.node, False)

        self._seats.serve(model_id, running, lease)

    async def _wait(self, message: Place, envelope: Envelope, what: str) -> None:
        """Return at the next change, or soon. Raises: DeadlineExceeded, Cancelled."""
        left_s = (envelope.deadline_ns - time.monotonic_ns()) / 1e9
        if left_s <= 0:
            raise DeadlineExceeded(what)
        changed = self._changed
        # Ages and cool-downs end without a message: then look again.
        with self._waits.of(message.request_id), contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(left_s, _RECHECK_S)):
                await changed.wait()

    def take_over(self, name: str, request_id: str, lease: Lease) -> None:
        """Hold a lease that was granted before this router was started."""
        node = self._nodes.get(name)
        if node is not None:
            node.leases[request_id] = lease

    def end_request(self, request_id: str, *, is_answered: bool = False) -> None:
        """Close a lease, or the wait for one; the next in the queue gets its seat."""
        self._waits.end(request_id)
        self._seats.cancel(request_id)
        for node in self._nodes.values():
            lease = node.leases.pop(request_id, None)
            if lease is None:
                continue
            before = node.breaker.state(time.monotonic())
            if is_answered:
                node.breaker.succeeded(request_id, time.monotonic())
            else:
                node.breaker.ended(request_id)
            self._tell_breaker(node, before)
            self._serve_queue(lease.model_id)

    def leases(self) -> Iterator[tuple[str, str, Lease]]:
        """Yield node, id and lease of every request that runs on another one."""
        for node in self._nodes.values():
            for request_id, lease in node.leases.items():
                yield node.entry.name, request_id, lease

    def front_down(self, front: str) -> None:
        """Close the leases of a dead front ("name.incarnation")."""
        gone = [
            request_id
            for node in self._nodes.values()
            for request_id, lease in node.leases.items()
            if lease.front == front
        ]
        for request_id in gone:
            self.end_request(request_id)

    # What others report

    def on_report(self, report: NeuronReport) -> None:
        """Take over what a poll saw; say so when the node comes or goes."""
        node = self._nodes.get(report.name)
        if node is None:
            return
        was_healthy, before = node.is_healthy, node.breaker.state(time.monotonic())
        node.heard(report)
        self._tell_breaker(node, before)
        if node.is_healthy != was_healthy:
            name = "node.healthy" if node.is_healthy else "node.unhealthy"
            event(self._router.log, name, node=report.name, error=report.error)
        self._wake()

    def on_node_failed(self, message: NodeFailed) -> None:
        """Count a failure; a node that refuses connections is not used until it answers a poll.

        What fails while the polls fail too is the same outage: its end is the polls' to tell.
        """
        node = self._nodes.get(message.node)
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
            self._wake()

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

    # Loads

    async def load(self, options: LoadOptions) -> None:
        """Load on the best node, on an operator's behalf; joins a load that runs."""
        model_id = options.model_id
        load = self._loads.running(model_id)
        if load is None:
            needs = self._catalogue.get(model_id) or CatalogueModel(
                id=model_id, min_devices=options.tensor_parallel
            )
            views = [view for view in self._views(model_id) if view.name != self._local_name]
            placement = place(model_id, views, needs)
            if placement.action in {"run", "queue"}:
                return
            load = self._loads.begin(model_id, placement.node, options, needs.policy)
        while not load.is_done:
            await self._changed.wait()
        if load.error is not None:
            raise load.error

    async def unload(self, model_id: str, *, force: bool) -> bool:
        """Unload wherever it is loaded; False when it is loaded nowhere."""
        holders = [
            node.entry.name
            for node in self._nodes.values()
            if node.entry.kind == "cortex"
            and node.view().states.get(model_id) in {"loaded", "sleeping"}
        ]
        for name in holders:
            await self._router.ask(
                "poller", UnloadOnNode(name, model_id, force), deadline_s=_UNLOAD_DEADLINE_S
            )
        return bool(holders)

    def _begin_load(self, model_id: str, name: str) -> None:
        needs = self._catalogue.get(model_id)
        options = load_options(model_id, needs, self._nodes[name].view())
        self._loads.begin(model_id, name, options, None if needs is None else needs.policy)

    def _loading_error(self, model_id: str, node: str) -> ModelLoading:
        loading = self.loading(model_id)
        retry_after_s = min(max(loading.eta_s or _LOADING_RETRY_AFTER_S, 1.0), _MAX_RETRY_AFTER_S)
        return ModelLoading(
            f'model "{model_id}" is loading on node "{node}" ({loading.stage or "starting"}); '
            "retry later or stream to wait",
            retry_after_s=retry_after_s,
            progress=round(loading.progress or 0.0, 3),
            eta_s=None if loading.eta_s is None else round(loading.eta_s, 1),
        )

    # Views

    def loading(self, model_id: str) -> Loading:
        """Return how far the load of a model is at the neurons."""
        return loading_of(model_id, self._nodes.values(), self._loads.running(model_id))

    def node_view(self, name: str, model_id: str) -> NodeView:
        """Return what the last poll of a node said of a model's requests."""
        node = self._nodes.get(name)
        if node is None or node.report is None:
            return NodeView(False)
        found = [model for model in node.report.models if model.model_id == model_id]
        knows_load = found and found[0].max_in_flight is not None
        in_flight = found[0].in_flight + found[0].queue_depth if knows_load else None
        return NodeView(node.is_healthy, in_flight)

    def statuses(self) -> list[NodeStatus]:
        """Return every remote node for people and for `/v1/models`."""
        return node_statuses(self._nodes.values())

    def queue_depths(self) -> dict[str, int]:
        """Return how many requests wait for a seat, by model."""
        return self._seats.depths()

    def catalogue_cards(self) -> list[CatalogueCard]:
        """Return where each catalogue model could run now."""
        return catalogue_cards(self._views(), self._catalogue.values())

    def _views(self, model_id: str = "", exclude: list[str] | None = None) -> list[Node]:
        """Return all nodes; for a model, those where it could not be loaded count as failed."""
        failed = self._loads.failed_nodes(model_id) if model_id else set()
        views = [
            node.view(self._turns[name], failed_id=model_id if name in failed else None)
            for name, node in self._nodes.items()
            if exclude is None or name not in exclude
        ]
        if not self._serves_here:
            return views
        here = local_view(
            self._local_name,
            self._router.models,
            self._router.host,
            is_draining=self._router.is_draining,
            turn=self._turns[self._local_name],
        )
        return [here, *views]

    def _is_first_look(self) -> bool:
        """Tell whether a node may still be about to answer for the first time."""
        is_early = time.monotonic() - self._started_at < _FIRST_POLL_S
        return is_early and not all(node.has_answered for node in self._nodes.values())

    def _wake(self) -> None:
        """Something has changed: let all that wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()
        for model_id in self._seats.models():
            self._serve_queue(model_id)
