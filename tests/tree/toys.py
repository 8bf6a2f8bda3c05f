"""Toy actors for the supervision tests: they answer, ask others, and misbehave on command.

A command is an `AdminCommand` whose `args["do"]` says what to do; the root hands the admin
operation `requests` to the actor called "router", so tests drive the tree through that one.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import msgspec

from actors.actor import ActorContext, AsyncActor, handles
from actors.sync_actor import SyncActor
from cortexd.errors import CortexError, EngineRestarting, InsufficientMemory, ModelNotFound
from cortexd.messages import (
    ActorDown,
    ActorUp,
    AdminCommand,
    AdminProgress,
    AdminReply,
    GroupDown,
    GroupUp,
    ListModels,
    ModelList,
    Ping,
    StartGroup,
    StopGroup,
)
from cortexd.messages.control import Message
from cortexd.messages.envelope import Envelope
from cortexd.messages.neurons import NodeStatus
from tests.waiting import DEADLINE_S, wait_for

_TOLD_TO = b'{"code": "internal_error", "message": "told to"}'


_NODE = NodeStatus(
    name="n", kind="cortex", endpoint="http://n", is_healthy=True, age_s=0.0, dispatched=0
)


def _block(seconds: float) -> None:
    time.sleep(seconds)


def _start_grandchild(*, detached: bool) -> int:
    code = "import time; time.sleep(600)"
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=detached).pid


def _json(value: object) -> AdminReply:
    return AdminReply(msgspec.json.encode(value))


def _args(message: AdminCommand) -> dict[str, Any]:
    return {name: msgspec.json.decode(value) for name, value in message.args.items()}


class Toy(AsyncActor):
    """Answers and misbehaves."""

    def __init__(self, context: ActorContext) -> None:
        super().__init__(context)
        self.seen: list[dict[str, Any]] = []
        self.outcomes: Counter[str] = Counter()
        self.num_open = 0
        self.storms: set[asyncio.Task[None]] = set()

    async def on_start(self) -> None:
        """Fail or hang at once, or wait for a file "go", when told so by the child spec."""
        if self.context.args == b"crash":
            print("last words of a crashing actor", flush=True)
            raise RuntimeError("told to crash in on_start")
        if self.context.args == b"waits":
            await asyncio.to_thread(wait_for, (self.context.runtime_dir / "go").exists, "the word")

    async def on_drain(self, deadline_s: float) -> None:
        """Take a while, or for ever, when told so."""
        if self.context.args == b"never drains":
            await asyncio.Event().wait()

    async def on_stop(self) -> None:
        """Never end, when told so."""
        if self.context.args == b"never stops":
            _block(600)

    def on_actor_up(self, up: ActorUp) -> None:
        """Note it."""
        self.seen.append({"event": "up", "name": up.actor.name, "n": up.actor.incarnation})

    def on_actor_down(self, down: ActorDown) -> None:
        """Note it."""
        self.seen.append({"event": "down", "name": down.name, "n": down.incarnation})

    def on_group_up(self, up: GroupUp) -> None:
        """Note it."""
        self.seen.append({"event": "group_up", "name": up.group, "n": up.epoch})

    async def on_group_down(self, down: GroupDown) -> None:
        """Note it, asynchronously."""
        self.seen.append(
            {
                "event": "group_down",
                "name": down.group,
                "n": down.epoch,
                "will_restart": down.will_restart,
                "commanded": down.commanded,
                "code": down.error.code if down.error else None,
                "message": down.error.message if down.error else down.reason,
            }
        )

    @handles(ListModels)
    def on_list_models(self, message: ListModels, envelope: Envelope) -> ModelList:
        """Answer what `status` asks of the router: one node, which is well."""
        return ModelList([], nodes=[_NODE])

    @handles(AdminCommand)
    async def on_command(self, message: AdminCommand, envelope: Envelope) -> AdminReply:
        """Do what the command says."""
        args = _args(message)
        if message.op.startswith("model."):
            self.tell("root", AdminProgress(message.operation_id, "progress", b'{"step": 1}'))
            if args.get("then") != "nothing":
                self.tell("root", AdminProgress(message.operation_id, args["then"], _TOLD_TO))
            return _json({"model_id": "toy"})
        return _json(await getattr(self, f"do_{args['do']}")(args))

    async def do_pid(self, args: dict[str, Any]) -> int:
        """Return our pid."""
        return os.getpid()

    async def do_fail(self, args: dict[str, Any]) -> None:
        """Raise an error of the flat set, or a foreign one."""
        if args.get("foreign"):
            raise ZeroDivisionError("told to")
        raise ModelNotFound('model "x" is told to be unknown', param="model")

    async def do_sleep(self, args: dict[str, Any]) -> None:
        """Answer late."""
        await asyncio.sleep(args["seconds"])

    async def do_block(self, args: dict[str, Any]) -> None:
        """Block the event loop."""
        _block(args["seconds"])

    async def do_seen(self, args: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the registry events so far."""
        return self.seen

    async def do_relay(self, args: dict[str, Any]) -> object:
        """Ask another actor and return its answer, or the code of the error."""
        command = AdminCommand("", "requests", _json_values(args["args"]))
        try:
            answer = await self.ask(args["to"], command, deadline_s=args["deadline_s"])
        except CortexError as error:
            return {"error": error.code, "message": error.message}
        assert isinstance(answer, AdminReply)
        return msgspec.json.decode(answer.result)

    async def do_listener(self, args: dict[str, Any]) -> list[str]:
        """Return which listeners we hold and where they are bound."""
        return [f"{name}:{one.getsockname()[1]}" for name, one in self.context.listeners.items()]

    async def do_grandchild(self, args: dict[str, Any]) -> int:
        """Start a process of our own, in a session of its own if so told."""
        return _start_grandchild(detached=bool(args.get("detached")))

    async def do_print(self, args: dict[str, Any]) -> None:
        """Write to our output."""
        os.write(1, args["text"].encode())

    async def do_storm(self, args: dict[str, Any]) -> None:
        """Ask another actor without pause from several tasks, until told to end."""
        for _ in range(args["tasks"]):
            self.storms.add(asyncio.create_task(self._storm(args["target"])))

    async def _storm(self, to: str) -> None:
        while True:
            self.num_open += 1
            try:
                await self.ask(to, Ping(), deadline_s=DEADLINE_S)
                self.outcomes["reply"] += 1
            except CortexError as error:
                self.outcomes[error.code] += 1
                if error.code == "actor_down":
                    await self.wait_for(to, deadline_s=DEADLINE_S)
            finally:
                self.num_open -= 1

    async def do_outcomes(self, args: dict[str, Any]) -> dict[str, int]:
        """Return how the storm's asks ended so far."""
        return dict(self.outcomes)

    async def do_end_storm(self, args: dict[str, Any]) -> dict[str, int]:
        """End the storm; return how its asks ended and how many are still open."""
        for task in self.storms:
            task.cancel()
        await asyncio.gather(*self.storms, return_exceptions=True)
        return {**self.outcomes, "open": self.num_open}

    async def do_start_group(self, args: dict[str, Any]) -> object:
        """Have the root start a group of `Rank`s."""
        order = StartGroup(
            args.get("group", "g"),
            args.get("target", "tests.tree.toys:Rank"),
            args.get("mode", "ok").encode(),
            args.get("world_size", 2),
            args.get("start_timeout_s", DEADLINE_S),
        )
        return await self._ask_root(order)

    async def do_stop_group(self, args: dict[str, Any]) -> object:
        """Have the root stop it."""
        return await self._ask_root(StopGroup(args.get("group", "g"), args.get("drain_s", 0.0)))

    async def _ask_root(self, body: Message) -> object:
        try:
            return msgspec.to_builtins(await self.ask("root", body, deadline_s=DEADLINE_S))
        except CortexError as error:
            return {"error": error.code, "message": error.message}


