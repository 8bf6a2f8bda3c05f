"""Store, root, leaders and evictor, as far as a router sees them; a script plays them all."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from actors.actor import ActorContext
from actors.registry import Registry
from actors.router.args import RouterArgs
from actors.router.router import Router
from cortexd.catalogue import Catalogue, CatalogueModel
from cortexd.errors import ActorDown as ActorDownError
from cortexd.errors import CortexError, NotFound
from cortexd.messages import (
    ActorUp,
    DescribeModel,
    EvictionProposal,
    Gauges,
    GroupDown,
    GroupStarting,
    GroupUp,
    HostReport,
    Measured,
    ModelLoaded,
    Ok,
    ProposeEviction,
    QueryHost,
    ReadText,
    ResolvedFiles,
    ResolveFiles,
    Route,
    Routed,
    Sample,
    StartGroup,
    StopGroup,
)
from cortexd.messages.control import ActorInfo, Message
from cortexd.messages.envelope import Address, Envelope
from cortexd.messages.fleet import DeviceReport
from cortexd.models import (
    LoadOptions,
    ModelFiles,
    ModelLimits,
    ModelSpec,
    RopeSpec,
    WeightBytes,
)
from cortexd.settings import Settings
from tests.waiting import DEADLINE_S

MODEL = "org/small"
OTHER = "org/other"
GIB = 2**30


def model_spec() -> ModelSpec:
    """A spec whose numbers do not matter here."""
    return ModelSpec(
        model_type="llama",
        architecture="llama",
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        rope=RopeSpec(),
    )


class World:
    """Store, root, leaders and evictor, as far as the router sees them; a `Runtime`."""

    def __init__(self) -> None:
        self.peers = Registry()
        self.asked: list[Message] = []
        self.started = asyncio.Event()
        self.resolve_error: CortexError | None = None
        self.size_bytes = 1000
        self.weights: WeightBytes | None = None  # None: as large as the files
        self.victims: list[str] = []
        self.used_bytes = 0
        self.gpu_fault: str | None = None
        self.epoch = 0
        self.orders: dict[str, StartGroup] = {}
        self.loads_by_itself = True
        self.starting: set[str] = set()  # actors that are ready when somebody waits for them
        self.measured: list[Sample] = []
        self.gauges: list[Sample] = []
        self.texts: list[tuple[str, str]] = []  # which front was told to read which model's
        self.router: Router

    def tell(self, name: str, body: Message) -> None:
        """Keep what metrics and fronts are told."""
        if isinstance(body, ReadText):
            self.texts.append((name, body.files.model_id))
        if isinstance(body, Measured):
            self.measured += body.samples
        if isinstance(body, Gauges):
            self.gauges = body.samples

    async def ask(self, name: str, body: Message, *, deadline_s: float) -> Message:
        """Answer as the named actor would."""
        self.asked.append(body)
        if name in self.starting:
            raise ActorDownError(f'actor "{name}" is not running')
        answers: dict[type[Message], Callable[[Any], Awaitable[Message]]] = {
            ResolveFiles: self._resolve,
            StartGroup: self._start_group,
            StopGroup: self._stop_group,
            DescribeModel: lambda _: self._describe(name),
            ProposeEviction: self._propose,
            QueryHost: self._host,
        }
        return await answers[type(body)](body)

    async def wait_for(self, name: str, *, deadline_s: float) -> ActorInfo:
        """Let an actor get ready."""
        self.starting.discard(name)
        return ActorInfo(name, 1, "ready")

    def report_progress(self, fraction: float, stage: str) -> None:
        """Not used by the router."""

    def count(self, kind: type[Message]) -> int:
        """Return how often the router asked this."""
        return sum(isinstance(message, kind) for message in self.asked)

    async def _resolve(self, message: ResolveFiles) -> Message:
        if self.resolve_error is not None:
            raise self.resolve_error
        size = self.size_bytes
        weights = self.weights or WeightBytes(size, size, size)
        return ResolvedFiles(self._files(message.model_id), model_spec(), weights)

    def _files(self, model_id: str) -> ModelFiles:
        return ModelFiles(
            model_id=model_id,
            source="hub",
            revision="main",
            format="gguf",
            weights=("/m.gguf",),
            size_bytes=self.size_bytes,
        )

    async def _start_group(self, order: StartGroup) -> Message:
        self.epoch += 1
        self.orders[order.group] = order
        self.started.set()
        if self.loads_by_itself:
            asyncio.get_running_loop().call_soon(lambda: self.spawn_up(order.group, self.epoch))
        return GroupStarting(order.group, self.epoch)

    def spawn_up(self, group: str, epoch: int) -> None:
        """Let a group become ready."""
        leader = f"{group}/0"
        info = ActorInfo(leader, epoch, "ready", group=group, epoch=epoch)
        self.peers.apply(ActorUp(self.peers.sequence + 1, info))
        self.router.spawn(self.router.on_group_up(GroupUp(0, group, epoch, leader)))

    async def _stop_group(self, message: StopGroup) -> Message:
        if message.group not in self.orders:
            raise NotFound(f'no group "{message.group}"')
        self.used_bytes = 0
        self.router.on_group_down(
            GroupDown(0, message.group, self.epoch, "stopped", will_restart=False, commanded=True)
        )
        return Ok()

    async def _describe(self, leader: str) -> Message:
        order = self.orders[leader.split("/", maxsplit=1)[0]]
        args = msgspec.msgpack.decode(order.args)
        options = msgspec.convert(args["options"], LoadOptions)
        return ModelLoaded(
            options,
            self._files(options.model_id),
            model_spec(),
            ModelLimits(context=64, output=63),
            3 * GIB,
            "cpu",
            "float32",
            "reference",
            0.1,
        )

    async def _host(self, message: QueryHost) -> Message:
        device = DeviceReport(0, "cpu", "cpu", 4 * GIB, self.used_bytes)
        return HostReport("host", "Linux", "6", None, [device], [], gpu_fault=self.gpu_fault)

    async def _propose(self, message: ProposeEviction) -> Message:
        return EvictionProposal(self.victims, "lru")


def make_router(world: World, folder: Path, **settings: Any) -> Router:
    """Return a router that knows two models and talks to `world`."""
    catalogue = Catalogue(
        models=[CatalogueModel(id=MODEL), CatalogueModel(id=OTHER)], aliases={"small": MODEL}
    )
    return attached_router(world, folder, catalogue, Settings(**settings))


def attached_router(
    world: World,
    folder: Path,
    catalogue: Catalogue,
    settings: Settings,
    default_models: Sequence[LoadOptions] = (),
) -> Router:
    """Return a router of this catalogue that talks to `world`."""
    context = ActorContext(
        name="router",
        incarnation=1,
        settings=settings,
        args=msgspec.msgpack.encode(RouterArgs(list(default_models), catalogue)),
        listeners={},
        log=logging.getLogger("test"),
        runtime_dir=folder,
    )
    router = Router(context)
    router.attach(world)
    world.router = router
    return router


def envelope(deadline_s: float = DEADLINE_S, front: str = "front.0") -> Envelope:
    """An envelope from a front."""
    return Envelope(
        id=1,
        re=0,
        src=Address(front, 1),
        dst=Address("router", 1),
        epoch=0,
        deadline_ns=time.monotonic_ns() + int(deadline_s * 1e9),
        body=Ok(),
    )


def route(request_id: str = "r1", *, model: str = MODEL, wait: bool = True) -> Route:
    """A front's question."""
    return Route(model, request_id, wait)


async def routed(router: Router, request_id: str = "r1", model: str = MODEL) -> Routed:
    """Ask and wait until the model runs."""
    return await asyncio.wait_for(
        router.on_route(route(request_id, model=model), envelope()), timeout=DEADLINE_S
    )


def state_of(router: Router, model: str = MODEL) -> str:
    """Return a model's state."""
    return router.models[model].state


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Run one asynchronous test."""
    asyncio.run(asyncio.wait_for(work(), timeout=DEADLINE_S))  # type: ignore[arg-type]
