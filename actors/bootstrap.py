"""The first steps of an actor process, and its last: from a fresh fork to `run` and the exit.

Runs in the child only. Before any code of the actor: own session and process group, output into
the root's pipe, the lifeline, default signals, stack dumps on SIGUSR1. The process ends with
`os._exit`, so that no library's exit handler can hold it.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import reduction, resource_tracker
from pathlib import Path
from typing import Any, Final

import msgspec

from actors import lifeline
from cortexd.errors import CortexError, Internal
from cortexd.log import configure_logging, event
from cortexd.settings import Settings

# The kernel's out-of-memory killer should take a rank, which can be reloaded, before the root.
_RANK_OOM_SCORE: Final = 300
_COMM_BYTES: Final = 15


class PassedFd:
    """A descriptor that travels to the child with the pickled start parameters."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive_fd, (reduction.DupFd(self.fd),)


def _receive_fd(duplicate: Any) -> PassedFd:
    return PassedFd(duplicate.detach())


@dataclass(slots=True)
class ActorStart:
    """All a child process is told; the only thing that is ever pickled, and never from a socket."""

    name: str
    incarnation: int
    target: str
    args: bytes
    settings: bytes  # msgpack
    runtime_dir: str
    lifeline: PassedFd
    output: PassedFd
    listeners: dict[str, socket.socket] = field(default_factory=dict)
    group: str = ""
    epoch: int = 0
    rank: int = 0
    world_size: int = 1


def run_child(start: ActorStart) -> None:
    """Be the actor; does not return."""
    code = 1
    try:
        _settle(start)
        code = _run(start)
    finally:
        if sys.exc_info()[0] is not None:
            event(logging.getLogger("cortexd"), "actor.crashed", 50, exc_info=True)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _settle(start: ActorStart) -> None:
    os.setsid()
    for stream_fd in (1, 2):
        os.dup2(start.output.fd, stream_fd, inheritable=True)
    os.close(start.output.fd)
    lifeline.hold(start.lifeline.fd)
    _leave_fork_server()
    _close_on_exec()
    _default_signals()
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    set_title(f"cortexd: {start.name}")
    if start.group:
        Path("/proc/self/oom_score_adj").write_text(str(_RANK_OOM_SCORE))


def _leave_fork_server() -> None:
    """Give up what multiprocessing handed down: we use neither its tracker nor its alive pipe."""
    from multiprocessing import forkserver

    server = forkserver._forkserver
    tracker = resource_tracker._resource_tracker
    for owner, attribute in ((server, "_forkserver_alive_fd"), (tracker, "_fd")):
        fd = getattr(owner, attribute)
        if fd is not None:
            os.close(fd)
            setattr(owner, attribute, None)


def _close_on_exec() -> None:
    for entry in os.listdir("/proc/self/fd"):
        fd = int(entry)
        if fd > 2 and os.path.exists(f"/proc/self/fd/{fd}"):
            os.set_inheritable(fd, False)


def _default_signals() -> None:
    for signum in (signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the root's to handle
    signal.set_wakeup_fd(-1)


def _run(start: ActorStart) -> int:
    from actors.actor import ActorContext

    settings = msgspec.msgpack.decode(start.settings, type=Settings)
    configure_logging(start.name, settings.logging.level)
    context = ActorContext(
        name=start.name,
        incarnation=start.incarnation,
        settings=settings,
        args=start.args,
        listeners=start.listeners,
        log=logging.getLogger("cortexd"),
        runtime_dir=Path(start.runtime_dir),
        group=start.group,
        epoch=start.epoch,
        rank=start.rank,
        world_size=start.world_size,
    )
    from actors.sync_actor import SyncActor

    rank: SyncActor | None = None
    try:
        actor_class = _load_target(start.target)
        if issubclass(actor_class, SyncActor):
            rank = actor_class(context)
    except Exception as error:
        return _refuse_to_start(context, start.target, error)
    if rank is not None:
        return rank.run()
    from actors.actor import AsyncActor
    from actors.actor_loop import run_actor

    assert issubclass(actor_class, AsyncActor), f"{actor_class} is no actor"
    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        return runner.run(run_actor(actor_class, context))


def event_loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes a loop: uvloop's where it is installed."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _load_target(target: str) -> type:
    module_name, _, class_name = target.partition(":")
    actor_class = getattr(importlib.import_module(module_name), class_name)
    assert isinstance(actor_class, type), f"{target} is not a class"
    return actor_class


def _refuse_to_start(context: Any, target: str, error: Exception) -> int:
    """Start as an actor whose `on_start` fails, so that the cause reaches the root."""
    from actors.sync_actor import SyncActor

    cause = error if isinstance(error, CortexError) else Internal(_import_text(target, error))

    class Unimportable(SyncActor):
        def on_start(self) -> None:
            raise cause from error

    return Unimportable(context).run()


def _import_text(target: str, error: Exception) -> str:
    text = f"cannot make {target}: {type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError):
        text += f"; install {error.name} into {sys.prefix}"
    return text


def set_title(title: str) -> None:
    """Show `title` as the process's command line and, cut to 15 bytes, as its name."""
    comm = title.replace(": ", ":").encode()[:_COMM_BYTES]
    Path("/proc/self/comm").write_bytes(comm)
    with open("/proc/self/stat", "rb") as stat:
        fields = stat.read().rpartition(b") ")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end: fields 48 and 49
    size = end - start
    text = title.encode()[: size - 1]
    ctypes.memmove(start, text + bytes(size - len(text)), size)
