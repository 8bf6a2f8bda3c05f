"""What operators ask of single actors: stop, start, restart, kill, stacks, logs and log levels.

A part of the admin socket's operations (`actors.root.admin`), in the root's loop; no state of its
own. A rank can be killed and looked at, but not stopped alone.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import msgspec

from actors.root.admin_clients import AdminClients, Client
from actors.root.admin_request import ActorArgs, LevelArgs, LogsArgs, RawArgs, decode_args
from actors.root.group import Groups
from actors.root.host import Host
from actors.root.incarnation import Incarnation
from actors.root.operations import Document
from actors.root.stack_dump import stack_dump
from actors.root.status import Status
from actors.root.supervisor import Supervisor
from cortexd.errors import ActorDown, InvalidValue, NotFound
from cortexd.messages.control import SetLogLevel

# A busy actor dumps its stacks when it gets a turn; below what a client waits for an answer.
_STACK_DUMP_S: Final = 5.0

Handler = Callable[[Client, RawArgs], Awaitable[object]]
# Answers "accepted", then carries out the work and reports its end.
RunOperation = Callable[[Client, str, Coroutine[Any, Any, None]], None]


class ActorOperations:
    """See the module's text."""

    def __init__(
        self,
        host: Host,
        *,
        supervisor: Supervisor,
        groups: Groups,
        status: Status,
        clients: AdminClients,
        run: RunOperation,
    ) -> None:
        self._host = host
        self._supervisor = supervisor
        self._groups = groups
        self._status = status
        self._clients = clients
        self._run = run

    def handlers(self) -> dict[str, Handler]:
        """Return the operations by name."""
        return {
            "actor.stop": self._stop,
            "actor.start": self._start,
            "actor.restart": self._restart,
            "actor.kill": self._kill,
            "actor.stack": self._stack,
            "actor.logs": self._logs,
            "loglevel": self._log_level,
        }

    async def _stop(self, client: Client, args: RawArgs) -> None:
        name = self._light_name(args)
        self._run(client, "actor.stop", self._supervisor.stop_actor(name))

    async def _start(self, client: Client, args: RawArgs) -> None:
        name = self._light_name(args)
        self._run(client, "actor.start", self._supervisor.start_actor(name))

    async def _restart(self, client: Client, args: RawArgs) -> None:
        name = self._light_name(args)
        self._run(client, "actor.restart", self._supervisor.restart_actor(name))

    async def _kill(self, client: Client, args: RawArgs) -> Document:
        name = decode_args(args, ActorArgs).name
        self._running(name).kill("killed by operator")
        return {"killed": name}

    async def _stack(self, client: Client, args: RawArgs) -> Document:
        name = decode_args(args, ActorArgs).name
        incarnation = self._running(name)
        lines = await stack_dump(
            self._host.logs,
            name,
            lambda: incarnation.signal(signal.SIGUSR1),
            deadline_s=_STACK_DUMP_S,
        )
        return {"name": name, "lines": [msgspec.Raw(line) for line in lines]}

    async def _logs(self, client: Client, args: RawArgs) -> Document:
        wanted = decode_args(args, LogsArgs)
        name, names = wanted.name, self._status.names()
        if name is not None and name not in names and not self._host.logs.knows(name):
            raise NotFound(f'no actor "{name}"; known: {", ".join(names)}')

        def follower(actor: str, line: bytes) -> None:
            if wanted.name in {None, actor}:
                self._clients.send(client, {"event": "line", "data": msgspec.Raw(line)})

        if wanted.follow:
            self._clients.add_stream(client, lambda: self._host.logs.unfollow(follower))
            self._host.logs.follow(follower)
        lines = self._host.logs.lines(wanted.name, wanted.lines)
        return {"lines": [msgspec.Raw(line) for line in lines]}

    async def _log_level(self, client: Client, args: RawArgs) -> Document:
        wanted = decode_args(args, LevelArgs)
        if wanted.name == "root":
            logging.getLogger().setLevel(wanted.level.upper())
        else:
            address = self._running(wanted.name).address
            self._host.bus.tell(address, SetLogLevel(wanted.level))
        return {"name": wanted.name, "level": wanted.level}

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
