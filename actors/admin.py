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
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from actors.events import Event
from actors.group import Groups
from actors.incarnation import Host, Incarnation
from actors.logs import RING_LINES
from actors.operations import (
    Document,
    EventKind,
    Operation,
    Operations,
    decode_json,
    error_document,
)
from actors.supervisor import Supervisor
from actors.transport import MAX_ADMIN_BYTES, AdminSocket
from cortexd import __version__
from cortexd.errors import (
    ActorDown,
    CortexError,
    Internal,
    InvalidJson,
    InvalidValue,
    NotFound,
    Overloaded,
    RequestTooLarge,
)
from cortexd.messages import ListModels, ModelList
from cortexd.messages.admin import AdminCommand, AdminProgress, AdminReply
from cortexd.messages.control import SetLogLevel
from cortexd.messages.envelope import ROOT

PROTOCOL_VERSION: Final = 1
_Args = TypeVar("_Args")
_MODELS_DEADLINE_S: Final = 1.0
_COMMAND_DEADLINE_S: Final = 10.0
_STACK_DUMP_S: Final = 0.3
_MAX_STREAMS: Final = 64
_LEVELS: Final = ("debug", "info", "warning", "error")
# Handed to an actor; the long ones report with AdminProgress after their first answer.
_FORWARDED: Final = {
    "models": "router",
    "requests": "router",
    "model.load": "router",
    "model.unload": "router",
    "model.retry": "router",
    "model.pull": "store",
    "host": "poller",
}
_LONG: Final = frozenset({"model.load", "model.unload", "model.retry", "model.pull"})


class _Request(msgspec.Struct):
    """One request; `v` is checked first."""

    v: int
    id: str
    op: str
    args: dict[str, msgspec.Raw] = {}


