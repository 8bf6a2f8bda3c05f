"""How the router puts one model to sleep and wakes it; a request that comes meanwhile waits.

Part of the router actor (same loop, no state of its own). A model that falls asleep is "draining",
one that wakes is "loading", so that both are single flight and clients are kept alive as in a cold
load. A model that cannot be woken is loaded anew.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from actors.router.managed_model import ManagedModel
from cortexd.errors import ActorDown, CortexError, InsufficientMemory, ServiceUnavailable
from cortexd.log import event
from cortexd.messages import SleepModel, WakeModel

if TYPE_CHECKING:
    from actors.router.model_loader import ModelLoader
    from actors.router.router import Router

# Pinning host memory takes a second for each few GB; the copy back is a fraction of that.
_MOVE_DEADLINE_S: Final = 120.0
# For a client's Retry-After only: half of what PCIe 4 carries.
_WAKE_BYTES_PER_S: Final = 10e9


class ModelSleep:
    """Sleep and wake on behalf of the router."""

    def __init__(self, router: Router, loader: ModelLoader) -> None:
        self._router = router
        self._loader = loader

    async def sleep(self, model: ManagedModel) -> None:
        """Return when the model sleeps and its device is free.

        Raises: ServiceUnavailable while it is in use; what the engine raises. It then runs on.
        """
        if model.is_in("sleeping"):
            return
        model_id = model.options.model_id
        if model.leases or not model.is_in("loaded"):
            raise ServiceUnavailable(
                f'model "{model_id}" is {model.state} and answers {len(model.leases)} requests; '
                "let them end before it sleeps"
            )
        model.become("draining", stage="falling asleep")
        try:
            await self._router.ask(model.leader, SleepModel(model_id), deadline_s=_MOVE_DEADLINE_S)
        except ActorDown:
            raise  # the group's end is told by the root
        except CortexError:
            if model.is_in("draining"):
                model.become("loaded")
            raise
        if not model.is_in("draining"):
            return  # its group ended meanwhile
        self._loader.rooms.note_freed()
        model.become("sleeping")
        self._router.local.remember()
        self._loader.metrics.evicted(model, "sleep")

    async def sleep_or_unload(self, model: ManagedModel, *, reason: str) -> None:
        """Put a model to sleep, or unload it for `reason` when it cannot."""
        try:
            await self.sleep(model)
        except CortexError as error:
            event(
                self._router.log,
                "model.sleep_failed",
                30,
                model=model.options.model_id,
                error=error.message,
            )
            if model.is_in("loaded") and not model.leases:
                await self._loader.unload(model, force=False, reason=reason)

    def begin_wake(self, model: ManagedModel) -> None:
        """Start waking a model that sleeps; its state tells how it ends."""
        expected_s = model.memory_bytes / _WAKE_BYTES_PER_S
        model.become("loading", stage="waking", expected_s=expected_s)
        model.load_task = self._router.spawn(self._wake(model))

    async def _wake(self, model: ManagedModel) -> None:
        started = time.monotonic()
        try:
            await self._loader.rooms.make_room_to_wake(model)
            message = WakeModel(model.options.model_id)
            await self._router.ask(model.leader, message, deadline_s=_MOVE_DEADLINE_S)
        except ActorDown:
            return  # the group's end is told by the root
        except CortexError as error:
            await self._load_anew(model, error)
            return
        if not model.is_in("loading"):
            return
        model.load_task = None
        model.last_used = time.monotonic()
        model.become("loaded")
        self._loader.metrics.woken(model, time.monotonic() - started)

    async def _load_anew(self, model: ManagedModel, error: CortexError) -> None:
        """End the group that sleeps; a fresh one takes what cache the device has room for."""
        severity = 20 if isinstance(error, InsufficientMemory) else 30
        event(
            self._router.log,
            "model.wake_failed",
            severity,
            model=model.options.model_id,
            error=error.message,
        )
        if not model.is_in("loading"):
            return
        model.epoch += 1  # what is told of the old group's end is old
        try:
            await self._loader.stop_group(model)
        except CortexError as stuck:
            model.become("failed", error=stuck)
            return
        await self._loader.load(model)
