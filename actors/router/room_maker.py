"""Makes room for a model that starts or wakes: others are unloaded, or sleep, as the evictor says.

Part of the router actor (same loop). A model in use is never unloaded: when only such ones are in
the way, or another load is, the newcomer waits for them, within a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import TYPE_CHECKING, Final

import msgspec

from actors.router.device_room import DeviceRoom
from actors.router.managed_model import ManagedModel
from cortexd.errors import CortexError
from cortexd.eviction import may_displace
from cortexd.log import event
from cortexd.memory_budget import held_bytes, within_limit
from cortexd.messages import (
    EvictionProposal,
    HostReport,
    ProposeEviction,
    QueryHost,
    ResolvedFiles,
)
from cortexd.messages.fleet import DeviceReport
from cortexd.models import LoadOptions

if TYPE_CHECKING:
    from actors.router.router import Router

_CONTROL_DEADLINE_S: Final = 10.0
_HOST_DEADLINE_S: Final = 5.0  # the poller answers from what it saw last
# Longer than most answers take: whoever asked waits for the load anyway.
_MAX_WAIT_S: Final = 120.0
_RECHECK_S: Final = 0.25
# The poller looks once a second; without it what was freed is not waited for any longer.
_LOOKS_DEADLINE_S: Final = 10.0


class RoomMaker:
    """One model's room at a time: two loads must not count on the same memory."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._turn = asyncio.Lock()
        # When memory was freed last, by the loop's clock, and how many looks there had been.
        self._freed_at = -math.inf
        self._looks_before = 0

    def note_freed(self) -> None:
        """Note that memory was freed now: devices show it only at the poller's next look."""
        self._freed_at = asyncio.get_running_loop().time()
        self._looks_before = self._router.num_looks

    def _shows_freed(self) -> bool:
        """Tell whether the last look at the devices shows what was freed last."""
        # The first look to come may have begun before.
        if self._router.num_looks >= self._looks_before + 2:
            return True
        return asyncio.get_running_loop().time() - self._freed_at > _LOOKS_DEADLINE_S

    async def make_room(self, model: ManagedModel, resolved: ResolvedFiles) -> None:
        """Return when the model fits; what it will take is counted as used from then on.

        Raises: InsufficientMemory when waiting cannot help, or has not.
        """
        deadline = asyncio.get_running_loop().time() + _MAX_WAIT_S
        await self._hear_what_runs()
        while True:
            shows_freed = self._shows_freed()
            async with self._turn:
                room = await self._room(model.options, resolved)
                if room is not None and room.missing:
                    model.stage = "making room"
                    if await self._evict(model, room):
                        shows_freed = False
                        room = await self._room(model.options, resolved)
                if room is None or not room.missing:
                    self._reserve(model, room)
                    return
            now = asyncio.get_running_loop().time()
            if (shows_freed and not self._may_come_free(model)) or now > deadline:
                settings = self._router.context.settings.engine
                raise room.refusal(model.options, resolved, settings)
            if model.stage != "waiting for room":
                model.stage = "waiting for room"
                model.wake()
            await asyncio.sleep(_RECHECK_S)

    async def make_room_to_wake(self, model: ManagedModel) -> None:
        """Return when a sleeping model fits again, as large as it was; nobody busy is waited for.

        Raises: InsufficientMemory.
        """
        async with self._turn:
            room = await self._room_to_wake(model)
            if room is not None and room.missing:
                await self._evict(model, room)
                room = await self._room_to_wake(model)
            if room is not None and room.missing:
                raise room.too_small_to_wake(model.options)

    def _reserve(self, model: ManagedModel, room: DeviceRoom | None) -> None:
        if room is not None and model.is_in("loading"):
            model.memory_bytes = sum(
                need.weights + need.cache for ranks in room.needs.values() for need in ranks
            )

    async def _evict(self, model: ManagedModel, room: DeviceRoom) -> bool:
        """Unload what the evictor proposes; tell whether anything was unloaded."""
        others = [other.status() for other in self._router.models.values() if other is not model]
        question = ProposeEviction(
            model.options.model_id,
            room.needed_bytes,
            room.needed_bytes - sum(room.missing.values()),
            [
                msgspec.structs.replace(other, memory_bytes=held_bytes(other, room.kind))
                for other in others
            ],
            model.priority,
            None if self._router.host is None else self._router.host.host_free_bytes,
        )
        answer = await self._router.ask("evictor", question, deadline_s=_CONTROL_DEADLINE_S)
        assert isinstance(answer, EvictionProposal), "ProposeEviction is answered by a proposal"
        has_unloaded = False
        for victim_id in answer.victims:
            victim = self._router.models.get(victim_id)
            if victim and victim.is_in("loaded", "sleeping") and not victim.leases:
                event(
                    self._router.log,
                    "model.evicted",
                    model=victim_id,
                    reason=answer.reason,
                    incoming=model.options.model_id,
                )
                if victim_id in answer.sleepers:
                    await self._router.loader.sleep.sleep_or_unload(victim, reason=answer.reason)
                else:
                    await self._router.loader.unload(victim, force=False, reason=answer.reason)
                has_unloaded = True
        return has_unloaded

    async def _hear_what_runs(self) -> None:
        """Return when each leader has told this router, which may be a new one, what it holds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_MAX_WAIT_S):
                for other in list(self._router.models.values()):
                    while other.is_in("recovering") and not other.memory_bytes:
                        await other.wait_changed()

    def _may_come_free(self, model: ManagedModel) -> bool:
        """Tell whether others that are busy now may leave room later."""
        return any(
            other is not model
            and may_displace(model.priority, other.priority)
            and (other.is_in("loading", "draining") or (other.is_in("loaded") and other.leases))
            for other in self._router.models.values()
        )

    async def _room(self, options: LoadOptions, resolved: ResolvedFiles) -> DeviceRoom | None:
        """Return what the devices have and lack by the last look, None while it is unknown."""
        devices = await self._devices_without(options.model_id)
        if devices is None:
            return None
        settings = self._router.context.settings.engine
        return DeviceRoom.of(options.devices_of_ranks, resolved, settings, devices)

    async def _room_to_wake(self, model: ManagedModel) -> DeviceRoom | None:
        """Return the same for a model that sleeps there."""
        options = model.options
        devices = await self._devices_without(options.model_id)
        if devices is None:
            return None
        return DeviceRoom.to_wake(options.devices_of_ranks, model.memory_bytes, devices)

    async def _devices_without(self, model_id: str) -> list[DeviceReport] | None:
        """Return the devices as far as models may use them, without one model's claims."""
        report = await self.host_report()
        if report is None:
            return None
        others = [
            model.status()
            for model in self._router.models.values()
            if model.options.model_id != model_id
        ]
        limit_mib = self._router.context.settings.engine.memory_limit_mib
        return within_limit(report.devices, others, limit_mib)

    async def host_report(self) -> HostReport | None:
        """Return what the poller saw last, or None when it does not answer."""
        router = self._router
        try:
            if router.host is None:  # this host starts, which a busy machine takes long for
                patience_s = router.context.settings.supervision.start_timeout_s
                await router.wait_for("poller", deadline_s=patience_s)
            answer = await router.ask("poller", QueryHost(), deadline_s=_HOST_DEADLINE_S)
        except CortexError:
            return router.host
        assert isinstance(answer, HostReport), "QueryHost is answered by HostReport"
        return answer
