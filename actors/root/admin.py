"""The admin socket: operators' JSON requests, answered at once, followed by events.

The daemon's operations are methods here, those on actors in `actors.root.admin_actors`; those of
models are handed to the actor that owns them. Bad input is an error answer, never a crash. Streams
and operation events go to the client that asked until it is gone or cancels
(`actors.root.admin_clients`). The protocol is documented in the README.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec

from actors.root.admin_actors import ActorOperations, Handler
from actors.root.admin_clients import AdminClients, Client
from actors.root.admin_request import (
    PROTOCOL_VERSION,
    CancelArgs,
    EventsArgs,
    NoArgs,
    OperationArgs,
    RawArgs,
    Request,
    ShutdownArgs,
    decode_args,
    decode_request,
)
from actors.root.events import Event
from actors.root.group import Groups
from actors.root.host import Host
from actors.root.operations import (
    Document,
    EventKind,
    Operation,
    Operations,
    decode_json,
    error_document,
)
from actors.root.status import DaemonInfo, Status
from actors.root.supervisor import Supervisor
from actors.transport.sockets import AdminSocket
from cortexd import __version__
from cortexd.errors import ActorDown, CortexError, Internal, InvalidJson, NotFound
from cortexd.messages.admin import AdminCommand, AdminProgress, AdminReply
from cortexd.messages.envelope import ROOT

_COMMAND_DEADLINE_S: Final = 10.0
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
        self._status = Status(host, supervisor, groups, info)
        self._command_stop = command_stop
        self._operations = Operations()
        self._clients = AdminClients(socket, self._drain_soon)
        self._tasks: set[asyncio.Task[None]] = set()
        actors = ActorOperations(
            host,
            supervisor=supervisor,
            groups=groups,
            status=self._status,
            clients=self._clients,
            run=self._run_operation,
        )
        self._ops: dict[str, Handler] = {
            "ping": self._ping,
            "version": self._version,
            "status": self._status_document,
            "actors": self._actors,
            "events": self._follow_events,
            "deadletters": self._dead_letters,
            "operation": self._operation,
            "operations": self._all_operations,
            "shutdown": self._shutdown,
            "cancel": self._cancel,
            **actors.handlers(),
        }
        asyncio.get_running_loop().add_reader(socket.fd, self._drain)

    def __repr__(self) -> str:
        return f"Admin({self._operations}, {self._clients})"

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
        self._clients.announce_end()

    def close(self) -> None:
        """Stop serving."""
        asyncio.get_running_loop().remove_reader(self._socket.fd)
        for task in self._tasks:
            task.cancel()
        self._socket.close()

    def _drain(self) -> None:
        while (frames := self._socket.receive()) is not None:
            self._on_frames(frames)

    def _drain_soon(self) -> None:
        # Sending clears the socket's signal: what has come meanwhile would wait for the next one.
        if self._socket.is_readable:
            asyncio.get_running_loop().call_soon(self._drain)

    def _on_frames(self, frames: list[bytes]) -> None:
        client = Client(frames[0], "")
        try:
            if len(frames) != 2:
                raise InvalidJson(f"a request is one frame, not {len(frames) - 1}")
            request = decode_request(frames[1])
        except CortexError as error:
            self._clients.refuse(client, error)
        else:
            self._spawn(self._serve(Client(frames[0], request.id), request))

    async def _serve(self, client: Client, request: Request) -> None:
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
            self._clients.refuse(client, error)
        except Exception as error:
            self._host.events.add("admin.failed", logging.ERROR, op=request.op, error=repr(error))
            self._clients.refuse(client, Internal(f"{request.op} failed: {type(error).__name__}"))
        else:
            if result is not None:  # None: the handler has answered already
                self._clients.answer(client, result)

    async def _forward(self, client: Client, request: Request) -> None:
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
            self._clients.answer(client, {**extra, "op_id": operation.op_id, "accepted": True})
            self._clients.follow(client, operation)
        else:
            operation.add("done", None)
            self._clients.answer(client, result)

    def _run_operation(self, client: Client, op: str, work: Coroutine[Any, Any, None]) -> None:
        """Answer "accepted", then carry out `work` here in the root and report its end."""
        operation = self._operations.begin(op, ROOT.name)
        self._clients.answer(client, {"op_id": operation.op_id, "accepted": True})
        self._clients.follow(client, operation)
        self._spawn(_finish(operation, work))

    async def _ping(self, client: Client, args: RawArgs) -> Document:
        decode_args(args, NoArgs)
        return {"pong": True}

    async def _version(self, client: Client, args: RawArgs) -> Document:
        decode_args(args, NoArgs)
        return {"version": __version__, "protocol": PROTOCOL_VERSION}

    async def _actors(self, client: Client, args: RawArgs) -> Document:
        decode_args(args, NoArgs)
        return {"actors": self._status.actors()}

    async def _status_document(self, client: Client, args: RawArgs) -> Document:
        decode_args(args, NoArgs)
        return await self._status.document()

    async def _dead_letters(self, client: Client, args: RawArgs) -> Document:
        decode_args(args, NoArgs)
        recent = [
            {"reason": reason, "header": msgspec.to_builtins(header)}
            for reason, header in self._host.bus.dead_letters.recent
        ]
        return {"counts": self._status.dead_letters(), "recent": recent}

    async def _follow_events(self, client: Client, args: RawArgs) -> Document:
        wanted = decode_args(args, EventsArgs)

        def follower(event: Event) -> None:
            self._clients.send(client, {"event": "event", "data": event})

        if wanted.follow:
            self._clients.add_stream(client, lambda: self._host.events.unfollow(follower))
            self._host.events.follow(follower)
        return {"events": self._host.events.since(wanted.since)}

    async def _operation(self, client: Client, args: RawArgs) -> Document:
        return self._operations.get(decode_args(args, OperationArgs).op_id).describe()

    async def _all_operations(self, client: Client, args: RawArgs) -> Document:
        decode_args(args, NoArgs)
        return {"operations": [one.describe() for one in self._operations.all()]}

    async def _shutdown(self, client: Client, args: RawArgs) -> Document:
        now = decode_args(args, ShutdownArgs).now
        asyncio.get_running_loop().call_soon(self._command_stop, "shutdown by operator", now)
        return {"stopping": True, "pid": os.getpid()}

    async def _cancel(self, client: Client, args: RawArgs) -> Document:
        stream = Client(client.identity, decode_args(args, CancelArgs).id)
        return {"cancelled": self._clients.end_stream(stream)}

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
