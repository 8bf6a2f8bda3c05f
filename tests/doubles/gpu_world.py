"""A `World` whose models run on a GPU: they hold memory there, and may sleep.

The evictor is the real one, so its proposals meet the router that carries them out.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from actors.actor import ActorContext
from actors.evictor import Evictor
from cortexd.errors import CortexError
from cortexd.messages import (
    GroupDown,
    HostReport,
    ListModels,
    ModelList,
    ModelLoaded,
    Ok,
    ProposeEviction,
    QueryHost,
    SleepModel,
    StartGroup,
    StopGroup,
    UnloadIdle,
    WakeModel,
)
from cortexd.messages.control import Message
from cortexd.messages.fleet import DeviceReport
from cortexd.settings import Settings
from tests.doubles.router_world import GIB, World, envelope

SLEEP_BYTES = 2 * GIB


class GpuWorld(World):
    """One GPU of 8 GiB; each model holds 3 GiB of it while it is awake."""

    def __init__(self, folder: Path, settings: Settings | None = None) -> None:
        super().__init__()
        self.size_bytes = 2 * GIB
        self.host_free_bytes: int | None = 64 * GIB
        self.foreign_bytes = 0  # what others hold of the GPU
        self.awake: set[str] = set()
        self.asleep: set[str] = set()
        self.sleep_error: CortexError | None = None
        self.wake_error: CortexError | None = None
        self.is_waking = asyncio.Event()
        self.may_wake = asyncio.Event()
        self.may_wake.set()
        self.evictor = Evictor(
            ActorContext(
                name="evictor",
                incarnation=1,
                settings=settings or Settings(),
                args=b"",
                listeners={},
                log=logging.getLogger("test"),
                runtime_dir=folder,
            )
        )
        self.evictor.attach(self)

    def tell(self, name: str, body: Message) -> None:
        """Bring the evictor's word to the router."""
        if isinstance(body, UnloadIdle):
            self.asked.append(body)
            self.router.spawn(self.router.on_unload_idle(body, envelope()))
            return
        super().tell(name, body)

    async def ask(self, name: str, body: Message, *, deadline_s: float) -> Message:
        """Answer as leaders and the router do, too."""
        match body:
            case SleepModel():
                self.asked.append(body)
                return self._sleep(body.model_id)
            case WakeModel():
                self.asked.append(body)
                return await self._wake(body.model_id)
            case ListModels():
                return ModelList([model.status() for model in self.router.models.values()])
        return await super().ask(name, body, deadline_s=deadline_s)

    def _sleep(self, model_id: str) -> Message:
        if self.sleep_error is not None:
            raise self.sleep_error
        self.awake.discard(model_id)
        self.asleep.add(model_id)
        return Ok()

    async def _wake(self, model_id: str) -> Message:
        self.is_waking.set()
        await self.may_wake.wait()
        if self.wake_error is not None:
            raise self.wake_error
        self.asleep.discard(model_id)
        self.awake.add(model_id)
        return Ok()

    async def _start_group(self, order: StartGroup) -> Message:
        self.awake.add(self._model_of(order.group))
        return await super()._start_group(order)

    async def _stop_group(self, message: StopGroup) -> Message:
        for models in (self.awake, self.asleep):
            models.discard(self._model_of(message.group))
        self.router.on_group_down(
            GroupDown(0, message.group, self.epoch, "stopped", will_restart=False, commanded=True)
        )
        return Ok()

    async def _describe(self, leader: str) -> Message:
        loaded = await super()._describe(leader)
        assert isinstance(loaded, ModelLoaded)
        return msgspec.structs.replace(
            loaded,
            device="test gpu",
            sleep_bytes=SLEEP_BYTES,
            is_asleep=loaded.options.model_id in self.asleep,
        )

    async def _host(self, message: QueryHost) -> Message:
        used = self.foreign_bytes + 3 * GIB * len(self.awake)
        device = DeviceReport(0, "test gpu", "cuda", 8 * GIB, min(used, 8 * GIB))
        report = HostReport("host", "Linux", "6", None, [device], [], 0.0, self.host_free_bytes)
        self.router.host = report
        return report

    async def _propose(self, message: ProposeEviction) -> Message:
        return await self.evictor.on_propose(message, envelope())

    def _model_of(self, group: str) -> str:
        return next(id for id, model in self.router.models.items() if model.group == group)
