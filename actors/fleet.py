"""The router's view of the remote neurons: their last reports, our own dispatches, running loads.

Part of the router actor (same loop). Nothing here is kept on disk: a restarted router knows all of
it again after one round of polls. Placement itself is pure (`cortexd.placement`).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from actors.remote_node import RemoteLoad, RemoteNode, local_view
from cortexd.catalogue import Catalogue, CatalogueModel
from cortexd.errors import (
    Cancelled,
    CortexError,
    DeadlineExceeded,
    ModelLoadFailed,
    ModelLoading,
    NoHealthyNode,
)
from cortexd.log import event
from cortexd.messages import (
    LoadOnNode,
    NeuronReport,
    NodeFailed,
    Place,
    RoutedHere,
    RoutedRemote,
    UnloadOnNode,
)
from cortexd.messages.envelope import Envelope
from cortexd.messages.neurons import CatalogueCard, NodeStatus
from cortexd.models import LoadOptions
from cortexd.placement import Node, Placement, load_options, may_hold, place
from cortexd.settings import NeuronEntry

if TYPE_CHECKING:
    from actors.router import Router

# A gateway that has just started knows nothing yet; the first round of polls takes this long.
_FIRST_POLL_S: Final = 2.0
_RECHECK_S: Final = 1.0
_LOADING_RETRY_AFTER_S: Final = 2.0
_LOAD_DEADLINE_S: Final = 24 * 3600.0
_UNLOAD_DEADLINE_S: Final = 600.0


class Fleet:
    """Place requests on this host or a neuron, loading the model there first when it is cold."""

    def __init__(
        self, router: Router, neurons: list[NeuronEntry], catalogue: Catalogue, local_name: str
    ) -> None:
        self._router = router
        self._nodes = {entry.name: RemoteNode(entry) for entry in neurons}
        self._catalogue = {model.id: model for model in catalogue.models}
        self._local_name = local_name
        self._serves_here = router.context.settings.role != "gateway"
        self._loads: dict[str, RemoteLoad] = {}
        self._waiting: set[str] = set()
        self._ended: set[str] = set()
        self._started_at = time.monotonic()
        self._changed = asyncio.Event()

    def use_catalogue(self, catalogue: Catalogue) -> None:
        """Place by another catalogue from now on."""
        self._catalogue = {model.id: model for model in catalogue.models}
        self._wake()

    # Requests

    async def place(self, message: Place, envelope: Envelope) -> RoutedHere | RoutedRemote:
        """Return where the request goes; a remote one holds a lease.

        Raises: ModelNotFound, ModelNotFeasible, NoHealthyNode, ModelLoading, ModelLoadFailed.
        """
        model_id = self._router.aliases.get(message.model, message.model)
        was_cold = False
        while True:
            placement = await self._placement(model_id, message, envelope)
            if placement is None:
                continue
            if placement.node == self._local_name:
                return RoutedHere(model_id)
            if placement.action == "run":
                return self._lease(model_id, message, envelope, placement.node, was_cold)
            was_cold = True
            if placement.action == "load":
                self._begin_load(model_id, placement.node)
            if not message.wait:
                raise ModelLoading(
                    f'model "{model_id}" is loading on node "{placement.node}"; retry later or '
                    "stream to wait",
                    retry_after_s=_LOADING_RETRY_AFTER_S,
                )
            await self._wait(message, envelope, f'model "{model_id}" is still loading')

    async def _placement(
        self, model_id: str, message: Place, envelope: Envelope
    ) -> Placement | None:
        """Return the placement, None when a first look at the nodes was awaited instead."""
        load = self._loads.get(model_id)
        if load is not None and load.error is None:
            return Placement("wait", load.node)
        try:
            placement = place(
                model_id,
                self._views(exclude=message.exclude),
                self._catalogue.get(model_id),
                self._known_names(),
            )
        except CortexError:
            if not message.wait or not self._is_first_look():
                raise
            await self._wait(message, envelope, "no node has been heard of yet")
            return None
        is_remote_load = placement.action == "load" and placement.node != self._local_name
        if is_remote_load and load is not None and load.cooldown_left_s > 0:
            assert load.error is not None, "only a failed load cools down"
            raise self._load_failed(model_id, load)
        return placement

    def _lease(
        self, model_id: str, message: Place, envelope: Envelope, name: str, was_cold: bool
    ) -> RoutedRemote:
        node = self._nodes[name]
        assert node.report is not None, "a node that serves has been heard of"
        front = f"{envelope.src.name}.{envelope.src.incarnation}"
        node.leases[message.request_id] = (model_id, front)
        report = node.report
        return RoutedRemote(
            name, node.entry.kind, report.base_url, model_id, report.sequence, was_cold
        )

    async def _wait(self, message: Place, envelope: Envelope, what: str) -> None:
        """Return at the next change, or soon. Raises: DeadlineExceeded, Cancelled."""
        left_s = (envelope.deadline_ns - time.monotonic_ns()) / 1e9
        if left_s <= 0:
            raise DeadlineExceeded(what)
        self._waiting.add(message.request_id)
        changed = self._changed
        try:
            async with asyncio.timeout(min(left_s, _RECHECK_S)):
                await changed.wait()
        except TimeoutError:
            pass  # ages and cool-downs end without a message: look again
        finally:
            self._waiting.discard(message.request_id)
        if message.request_id in self._ended:
            self._ended.discard(message.request_id)
            raise Cancelled(f"request {message.request_id} ended while it waited")

    def end_request(self, request_id: str) -> None:
        """Close a lease, or the wait for one."""
        if request_id in self._waiting:
            self._ended.add(request_id)
        for node in self._nodes.values():
            node.leases.pop(request_id, None)

    def front_down(self, front: str) -> None:
        """Close the leases of a dead front ("name.incarnation")."""
        for node in self._nodes.values():
            node.leases = {
                request: lease for request, lease in node.leases.items() if lease[1] != front
            }

    # What others report

    def on_report(self, report: NeuronReport) -> None:
        """Take over what a poll saw; say so when the node comes or goes."""
        node = self._nodes.get(report.name)
        if node is None:
            return
        was_healthy = node.is_healthy
        node.heard(report)
        if node.is_healthy != was_healthy:
            name = "node.healthy" if node.is_healthy else "node.unhealthy"
            event(self._router.log, name, node=report.name, error=report.error)
        self._wake()

    def on_node_failed(self, message: NodeFailed) -> None:
        """Use a node that refuses connections no more until it answers a poll."""
        node = self._nodes.get(message.node)
        if node is not None and not node.is_refusing:
            node.is_refusing = True
            event(self._router.log, "node.refused", 30, node=message.node, error=message.reason)
            self._wake()

    # Loads

    async def load(self, options: LoadOptions) -> None:
        """Load on the best node, on an operator's behalf; joins a load that runs."""
        model_id = options.model_id
        load = self._loads.get(model_id)
        if load is None or load.error is not None:
            needs = self._catalogue.get(model_id) or CatalogueModel(
                id=model_id, min_devices=options.tensor_parallel
            )
            views = [view for view in self._views() if view.name != self._local_name]
            placement = place(model_id, views, needs)
            if placement.action == "run":
                return
            load = self._begin_load(model_id, placement.node, options)
        while model_id in self._loads and load.error is None:
            await self._changed.wait()
        if load.error is not None:
            raise load.error

    async def unload(self, model_id: str, *, force: bool) -> bool:
        """Unload wherever it is loaded; False when it is loaded nowhere."""
        holders = [
            node.entry.name
            for node in self._nodes.values()
            if node.entry.kind == "cortex" and node.view().states.get(model_id) == "loaded"
        ]
        for name in holders:
            await self._router.ask(
                "poller", UnloadOnNode(name, model_id, force), deadline_s=_UNLOAD_DEADLINE_S
            )
        return bool(holders)

    def _begin_load(
        self, model_id: str, name: str, options: LoadOptions | None = None
    ) -> RemoteLoad:
        failed = self._loads.get(model_id)
        load = RemoteLoad(name, num_failures=failed.num_failures if failed else 0)
        self._loads[model_id] = load
        if options is None:
            needs = self._catalogue.get(model_id)
            options = load_options(model_id, needs, self._nodes[name].view())
        self._router.spawn(self._load(model_id, load, options))
        return load

    async def _load(self, model_id: str, load: RemoteLoad, options: LoadOptions) -> None:
        log = self._router.log
        event(log, "model.loading", model=model_id, node=load.node)
        try:
            await self._router.ask(
                "poller", LoadOnNode(load.node, options), deadline_s=_LOAD_DEADLINE_S
            )
        except CortexError as error:
            load.error, load.failed_at = error, time.monotonic()
            load.num_failures += 1
            event(log, "model.load_failed", 40, model=model_id, node=load.node, error=error.message)
        else:
            # The poller has polled the node again before it answered, so the state is known.
            del self._loads[model_id]
            event(log, "model.loaded", model=model_id, node=load.node)
        finally:
            self._wake()

    def _load_failed(self, model_id: str, load: RemoteLoad) -> CortexError:
        cause = load.error
        assert cause is not None, "called for a failed load"
        if cause.http_status < 500:
            return cause
        if isinstance(cause, NoHealthyNode):
            return NoHealthyNode(cause.message, retry_after_s=min(load.cooldown_left_s, 60.0))
        return ModelLoadFailed(
            f'model "{model_id}" could not be loaded: {cause.message}',
            retry_after_s=min(load.cooldown_left_s, 60.0),
        )

    # Views

    def statuses(self) -> list[NodeStatus]:
        """Return every remote node for people and for `/v1/models`."""
        now = time.monotonic()
        return [
            NodeStatus(
                name=node.entry.name,
                kind=node.entry.kind,
                endpoint=node.entry.endpoint,
                is_healthy=node.is_healthy,
                age_s=None if node.report is None else now - node.heard_at,
                dispatched=len(node.leases),
                models=[] if node.report is None else node.report.models,
                error=None if node.report is None else node.report.error,
            )
            for node in self._nodes.values()
        ]

    def catalogue_cards(self) -> list[CatalogueCard]:
        """Return where each catalogue model could run now."""
        if not self._nodes:
            return []
        healthy = [view for view in self._views() if view.is_healthy]
        return [
            CatalogueCard(
                model_id=model.id,
                feasible_on=[view.name for view in healthy if may_hold(view, model.id, model)],
                capabilities=model.capabilities,
            )
            for model in self._catalogue.values()
        ]

    def _views(self, exclude: list[str] | None = None) -> list[Node]:
        views = [
            node.view()
            for name, node in self._nodes.items()
            if exclude is None or name not in exclude
        ]
        return (
            [local_view(self._local_name, self._router.models, self._router.host), *views]
            if self._serves_here
            else views
        )

    def _known_names(self) -> list[str]:
        names = {*self._router.aliases, *self._catalogue, *self._router.models}
        for node in self._nodes.values():
            if node.report is not None:
                names |= {model.model_id for model in node.report.models}
        return sorted(names)

    def _is_first_look(self) -> bool:
        """Tell whether a node may still be about to be heard of for the first time."""
        is_early = time.monotonic() - self._started_at < _FIRST_POLL_S
        return is_early and any(node.report is None for node in self._nodes.values())

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
