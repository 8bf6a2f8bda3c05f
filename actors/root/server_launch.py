"""Starts the processes of fork servers; before an event loop runs, and before the root is imported.

`cortexd start` calls `launch_early` as soon as it knows the settings: the servers' imports then run
beside the root's, which take as long as half of theirs. The root takes the servers over; were it to
die first, the lifeline ends them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from actors.lifeline import Lifeline
from cortexd.settings import Settings

LIGHT: Final = "light"
ENGINE: Final = "engine"

_LIGHT_PRELOAD: Final = ("uvloop", "zmq", "aiohttp.web", "actors.actor_loop", "actors.sync_actor")
# Ranks are synchronous: nothing of asyncio or HTTP, which would only delay the first model.
_ENGINE_PRELOAD: Final = (
    "zmq",
    "actors.sync_actor",
    "engine.torch_import",
    "actors.leader",
    "engine.engine",
)
# The engine's imports run beside the start of the light actors, which somebody waits for.
_NICENESS: Final = {LIGHT: 0, ENGINE: 5}
_CODE: Final = (
    "import sys; sys.path[:] = {path!r}; from actors.root.forkserver import serve; "
    "serve({name!r}, {preload!r}, listener_fd={listener}, alive_fd={alive}, ready_fd={ready}, "
    "lifeline_fd={lifeline}, niceness={niceness})"
)


@dataclass(slots=True)
class ServerPlan:
    """What it takes to start one kind of fork server, again and again."""

    name: str
    preload: list[str]
    niceness: int
    runtime_dir: Path
    lifeline_fd: int

    @property
    def path(self) -> Path:
        """Where the server listens."""
        return self.runtime_dir / f"{self.name}.s"


@dataclass(slots=True)
class LaunchedServer:
    """A server that begins its imports, and our ends of its pipes."""

    process: subprocess.Popen[bytes]
    alive_fd: int  # it serves until this is closed everywhere
    ready_fd: int  # gets one byte when the imports are done
    output_fd: int  # what it prints


@dataclass(slots=True)
class EarlyServers:
    """The daemon's lifeline, and the servers that hold it already."""

    lifeline: Lifeline = field(default_factory=Lifeline)
    launched: dict[str, LaunchedServer] = field(default_factory=dict)


def plan_server(
    kind: str, targets: Iterable[str], runtime_dir: Path, lifeline_fd: int
) -> ServerPlan:
    """Return the plan of the "light" or "engine" server; `targets` are the light actors'."""
    modules = (target.partition(":")[0] for target in targets)
    preload = _ENGINE_PRELOAD if kind == ENGINE else (*_LIGHT_PRELOAD, *modules)
    return ServerPlan(
        f"forkserver.{kind}",
        list(dict.fromkeys(preload)),
        _NICENESS[kind],
        runtime_dir,
        lifeline_fd,
    )


def early_kinds(settings: Settings) -> tuple[str, ...]:
    """Return the servers that a daemon of this role will need, the more urgent one first."""
    if settings.supervision.start_method != "forkserver":
        return ()
    return (LIGHT,) if settings.role == "gateway" else (LIGHT, ENGINE)


def launch_early(settings: Settings, targets: Iterable[str], runtime_dir: Path) -> EarlyServers:
    """Start all servers that will be needed. Raises: OSError."""
    early = EarlyServers()
    modules = list(targets)
    for kind in early_kinds(settings):
        plan = plan_server(kind, modules, runtime_dir, early.lifeline.read_fd)
        early.launched[kind] = launch_server(plan)
    return early


def launch_server(plan: ServerPlan) -> LaunchedServer:
    """Start one server. Raises: OSError."""
    plan.path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    ready_fd, child_ready_fd = os.pipe()
    child_alive_fd, alive_fd = os.pipe()
    output_fd, child_output_fd = os.pipe()
    passed = [listener.fileno(), child_alive_fd, child_ready_fd, plan.lifeline_fd]
    code = _CODE.format(
        path=sys.path,
        name=plan.name,
        listener=passed[0],
        alive=passed[1],
        ready=passed[2],
        lifeline=passed[3],
        preload=plan.preload,
        niceness=plan.niceness,
    )
    try:
        listener.bind(str(plan.path))
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=child_output_fd,
            stderr=child_output_fd,
            pass_fds=passed,
            start_new_session=True,
        )
    except BaseException:
        for fd in (ready_fd, alive_fd, output_fd):
            os.close(fd)
        raise
    finally:
        listener.close()
        for fd in (child_ready_fd, child_alive_fd, child_output_fd):
            os.close(fd)
    return LaunchedServer(process, alive_fd, ready_fd, output_fd)
