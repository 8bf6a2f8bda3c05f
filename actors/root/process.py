"""One child process of the root: seen to die, signalled and reaped.

Nothing here waits: death arrives over a pidfd (about 1 ms). The root is a subreaper, so a child
whose fork server has died is still its to reap, and so is whatever an actor leaves behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import struct
from typing import Final

_NUMBER: Final = struct.Struct("q")  # what the fork server writes: pid, then exit code
# The server tells it when it gets its turn, on a busy machine not at once; its death ends the wait.
_EXIT_CODE_TIMEOUT_S: Final = 10.0
_PR_SET_CHILD_SUBREAPER: Final = 36
UNKNOWN_EXIT: Final = 255


def become_subreaper() -> None:
    """Have orphaned descendants re-parented to this process instead of to init."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


class ChildProcess:
    """One running child: its pid, its death, its signals. Owned by the root's loop."""

    def __init__(self, pid: int, status_fd: int) -> None:
        self.pid = pid
        self._status_fd = status_fd
        self.exit_code: int | None = None
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        try:
            self._pid_fd = os.pidfd_open(pid)
        except ProcessLookupError:  # already dead and reaped by its fork server
            self._pid_fd = -1
            self._spawn_reaper()
            return
        asyncio.get_running_loop().add_reader(self._pid_fd, self._on_death)

    def __repr__(self) -> str:
        state = "running" if self.exit_code is None else f"exit {self.exit_code}"
        return f"ChildProcess(pid {self.pid}, {state})"

    def signal(self, signum: int) -> None:
        """Send a signal to the process itself, if it still runs."""
        if self._pid_fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pid_fd, signum)

    def kill(self) -> None:
        """SIGKILL the process and its group, compiler helpers and downloads included."""
        self.signal(signal.SIGKILL)
        if self._pid_fd >= 0:
            self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _on_death(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pid_fd)
        os.close(self._pid_fd)
        self._pid_fd = -1
        self._kill_group()  # what the actor had started goes with it
        self._spawn_reaper()

    def _spawn_reaper(self) -> None:
        self._reaper = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        self.exit_code = await self._read_exit_code()
        if self._status_fd >= 0:
            os.close(self._status_fd)
        self.exited.set_result(self.exit_code)

    async def _read_exit_code(self) -> int:
        """Return the exit code (minus the signal), from whoever is the parent."""
        code = _wait_own(self.pid)
        if code is not None:
            return code
        if self._status_fd < 0:
            return UNKNOWN_EXIT
        try:
            return await read_number(self._status_fd, _EXIT_CODE_TIMEOUT_S)
        except (EOFError, TimeoutError):
            return UNKNOWN_EXIT


def _wait_own(pid: int) -> int | None:
    """Reap a dead child; None when its fork server is the parent, who reports over the pipe."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, os.WNOHANG)[1])
    except ChildProcessError:
        return None


async def read_number(fd: int, timeout_s: float) -> int:
    """Return the next number of a status pipe. Raises: EOFError, TimeoutError."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _set_once, readable)
    try:
        async with asyncio.timeout(timeout_s):
            await readable
    finally:
        loop.remove_reader(fd)
    data = os.read(fd, _NUMBER.size)  # numbers are written in one piece
    if len(data) != _NUMBER.size:
        raise EOFError
    return int(_NUMBER.unpack(data)[0])


def _set_once(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
