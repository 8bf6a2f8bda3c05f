"""One incarnation of a child in the root's eyes: from launch to death, and the watch over it.

It moves its member's life cycle while it lives, tells its owner (supervisor or group) when it is
ready and when it is gone, and decides nothing about restarts. Death comes from the pidfd; a hang is
silence of the beats, a start deadline, or a step counter that stands still.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

import msgspec

from actors.bootstrap import ActorStart, PassedFd
from actors.root.host import Host
from actors.root.liveness import Liveness
from actors.root.logs import LogPipe
from actors.root.member import Member
from actors.root.process import UNKNOWN_EXIT, ChildProcess
from actors.root.spec import Exit
from actors.root.stack_dump import stack_dump
from actors.root.watch import ROOT_LAG_S, Watch
from actors.transport.sockets import inbox_endpoint
from cortexd.errors import CortexError, ErrorInfo
from cortexd.messages.control import (
    ActorDown,
    ActorInfo,
    ActorState,
    ActorUp,
    Beat,
    Bye,
    Drain,
    Hello,
    Progress,
    Ready,
    Stop,
)
from cortexd.messages.envelope import Address, Envelope

# Longest time for a stack dump to be written before the kill; one that is there ends it.
_DUMP_S: Final = 5.0
_SIGTERM_GRACE_S: Final = 1.0


class Incarnation:
    """Launches, watches, stops one process."""

    def __init__(
        self,
        host: Host,
        member: Member,
        *,
        on_ready: Callable[[Incarnation], None],
        on_exit: Callable[[Incarnation, Exit], None],
    ) -> None:
        self._host = host
        self._member = member
        self._on_ready = on_ready
        self._on_exit = on_exit
        self.address = Address(member.spec.name, member.incarnation)
        self.wants_events = False
        self.error: ErrorInfo | None = None
        self.reason = ""
        self.exit_code: int | None = None
        self.exited: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._is_commanded = False
        self._kill_wanted = asyncio.Event()
        self._is_condemned = False
        self._process: ChildProcess | None = None
        self._pipe: LogPipe | None = None
        self._endpoint = inbox_endpoint(host.runtime_dir, self.address)
        self._inbox_path = Path(self._endpoint.removeprefix("ipc://"))
        self._ready_at_s: float | None = None
        self._watch: Watch | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"Incarnation({self.address}, {self._member.lifecycle.state}, {self._process})"

    @property
    def is_ready(self) -> bool:
        """Return whether it ever said READY and still lives."""
        return self._ready_at_s is not None and not self.exited.done()

    def begin(self, reason: str) -> None:
        """Start the process; the rest follows by itself."""
        self._move("starting", reason)
        self._host.bus.register(self)
        self._spawn(self._live())

    def kill(self, reason: str, *, commanded: bool = False) -> None:
        """SIGKILL it and its process group now."""
        self._is_commanded |= commanded
        self._is_condemned = True
        self.reason = self.reason or reason
        self._stop_watching()
        self._kill_wanted.set()
        if self._process is not None:
            self._process.kill()

    def signal(self, signum: int) -> None:
        """Send a signal to the process."""
        if self._process is not None:
            self._process.signal(signum)

    async def stop(self, drain_s: float, reason: str) -> None:
        """Drain, stop, and return when it is dead; every step is bounded."""
        self._is_commanded = True
        self.reason = self.reason or reason
        if not self.is_ready:
            self.kill(reason)
        else:
            if drain_s > 0:
                await self.drain(drain_s, reason)
            if not self.exited.done():
                await self._stop_now(reason)
        await asyncio.shield(self.exited)

    async def drain(self, drain_s: float, reason: str) -> None:
        """Let it finish its work, within the deadline; it takes no new work from now on."""
        self._is_commanded = True
        self._move("draining", reason)
        with contextlib.suppress(CortexError):  # gone, or out of time: the stop follows anyway
            await self._host.bus.ask(self.address, Drain(drain_s), deadline_s=drain_s + ROOT_LAG_S)

    async def _stop_now(self, reason: str) -> None:
        self._move("stopping", reason)
        self.wants_events = False  # else a full link of an exiting actor would count as a hang
        self._host.bus.tell(self.address, Stop())
        if await self._exits_within(self._member.stop_timeout_s(self._host.settings)):
            return
        self._host.events.add("actor.stop_timeout", logging.WARNING, actor=self.address.name)
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)
        if not await self._exits_within(_SIGTERM_GRACE_S):
            self.kill("did not stop")

    async def _exits_within(self, timeout_s: float) -> bool:
        await asyncio.wait({self.exited}, timeout=timeout_s)
        return self.exited.done()

    async def _live(self) -> None:
        try:
            if not await self._launch():
                self._finish(UNKNOWN_EXIT, "stopped before it was started")
                return
        except (CortexError, OSError) as error:
            self._host.events.add(
                "actor.launch_failed", logging.ERROR, actor=self.address.name, error=str(error)
            )
            self._finish(UNKNOWN_EXIT, f"could not be started: {error}")
            return
        assert self._process is not None
        code = await self._process.exited
        self._host.bus.drain()  # its last words may still wait
        self._finish(code, exit_text(code))

    async def _launch(self) -> bool:
        """Create the process; return False when a kill came first.

        Its output is captured from its first byte.
        """
        member = self._member
        if not await self._launcher_is_ready():
            return False
        read_fd, write_fd = os.pipe()
        self._pipe = self._host.logs.capture(member.spec.name, read_fd)
        try:
            self._process = await self._host.launcher.launch(
                self._start_data(write_fd), member.spec.preload
            )
        finally:
            os.close(write_fd)
        self._watch = self._begin_watch()
        self._pipe.pid = member.pid = self._process.pid
        self._host.events.add(
            "actor.started",
            actor=member.spec.name,
            incarnation=member.incarnation,
            pid=self._process.pid,
        )
        if self._is_condemned:
            self._stop_watching()
            self._process.kill()
        return True

    def _begin_watch(self) -> Watch:
        member, host = self._member, self._host
        liveness = Liveness(
            host.settings.supervision,
            start_timeout_s=member.start_timeout_s(host.settings),
            beats_while_starting=not member.group,
            now_s=time.monotonic(),
        )
        return Watch(
            liveness,
            read_waiting=host.bus.drain,
            on_silent=self._suspect,
            on_hung=self._condemn,
        )

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.stop()

    async def _launcher_is_ready(self) -> bool:
        """Wait for the fork server's imports (seconds, for the engine's), unless killed first."""
        preparing = asyncio.create_task(self._host.launcher.prepare(self._member.spec.preload))
        killed = asyncio.create_task(self._kill_wanted.wait())
        await asyncio.wait({preparing, killed}, return_when=asyncio.FIRST_COMPLETED)
        killed.cancel()
        if not preparing.done():
            preparing.cancel()
            return False
        preparing.result()
        return not self._is_condemned

    def _start_data(self, output_fd: int) -> ActorStart:
        member, host = self._member, self._host
        return ActorStart(
            name=member.spec.name,
            incarnation=member.incarnation,
            target=member.spec.target,
            args=member.spec.args,
            settings=msgspec.msgpack.encode(host.settings),
            runtime_dir=str(host.runtime_dir),
            lifeline=PassedFd(host.lifeline_fd),
            output=PassedFd(output_fd),
            listeners={name: host.listeners[name] for name in member.spec.listeners},
            group=member.group,
            epoch=member.epoch,
            rank=member.rank,
            world_size=member.world_size,
        )

    def on_message(self, envelope: Envelope) -> None:
        """Take in a message of this child."""
        body = envelope.body
        match body:
            case Beat():
                self._on_beat(body)
            case Hello():
                self._host.bus.welcome(self, self._host.ready_actors())
                if self._watch is not None:
                    self._watch.hello()
            case Ready():
                self._on_ready_message()
            case Progress():
                if self._watch is not None:
                    self._watch.progress(body)
            case ErrorInfo():
                self.error = body
                self._host.bus.tell(self.address, Stop())  # tells it that we have read this
            case Bye():
                self.wants_events = False  # it closes its link and exits
            case _:
                self._host.on_request(envelope)

    def _on_ready_message(self) -> None:
        if self._member.lifecycle.state != "starting" or self._is_condemned:
            return
        now_s = time.monotonic()
        started_s = self._member.lifecycle.since_s
        self._ready_at_s = now_s
        self._move("ready", "ready")
        if self._watch is not None:
            self._watch.ready()
        info = self.info()
        self._host.events.add(
            "actor.ready",
            actor=info.name,
            incarnation=info.incarnation,
            pid=info.pid,
            after_s=round(now_s - started_s, 3),
        )
        self._host.bus.publish(lambda sequence: ActorUp(sequence, info))
        self._on_ready(self)

    def info(self) -> ActorInfo:
        """Return its registry line."""
        return msgspec.structs.replace(self._member.info(), endpoint=self._endpoint)

    def _on_beat(self, beat: Beat) -> None:
        member = self._member
        member.rss_bytes, member.lag_ms = beat.rss_bytes, beat.lag_ms
        member.mailbox_depth, member.dead_letters = beat.mailbox_depth, beat.dead_letters
        if self._watch is not None:
            self._watch.beat(beat)
        if member.lifecycle.state == "suspect" and not self._is_condemned:
            self._move("ready", "beats again")

    def _suspect(self) -> None:
        if self._member.lifecycle.state != "ready":
            return
        self._move("suspect", "silent")
        self._host.events.add(
            "actor.suspect", logging.WARNING, actor=self.address.name, pid=self._member.pid
        )
        self.signal(signal.SIGUSR1)

    def _condemn(self, reason: str) -> None:
        """A hang is a crash: dump the stacks, then kill."""
        if self._is_condemned:
            return
        self._is_condemned = True
        self.reason = reason
        self._host.events.add(
            "actor.hung",
            logging.ERROR,
            actor=self.address.name,
            pid=self._member.pid,
            reason=reason,
        )
        self._spawn(self._dump_and_kill(reason))

    async def _dump_and_kill(self, reason: str) -> None:
        def tell() -> None:
            self.signal(signal.SIGUSR1)
            self.signal(signal.SIGCONT)  # a stopped process could not write its dump

        dump = asyncio.create_task(
            stack_dump(self._host.logs, self.address.name, tell, deadline_s=_DUMP_S)
        )
        ends: set[asyncio.Future[Any]] = {dump, self.exited}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        dump.cancel()
        self.kill(reason)

    def _finish(self, code: int, text: str) -> None:
        """It is dead: tell everybody."""
        self._stop_watching()
        if self._pipe is not None:
            self._pipe.close_soon()
        self._inbox_path.unlink(missing_ok=True)
        self.exit_code = code
        error_text = self.error.message if self.error else ""
        self.reason = self.reason or error_text or text
        member = self._member
        now_s = time.monotonic()
        ready_for_s = now_s - self._ready_at_s if self._ready_at_s is not None else 0.0
        exit_ = Exit(self._is_commanded, code == 0, ready_for_s)
        member.pid = 0
        self._host.bus.unregister(self, self.reason)
        self._host.events.add(
            "actor.exited",
            logging.INFO if self._is_commanded else logging.ERROR,
            actor=self.address.name,
            incarnation=self.address.incarnation,
            exit=text,
            reason=self.reason,
        )
        self._host.bus.publish(
            lambda sequence: ActorDown(
                sequence,
                self.address.name,
                self.address.incarnation,
                member.group,
                member.epoch,
                self.reason,
            )
        )
        self._ready_at_s = None
        self._host.on_gone(self.address.name, self.reason)
        adopted = self._host.launcher.kill_adopted()
        if adopted:
            self._host.events.add(
                "root.orphans_killed", logging.WARNING, actor=self.address.name, count=adopted
            )
        self.exited.set_result(exit_)
        self._on_exit(self, exit_)

    def _move(self, state: ActorState, reason: str) -> None:
        self._member.move(state, reason)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def exit_text(code: int) -> str:
    """Return how a process ended, in words."""
    if code >= 0:
        return f"exit code {code}" if code != UNKNOWN_EXIT else "exit code unknown"
    return f"killed by {signal.Signals(-code).name}"
