"""The root supervisor: one process that owns everything that must outlive an actor, and no model.

`run_root` takes the runtime directory's lock, then starts the light actors in order and serves
engine groups and operators until it is told to stop, or an actor has failed for good. It holds the
listening sockets, the control and admin sockets, the logs and the lifeline; when it dies, however
that happens, the kernel kills all others.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TextIO, cast

from actors.bootstrap import event_loop_factory, set_title
from actors.root.admin import Admin
from actors.root.control_bus import ControlBus
from actors.root.events import EventLog
from actors.root.forkserver import ForkServer
from actors.root.group import Groups
from actors.root.host import Host
from actors.root.launcher import Launcher
from actors.root.logs import HubStream, LogHub
from actors.root.process import become_subreaper
from actors.root.runtime_dir import RuntimeDir
from actors.root.server_launch import EarlyServers, early_kinds, launch_early, plan_server
from actors.root.spec import GROUP_STOP_ORDER, ChildSpec
from actors.root.status import DaemonInfo
from actors.root.supervisor import Supervisor
from actors.transport.sockets import AdminSocket, Transport
from cortexd.errors import ConfigError, CortexError, Internal
from cortexd.log import JsonFormatter, configure_logging, event
from cortexd.messages.admin import AdminProgress
from cortexd.messages.control import ActorInfo, Ok, Ping, Pong, StartGroup, StopGroup
from cortexd.messages.envelope import Envelope
from cortexd.messages.reload import ReloadFiles
from cortexd.paths import runtime_dir, state_dir
from cortexd.settings import Settings

_EXIT_OK: Final = 0
_EXIT_FAILED: Final = 1
_EXIT_KILLED: Final = 130
_GROUP_DRAIN_S: Final = 10.0
# Time for SIGKILLed processes to be reaped.
_KILL_WAIT_S: Final = 5.0


def run_root(
    settings: Settings,
    children: list[ChildSpec],
    listeners: dict[str, socket.socket],
    *,
    on_ready: Callable[[], None],
    addresses: dict[str, str] | None = None,
    locked: RuntimeDir | None = None,
    early: EarlyServers | None = None,
) -> int:
    """Run the daemon in this process; return its exit code: 0, 1 (an actor failed), 130 (killed).

    `locked` is the runtime folder when the caller took it already, `early` are the fork servers
    when they run already; both are closed here. `addresses`
    ("api", "metrics", "neuron" → "host:port") is what `status` shows. `on_ready` is called once,
    when all children are ready. Raises: AlreadyRunning, ConfigError; then nothing was started.
    """
    if sys.platform != "linux":
        raise ConfigError(f"cortexd needs Linux 5.4 or later (pidfd, lifeline), not {sys.platform}")
    locked = locked or RuntimeDir(runtime_dir(settings))
    early = early or launch_early(settings, (child.target for child in children), locked.path)
    try:
        with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
            root = Root(
                settings,
                children,
                listeners,
                addresses=addresses or {},
                folder=locked.path,
                early=early,
                on_ready=on_ready,
            )
            return runner.run(root.run())
    finally:
        locked.close()


class Root:
    """Wires the parts together and decides when the daemon ends."""

    def __init__(
        self,
        settings: Settings,
        children: list[ChildSpec],
        listeners: dict[str, socket.socket],
        *,
        addresses: dict[str, str],
        folder: Path,
        early: EarlyServers,
        on_ready: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._specs = children
        self._listeners = listeners
        self._addresses = addresses
        self._folder = folder
        self._early = early
        self._lifeline = early.lifeline
        self._on_ready = on_ready
        self._stop_reason: asyncio.Future[str] | None = None
        self._killed: asyncio.Event | None = None
        self._has_failed = False
        self._log = logging.getLogger("cortexd.root")
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Start, serve, stop; return the exit code."""
        loop = asyncio.get_running_loop()
        self._stop_reason = loop.create_future()
        self._killed = asyncio.Event()
        self._open()
        try:
            code = await self._serve()
            self._admin.announce_end()
            return code
        finally:
            self._close()

    def _open(self) -> None:
        """Bring up everything the children need; the order is that of their dependence."""
        become_subreaper()
        set_title("cortexd: root")
        self._events = EventLog()
        logs_dir = state_dir(self._settings) / "logs"
        self._logs = LogHub(logs_dir, self._settings.logging, self._on_log_failure)
        stream = cast(TextIO, HubStream(self._logs, "root"))
        configure_logging("root", self._settings.logging.level, stream)
        errors = logging.StreamHandler(sys.stderr)  # whoever started us should see these at once
        errors.setLevel(logging.ERROR)
        errors.setFormatter(JsonFormatter("root"))
        self._log.addHandler(errors)
        self._transport = Transport()
        self._bus = ControlBus(self._transport, self._folder)
        self._launcher = self._make_launcher()
        self._host = Host(
            settings=self._settings,
            runtime_dir=self._folder,
            lifeline_fd=self._lifeline.read_fd,
            listeners=self._listeners,
            launcher=self._launcher,
            bus=self._bus,
            logs=self._logs,
            events=self._events,
            on_request=self._on_request,
            on_gone=self._on_gone,
            ready_actors=self._ready_actors,
        )
        self._supervisor = Supervisor(self._host, self._specs)
        self._groups = Groups(self._host)
        self._admin = Admin(
            AdminSocket(self._transport, self._folder),
            self._host,
            supervisor=self._supervisor,
            groups=self._groups,
            info=DaemonInfo(self._settings.role, self._addresses),
            command_stop=self._command_stop,
        )
        self._install_signals()

    def _make_launcher(self) -> Launcher:
        targets = [spec.target for spec in self._specs]

        def make_server(kind: str) -> ForkServer:
            plan = plan_server(kind, targets, self._folder, self._lifeline.read_fd)
            return ForkServer(plan, self._capture, self._early.launched.pop(kind, None))

        return Launcher(
            self._settings.supervision.start_method, make_server, self._on_server_given_up
        )

    async def _serve(self) -> int:
        assert self._stop_reason is not None
        self._events.add("root.started", pid=os.getpid(), runtime_dir=str(self._folder))
        for kind in early_kinds(self._settings):
            self._launcher.start_early(kind)
        starting = asyncio.create_task(self._start())
        reason = await self._stop_reason
        starting.cancel()
        code = await self._shut_down(reason)
        return _EXIT_FAILED if code == _EXIT_OK and self._has_failed else code

    async def _start(self) -> None:
        try:
            await self._start_and_watch()
        except Exception as error:  # a fault of ours, or of `on_ready`
            self._has_failed = True
            event(self._log, "root.failed", logging.CRITICAL, exc_info=True, error=repr(error))
            self._request_stop(f"root failed: {error!r}")

    async def _start_and_watch(self) -> None:
        await self._supervisor.start()
        if self._supervisor.failed is None:
            self._admin.started()
            self._events.add("root.ready")
            self._on_ready()
        while self._supervisor.failed is None:
            await self._supervisor.changed()
        failed = self._supervisor.failed
        self._has_failed = True
        self._request_stop(f"actor {failed.spec.name} failed: {failed.lifecycle.reason}")

    async def _shut_down(self, reason: str) -> int:
        """Stop all in order; a second signal kills what is left."""
        assert self._killed is not None
        self._admin.stopping()
        self._events.add("root.stopping", reason=reason)
        stopping = asyncio.create_task(self._stop_in_order(reason))
        killed = asyncio.create_task(self._killed.wait())
        await asyncio.wait({stopping, killed}, return_when=asyncio.FIRST_COMPLETED)
        killed.cancel()
        if self._killed.is_set():
            stopping.cancel()
            await self._kill_all("killed by operator")
            return _EXIT_KILLED
        stopping.result()
        return _EXIT_OK

    async def _stop_in_order(self, reason: str) -> None:
        orders = self._supervisor.stop_orders() | {GROUP_STOP_ORDER}
        for stop_order in sorted(orders, reverse=True):
            await self._supervisor.stop_tier(stop_order, reason)
            if stop_order == GROUP_STOP_ORDER:
                await self._groups.stop_all(_GROUP_DRAIN_S, reason)

    async def _kill_all(self, reason: str) -> None:
        running = self._supervisor.incarnations + self._groups.incarnations
        self._groups.kill_all(reason)
        self._supervisor.kill_all(reason)
        if running:
            await asyncio.wait({one.exited for one in running}, timeout=_KILL_WAIT_S)

    def _close(self) -> None:
        self._launcher.stop()
        self._launcher.kill_adopted()
        self._logs.close()
        self._admin.close()
        self._bus.close()
        self._transport.close()
        self._lifeline.close()

    def _on_request(self, envelope: Envelope) -> None:
        """Answer what children ask the root."""
        body = envelope.body
        match body:
            case StartGroup():
                try:
                    self._bus.reply(envelope, self._groups.start_group(body))
                except CortexError as error:
                    self._bus.reply(envelope, error.to_info())
            case StopGroup():
                self._spawn(self._stop_group(body, envelope))
            case AdminProgress():
                self._admin.on_progress(body)
            case Ping():
                self._bus.reply(envelope, Pong())
            case _:
                self._bus.dead_letters.add("no_such_actor", None)
                if envelope.wants_reply:
                    refusal = Internal(f"the root does not handle {type(body).__name__}")
                    self._bus.reply(envelope, refusal.to_info())

    async def _stop_group(self, body: StopGroup, envelope: Envelope) -> None:
        try:
            await self._groups.stop_group(body.group, body.drain_s)
        except CortexError as error:
            self._bus.reply(envelope, error.to_info())
        else:
            self._bus.reply(envelope, Ok())

    def _ready_actors(self) -> list[ActorInfo]:
        running = self._supervisor.incarnations + self._groups.incarnations
        return [one.info() for one in running if one.is_ready]

    def _on_gone(self, name: str, reason: str) -> None:
        self._admin.on_actor_down(name, reason)

    def _on_server_given_up(self, preload: str, error: Internal) -> None:
        self._events.add(
            "root.fork_server_given_up",
            logging.ERROR,
            preload=preload,
            error=error.message,
            hint="its actors are started by spawn from now on, which is slower",
        )

    def _capture(self, name: str, read_fd: int) -> None:
        self._logs.capture(name, read_fd)

    def _on_log_failure(self, error: OSError) -> None:
        self._events.add(
            "root.log_file_failed",
            logging.ERROR,
            path=str(self._logs.path),
            error=os.strerror(error.errno or 0),
        )

    def _install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_stop_signal, signum)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        loop.add_signal_handler(signal.SIGUSR1, self._dump_all_stacks)

    def _on_stop_signal(self, signum: int) -> None:
        self._command_stop(f"signal {signal.Signals(signum).name}", False)

    def _on_hangup(self) -> None:
        """Let the reloader look at its files; it logs what became of each."""
        reloader = self._supervisor.find("reloader")
        if reloader is None or not reloader.is_ready:
            self._events.add("root.hangup_ignored", reason="the reloader is not running")
        else:
            self._bus.tell(reloader.address, ReloadFiles())

    def _dump_all_stacks(self) -> None:
        for incarnation in self._supervisor.incarnations + self._groups.incarnations:
            incarnation.signal(signal.SIGUSR1)

    def _command_stop(self, reason: str, now: bool) -> None:
        """Stop in order; told so a second time, or `now`, kill."""
        assert self._stop_reason is not None
        assert self._killed is not None
        if now or self._stop_reason.done():
            self._killed.set()
        self._request_stop(reason)

    def _request_stop(self, reason: str) -> None:
        assert self._stop_reason is not None
        if not self._stop_reason.done():
            self._stop_reason.set_result(reason)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
