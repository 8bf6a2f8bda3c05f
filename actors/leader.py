"""Rank 0 of a model's engine group: owns the engine, runs its steps, hands out tokens.

Fronts send `Submit` and `Cancel`; every step's output goes to each front as one `TokenBatch`. The
root starts it through `StartGroup`; `on_start` loads the model, so READY means "can generate". The
engine survives what it can (`engine.step_faults`). What it raises ends the process, with an exit
code of its own when the device is lost: the group restarts and clients get a retriable error, which
is honest, where going on with unknown engine state is not. When the model is split over several
ranks, this one decides and the workers get every step's plan through the `RankGroup`; an error of
any rank inside a step ends them all, since the others wait in a collective for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from actors.actor import ActorContext, handles
from actors.rank_group import Deadlines, RankGroup, leave_meeting_place, meeting_address
from actors.step_watchdog import StepWatchdog
from actors.sync_actor import POISONED_EXIT_CODE, SyncActor
from cortexd.errors import ActorDown as ActorDownError
from cortexd.errors import CortexError, MailboxFull
from cortexd.log import event
from cortexd.messages import (
    ActorDown,
    Cancel,
    DescribeModel,
    LoadProgress,
    LoadReport,
    ModelLoaded,
    Ok,
    QueryLoad,
    SleepModel,
    Submit,
    TokenBatch,
    WakeModel,
)
from cortexd.messages.envelope import Envelope
from cortexd.messages.inference import SequenceDelta
from cortexd.models import RankArgs

if TYPE_CHECKING:
    from engine.device import Device
    from engine.engine import Engine
    from engine.tp.comm import Comm

_PROGRESS_PERIOD_S = 0.2


class Leader(SyncActor):
    """Run one model's engine between ZeroMQ polls."""

    engine: Engine
    args: RankArgs

    def __init__(self, context: ActorContext) -> None:
        super().__init__(context)
        step_timeout_s = context.settings.supervision.step_timeout_s
        self._watchdog = StepWatchdog(step_timeout_s, POISONED_EXIT_CODE, self.log)

    def on_start(self) -> None:
        """Load the model; raises what the engine raises, which the root passes to the router."""
        from engine.device import choose_device
        from engine.engine import Engine

        self.args = msgspec.msgpack.decode(self.context.args, type=RankArgs)
        self._step = 0
        self._last_progress = 0.0
        started = time.monotonic()
        self._ranks: RankGroup | None = None
        device = choose_device(
            self.context.settings.engine, self.args.options.device_of(self.context.rank)
        )
        comm = self._meet_workers(device) if self.context.world_size > 1 else None
        self.engine = Engine.load(
            self.args.files,
            self.args.spec,
            self.context.settings.engine,
            self._progress,
            comm=comm,
            device=device,
            lockstep=self._ranks,
        )
        self._load_s = time.monotonic() - started
        event(
            self.log,
            "model.loaded",
            model=self.args.options.model_id,
            load_s=round(self._load_s, 3),
            device=self.engine.device_name,
            dtype=self.engine.dtype_name,
            backend=self.engine.backend_name,
            memory_bytes=self.engine.memory_bytes,
            context=self.engine.limits.context,
            ranks=self.context.world_size,
            collectives="nothing" if comm is None else comm.backend,
        )

    def _meet_workers(self, device: Device) -> Comm:
        """Join the workers, and let the shards be loaded."""
        ranks = self._ranks = rank_group(self, self.args)
        comm = join_workers(self, ranks, device, lambda stage: None)
        event(self.log, "ranks.joined", world_size=comm.world_size, devices=ranks.devices)
        ranks.begin_load(
            msgspec.json.encode(self.args.spec), self.args.files.weights, self.args.files.quant
        )
        return comm

    def _progress(self, fraction: float, stage: str) -> None:
        now = time.monotonic()
        if now - self._last_progress < _PROGRESS_PERIOD_S and fraction < 1.0:
            return
        self._last_progress = now
        self.report_progress(fraction, stage)
        try:
            self.tell("router", LoadProgress(self.args.options.model_id, fraction, stage))
        except (ActorDownError, MailboxFull):
            return  # the router is between two incarnations; the root has the progress too

    @handles(Submit)
    def on_submit(self, message: Submit, envelope: Envelope) -> None:
        """Queue a sequence; a refusal goes back as the sequence's only delta."""
        owner = _owner(envelope)
        try:
            self.engine.submit(owner, message)
        except CortexError as error:
            delta = SequenceDelta(
                message.sequence_id, [], finish_reason="error", error=error.to_info()
            )
            self._send(owner, [delta])

    @handles(Cancel)
    def on_cancel(self, message: Cancel, envelope: Envelope) -> None:
        """Drop a sequence at this step boundary."""
        self.engine.cancel(_owner(envelope), message.sequence_id)

    @handles(QueryLoad)
    def on_query_load(self, message: QueryLoad, envelope: Envelope) -> LoadReport:
        """Answer the engine's load figures."""
        return self.engine.report(self.args.options.model_id)

    @handles(DescribeModel)
    def on_describe_model(self, message: DescribeModel, envelope: Envelope) -> ModelLoaded:
        """Answer what runs here."""
        return ModelLoaded(
            self.args.options,
            self.args.files,
            self.args.spec,
            self.engine.figures.offered,
            self.engine.memory_bytes,
            self.engine.device_name,
            self.engine.dtype_name,
            self.engine.backend_name,
            self._load_s,
            self.engine.sleep_bytes,
            self.engine.is_asleep,
        )

    @handles(SleepModel)
    def on_sleep(self, message: SleepModel, envelope: Envelope) -> Ok:
        """Move the weights to host memory. Raises: what the engine raises."""
        started = time.monotonic()
        self.engine.sleep()
        self._log_move("model.asleep", started)
        return Ok()

    @handles(WakeModel)
    def on_wake(self, message: WakeModel, envelope: Envelope) -> Ok:
        """Move the weights back. Raises: what the engine raises."""
        started = time.monotonic()
        self.engine.wake()
        self._log_move("model.awake", started)
        return Ok()

    def _log_move(self, name: str, started: float) -> None:
        took_s = round(time.monotonic() - started, 3)
        event(self.log, name, model=self.args.options.model_id, took_s=took_s)

    def poll(self) -> bool:
        """Run one engine step and hand its tokens out; return whether more work waits."""
        from engine.device import is_device_poisoned

        if not self.engine.has_work:
            return False
        try:
            with self._watchdog:
                outputs = self.engine.step()
        except Exception as error:
            if self.is_stopping:
                return False  # the other ranks were told to stop too, and were faster
            event(self.log, "engine.failed", 40, exc_info=True, error=repr(error))
            self.exit_poisoned(
                f"engine step failed: {error!r}", is_device_lost=is_device_poisoned(error)
            )
        self._step += 1
        for owner, deltas in outputs.items():
            self._send(owner, deltas)
        self.count_progress()
        return self.engine.has_work

    def on_actor_down(self, down: ActorDown) -> None:
        """Free everything a dead front had asked for."""
        self.engine.cancel_owner(f"{down.name}.{down.incarnation}")

    def on_stop(self) -> None:
        """Free the model; the process ends next, which frees what is left."""
        self.engine.close()

    def _send(self, owner: str, deltas: list[SequenceDelta]) -> None:
        """Send one batch to the front incarnation `owner`; drop its work when it is gone."""
        name, _, incarnation = owner.rpartition(".")
        peer = self.peers.get(name)
        if peer is None or peer.incarnation != int(incarnation):
            self.engine.cancel_owner(owner)
            return
        try:
            self.tell(name, TokenBatch(self.context.epoch, self._step, deltas))
        except (ActorDownError, MailboxFull) as error:
            event(self.log, "front.unreachable", 30, front=owner, error=error.message)
            self.engine.cancel_owner(owner)


