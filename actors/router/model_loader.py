"""How the router loads and unloads one model: files, room, engine group; single flight.

Part of the router actor (same loop, no state of its own beyond running tasks, which hang on the
models). Every step has a deadline; any failure leaves the model "failed" with its cause and nothing
half-running.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import msgspec

from actors.router.load_metrics import LoadMetrics
from actors.router.local_models import AT_REST
from actors.router.managed_model import ManagedModel
from actors.router.model_sleep import ModelSleep
from actors.router.room_maker import RoomMaker
from actors.router.text_notice import tell_fronts
from cortexd.errors import (
    ActorDown,
    CortexError,
    CudaUnavailable,
    DeadlineExceeded,
    Internal,
    InvalidValue,
    ModelLoadFailed,
    NotFound,
    Overloaded,
)
from cortexd.log import event
from cortexd.messages import (
    GroupStarting,
    ResolvedFiles,
    ResolveFiles,
    StartGroup,
    StopGroup,
)
from cortexd.models import LoadOptions, RankArgs

if TYPE_CHECKING:
    from actors.router.router import Router

_LEADER_TARGET = "actors.leader:Leader"
_WORKER_TARGET = "actors.worker:Worker"
_SLOWEST_READ_BYTES_PER_S = 50e6
_CONTROL_DEADLINE_S = 10.0


class ModelLoader:
    """Load and unload on behalf of the router."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self.rooms = RoomMaker(router)
        self.metrics = LoadMetrics(router)
        self.sleep = ModelSleep(router, self)

    async def ensure_loaded(self, model: ManagedModel) -> None:
        """Return when loaded; raise what made the load fail."""
        while not model.is_in("loaded"):
            self.bring_up(model)
            await model.wait_changed()
            if model.is_in("failed"):
                assert model.error is not None, "a failed model has an error"
                raise model.error
            if model.is_in("unloaded"):
                raise ModelLoadFailed(
                    f'model "{model.options.model_id}" was unloaded while it was loading'
                )

    def bring_up(self, model: ManagedModel) -> None:
        """Begin to load or to wake a model that does not run and is not about to."""
        if model.is_in("unloaded", "failed"):
            model.become("loading", stage="resolving")
            self._router.local.remember_with(model)
            model.load_task = self._router.spawn(self.load(model))
        elif model.is_in("sleeping"):
            self.sleep.begin_wake(model)

    async def load(self, model: ManagedModel) -> None:
        """Bring up a model that is "loading" already; its state tells how it ends."""
        event(self._router.log, "model.loading", model=model.options.model_id, group=model.group)
        try:
            with self.metrics.stage(model, "resolve"):
                resolved = await self._resolve(model)
                await self._check_split(model.options, resolved)
            await self._check_gpus(model.options)
            with self.metrics.stage(model, "room"):
                await self.rooms.make_room(model, resolved)
            await self._start_group(model, resolved)
        except CortexError as error:
            self._fail(model, error)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            event(self._router.log, "model.load_crashed", 40, exc_info=True)
            self._fail(model, Internal(f"loading failed: {error!r}"))
        finally:
            model.load_task = None

    def _fail(self, model: ManagedModel, error: CortexError) -> None:
        if model.state != "loading":
            return  # the group's own end has been told already
        model.become("failed", error=error)
        self.metrics.failed(model)
        self._router.local.remember()
        event(
            self._router.log,
            "model.load_failed",
            40,
            model=model.options.model_id,
            code=error.code,
            error=error.message,
        )
        # An id that somebody got wrong is not a model of this host that failed.
        if error.http_status < 500:
            self._router.local.forget(model)

    async def _resolve(self, model: ManagedModel) -> ResolvedFiles:
        settings = self._router.context.settings
        request = ResolveFiles(model.options.model_id, model.options.quant)
        # The store may be starting, which a busy machine takes long for, or restarting; resolving
        # again is harmless, a completed file is found.
        for attempt in range(3):
            await self._router.wait_for("store", deadline_s=settings.supervision.start_timeout_s)
            try:
                answer = await self._router.ask(
                    "store", request, deadline_s=settings.store.download_timeout_s
                )
                assert isinstance(answer, ResolvedFiles), "ResolveFiles is answered by its files"
                return answer
            except ActorDown:
                if attempt == 2:
                    raise
        raise AssertionError("the loop returns or raises")

    async def _check_split(self, options: LoadOptions, resolved: ResolvedFiles) -> None:
        """Check that the model can be split so, before a process is started or a byte is moved."""
        from engine.preflight import check_tensor_parallel

        if options.tensor_parallel == 1:
            return
        await asyncio.to_thread(
            check_tensor_parallel, resolved.files, resolved.spec, options.tensor_parallel
        )
        await self._check_devices(options)

    async def _check_gpus(self, options: LoadOptions) -> None:
        """Check that what was meant for a GPU does not come to the CPU. Raises: CudaUnavailable."""
        report = await self.rooms.host_report()
        is_for_cpu = self._router.context.settings.engine.device == "cpu"
        if report is not None and report.gpu_fault is not None and not is_for_cpu:
            raise CudaUnavailable(f'model "{options.model_id}": {report.gpu_fault}')

    async def _check_devices(self, options: LoadOptions) -> None:
        """Check that there is a device for each rank; on a CPU all ranks share it."""
        report = await self.rooms.host_report()
        settings = self._router.context.settings.engine
        if report is None or settings.device == "cpu":
            return
        present = [device.index for device in report.devices if device.kind == "cuda"]
        missing = [index for index in options.devices_of_ranks if index not in present]
        if present and missing:
            raise InvalidValue(
                f'model "{options.model_id}": tensor_parallel = {options.tensor_parallel} needs '
                f"devices {list(options.devices_of_ranks)}; here are {present}",
                param="devices",
            )

    async def _start_group(self, model: ManagedModel, resolved: ResolvedFiles) -> None:
        if model.state != "loading":
            return  # unloaded meanwhile
        model.files, model.spec = resolved.files, resolved.spec
        model.stage, model.progress = "starting", 0.0
        tell_fronts(self._router, resolved.files)
        settings = self._router.context.settings.supervision
        timeout_s = (
            settings.start_timeout_s
            + settings.load_stall_timeout_s
            + resolved.files.size_bytes / _SLOWEST_READ_BYTES_PER_S
        )
        args = RankArgs(model.options, resolved.files, resolved.spec, timeout_s)
        answer = await self._router.ask(
            "root",
            StartGroup(
                model.group,
                _LEADER_TARGET,
                msgspec.msgpack.encode(args),
                model.options.tensor_parallel,
                timeout_s,
                _WORKER_TARGET,
            ),
            deadline_s=_CONTROL_DEADLINE_S,
        )
        assert isinstance(answer, GroupStarting), "StartGroup is answered by GroupStarting"
        model.epoch = answer.epoch
        # From here GroupUp and GroupDown tell how it goes on.

    async def recycle(self, model: ManagedModel) -> None:
        """Start the engine of an unused model anew; requests that come meanwhile wait for it."""
        await self.unload(model, force=False, reason="defrag")
        # Unloading has forgotten a model that only an operator had brought here.
        self._router.models.setdefault(model.options.model_id, model)
        await self.ensure_loaded(model)

    async def unload(self, model: ManagedModel, *, force: bool, reason: str) -> None:
        """Wait for running requests (unless forced), end the group, forget the model.

        `reason` is what metrics count it under.
        """
        while model.is_in("draining"):  # unless it only fell asleep, somebody unloads it already
            await model.wait_changed()
            if model.is_in(*AT_REST):
                return
        if model.load_task is not None:
            model.load_task.cancel()
            model.load_task = None
        drain_s = 0.0 if force else self._router.context.settings.gateway.drain_s
        model.is_due = False
        self._router.local.remember_without(model)
        model.become("draining")
        if not await self._drained(model, drain_s) and not force:
            num_requests = len(model.leases)
            model.become("loaded")
            self._router.local.remember_with(model)
            raise Overloaded(
                f'model "{model.options.model_id}" still serves {num_requests} requests after '
                f"{drain_s:g} s; retry later or force the unload",
                retry_after_s=5,
            )
        try:
            await self.stop_group(model)
        except DeadlineExceeded as error:
            model.become("failed", error=error)
            raise
        self.rooms.note_freed()
        if model.is_in("draining"):
            model.become("unloaded")
        self._router.local.forget(model)
        event(
            self._router.log,
            "model.unloaded",
            model=model.options.model_id,
            forced=force,
            reason=reason,
        )
        if reason != "defrag":  # or recycling one would make all others old
            for other in self._router.models.values():
                other.num_cycles += 1
        self.metrics.evicted(model, reason)

    async def clear_failure(self, model: ManagedModel) -> None:
        """Take a failed model for unloaded, and forget it if nobody configured it.

        Raises: DeadlineExceeded.
        """
        with contextlib.suppress(NotFound):
            await self.stop_group(model)  # only an unload that took too long has left one
        if model.is_in("failed"):
            model.become("unloaded")
        self._router.local.forget(model)
        event(self._router.log, "model.failure_cleared", model=model.options.model_id)

    async def stop_group(self, model: ManagedModel) -> None:
        """End a model's processes. Raises: DeadlineExceeded."""
        await self._router.ask(
            "root",
            StopGroup(model.group, 0.0),
            deadline_s=self._router.context.settings.supervision.stop_timeout_s + 10,
        )

    async def _drained(self, model: ManagedModel, drain_s: float) -> bool:
        """Return whether all leases closed within the time."""
        deadline = asyncio.get_running_loop().time() + drain_s
        while model.leases:
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0:
                return False
            try:
                await asyncio.wait_for(model.wait_changed(), left_s)
            except TimeoutError:
                return not model.leases
        return True
