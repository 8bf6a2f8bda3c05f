"""Rank 1 and up of a model's engine group: obeys the leader's RPC and decides nothing.

The root starts it beside the leader with the same arguments. `on_start` serves until the leader has
had it load its shard and make its cache, so READY means the same on every rank. Every request is
answered once. A failed forward pass leaves the ranks out of step, so it ends the process; any other
failure is an `Error` and nothing more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from actors.actor import ActorContext, handles
from actors.sync_actor import SyncActor
from cortexd.errors import CortexError, InvalidValue, UnsupportedArchitecture
from cortexd.log import event
from cortexd.messages import rpc
from cortexd.messages.control import Message
from cortexd.messages.envelope import Envelope
from cortexd.models import ModelSpec, RankArgs

if TYPE_CHECKING:
    from engine.device import Device
    from engine.tp.comm import Comm
    from engine.tp.shard_runner import ShardRunner

_MIB = 2**20


class RpcFailure(Exception):
    """Becomes the `Error` reply."""

    def __init__(self, kind: rpc.ErrorKind, message: str) -> None:
        super().__init__(message)
        self.reply = rpc.Error(kind, message)


_Message = TypeVar("_Message", bound=Message)
_Handler = Callable[["Worker", _Message, Envelope], rpc.RpcMessage]


def _answers(kind: rpc.ErrorKind) -> Callable[[_Handler[_Message]], _Handler[_Message]]:
    """Refuse what another epoch asks for; turn a failure into an `Error` reply of `kind`."""

    def decorate(handle: _Handler[_Message]) -> _Handler[_Message]:
        @functools.wraps(handle)
        def answer(worker: Worker, message: _Message, envelope: Envelope) -> rpc.RpcMessage:
            try:
                worker.check_epoch(envelope)
                return handle(worker, message, envelope)
            except RpcFailure as failure:
                return failure.reply
            except UnsupportedArchitecture as error:
                return rpc.Error("unsupported_arch", error.message)
            except CortexError as error:
                return rpc.Error(kind, error.message)
            except (RuntimeError, ValueError, MemoryError) as error:
                event(worker.log, "shard.request_failed", 40, exc_info=True, kind=kind)
                return rpc.Error(kind, f"{type(error).__name__}: {error}")

        return answer

    return decorate


class Worker(SyncActor):
    """See the module's text."""

    def __init__(self, context: ActorContext) -> None:
        super().__init__(context)
        self.args = msgspec.msgpack.decode(context.args, type=RankArgs)
        self._comm: Comm | None = None
        self._runner: ShardRunner | None = None
        self._is_serving = False

    def on_start(self) -> None:
        """Obey until this rank can take part in a step."""
        self.serve_until(lambda: self._is_serving)

    @handles(rpc.Ping)
    @_answers("cuda_unavailable")
    def on_ping(self, message: rpc.Ping, envelope: Envelope) -> rpc.RpcMessage:
        """Say who this is."""
        return rpc.Pong(self.context.rank, self.context.world_size, str(self._device()))

    @handles(rpc.Init)
    @_answers("nccl_init_failed")
    def on_init(self, message: rpc.Init, envelope: Envelope) -> rpc.RpcMessage:
        """Join the collectives."""
        from engine.tp.comm import Comm
        from engine.tp.sharding import Shard

        if self._comm is not None:
            raise RpcFailure("bad_request", "this rank has joined its group already")
        self._comm = Comm.join(
            message.comm_id,
            Shard(self.context.rank, self.context.world_size),
            self._device(),
            timeout_s=self.context.settings.supervision.step_timeout_s,
        )
        return rpc.InitOk()

    @handles(rpc.NcclSanityCheck)
    @_answers("nccl_sanity_failed")
    def on_sanity(self, message: rpc.NcclSanityCheck, envelope: Envelope) -> rpc.RpcMessage:
        """Take part in adding up a one from every rank."""
        return rpc.NcclSanityResult(self._joined().sanity_sum(self._device()))

    @handles(rpc.LoadDenseShard)
    @_answers("load_failed")
    def on_load(self, message: rpc.LoadDenseShard, envelope: Envelope) -> rpc.RpcMessage:
        """Load this rank's part of the model."""
        from engine.tp.shard_runner import ShardRunner

        if self._runner is not None:
            raise RpcFailure("already_loaded", f'"{self.args.options.model_id}" is loaded')
        self._check_model(message.model_id)
        self._runner = ShardRunner.load(
            msgspec.structs.replace(
                self.args.files, weights=message.weight_paths, quant=message.quant
            ),
            msgspec.json.decode(message.config_json, type=ModelSpec),
            self.context.settings.engine,
            self._joined(),
            device=self._device(),
            progress=self.report_progress,
        )
        loaded = self._runner.loaded
        event(
            self.log,
            "shard.loaded",
            model=message.model_id,
            rank=self.context.rank,
            read_bytes=loaded.read_bytes,
            memory_bytes=loaded.weight_bytes,
        )
        return rpc.LoadDenseShardOk(loaded.read_bytes, self._runner.free_bytes)

    @handles(rpc.ClearKvCache)
    @_answers("load_failed")
    def on_clear(self, message: rpc.ClearKvCache, envelope: Envelope) -> rpc.RpcMessage:
        """Make the KV cache anew."""
        if message.num_blocks < 2:
            raise RpcFailure("bad_request", f"{message.num_blocks} blocks; at least 2")
        runner = self._loaded(message.model_id)
        if (message.num_state_slots > 0) != bool(runner.loaded.spec.linear_layers):
            text = f"{message.num_state_slots} state slots; a hybrid has some, others none"
            raise RpcFailure("bad_request", text)
        runner.make_cache(message.num_blocks, message.num_state_slots)
        self._is_serving = True
        return rpc.KvCacheCleared(runner.memory_bytes)

    @handles(rpc.GenerateStep)
    @_answers("bad_request")
    def on_step(self, message: rpc.GenerateStep, envelope: Envelope) -> rpc.RpcMessage:
        """Run the leader's step, whose collectives complete only with this rank.

        The other ranks are in it by now, so one that cannot be run ends the process, which they
        notice at once; a refusal would leave them to their deadline.
        """
        from engine.device import is_device_poisoned

        runner = self._loaded(message.model_id)
        if runner.cache is None:
            raise RpcFailure("model_not_loaded", "there is no KV cache yet")
        try:
            runner.step(message)
        except Exception as error:
            event(self.log, "shard.step_failed", 40, exc_info=True, error=repr(error))
            text = f"step {message.step} failed: {error!r}"
            kind: rpc.ErrorKind = "forward_failed"
            if isinstance(error, InvalidValue):
                kind = "bad_request"
            self.reply(envelope, rpc.Error(kind, text))
            self.exit_poisoned(text, is_device_lost=is_device_poisoned(error))
        self.count_progress()
        return rpc.GenerateStepOk(message.step)

    @handles(rpc.SnapshotKvCache)
    @_answers("snapshot_failed")
    def on_snapshot(self, message: rpc.SnapshotKvCache, envelope: Envelope) -> rpc.RpcMessage:
        """Keep a copy of a sequence's blocks and state."""
        kept = self._loaded(message.model_id).kept
        num_bytes = kept.keep(message.snapshot_id, message.blocks, message.state_slot)
        return rpc.KvSnapshotStored(num_bytes)

    @handles(rpc.RestoreKvCache)
    @_answers("restore_failed")
    def on_restore(self, message: rpc.RestoreKvCache, envelope: Envelope) -> rpc.RpcMessage:
        """Put a kept copy into blocks and a state slot."""
        kept = self._loaded(message.model_id).kept
        if message.snapshot_id not in kept:
            text = f"there is no snapshot {message.snapshot_id}"
            raise RpcFailure("snapshot_not_found", text)
        kept.restore(message.snapshot_id, message.blocks, message.state_slot)
        return rpc.KvCacheRestored()

    @handles(rpc.DropKvSnapshot)
    @_answers("bad_request")
    def on_drop(self, message: rpc.DropKvSnapshot, envelope: Envelope) -> rpc.RpcMessage:
        """Forget a kept copy; an unknown one is dropped already."""
        self._loaded(message.model_id).kept.drop(message.snapshot_id)
        return rpc.KvSnapshotDropped()

    @handles(rpc.QueryVram)
    @_answers("vram_query_failed")
    def on_query_vram(self, message: rpc.QueryVram, envelope: Envelope) -> rpc.RpcMessage:
        """Tell the device's memory."""
        from engine.device import free_memory_bytes, total_memory_bytes

        device = self._device()
        return rpc.VramInfo(free_memory_bytes(device) // _MIB, total_memory_bytes(device) // _MIB)

    @handles(rpc.UnloadModel)
    @_answers("model_not_loaded")
    def on_unload(self, message: rpc.UnloadModel, envelope: Envelope) -> rpc.RpcMessage:
        """Drop the model."""
        self._loaded(message.model_id)
        self._runner = None
        return rpc.Unloaded()

    @handles(rpc.Shutdown)
    def on_shutdown(self, message: rpc.Shutdown, envelope: Envelope) -> rpc.RpcMessage:
        """Say goodbye and end."""
        self._is_serving = True
        self.request_stop()
        return rpc.Bye()

    def check_epoch(self, envelope: Envelope) -> None:
        """Raise RpcFailure when the request is one of another epoch."""
        if envelope.epoch != self.context.epoch:
            raise RpcFailure(
                "bad_request",
                f"a request of epoch {envelope.epoch}; this rank is of epoch {self.context.epoch}",
            )

    def _check_model(self, model_id: str) -> None:
        if model_id != self.args.options.model_id:
            own = self.args.options.model_id
            raise RpcFailure("bad_request", f'this rank is for "{own}", not for "{model_id}"')

    def _loaded(self, model_id: str) -> ShardRunner:
        self._check_model(model_id)
        if self._runner is None:
            raise RpcFailure("model_not_loaded", f'"{model_id}" is not loaded on this rank')
        return self._runner

    def _joined(self) -> Comm:
        if self._comm is None:
            raise RpcFailure("nccl_not_initialised", "this rank has not joined its group")
        return self._comm

    def _device(self) -> Device:
        from engine.device import choose_device

        index = self.args.options.device_of(self.context.rank)
        return choose_device(self.context.settings.engine, index)