def _json_values(args: dict[str, Any]) -> dict[str, bytes]:
    return {name: msgspec.json.encode(value) for name, value in args.items()}


class Rank(SyncActor):
    """A rank without an engine. `context.args` says how it behaves at its start."""

    def on_start(self) -> None:
        """Load, slowly, or fail."""
        mode = self.context.args.decode()
        self.work = 0
        if mode == "no memory" and self.context.rank == 1:
            raise InsufficientMemory("needs 9 bytes, has 1")
        if mode == "retriable":
            raise EngineRestarting("told to fail for now")
        if mode == "stall":
            self.report_progress(0.1, "loading")
            time.sleep(600)
        if mode == "slow":
            for step in range(16):
                time.sleep(0.3)
                self.report_progress(step / 16, "loading")

    def poll(self) -> bool:
        """Count down the work there is."""
        if not self.work:
            return False
        self.work -= 1
        self.count_progress()
        return bool(self.work)

    def on_stop(self) -> None:
        """Say that we were asked."""
        print("rank was asked to stop", flush=True)

    @handles(AdminCommand)
    def on_command(self, message: AdminCommand, envelope: Envelope) -> AdminReply:
        """Do what the command says."""
        args = _args(message)
        match args["do"]:
            case "pid":
                return _json(os.getpid())
            case "work":
                self.work = args["steps"]
                return _json(None)
            case "hang":
                self._is_busy = True
                time.sleep(600)
            case "poison":
                self.exit_poisoned("told to")
            case "fail":
                raise ModelNotFound("told to")
        raise ValueError(f"unknown command {args}")
