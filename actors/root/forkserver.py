"""A fork server: a process with the heavy imports done, which forks actors in milliseconds.

The serving loop is `multiprocessing.forkserver.main`; this module is what runs in it, and the
root's handle that asks it for children. `server_launch` starts the process (with our path, a
readiness byte, the lifeline and its output in the root's logs). Its
`ForkServer` class is not used, because it allows one server a process, blocks until the imports are
done, and leaves an orphan. A server is single-threaded, has no ZeroMQ context and no CUDA context:
both would be broken in a forked child. If it dies, running actors are not touched and the next
start launches a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing import forkserver, reduction
from typing import Final

import msgspec

from actors import lifeline
from actors.root.server_launch import LaunchedServer, ServerPlan, launch_server
from cortexd.errors import Internal
from cortexd.log import configure_logging, event
from cortexd.settings import Settings

_READY_TIMEOUT_S: Final = 180.0


def serve(
    name: str,
    preload: list[str],
    *,
    listener_fd: int,
    alive_fd: int,
    ready_fd: int,
    lifeline_fd: int,
    niceness: int,
) -> None:
    """Be the fork server `name`, which imports at this niceness; runs until killed."""
    from actors.bootstrap import set_title

    lifeline.hold(lifeline_fd)
    set_title(f"cortexd: {name}")
    configure_logging(name, "info")
    log = logging.getLogger("cortexd")
    gc.disable()  # imports make next to no garbage; looking for it takes a tenth of their time
    if niceness:
        importer = threading.Thread(target=_import_nicely, args=(preload, niceness, log))
        importer.start()
        importer.join()
    else:
        _import(preload, log)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        event(log, "forkserver.cuda_initialised", 50, preload=preload)
        raise SystemExit(1)
    # Builds the decoder's type tables once, here: 3 ms of every child's start otherwise.
    msgspec.msgpack.decode(msgspec.msgpack.encode(Settings()), type=Settings)
    gc.freeze()  # keeps the collector from copying shared pages in every child
    gc.enable()
    os.write(ready_fd, b"1")
    os.close(ready_fd)
    forkserver.main(listener_fd, alive_fd, [])


def _import_nicely(modules: list[str], niceness: int, log: logging.Logger) -> None:
    """Import at a lower priority, which is this thread's alone: children have the main thread's.

    A process that lowers its priority may not raise it again.
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
    _import(modules, log)


def _import(modules: list[str], log: logging.Logger) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # the actor that needs it will say so, with a traceback
            event(log, "forkserver.preload_failed", 30, module=module, error=repr(error))


class ForkServer:
    """The root's handle of one fork server."""

    def __init__(
        self,
        plan: ServerPlan,
        capture: Callable[[str, int], None],
        launched: LaunchedServer | None = None,
    ) -> None:
        """Take over the server, if it is `launched` already; `capture` takes what it prints."""
        self.name = plan.name
        self._plan = plan
        self._capture = capture
        self._launched = launched
        self._ready: asyncio.Future[None] | None = None
        if launched is not None:
            self._attach(launched)

    def __repr__(self) -> str:
        return f"ForkServer({self.name}, pid {self.pid})"

    @property
    def pid(self) -> int | None:
        """Return the server's pid while it runs."""
        process = self._launched.process if self._launched else None
        return process.pid if process and process.poll() is None else None

    async def ready(self) -> None:
        """Start the server if none runs, and wait for its imports. Raises: Internal."""
        if self.pid is None:
            self._start()
        assert self._ready is not None
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                await asyncio.shield(self._ready)
        except TimeoutError:
            self.stop()
            raise Internal(f"{self.name} was not ready in {_READY_TIMEOUT_S} s") from None

    def start_early(self) -> None:
        """Start it without waiting."""
        if self.pid is None:
            self._start()

    def request_child(self, fds: list[int]) -> tuple[int, int]:
        """Ask for a fork; return (status to read its pid and exit code from, data to write to).

        Raises: OSError when the server is gone.
        """
        if self._launched is None:
            raise ConnectionRefusedError(f"{self.name} does not run")
        with socket.socket(socket.AF_UNIX) as client, open(os.devnull, "rb") as no_tracker:
            client.connect(str(self._plan.path))
            status_fd, child_status_fd = os.pipe()
            child_data_fd, data_fd = os.pipe()
            try:
                alive_fd = self._launched.alive_fd
                handed = [child_data_fd, child_status_fd, alive_fd, no_tracker.fileno()]
                reduction.sendfds(client, handed + fds)
            except OSError:
                os.close(status_fd)
                os.close(data_fd)
                raise
            finally:
                os.close(child_data_fd)
                os.close(child_status_fd)
        return status_fd, data_fd

    def stop(self) -> None:
        """Kill the server; children that run are not touched."""
        if self._launched is not None:
            with contextlib.suppress(ProcessLookupError):
                self._launched.process.kill()
            self._launched.process.wait()
            self._clear()

    def _start(self) -> None:
        self._clear()
        self._launched = launch_server(self._plan)
        self._attach(self._launched)

    def _attach(self, launched: LaunchedServer) -> None:
        self._capture(self.name, launched.output_fd)
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._ready.add_done_callback(_retrieve)  # nobody may be waiting
        loop.add_reader(launched.ready_fd, self._on_ready, launched.ready_fd, self._ready)

    @staticmethod
    def _on_ready(fd: int, ready: asyncio.Future[None]) -> None:
        asyncio.get_running_loop().remove_reader(fd)
        is_ready = os.read(fd, 1) == b"1"
        os.close(fd)
        if ready.done():
            return
        if is_ready:
            ready.set_result(None)
        else:
            ready.set_exception(Internal("the fork server died while importing; see its log"))

    def _clear(self) -> None:
        self._plan.path.unlink(missing_ok=True)
        if self._launched is not None:
            os.close(self._launched.alive_fd)
        self._launched = None


def _retrieve(ready: asyncio.Future[None]) -> None:
    if not ready.cancelled():
        ready.exception()