class Probe(SyncActor):
    """Rank 0 of a group without a model: finds out whether the ranks can work together."""

    def on_start(self) -> None:
        """Try every stage and tell the doctor of each; raises what fails."""
        from engine.device import choose_device, device_name, kernels_line

        args = msgspec.msgpack.decode(self.context.args, type=RankArgs)
        device = choose_device(self.context.settings.engine, args.options.device_of(0))
        self._found(f"device: {device_name(device)}")
        self._found(kernels_line(self.context.settings.engine, device))
        if self.context.world_size == 1:
            return
        ranks = rank_group(self, args)
        join_workers(self, ranks, device, self._found)
        free = ", ".join(f"{info.free_mb} of {info.total_mb} MiB" for info in ranks.vram())
        self._found(f"memory free on the workers: {free}")
        self._found("shutdown")
        ranks.shutdown()

    def _found(self, stage: str) -> None:
        self.tell("doctor", LoadProgress("doctor", 0.0, stage))


def rank_group(actor: SyncActor, args: RankArgs) -> RankGroup:
    """Return the workers of a rank 0."""
    supervision = actor.context.settings.supervision
    return RankGroup(
        actor,
        actor.context.address,
        actor.context.world_size,
        Deadlines(supervision.start_timeout_s, args.load_timeout_s, supervision.step_timeout_s),
        model_id=args.options.model_id,
    )


def join_workers(
    actor: SyncActor, ranks: RankGroup, device: Device, found: Callable[[str], None]
) -> Comm:
    """Find all workers, join the collectives with them, and test these; `found` hears of each.

    Raises: CortexError naming the rank that failed.
    """
    from engine.tp.comm import Comm
    from engine.tp.sharding import Shard

    context = actor.context
    timeout_s = context.settings.supervision.step_timeout_s
    ranks.ping()
    found(f"ping: workers on {', '.join(ranks.devices)}")
    address = meeting_address(context.runtime_dir, context.address)
    shard = Shard(0, ranks.world_size)
    comm = ranks.join(address, lambda where: Comm.join(where, shard, device, timeout_s=timeout_s))
    leave_meeting_place(address)
    found(f"init: {ranks.world_size} ranks joined over {comm.backend}")
    ranks.check_sanity(lambda: comm.sanity_sum(device))
    found(f"sanity: every rank added up {ranks.world_size}")
    return comm


def _owner(envelope: Envelope) -> str:
    return f"{envelope.src.name}.{envelope.src.incarnation}"
