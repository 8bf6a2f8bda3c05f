"""Starts the root's child processes: from a fork server, or by `spawn`.

Through `multiprocessing`'s own machinery, which carries what a child needs to begin. Nothing here
blocks: the data fits its pipe whole, and the pid arrives over another.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import popen_forkserver, popen_spawn_posix, reduction, spawn, util
from multiprocessing.context import set_spawning_popen
from multiprocessing.process import BaseProcess
from typing import Any, Final

from actors.bootstrap import ActorStart, run_child
from actors.root.forkserver import ForkServer
from actors.root.process import ChildProcess, read_number
from cortexd.errors import Internal, RequestTooLarge

_PID_TIMEOUT_S: Final = 30.0
# The whole start data must fit the pipe, since nobody may block on a slow server.
_MAX_START_BYTES: Final = 1024 * 1024


class _ActorProcess(BaseProcess):
    """Carries `ActorStart` through multiprocessing's pickling and bootstrap."""

    _start_method = None

    def __init__(self, start: ActorStart) -> None:
        super().__init__(name=start.name)
        self._start = start

    def run(self) -> None:
        run_child(self._start)


def _start_data(popen: Any, process: BaseProcess) -> bytes:
    """Return the pickled preparation and process.

    Unlike multiprocessing's own preparation, it does not make the child import our main script.
    """
    preparation = {"name": process.name, "sys_path": sys.path, "sys_argv": sys.argv}
    buffer = io.BytesIO()
    set_spawning_popen(popen)
    try:
        reduction.dump(preparation, buffer)
        reduction.dump(process, buffer)
    finally:
        set_spawning_popen(None)
    if buffer.tell() > _MAX_START_BYTES:
        raise RequestTooLarge(
            f'actor "{process.name}": start data of {buffer.tell()} bytes; '
            f"allowed: {_MAX_START_BYTES}"
        )
    return buffer.getvalue()


class _ForkServerPopen(popen_forkserver.Popen):
    """multiprocessing's Popen for one of several servers; `pid` is read later."""

    _fds: list[int]

    def __init__(self, process: BaseProcess, server: ForkServer) -> None:
        self._server = server
        self.status_fd = -1
        super().__init__(process)

    def _launch(self, process: BaseProcess) -> None:
        data = _start_data(self, process)
        self.status_fd, data_fd = self._server.request_child(self._fds)
        _write_at_once(data_fd, data)


class _SpawnPopen(popen_spawn_posix.Popen):
    """multiprocessing's Popen for `spawn`, without its resource tracker."""

    _fds: list[int]

    def _launch(self, process: BaseProcess) -> None:
        data = _start_data(self, process)
        child_data_fd, data_fd = os.pipe()
        try:
            command = spawn.get_command_line(tracker_fd=None, pipe_handle=child_data_fd)
            self.pid = util.spawnv_passfds(
                os.fsencode(spawn.get_executable()), command, [child_data_fd, *self._fds]
            )
        finally:
            os.close(child_data_fd)
        _write_at_once(data_fd, data)


def _write_at_once(fd: int, data: bytes) -> None:
    """Write all of `data` to a pipe that is made large enough, and close it."""
    try:
        if len(data) > 65536:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _MAX_START_BYTES)
        os.set_blocking(fd, False)
        written = os.write(fd, data)
        if written != len(data):
            raise Internal(f"only {written} of {len(data)} bytes fit the start pipe")
    finally:
        os.close(fd)


class Launcher:
    """Starts child processes. One server for light actors, one with the engine's imports."""

    def __init__(
        self,
        start_method: str,
        make_server: Callable[[str], ForkServer],
        on_give_up: Callable[[str, Internal], None],
    ) -> None:
        self._start_method = start_method
        self._make_server = make_server
        self._on_give_up = on_give_up
        self._given_up: set[str] = set()
        self._servers: dict[str, ForkServer] = {}
        self._running: set[ChildProcess] = set()

    def __repr__(self) -> str:
        return f"Launcher({self._start_method}, {len(self._running)} running, {self.servers})"

    @property
    def servers(self) -> list[ForkServer]:
        """Return the fork servers that were started."""
        return list(self._servers.values())

    def start_early(self, preload: str) -> None:
        """Begin the imports of a server before its first child is wanted."""
        if self._start_method == "forkserver":
            self._server(preload).start_early()

    async def prepare(self, preload: str) -> None:
        """Return when `launch` can start a child without waiting for imports.

        A fork server that cannot do its imports is given up, and its children are spawned.
        """
        if self._start_method == "spawn" or preload in self._given_up:
            return
        try:
            await self._server(preload).ready()
        except Internal as error:
            self._given_up.add(preload)
            self._on_give_up(preload, error)

    async def launch(self, start: ActorStart, preload: str) -> ChildProcess:
        """Start a child; await `prepare` first. Raises: CortexError or OSError."""
        if self._start_method == "spawn" or preload in self._given_up:
            popen = _SpawnPopen(_ActorProcess(start))
            return self._own(ChildProcess(popen.pid, -1))
        server = self._server(preload)
        forked = _ForkServerPopen(_ActorProcess(start), server)
        try:
            pid = await read_number(forked.status_fd, _PID_TIMEOUT_S)
        except (EOFError, TimeoutError) as error:
            os.close(forked.status_fd)
            server.stop()
            raise Internal(f"{server.name} did not start {start.name}") from error
        return self._own(ChildProcess(pid, forked.status_fd))

    def _own(self, child: ChildProcess) -> ChildProcess:
        self._running.add(child)
        child.exited.add_done_callback(lambda _: self._running.discard(child))
        return child

    def kill_adopted(self) -> int:
        """Kill and reap what a dead actor left behind; return how many processes that were.

        They were re-parented to this process, which is a subreaper, and have no owner any more.
        """
        known = {child.pid for child in self._running} | {server.pid for server in self.servers}
        own = os.getpid()
        with open(f"/proc/{own}/task/{own}/children") as children:
            adopted = [int(pid) for pid in children.read().split() if int(pid) not in known]
        for pid in adopted:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return len(adopted)

    def stop(self) -> None:
        """Kill the fork servers."""
        for server in self._servers.values():
            server.stop()

    def _server(self, preload: str) -> ForkServer:
        if preload not in self._servers:
            self._servers[preload] = self._make_server(preload)
        return self._servers[preload]
