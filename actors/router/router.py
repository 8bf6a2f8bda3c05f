"""The router: the one owner of "what runs where" on this host.

Fronts ask it where a model is (`Route`) and hold a lease until `EndRequest`; it loads a cold model
once however many ask, never unloads one in use, and rebuilds its view after a crash from the
registry, the leaders and the desired-state file. Its parts: requests for this host's models
(`actors.router.local_requests`), loading (`actors.router.model_loader`), one model's state
(`actors.router.managed_model`), remote neurons (`actors.router.fleet`).
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
from collections.abc import Awaitable, Iterator
from typing import Final

import msgspec

from actors.actor import ActorContext, AsyncActor, handles
from actors.router.activation import activate, adopt
from actors.router.admin import RouterAdmin
from actors.router.args import RouterArgs
from actors.router.fleet import Fleet
from actors.router.fleet_views import loaded_ids
from actors.router.gauges import router_gauges
from actors.router.local_models import LocalModels, check_devices, quoted
from actors.router.local_requests import LocalRequests
from actors.router.lost_requests import record_lost_requests
from actors.router.managed_model import Lease, ManagedModel
from actors.router.model_loader import ModelLoader
from actors.router.text_notice import tell_front
from cortexd.desired import is_draining, remember_draining
from cortexd.errors import ActorDown as ActorDownError
from cortexd.errors import (
    CortexError,
    MailboxFull,
    ModelAlreadyLoaded,
    ModelLoadFailed,
    ModelNotFound,
)
from cortexd.log import event
from cortexd.messages import (
    ActorDown,
    ActorUp,
    AdminCommand,
    AdminReply,
    CatalogueChanged,
    EndRequest,
    Gauges,
    GroupDown,
    GroupUp,
    HeldLeases,
    HostReport,
    LeaseReport,
    ListModels,
    Loading,
    LoadModel,
    LoadProgress,
    Measured,
    ModelList,
    NeuronReport,
    NodeFailed,
    NodeView,
    Ok,
    Place,
    QueryLoading,
    QueryNode,
    RecycleModel,
    ResolveProgress,
    Route,
    Routed,
    RoutedHere,
    RoutedRemote,
    Sample,
    SleepModel,
    UnloadIdle,
    UnloadModelNow,
    WakeModel,
)
from cortexd.messages.envelope import Envelope
from cortexd.models import LoadOptions, ModelPolicy
from cortexd.neuron_list import local_node_name, remote_neurons

_GAUGE_PERIOD_S: Final = 2.0


class Router(AsyncActor):
    """Route, load, unload."""

    def __init__(self, context: ActorContext) -> None:
        super().__init__(context)
        args = msgspec.msgpack.decode(context.args, type=RouterArgs)
        # A gateway runs no engine: its models are those of its neurons.
        self._serves_here = context.settings.role != "gateway"
        self.local = LocalModels(context.runtime_dir)
        self.host: HostReport | None = None
        self.num_looks = 0  # how many there were
        self.is_draining = is_draining(context.runtime_dir)
        self.requests = LocalRequests(self)
        self.loader = ModelLoader(self)
        self._admin = RouterAdmin(self)
        self._background: set[asyncio.Task[None]] = set()
        self.node_name = local_node_name(context.settings, platform.node())
        self.fleet = Fleet(self, remote_neurons(context.settings), args.catalogue, self.node_name)
        self.local.use_catalogue(args.catalogue, serves_here=self._serves_here)
        wanted = args.default_models if self._serves_here else []
        self.default_models = [self.local.completed(options) for options in wanted]
        for options in self.default_models:
            self.local.add(options, is_known=True)

    @property
    def models(self) -> dict[str, ManagedModel]:
        """Return the models of this host by id."""
        return self.local.by_id

    @property
    def aliases(self) -> dict[str, str]:
        """Return what each alias means."""
        return self.local.aliases

    # Life cycle

    async def on_start(self) -> None:
        """Adopt what already runs, then load what should run and does not."""
        activate(self)
        for peer in self.peers.all():
            record_lost_requests(self, peer.name, before=peer.incarnation)
        self.spawn(self._show_forever())

    async def on_stop(self) -> None:
        """Stop background work; groups are stopped by the root."""
        for task in self._background:
            task.cancel()

    def spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        """Run work in the background; its failure is logged."""
        task = asyncio.create_task(self._guard(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _show_forever(self) -> None:
        while True:
            self.show_gauges()
            await asyncio.sleep(_GAUGE_PERIOD_S)

    def show_gauges(self) -> None:
        """Tell metrics who waits, and which nodes are left alone."""
        with contextlib.suppress(ActorDownError, MailboxFull):  # it is told again soon
            self.tell("metrics", Gauges(router_gauges(self)))

    def measure(self, sample: Sample) -> None:
        """Tell metrics what happened; a metrics actor that is not there misses it."""
        with contextlib.suppress(ActorDownError, MailboxFull):
            self.tell("metrics", Measured([sample]))

    async def _guard(self, work: Awaitable[None]) -> None:
        try:
            await work
        except CortexError as error:
            event(self.log, "router.background_failed", 30, error=error.message)
        except Exception:
            event(self.log, "router.background_failed", 40, exc_info=True)

    def drain(self, *, is_on: bool) -> None:
        """Take no new requests, or take them again; what runs goes on."""
        remember_draining(self.context.runtime_dir, is_on=is_on)
        self.is_draining = is_on
        event(self.log, "node.draining" if is_on else "node.drained_no_more")

    # Requests

    @handles(Route)
    async def on_route(self, message: Route, envelope: Envelope) -> Routed:
        """Lease a loaded model, loading it first when it is cold."""
        with self._naming(message.model):
            return await self.requests.route(message, envelope)

    @handles(Place)
    async def on_place(self, message: Place, envelope: Envelope) -> RoutedHere | RoutedRemote:
        """Choose the node of a request, bringing the model up on one when it is cold."""
        with self._naming(message.model):
            return await self.fleet.place(message, envelope)

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Let what is raised inside say which model it is about, if clients did not invent it."""
        try:
            yield
        except CortexError as error:
            model_id = self.local.resolve(name)
            model = self.models.get(model_id)
            if (model is not None and model.is_known) or self.fleet.knows(model_id):
                error.model = model_id
            raise

    @handles(EndRequest)
    def on_end_request(self, message: EndRequest, envelope: Envelope) -> None:
        """Close a lease, or the wait for one."""
        self.fleet.end_request(message.request_id, is_answered=message.is_answered)
        self.requests.end(message.request_id)

    @handles(LeaseReport)
    def on_lease_report(self, message: LeaseReport, envelope: Envelope) -> None:
        """Count what a front has begun at a node that was open to it, and what has ended."""
        front = f"{envelope.src.name}.{envelope.src.incarnation}"
        for held in message.begun:
            self.fleet.begun(held, front)
        for ended in message.ended:
            self.fleet.end_request(ended.request_id, is_answered=ended.is_answered)

    @handles(HeldLeases)
    def on_held_leases(self, message: HeldLeases, envelope: Envelope) -> None:
        """Take over what a front was granted by the router before this one."""
        front = f"{envelope.src.name}.{envelope.src.incarnation}"
        for held in message.leases:
            lease = Lease(held.model_id, front, held.account)
            if held.node:
                self.fleet.nodes.take_over(held.node, held.request_id, lease)
            else:
                self.requests.take_over(held.request_id, lease)

    @handles(ListModels)
    def on_list_models(self, message: ListModels, envelope: Envelope) -> ModelList:
        """Answer all models and aliases, and what the remote neurons have."""
        waiting = self.requests.queue_depths()
        return ModelList(
            [model.status(waiting.get(model_id, 0)) for model_id, model in self.models.items()],
            self.aliases,
            nodes=self.fleet.statuses(),
            catalogue=self.fleet.catalogue_cards(),
            is_draining=self.is_draining,
        )

    @handles(QueryNode)
    def on_query_node(self, message: QueryNode, envelope: Envelope) -> NodeView:
        """Answer how a node is that a front waits for."""
        return self.fleet.nodes.view(message.node, message.model_id)

    @handles(QueryLoading)
    def on_query_loading(self, message: QueryLoading, envelope: Envelope) -> Loading:
        """Answer how far a load is, here or at a neuron."""
        model_id = self.local.resolve(message.model)
        model = self.models.get(model_id)
        if model is not None and model.is_in("loading", "recovering"):
            return model.loading
        return self.fleet.loading(model_id)

    @handles(LoadModel)
    async def on_load_model(self, message: LoadModel, envelope: Envelope) -> Ok:
        """Load and answer when loaded; joins a load that runs with the same options."""
        await self.load(message.options, message.policy)
        return Ok()

    @handles(UnloadModelNow)
    async def on_unload_model(self, message: UnloadModelNow, envelope: Envelope) -> Ok:
        """Drain and unload; answer when the memory is free."""
        await self.unload(message.model_id, force=message.force)
        return Ok()

    @handles(UnloadIdle)
    async def on_unload_idle(self, message: UnloadIdle, envelope: Envelope) -> None:
        """Unload an idle model, or put it to sleep, unless it is in use again."""
        model = self.models.get(message.model_id)
        if model is None or model.leases or not model.is_in("loaded", "sleeping"):
            return
        event(
            self.log,
            "model.idle",
            model=message.model_id,
            idle_s=message.idle_s,
            reason=message.reason,
        )
        if message.may_sleep:
            await self.loader.sleep.sleep_or_unload(model, reason=message.reason)
        else:
            await self.loader.unload(model, force=False, reason=message.reason)

    @handles(SleepModel)
    async def on_sleep(self, message: SleepModel, envelope: Envelope) -> Ok:
        """Put a model to sleep; answer when its device is free."""
        await self.loader.sleep.sleep(self._running_model(message.model_id))
        return Ok()

    @handles(WakeModel)
    async def on_wake(self, message: WakeModel, envelope: Envelope) -> Ok:
        """Wake a model; answer when it can run."""
        await self.loader.ensure_loaded(self._running_model(message.model_id))
        return Ok()

    @handles(RecycleModel)
    async def on_recycle(self, message: RecycleModel, envelope: Envelope) -> None:
        """Start a model's engine anew unless it is in use."""
        model = self.models.get(message.model_id)
        if model and model.state == "loaded" and not model.leases:
            event(self.log, "model.recycling", model=message.model_id, cycles=model.num_cycles)
            await self.loader.recycle(model)

    @handles(AdminCommand)
    async def on_admin(self, message: AdminCommand, envelope: Envelope) -> AdminReply:
        """Run an operator's command."""
        return await self._admin.run(message)

    @handles(CatalogueChanged)
    def on_catalogue_changed(self, message: CatalogueChanged, envelope: Envelope) -> None:
        """Go by another catalogue from now on; what runs goes on running as it is."""
        kept = {options.model_id for options in self.default_models}
        self.local.use_catalogue(message.catalogue, kept=kept, serves_here=self._serves_here)
        self.fleet.use_catalogue(message.catalogue)

    # What others report

    @handles(HostReport)
    def on_host_report(self, message: HostReport, envelope: Envelope) -> None:
        """Keep the last look at the devices, and what the engines now offer."""
        self.host = message
        self.num_looks += 1
        for load in message.loads:
            model = self.models.get(load.model_id)
            if model is not None and model.state == "loaded":
                model.offer(load.context)

    @handles(NeuronReport)
    def on_neuron_report(self, message: NeuronReport, envelope: Envelope) -> None:
        """Keep the last look at a remote neuron."""
        self.fleet.nodes.on_report(message)

    @handles(NodeFailed)
    def on_node_failed(self, message: NodeFailed, envelope: Envelope) -> None:
        """Leave a neuron alone that refused a connection."""
        self.fleet.nodes.on_node_failed(message)

    @handles(LoadProgress)
    def on_load_progress(self, message: LoadProgress, envelope: Envelope) -> None:
        """Note how far a leader's load is."""
        model = self.models.get(message.model_id)
        if model and model.state in {"loading", "recovering"}:
            model.progress, model.stage = message.fraction, message.stage

    @handles(ResolveProgress)
    def on_resolve_progress(self, message: ResolveProgress, envelope: Envelope) -> None:
        """Note how far a download is."""
        model = self.models.get(message.model_id)
        if model and model.state == "loading":
            model.stage = message.stage
            model.progress = (
                message.done_bytes / message.total_bytes if message.total_bytes else 0.0
            )

    def on_actor_down(self, down: ActorDown) -> None:
        """Close the leases of a dead front, and record its requests in its place."""
        holder = f"{down.name}.{down.incarnation}"
        self.fleet.front_down(holder)
        self.requests.front_down(holder)
        record_lost_requests(self, down.name, before=down.incarnation + 1)

    def on_actor_up(self, up: ActorUp) -> None:
        """Record what an earlier front left when no router was there; prepare a new one."""
        tell_front(self, up.actor.name)
        record_lost_requests(self, up.actor.name, before=up.actor.incarnation)

    async def on_group_up(self, up: GroupUp) -> None:
        """Ask a new leader what it runs, then route to it."""
        model = self.local.by_group(up.group)
        peer = self.peers.get(up.leader)
        if model is None or peer is None:
            return
        self.spawn(adopt(self, model, peer, up.epoch))

    def on_group_down(self, down: GroupDown) -> None:
        """Recover, fail, or finish an unload."""
        model = self.local.by_group(down.group)
        if model is None or (model.epoch and down.epoch < model.epoch):
            return
        if down.commanded:
            model.become("unloaded")
        elif down.will_restart:
            model.become("recovering", stage="restarting")
        else:
            error = down.error.to_exception() if down.error else ModelLoadFailed(down.reason)
            model.become("failed", error=error)
            self.loader.metrics.failed(model)
            self.local.remember()
            event(self.log, "model.failed", 40, model=model.options.model_id, error=error.message)
        self.requests.serve(model)

    # For the loader and the admin commands

    async def load(self, options: LoadOptions, policy: ModelPolicy | None = None) -> None:
        """Load with these options, or raise ModelAlreadyLoaded when others are in force."""
        options = msgspec.structs.replace(options, model_id=self.local.resolve(options.model_id))
        check_devices(options)
        if not self._serves_here:
            await self.fleet.load(options)
            return
        options = self.local.completed(options)
        model = self.models.get(options.model_id)
        if model and model.is_in("loading", "loaded", "recovering", "draining", "sleeping"):
            if options != model.options:
                loaded = model.options
                devices = ",".join(map(str, loaded.devices or ())) or "default"
                raise ModelAlreadyLoaded(
                    f'model "{options.model_id}" is {model.state} with other options '
                    f"(quant {loaded.quant or 'default'}, tensor_parallel "
                    f"{loaded.tensor_parallel}, devices {devices}); unload it first"
                )
        elif model:
            model.options = options
            model.failures = 0
        else:
            model = self.local.add(options, is_known=False)
        if policy is not None and policy != model.given_policy:
            model.given_policy = policy
            self.local.remember()
        await self.loader.ensure_loaded(model)

    async def unload(self, model_id: str, *, force: bool) -> None:
        """Unload by id or alias, a gateway at its neurons; ModelNotFound when it is not loaded.

        Of a model whose load failed only the failure is forgotten: else a mistyped id would stay in
        the lists, and the host impaired, until the daemon ends.
        """
        wanted = self.local.resolve(model_id)
        if not self._serves_here and await self.fleet.unload(wanted, force=force):
            return
        model = self.models.get(wanted)
        if model is not None and model.is_in("failed"):
            await self.loader.clear_failure(model)
            return
        await self.loader.unload(self._running_model(model_id), force=force, reason="operator")

    def _running_model(self, name: str) -> ManagedModel:
        """Return a model that has a group, by id or alias. Raises: ModelNotFound."""
        model = self.models.get(self.local.resolve(name))
        if model is None or model.is_in("unloaded", "failed"):
            ids = self.local.ids_in("loaded", "sleeping")
            loaded = quoted(ids if self._serves_here else loaded_ids(self.fleet.statuses()))
            raise ModelNotFound(f'model "{name}" is not loaded; loaded: {loaded}', param="model_id")
        return model
