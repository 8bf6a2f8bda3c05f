"""Where a request goes: to this host or another node, once the model is up there.

Part of the router actor (same loop). The rules are pure (`cortexd.placement`, `cortexd.affinity`);
what is known of the nodes is in `actors.router.remote_nodes`, loads there in
`actors.router.remote_loads`, waiting for a seat in `actors.router.seat_queue`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from actors.router.fleet_views import catalogue_cards, known_names, loading_of, node_statuses
from actors.router.load_errors import loading_error
from actors.router.local_models import quoted
from actors.router.managed_model import Lease
from actors.router.open_waits import OpenWaits
from actors.router.remote_loads import RemoteLoad, RemoteLoads
from actors.router.remote_node import RemoteNode, local_view
from actors.router.remote_nodes import RemoteNodes
from actors.router.seat_queue import SeatQueue
from cortexd.affinity import PrefixMemory
from cortexd.catalogue import Catalogue, CatalogueModel
from cortexd.errors import CortexError, DeadlineExceeded, InvalidRequest, ModelLoading, QueueTimeout
from cortexd.messages import (
    HeldLease,
    Loading,
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
_FIRST_POLL_S: Final = 20.0
_RECHECK_S: Final = 1.0
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
        self.nodes = RemoteNodes(router, neurons, self._wake)
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
                raise self._still_loading(model_id, placement.node)
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
        depths: dict[str, int] = {}  # of the conversation that each node has seen
        if message.prefix:
            depths = {n.entry.name: n.prefixes.depth(model_id, message.prefix) for n in self.nodes}
            depths[self._local_name] = self._local_prefixes.depth(model_id, message.prefix)
        return place(
            model_id,
            self._views(model_id, exclude=message.exclude),
            self._catalogue.get(model_id),
            lambda: known_names(self._router, self._catalogue, self.nodes),
            depths,
        )

    def _assign(
        self, model_id: str, message: Place, front: str, name: str, was_cold: bool
    ) -> Answer:
        """Send a request to a node; a remote one counts there from now on."""
        node = self.nodes.find(name)
        if node is None:
            self._count_turn(name)
            self._local_prefixes.remember(model_id, message.prefix)
            return RoutedHere(model_id)
        report = node.report
        assert report is not None, "a node that serves has been heard of"
        lease = Lease(model_id, front, message.account)
        self._count_turn(name)
        self.nodes.begin(node, message.request_id, lease, message.prefix)
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
            other is not node and other.has_model(model_id) for other in self.nodes
        )

    def begun(self, held: HeldLease, front: str) -> None:
        """Count a request that a front has sent to a node that was open to it."""
        node = self.nodes.find(held.node)
        if node is not None:
            self._count_turn(held.node)
            lease = Lease(held.model_id, front, held.account)
            self.nodes.begin(node, held.request_id, lease, held.prefix)

    async def _wait_for_seat(
        self, model_id: str, message: Place, front: str, envelope: Envelope
    ) -> Answer:
        if not message.wait:
            raise QueueTimeout(f'model "{model_id}" has no free seat; retry later', retry_after_s=2)
        asyncio.get_running_loop().call_soon(self._serve_queue, model_id)
        return await self._seats.wait(model_id, message, front, envelope.deadline_ns / 1e9)

    def _serve_queue(self, model_id: str) -> None:
        """Give the free seats of a model to those who wait for one."""

        def lease(message: Place, front: str) -> Answer | None:
            placement = self._choose(model_id, message)
            if placement.action == "queue":
                return None
            if placement.action != "run":
                raise self._still_loading(model_id, placement.node)  # the front asks again
            return self._assign(model_id, message, front, placement.node, False)

        self._seats.serve(model_id, lambda: self.nodes.num_running(model_id), lease)

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

    def end_request(self, request_id: str, *, is_answered: bool = False) -> None:
        """Close a lease, or the wait for one; the next in the queue gets its seat."""
        self._waits.end(request_id)
        self._seats.cancel(request_id)
        for model_id in self.nodes.end(request_id, is_answered=is_answered):
            self._serve_queue(model_id)

    def front_down(self, front: str) -> None:
        """Close the leases of a dead front ("name.incarnation")."""
        gone = [request_id for _, request_id, lease in self.nodes.leases() if lease.front == front]
        for request_id in gone:
            self.end_request(request_id)

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
            if options.is_bare:
                load = self._begin_load(model_id, placement.node)
            else:
                load = self._loads.begin(model_id, placement.node, options, needs.policy)
        while not load.is_done:
            await self._changed.wait()
        if load.error is not None:
            raise load.error

    async def unload(self, model_id: str, *, force: bool) -> bool:
        """Unload wherever it is loaded, or failed to be; False when it is at no node.

        Raises: InvalidRequest when only external servers have it.
        """
        holders = {
            node.entry.name: node.entry.kind
            for node in self.nodes
            if node.view().states.get(model_id) in {"loaded", "sleeping", "failed"}
        }
        neurons = [name for name, kind in holders.items() if kind == "cortex"]
        if holders and not neurons:
            raise InvalidRequest(
                f'model "{model_id}" runs on {quoted(holders)}, an external server; unload it there'
            )
        for name in neurons:
            await self._router.ask(
                "poller", UnloadOnNode(name, model_id, force), deadline_s=_UNLOAD_DEADLINE_S
            )
        return bool(neurons)

    def _begin_load(self, model_id: str, name: str) -> RemoteLoad:
        """Load a model as the catalogue says."""
        needs = self._catalogue.get(model_id)
        node = self.nodes.find(name)
        assert node is not None, "this host loads by itself"
        options = load_options(model_id, needs, node.view())
        return self._loads.begin(model_id, name, options, None if needs is None else needs.policy)

    def _still_loading(self, model_id: str, node: str) -> ModelLoading:
        return loading_error(model_id, f'loading on node "{node}"', self.loading(model_id))

    # Views

    def loading(self, model_id: str) -> Loading:
        """Return how far the load of a model is at the neurons."""
        return loading_of(model_id, self.nodes, self._loads.running(model_id))

    def knows(self, model_id: str) -> bool:
        """Tell whether the catalogue or a node has the model."""
        return model_id in self._catalogue or any(node.has_model(model_id) for node in self.nodes)

    def statuses(self) -> list[NodeStatus]:
        """Return every remote node for people and for `/v1/models`."""
        return node_statuses(self.nodes)

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
            for node in self.nodes
            if (name := node.entry.name) not in (exclude or ())
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
        return is_early and not self.nodes.have_all_answered()

    def _wake(self) -> None:
        """Something has changed: let all that wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()
        for model_id in self._seats.models():
            self._serve_queue(model_id)
