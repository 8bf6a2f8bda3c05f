"""A fork server: a process with the heavy imports done, which forks actors in milliseconds.

The serving loop is `multiprocessing.forkserver.main`; this module starts it (with our path, a
readiness byte, the lifeline and its output in the root's logs) and asks it for children. Its
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
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import forkserver, reduction
from pathlib import Path
from typing import Final

import msgspec

from actors import lifeline
from cortexd.errors import Internal
from cortexd.log import configure_logging, event
from cortexd.settings import Settings

LIGHT_PRELOAD: Final = ("uvloop", "zmq", "aiohttp.web", "actors.actor_loop", "actors.sync_actor")
# Ranks are synchronous: nothing of asyncio or HTTP, which would only delay the first model.
ENGINE_PRELOAD: Final = ("zmq", "actors.sync_actor", "actors.leader", "torch", "engine.engine")

# The engine's imports run beside the start of the light actors, which somebody waits for.
ENGINE_NICENESS: Final = 5

_READY_TIMEOUT_S: Final = 180.0
_CODE: Final = (
    "import sys; sys.path[:] = {path!r}; from actors.forkserver import serve; "
    "serve({name!r}, {preload!r}, listener_fd={listener}, alive_fd={alive}, ready_fd={ready}, "
    "lifeline_fd={lifeline}, niceness={niceness})"
)


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
        name: str,
        preload: tuple[str, ...],
        runtime_dir: Path,
        lifeline_fd: int,
        capture: Callable[[str, int], None],
        *,
        niceness: int = 0,
    ) -> None:
        self.name = name
        self._preload = list(preload)
        self._path = runtime_dir / f"{name}.s"
        self._lifeline_fd = lifeline_fd
        self._capture = capture
        self._niceness = niceness
        self._process: subprocess.Popen[bytes] | None = None
        self._alive_fd = -1
        self._ready: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"ForkServer({self.name}, pid {self.pid})"

    @property
    def pid(self) -> int | None:
        """Return the server's pid while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

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
        with socket.socket(socket.AF_UNIX) as client, open(os.devnull, "rb") as no_tracker:
            client.connect(str(self._path))
            status_fd, child_status_fd = os.pipe()
            child_data_fd, data_fd = os.pipe()
            try:
                handed = [child_data_fd, child_status_fd, self._alive_fd, no_tracker.fileno()]
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
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()
            self._clear()

    def _start(self) -> None:
        self._clear()
        listener = socket.socket(socket.AF_UNIX)
        ready_fd, child_ready_fd = os.pipe()
        alive_fd, self._alive_fd = os.pipe()
        output_read_fd, output_fd = os.pipe()
        passed = [listener.fileno(), alive_fd, child_ready_fd, self._lifeline_fd]
        code = _CODE.format(
            path=sys.path,
            name=self.name,
            listener=passed[0],
            alive=passed[1],
            ready=passed[2],
            lifeline=passed[3],
            preload=self._preload,
            niceness=self._niceness,
        )
        try:
            listener.bind(str(self._path))
            listener.listen(64)
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=output_fd,
                stderr=output_fd,
                pass_fds=passed,
                start_new_session=True,
            )
        finally:
            listener.close()
            for fd in (child_ready_fd, alive_fd, output_fd):
                os.close(fd)
        self._capture(self.name, output_read_fd)
        self._ready = asyncio.get_running_loop().create_future()
        self._ready.add_done_callback(_retrieve)  # nobody may be waiting
        asyncio.get_running_loop().add_reader(ready_fd, self._on_ready, ready_fd, self._ready)

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
        self._path.unlink(missing_ok=True)
        if self._alive_fd >= 0:
            os.close(self._alive_fd)
        self._alive_fd = -1
        self._process = None


def _retrieve(ready: asyncio.Future[None]) -> None:
    if not ready.cancelled():
        ready.exception()
