"""The admin socket: operators' JSON requests, answered at once, followed by events.

The root's own operations are methods here; those of models are handed to the actor that owns them.
Bad input is an error answer, never a crash. Streams and operation events go to the client that
asked until it is gone or cancels. The protocol is documented in the README.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from actors.admin_request import (
    PROTOCOL_VERSION,
    ActorArgs,
    CancelArgs,
    EventsArgs,
    LevelArgs,
    LogsArgs,
    NoArgs,
    OperationArgs,
    RawArgs,
    Request,
    ShutdownArgs,
    decode_args,
    decode_request,
)
from actors.events import Event
from actors.group import Groups
from actors.host import Host
from actors.incarnation import Incarnation
from actors.operations import (
    Document,
    EventKind,
    Operation,
    Operations,
    decode_json,
    error_document,
)
from actors.stack_dump import stack_dump
from actors.status import DaemonInfo, Status
from actors.supervisor import Supervisor
from actors.transport.sockets import AdminSocket
from cortexd import __version__
from cortexd.errors import (
    ActorDown,
    CortexError,
    Internal,
    InvalidJson,
    InvalidValue,
    NotFound,
    Overloaded,
)
from cortexd.messages.admin import AdminCommand, AdminProgress, AdminReply
from cortexd.messages.control import SetLogLevel
from cortexd.messages.envelope import ROOT

_COMMAND_DEADLINE_S: Final = 10.0
# A busy actor dumps its stacks when it gets a turn; below what a client waits for an answer.
_STACK_DUMP_S: Final = 5.0
_MAX_STREAMS: Final = 64
# Handed to an actor; the long ones report with AdminProgress after their first answer.
_FORWARDED: Final = {
    "models": "router",
    "requests": "router",
    "model.load": "router",
    "model.unload": "router",
    "model.retry": "router",
    "model.pull": "store",
    "host": "poller",
    "reload": "reloader",
    "drain": "router",
    "keys": "budgets",
}
_LONG: Final = frozenset({"model.load", "model.unload", "model.retry", "model.pull"})


@dataclass(slots=True, frozen=True)
class _Client:
    """Who asked: the socket's identity and the client's own request id."""

    identity: bytes
    request_id: str


class Admin:
    """Serves the admin socket. Owned by the root's loop."""

    def __init__(
        self,
        socket: AdminSocket,
        host: Host,
        *,
        supervisor: Supervisor,
        groups: Groups,
        info: DaemonInfo,
        command_stop: Callable[[str, bool], None],
    ) -> None:
        self._socket = socket
        self._host = host
        self._supervisor = supervisor
        self._groups = groups
        self._status = Status(host, supervisor, groups, info)
        self._command_stop = command_stop
        self._operations = Operations()
        self._streams: dict[_Client, Callable[[], None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ops: dict[str, Callable[[_Client, RawArgs], Awaitable[object]]] = {
            "ping": self._ping,
            "version": self._version,
            "status": self._status_document,
            "actors": self._actors,
            "actor.stop": self._actor_stop,
            "actor.start": self._actor_start,
            "actor.restart": self._actor_restart,
            "actor.kill": self._actor_kill,
            "actor.stack": self._actor_stack,
            "actor.logs": self._actor_logs,
            "events": self._follow_events,
            "deadletters": self._dead_letters,
            "operation": self._operation,
            "operations": self._all_operations,
            "loglevel": self._log_level,
            "shutdown": self._shutdown,
            "cancel": self._cancel,
        }
        asyncio.get_running_loop().add_reader(socket.fd, self._drain)

    def __repr__(self) -> str:
        return f"Admin({self._operations}, {len(self._streams)} streams)"

    def started(self) -> None:
        """All actors are ready."""
        self._status.is_started = True

    def stopping(self) -> None:
        """The daemon is on its way out."""
        self._status.is_stopping = True

    def on_progress(self, progress: AdminProgress) -> None:
        """Pass on an event of a long operation."""
        try:
            operation = self._operations.get(progress.operation_id)
            data = decode_json(progress.data)
        except (CortexError, msgspec.MsgspecError) as error:
            self._host.events.add("admin.bad_progress", logging.ERROR, error=str(error))
            return
        kind: EventKind = progress.kind if progress.kind in {"done", "failed"} else "progress"  # type: ignore[assignment]
        operation.add(kind, data)

    def on_actor_down(self, name: str, reason: str) -> None:
        """Fail the operations that this actor carried."""
        self._operations.fail_target(name, ActorDown(f'actor "{name}" is gone: {reason}'))

    def announce_end(self) -> None:
        """Tell all followers that nothing more will come."""
        for client in list(self._streams):
            self._send(client, {"event": "end", "data": {}})

    def close(self) -> None:
        """Stop serving."""
        asyncio.get_running_loop().remove_reader(self._socket.fd)
        for task in self._tasks:
            task.cancel()
        self._socket.close()

    def _drain(self) -> None:
        while (frames := self._socket.receive()) is not None:
            self._on_frames(frames)

    def _on_frames(self, frames: list[bytes]) -> None:
        client = _Client(frames[0], "")
        try:
            if len(frames) != 2:
                raise InvalidJson(f"a request is one frame, not {len(frames) - 1}")
            request = decode_request(frames[1])
        except CortexError as error:
            self._answer_error(client, error)
        else:
            self._spawn(self._serve(_Client(frames[0], request.id), request))

    async def _serve(self, client: _Client, request: Request) -> None:
        try:
            if request.op in _FORWARDED:
                await self._forward(client, request)
                return
            handler = self._ops.get(request.op)
            if handler is None:
                known = ", ".join(sorted([*self._ops, *_FORWARDED]))
                raise NotFound(f'no operation "{request.op}"; known: {known}')
            result = await handler(client, request.args)
        except CortexError as error:
            self._answer_error(client, error)
        except Exception as error:
            self._host.events.add("admin.failed", logging.ERROR, op=request.op, error=repr(error))
            self._answer_error(client, Internal(f"{request.op} failed: {type(error).__name__}"))
        else:
            if result is not None:  # None: the handler has answered already
                self._answer(client, result)

    async def _forward(self, client: _Client, request: Request) -> None:
        """Let the owner of the subject carry it out."""
        target = _FORWARDED[request.op]
        operation = self._operations.begin(request.op, target)
        try:
            incarnation = self._supervisor.find(target)
            if incarnation is None or not incarnation.is_ready:
                raise ActorDown(f'actor "{target}" is not running')
            # JSON text as bytes: a Raw would be spliced into the MessagePack frame as it is.
            args = {name: bytes(value) for name, value in request.args.items()}
            command = AdminCommand(operation.op_id, request.op, args)
            reply = await self._host.bus.ask(
                incarnation.address, command, deadline_s=_COMMAND_DEADLINE_S
            )
            if not isinstance(reply, AdminReply):
                raise Internal(f"{target} answered {type(reply).__name__} to {request.op}")
            result = decode_json(reply.result)
        except CortexError as error:
            operation.add("failed", error_document(error.to_info()))
            raise
        if request.op in _LONG:
            extra = result if isinstance(result, dict) else {}
            self._answer(client, {**extra, "op_id": operation.op_id, "accepted": True})
            operation.listen(lambda kind, one, data: self._on_operation(client, kind, one, data))
        else:
            operation.add("done", None)
            self._answer(client, result)

    def _on_operation(
        self, client: _Client, kind: EventKind, operation: Operation, data: object
    ) -> None:
        self._send(client, {"event": kind, "op_id": operation.op_id, "data": data})

    def _run_operation(self, client: _Client, op: str, work: Coroutine[Any, Any, None]) -> None:
        """Answer "accepted", then carry out `work` here in the root and report its end."""
        operation = self._operations.begin(op, ROOT.name)
        self._answer(client, {"op_id": operation.op_id, "accepted": True})
        operation.listen(lambda kind, one, data: self._on_operation(client, kind, one, data))
        self._spawn(_finish(operation, work))

    async def _ping(self, client: _Client, args: RawArgs) -> Document:
        decode_args(args, NoArgs)
        return {"pong": True}

    async def _version(self, client: _Client, args: RawArgs) -> Document:
        decode_args(args, NoArgs)
        return {"version": __version__, "protocol": PROTOCOL_VERSION}

    async def _actors(self, client: _Client, args: RawArgs) -> Document:
        decode_args(args, NoArgs)
        return {"actors": self._status.actors()}

    async def _status_document(self, client: _Client, args: RawArgs) -> Document:
        decode_args(args, NoArgs)
        return await self._status.document()

    async def _dead_letters(self, client: _Client, args: RawArgs) -> Document:
        decode_args(args, NoArgs)
        recent = [
            {"reason": reason, "header": msgspec.to_builtins(header)}
            for reason, header in self._host.bus.dead_letters.recent
        ]
        return {"counts": self._status.dead_letters(), "recent": recent}

    async def _actor_stop(self, client: _Client, args: RawArgs) -> None:
        name = self._light_name(args)
        self._run_operation(client, "actor.stop", self._supervisor.stop_actor(name))

    async def _actor_start(self, client: _Client, args: RawArgs) -> None:
        name = self._light_name(args)
        self._run_operation(client, "actor.start", self._supervisor.start_actor(name))

    async def _actor_restart(self, client: _Client, args: RawArgs) -> None:
        name = self._light_name(args)
        self._run_operation(client, "actor.restart", self._supervisor.restart_actor(name))

    async def _actor_kill(self, client: _Client, args: RawArgs) -> Document:
        name = decode_args(args, ActorArgs).name
        self._running(name).kill("killed by operator")
        return {"killed": name}

    async def _actor_stack(self, client: _Client, args: RawArgs) -> Document:
        name = decode_args(args, ActorArgs).name
        incarnation = self._running(name)
        lines = await stack_dump(
            self._host.logs,
            name,
            lambda: incarnation.signal(signal.SIGUSR1),
            deadline_s=_STACK_DUMP_S,
        )
        return {"name": name, "lines": [msgspec.Raw(line) for line in lines]}

    async def _actor_logs(self, client: _Client, args: RawArgs) -> Document:
        wanted = decode_args(args, LogsArgs)
        name, names = wanted.name, self._status.names()
        if name is not None and name not in names and not self._host.logs.knows(name):
            raise NotFound(f'no actor "{name}"; known: {", ".join(names)}')

        def follower(actor: str, line: bytes) -> None:
            if wanted.name in {None, actor}:
                self._send(client, {"event": "line", "data": msgspec.Raw(line)})

        if wanted.follow:
            self._add_stream(client, lambda: self._host.logs.unfollow(follower))
            self._host.logs.follow(follower)
        lines = self._host.logs.lines(wanted.name, wanted.lines)
        return {"lines": [msgspec.Raw(line) for line in lines]}

    async def _follow_events(self, client: _Client, args: RawArgs) -> Document:
        wanted = decode_args(args, EventsArgs)

        def follower(event: Event) -> None:
            self._send(client, {"event": "event", "data": event})

        if wanted.follow:
            self._add_stream(client, lambda: self._host.events.unfollow(follower))
            self._host.events.follow(follower)
        return {"events": self._host.events.since(wanted.since)}

    async def _operation(self, client: _Client, args: RawArgs) -> Document:
        return self._operations.get(decode_args(args, OperationArgs).op_id).describe()

    async def _all_operations(self, client: _Client, args: RawArgs) -> Document:
        decode_args(args, NoArgs)
        return {"operations": [one.describe() for one in self._operations.all()]}

    async def _log_level(self, client: _Client, args: RawArgs) -> Document:
        wanted = decode_args(args, LevelArgs)
        if wanted.name == "root":
            logging.getLogger().setLevel(wanted.level.upper())
        else:
            address = self._running(wanted.name).address
            self._host.bus.tell(address, SetLogLevel(wanted.level))
        return {"name": wanted.name, "level": wanted.level}

    async def _shutdown(self, client: _Client, args: RawArgs) -> Document:
        now = decode_args(args, ShutdownArgs).now
        asyncio.get_running_loop().call_soon(self._command_stop, "shutdown by operator", now)
        return {"stopping": True, "pid": os.getpid()}

    async def _cancel(self, client: _Client, args: RawArgs) -> Document:
        stream = _Client(client.identity, decode_args(args, CancelArgs).id)
        was_open = stream in self._streams
        self._end_stream(stream)
        return {"cancelled": was_open}

    def _light_name(self, args: RawArgs) -> str:
        """Return the name of a light actor. Raises: NotFound, InvalidValue for a rank."""
        name = decode_args(args, ActorArgs).name
        if self._groups.find(name) is not None:
            raise InvalidValue(
                f'actor "{name}" is a rank of an engine group, which lives and dies as one; '
                "unload its model, or use actor.kill"
            )
        self._supervisor.find(name)
        return name

    def _running(self, name: str) -> Incarnation:
        rank = self._groups.find(name)
        if rank is not None:
            return rank
        incarnation: Incarnation | None = self._supervisor.find(name)
        if incarnation is None:
            raise ActorDown(f'actor "{name}" is not running')
        return incarnation

    def _add_stream(self, client: _Client, end: Callable[[], None]) -> None:
        if len(self._streams) >= _MAX_STREAMS:
            raise Overloaded(f"{_MAX_STREAMS} clients follow already; end one of them")
        self._end_stream(client)
        self._streams[client] = end

    def _end_stream(self, client: _Client) -> None:
        end = self._streams.pop(client, None)
        if end is not None:
            end()

    def _answer(self, client: _Client, result: object) -> None:
        self._send(client, {"ok": True, "result": result})

    def _answer_error(self, client: _Client, error: CortexError) -> None:
        self._send(client, {"ok": False, "error": error_document(error.to_info())})

    def _send(self, client: _Client, document: Document) -> None:
        data = msgspec.json.encode({"v": PROTOCOL_VERSION, "id": client.request_id, **document})
        if not self._socket.send(client.identity, data):
            self._end_stream(client)  # gone, or does not read
        if self._socket.is_readable:
            asyncio.get_running_loop().call_soon(self._drain)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _finish(operation: Operation, work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except CortexError as error:
        operation.add("failed", error_document(error.to_info()))
    else:
        operation.add("done", {})