class _Name(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class _LogsArgs(msgspec.Struct, forbid_unknown_fields=True):
    name: str | None = None
    lines: Annotated[int, Meta(ge=0, le=RING_LINES)] = 100
    follow: bool = False


class _EventsArgs(msgspec.Struct, forbid_unknown_fields=True):
    since: Annotated[int, Meta(ge=0)] = 0
    follow: bool = False


class _LevelArgs(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    level: str


class _ShutdownArgs(msgspec.Struct, forbid_unknown_fields=True):
    now: bool = False


class _CancelArgs(msgspec.Struct, forbid_unknown_fields=True):
    id: str


class _OperationArgs(msgspec.Struct, forbid_unknown_fields=True):
    op_id: str


class _NoArgs(msgspec.Struct, forbid_unknown_fields=True):
    pass


@dataclass(slots=True, frozen=True)
class DaemonInfo:
    """What `status` says of the daemon as a whole."""

    role: str
    addresses: dict[str, str]
    started_at: float = field(default_factory=time.monotonic)


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
        self._info = info
        self._command_stop = command_stop
        self._operations = Operations()
        self._streams: dict[_Client, Callable[[], None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_started = False
        self.is_stopping = False
        self._ops: dict[str, Callable[[_Client, dict[str, msgspec.Raw]], Awaitable[object]]] = {
            "ping": self._ping,
            "version": self._version,
            "status": self._status,
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
            if len(frames[1]) > MAX_ADMIN_BYTES:
                raise RequestTooLarge(
                    f"a request of {len(frames[1])} bytes; allowed: {MAX_ADMIN_BYTES}"
                )
            client, request = _decode_request(frames)
            self._spawn(self._serve(client, request))
        except CortexError as error:
            self._answer_error(client, error)

    async def _serve(self, client: _Client, request: _Request) -> None:
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

    async def _forward(self, client: _Client, request: _Request) -> None:
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

    async def _ping(self, client: _Client, args: dict[str, msgspec.Raw]) -> Document:
        _decode(args, _NoArgs)
        return {"pong": True}

    async def _version(self, client: _Client, args: dict[str, msgspec.Raw]) -> Document:
        _decode(args, _NoArgs)
        return {"version": __version__, "protocol": PROTOCOL_VERSION}

    async def _actors(self, client: _Client, args: dict[str, msgspec.Raw]) -> Document:
        _decode(args, _NoArgs)
        return {"actors": self._actor_lines()}

    async def _status(self, client: _Client, args: dict[str, msgspec.Raw]) -> Document:
        _decode(args, _NoArgs)
        models, models_error = await self._models()
        status: Document = {
            "v": PROTOCOL_VERSION,
            "pid": os.getpid(),
            "version": __version__,
            "uptime_s": round(time.monotonic() - self._info.started_at, 3),
            "role": self._info.role,
            "state": self._state(models),
            "listen": self._info.addresses,
            "actors": self._actor_lines(),
            "models": models,
            "dead_letters": self._dead_letter_counts(),
        }
        if models_error is not None:
            status["models_error"] = models_error
        return status

    async def _models(self) -> tuple[list[Document] | None, str | None]:
        try:
            router = self._supervisor.find("router")
            if router is None or not router.is_ready:
                raise ActorDown('actor "router" is not running')
            answer = await self._host.bus.ask(
                router.address, ListModels(), deadline_s=_MODELS_DEADLINE_S
            )
        except CortexError as error:
            return None, error.message
        if not isinstance(answer, ModelList):
            return None, f"the router answered {type(answer).__name__}"
        return [msgspec.to_builtins(model) for model in answer.models], None

    def _state(self, models: list[Document] | None) -> str:
        if self.is_stopping:
            return "stopping"
        if not self.is_started:
            return "starting"
        all_ready = all(m.lifecycle.state == "ready" for m in self._supervisor.members)
        any_failed = self._groups.has_failed or any(
            model["state"] == "failed" for model in models or []
        )
        return "ok" if all_ready and not any_failed and models is not None else "degraded"

    def _actor_lines(self) -> list[Document]:
        members = self._supervisor.members + self._groups.members
        return [
            {key: value for key, value in msgspec.structs.asdict(info).items() if key != "endpoint"}
            for info in (member.info() for member in members)
        ]

    def _dead_letter_counts(self) -> Document:
        counts: Document = {"root": self._host.bus.dead_letters.snapshot()}
        for member in self._supervisor.members + self._groups.members:
            if member.dead_letters:
                counts[member.spec.name] = member.dead_letters
        return counts

    async def _dead_letters(self, client: _Client, args: dict[str, msgspec.Raw]) -> Document:
        _decode(args, _NoArgs)
        recent = [
            {"reason": reason, "header": msgspec.to_builtins(header)}
            for reason, header in self._host.bus.dead_letters.recent
        ]
        return {"counts": self._dead_letter_counts(), "recent": recent}

    async def _actor_stop(self, client: _Client, args: dict[str, msgspec.Raw]) -> None:
        name = self._light_name(args)
        self._run_operation(client, "actor.stop", self._supervisor.stop_actor(name))

    async def _actor_start(self, client: _Client, args: dict[str, msgspec.Raw]) -> None:
        name = self._light_name(args)
        self._run_operation(client, "actor.start", self._supervisor.start_actor(name))

    async def _actor_restart(self, client: _Client, args: dict[str, msgspec.Raw]) -> None:
        name = self._light_name(args)
        self._run_operation(client, "actor.restart", self._supervisor.restart_actor(name))

    async def _actor_kill(self, client: _Client, args: dict[str, msgspec.Raw]) -> Document:
        name = _decode(args, _Name).name
        self._running(name).kill("killed by operator")
        return {"killed": name}

    async def _actor_stack(self, client: _Client, args: dict[str, msgspec.Raw]) -> Document:
        name = _decode(args, _Name).name
        incarnation = self._running(name)
        lines: list[object] = []

        def collect(actor: str, line: bytes) -> None:
            if actor == name:
                lines.append(msgspec.json.decode(line))

        self._host.logs.follow(collect)
        try:
            incarnation.signal(signal.SIGUSR1)
            await asyncio.sleep(_STACK_DUMP_S)
        finally:
            self._host.logs.unfollow(collect)
        return {"name": name, "lines": lines}

    async def _actor_logs(self, client: _Client, args: dict[str, msgspec.Raw]) -> Document:
        wanted = _decode(args, _LogsArgs)
        if wanted.name is not None and not self._is_known(wanted.name):
            raise NotFound(f'no actor "{wanted.name}"; known: {", ".join(self._known_names())}')

        def follower(actor: str, line: bytes) -> None:
            if wanted.name in {None, actor}:
                self._send(client, {"event": "line", "data": msgspec.Raw(line)})

        if wanted.follow:
            self._add_stream(client, lambda: self._host.logs.unfollow(follower))
            self._host.logs.follow(follower)
        lines = self._host.logs.lines(wanted.name, wanted.lines)
        return {"lines": [msgspec.Raw(line) for line in lines]}

    async def _follow_events(self, client: _Client, args: dict[str, msgspec.Raw]) -> Document:
        wanted = _decode(args, _EventsArgs)

        def follower(event: Event) -> None:
            self._send(client, {"event": "event", "data": event})

        if wanted.follow:
            self._add_stream(client, lambda: self._host.events.unfollow(follower))
            self._host.events.follow(follower)
        return {"events": self._host.events.since(wanted.since)}

    async def _operation(self, client: _Client, args: dict[str, msgspec.Raw]) -> Document:
        return self._operations.get(_decode(args, _OperationArgs).op_id).describe()

    async def _all_operations(self, client: _Client, args: dict[str, msgspec.Raw]) -> Document:
        _decode(args, _NoArgs)
        return {"operations": [one.describe() for one in self._operations.all()]}

    async def _log_level(self, client: _Client, args: dict[str, msgspec.Raw]) -> Document:
        wanted = _decode(args, _LevelArgs)
        if wanted.level not in _LEVELS:
            raise InvalidValue(f'level "{wanted.level}"; allowed: {", ".join(_LEVELS)}')
        if wanted.name == "root":
            logging.getLogger().setLevel(wanted.level.upper())
        else:
            address = self._running(wanted.name).address
            self._host.bus.tell(address, SetLogLevel(wanted.level))
        return {"name": wanted.name, "level": wanted.level}

    async def _shutdown(self, client: _Client, args: dict[str, msgspec.Raw]) -> Document:
        now = _decode(args, _ShutdownArgs).now
        asyncio.get_running_loop().call_soon(self._command_stop, "shutdown by operator", now)
        return {"stopping": True, "pid": os.getpid()}

    async def _cancel(self, client: _Client, args: dict[str, msgspec.Raw]) -> Document:
        stream = _Client(client.identity, _decode(args, _CancelArgs).id)
        was_open = stream in self._streams
        self._end_stream(stream)
        return {"cancelled": was_open}

    def _light_name(self, args: dict[str, msgspec.Raw]) -> str:
        """Return the name of a light actor. Raises: NotFound, InvalidValue for a rank."""
        name = _decode(args, _Name).name
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

    def _known_names(self) -> list[str]:
        members = self._supervisor.members + self._groups.members
        return ["root", *sorted(member.spec.name for member in members)]

    def _is_known(self, name: str) -> bool:
        return name in self._known_names() or self._host.logs.knows(name)

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


def _decode_request(frames: list[bytes]) -> tuple[_Client, _Request]:
    """Return client and request. Raises: InvalidJson, InvalidValue."""
    try:
        request = msgspec.json.decode(frames[1], type=_Request)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidJson(
            f'bad request: {error}; expected {{"v": 1, "id": text, "op": text, "args": object}}'
        ) from error
    if request.v != PROTOCOL_VERSION:
        raise InvalidValue(f"protocol version {request.v}; this daemon speaks {PROTOCOL_VERSION}")
    return _Client(frames[0], request.id), request


def _decode(args: dict[str, msgspec.Raw], kind: type[_Args]) -> _Args:
    """Return the arguments of an operation. Raises: InvalidValue."""
    try:
        return msgspec.json.decode(msgspec.json.encode(args), type=kind)
    except msgspec.MsgspecError as error:
        raise InvalidValue(f"bad arguments: {error}") from error
