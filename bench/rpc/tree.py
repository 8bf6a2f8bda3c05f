"""Runs one group of rank processes in a private tree, and returns what its rank 0 measured."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TypeVar

import msgspec

from actors.actor import ActorContext, AsyncActor
from actors.root.private_tree import NO_MODEL, run_private_tree
from actors.root.spec import ChildSpec
from bench.rpc.ranks import RpcCost, RpcTask, StepTask
from cortexd.messages import GroupDown, GroupUp, StartGroup
from cortexd.models import LoadOptions, ModelFiles, RankArgs
from cortexd.settings import Engine, Settings
from engine.preflight import inspect

_START_TIMEOUT_S = 60.0
_ASK_DEADLINE_S = 10.0
Result = TypeVar("Result")


class StarterArgs(msgspec.Struct, frozen=True):
    """What the starter is told."""

    root_pid: int
    order: StartGroup


class Starter(AsyncActor):
    """Starts the group; once it is up, or down, the tree ends."""

    def __init__(self, context: ActorContext) -> None:
        super().__init__(context)
        self._args = msgspec.msgpack.decode(context.args, type=StarterArgs)

    async def on_start(self) -> None:
        """Start the ranks."""
        await self.ask("root", self._args.order, deadline_s=_ASK_DEADLINE_S)

    def on_group_up(self, up: GroupUp) -> None:
        """All has been measured."""
        os.kill(self._args.root_pid, signal.SIGTERM)

    def on_group_down(self, down: GroupDown) -> None:
        """It failed, or rank 0 was ready before the others."""
        os.kill(self._args.root_pid, signal.SIGTERM)


def measure_rpc(
    folder: Path, world_size: int, num_rows: tuple[int, ...], context: int
) -> list[RpcCost]:
    """Return the costs for each number of rows."""
    path = folder / "rpc.json"
    task = msgspec.json.encode(RpcTask(str(path), num_rows, context)).decode()
    options = LoadOptions(model_id=task, tensor_parallel=world_size)
    files = ModelFiles(model_id=task, source="path", revision="", format="safetensors", weights=())
    targets = ("bench.rpc.ranks:RpcLeader", "bench.rpc.ranks:RpcWorker")
    words = _run_group(RankArgs(options, files, NO_MODEL), world_size, targets, Engine())
    return _result(path, list[RpcCost], words)


def measure_steps(folder: Path, model: Path, world_size: int, num_threads: int) -> dict[str, float]:
    """Return the milliseconds of each kind of step."""
    path = folder / "steps.json"
    task = msgspec.json.encode(StepTask(str(path))).decode()
    files = ModelFiles(
        model_id=task,
        source="path",
        revision="local",
        format="safetensors",
        weights=(str(model / "model.safetensors"),),
        config=str(model / "config.json"),
    )
    options = LoadOptions(model_id=task, tensor_parallel=world_size)
    engine = Engine(device="cpu", num_threads=num_threads, prefix_cache=False, kv_cache_mib=256)
    targets = ("bench.rpc.ranks:StepLeader", "actors.worker:Worker")
    words = _run_group(RankArgs(options, files, inspect(files)), world_size, targets, engine)
    return _result(path, dict[str, float], words)


def _run_group(args: RankArgs, world_size: int, targets: tuple[str, str], engine: Engine) -> str:
    """Return what the ranks logged."""
    leader, worker = targets
    packed = msgspec.msgpack.encode(args)
    order = StartGroup("bench", leader, packed, world_size, _START_TIMEOUT_S, worker)
    starter = msgspec.msgpack.encode(StarterArgs(os.getpid(), order))
    child = ChildSpec(name="starter", target="bench.rpc.tree:Starter", args=starter)
    return run_private_tree(Settings(engine=engine), child)


def _result(path: Path, kind: type[Result], words: str) -> Result:
    if not path.exists():
        raise RuntimeError(f"the ranks ended without a result: {words[-2000:]}")
    result = msgspec.json.decode(path.read_bytes(), type=kind)
    path.unlink()
    return result
