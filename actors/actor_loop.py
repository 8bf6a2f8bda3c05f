"""Runs one `AsyncActor` in its process: drains its sockets, runs handlers, beats, stops.

The root's messages come over the control link and are never behind data. Before `on_start` has
returned only answers and registry events are taken in; the rest waits and then follows in order.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
from collections import deque
from collections.abc import Awaitable, Coroutine
from typing import Any, Final

from actors.actor import ActorContext, AsyncActor, Handler
from actors.asks import AsyncAsks
from actors.dispatch import HandlerTable
from actors.event_pump import EventPump
from actors.link import Link
from actors.mailbox import MAX_RUNNING_HANDLERS, DeadLetters
from actors.registry import Registry, RegistryEvent
from cortexd.errors import CortexError, DeadlineExceeded, ErrorInfo, Internal, MailboxFull
from cortexd.log import event
from cortexd.messages.control import (
    ActorDown,
    ActorInfo,
    ActorUp,
    Bye,
    Drain,
    GroupDown,
    GroupUp,
    Message,
    Ok,
    Ping,
    Pong,
    Progress,
    Ready,
    SetLogLevel,
    Stop,
    Welcome,
)
from cortexd.messages.envelope import Address, Envelope

# Messages taken in before the loop may look at anything else (timers, HTTP).
_DRAIN_BATCH: Final = 256
_WELCOME_TIMEOUT_S: Final = 10.0
# How long the root has to take in a fatal error before the process ends. It answers at once, on a
# busy machine when it gets a turn; an error that it misses is taken for a crash, and tried again.
FATAL_ACK_S: Final = 5.0
# Drain time at a SIGTERM that the root did not send.
_SIGTERM_DRAIN_S: Final = 5.0


async def run_actor(actor_class: type[AsyncActor], context: ActorContext) -> int:
    """Run one incarnation until it is stopped; return the exit code."""
    return await ActorLoop(actor_class, context).run()


class ActorLoop:
    """The `Runtime` of one async actor."""

    def __init__(self, actor_class: type[AsyncActor], context: ActorContext) -> None:
        self._context = context
        self._log = context.log
        self._link = Link(context)
        self._asks = AsyncAsks(self._link.next_id)
        self._actor_class = actor_class
        self._actor: AsyncActor
        self._handlers: HandlerTable
        self._tasks: set[asyncio.Task[None]] = set()
        self._early: deque[Envelope] = deque()
        self._events = EventPump(context.log)
        self._is_started = False
        self._welcomed = asyncio.Event()
        self._stop = asyncio.Event()
        self._up = asyncio.Event()
        self._failure: str | None = None

    @property
    def peers(self) -> Registry:
        """Return the live view of the other actors."""
        return self._link.peers

    @property
    def dead_letters(self) -> DeadLetters:
        """Return what could not be delivered here."""
        return self._link.dead_letters

    def tell(self, name: str, body: Message) -> None:
        """Send without waiting for an answer."""
        self._link.tell(name, body)

    async def ask(self, name: str, body: Message, *, deadline_s: float) -> Message:
        """Send and await the answer."""
        dst, epoch = self._link.address_of(name)

        def send(ask_id: int, deadline_ns: int) -> None:
            self._link.send(dst, body, message_id=ask_id, epoch=epoch, deadline_ns=deadline_ns)

        return await self._asks.ask(dst, deadline_s, send)

    async def wait_for(self, name: str, *, deadline_s: float) -> ActorInfo:
        """Await a ready incarnation. Raises: DeadlineExceeded."""
        try:
            async with asyncio.timeout(deadline_s):
                while (peer := self.peers.get(name)) is None:
                    await self._up.wait()
                return peer
        except TimeoutError:
            raise DeadlineExceeded(f'actor "{name}" was not ready within {deadline_s} s') from None

    def report_progress(self, fraction: float, stage: str) -> None:
        """Tell the root how far the start is."""
        self._link.tell_root(Progress(fraction, stage))

    async def run(self) -> int:
        """Live: connect, start, serve, stop."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._link.control.fd, self._drain_control)
        loop.add_reader(self._link.inbox.fd, self._drain_inbox)
        loop.add_signal_handler(signal.SIGTERM, self._on_sigterm)
        self._link.hello(os.getpid())
        beating = asyncio.create_task(self._beat_forever())
        loop.call_soon(self._drain_control)
        try:
            return await self._live()
        finally:
            beating.cancel()
            self._events.close()
            for task in self._tasks:
                task.cancel()
            loop.remove_reader(self._link.control.fd)
            loop.remove_reader(self._link.inbox.fd)
            self._link.close()

    async def _live(self) -> int:
        try:
            async with asyncio.timeout(_WELCOME_TIMEOUT_S):
                await self._welcomed.wait()
            self._actor = self._actor_class(self._context)
            self._actor.attach(self)
            self._handlers = HandlerTable(self._actor, self._context.name, self._log)
            await self._until_stopped(self._actor.on_start())
        except Exception as error:
            return await self._die(error)
        if not self._stop.is_set():
            self._is_started = True
            self._link.tell_root(Ready())
            self._events.open(self._actor)
            while self._early:
                self._dispatch(self._early.popleft())
            await self._stop.wait()
        if self._failure is not None:
            return 1
        if self._is_started:
            await self._call("on_stop", self._actor.on_stop())
        self._link.tell_root(Bye())
        return 0

    async def _until_stopped(self, starting: Coroutine[Any, Any, None]) -> None:
        """Run `on_start`, or give it up at a Stop."""
        start = asyncio.create_task(starting)
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not start.done():
            start.cancel()
            await asyncio.wait({start})
        if not start.cancelled():
            start.result()

    async def _die(self, error: Exception) -> int:
        """Report why the start failed, and give the root a moment to read it."""
        event(self._log, "actor.start_failed", 40, exc_info=True, error=repr(error))
        self._link.tell_root(fatal_info(error))
        try:
            async with asyncio.timeout(FATAL_ACK_S):
                await self._stop.wait()
        except TimeoutError:
            event(self._log, "actor.root_silent", 30)
        return 1

    async def _call(self, name: str, awaitable: Awaitable[None]) -> None:
        try:
            await awaitable
        except Exception as error:
            event(self._log, f"actor.{name}_failed", 40, exc_info=True, error=repr(error))

    def _on_sigterm(self) -> None:
        self._spawn(self._drain_then_stop(_SIGTERM_DRAIN_S))

    async def _drain_then_stop(self, deadline_s: float) -> None:
        await self._drain_actor(deadline_s)
        self._stop.set()

    async def _drain_actor(self, deadline_s: float) -> None:
        if not self._is_started:
            return
        try:
            async with asyncio.timeout(deadline_s):
                await self._actor.on_drain(deadline_s)
        except TimeoutError:
            event(self._log, "actor.drain_timeout", 30, deadline_s=deadline_s)

    async def _answer_drain(self, message: Drain, envelope: Envelope) -> Ok:
        await self._drain_actor(message.deadline_s)
        return Ok()

    async def _beat_forever(self) -> None:
        """Beat from the loop itself, so that silence means a stuck loop."""
        loop = asyncio.get_running_loop()
        period_s = self._context.settings.supervision.heartbeat_ms / 1000
        lag_ms = 0.0
        while True:
            depth = len(self._tasks) + len(self._early)
            self._link.tell_root(self._link.beat(lag_ms, depth))
            self._recheck_control()
            due = loop.time() + period_s
            await asyncio.sleep(period_s)
            lag_ms = max(0.0, (loop.time() - due) * 1000)

    def _drain_control(self) -> None:
        while True:
            got_one, envelope = self._link.receive_control()
            if not got_one:
                return
            if envelope is not None:
                self._on_control(envelope)

    def _recheck_control(self) -> None:
        """Look again after a send: the send may have eaten the descriptor's edge."""
        if self._link.control.is_readable:
            asyncio.get_running_loop().call_soon(self._drain_control)

    def _drain_inbox(self) -> None:
        for _ in range(_DRAIN_BATCH):
            got_one, envelope = self._link.receive_inbox()
            if not got_one:
                return
            if envelope is not None:
                self._on_message(envelope)
        asyncio.get_running_loop().call_soon(self._drain_inbox)

    def _on_control(self, envelope: Envelope) -> None:
        body = envelope.body
        match body:
            case Welcome():
                self._link.peers.welcome(body)
                self._welcomed.set()
            case ActorUp() | ActorDown() | GroupUp() | GroupDown():
                self._on_registry_event(body)
            case Stop():
                self._stop.set()
            case Drain():
                self._spawn(self._run_handler(self._answer_drain, envelope))
            case SetLogLevel():
                self._log.root.setLevel(body.level.upper())
            case _:
                self._on_message(envelope)

    def _on_registry_event(self, registry_event: RegistryEvent) -> None:
        try:
            self._link.apply(registry_event)
        except RuntimeError as error:
            event(self._log, "actor.registry_gap", 40, error=str(error))
            self._failure = str(error)
            self._stop.set()
            return
        if isinstance(registry_event, ActorDown):
            gone = Address(registry_event.name, registry_event.incarnation)
            self._asks.fail_peer(gone, registry_event.reason)
        elif isinstance(registry_event, ActorUp):
            self._up.set()  # wakes all waiters; later ones wait for the next
            self._up = asyncio.Event()
        self._events.push(registry_event)

    def _on_message(self, envelope: Envelope) -> None:
        if envelope.re:
            if not self._asks.resolve(envelope):
                self._link.late_answer(envelope)
        elif isinstance(envelope.body, Ping):
            self._reply(envelope, Pong())
        elif self._is_started:
            self._dispatch(envelope)
        elif len(self._early) < MAX_RUNNING_HANDLERS:
            self._early.append(envelope)
        else:
            self._link.refuse(envelope, MailboxFull(f'actor "{self._context.name}" is starting'))

    def _dispatch(self, envelope: Envelope) -> None:
        try:
            handler = self._handlers.find(envelope)
        except Internal as unknown:
            self._link.refuse(envelope, unknown)
            return
        if not inspect.iscoroutinefunction(handler):
            self._run_inline(handler, envelope)
        elif len(self._tasks) >= MAX_RUNNING_HANDLERS:
            error = MailboxFull(
                f'actor "{self._context.name}" runs {MAX_RUNNING_HANDLERS} handlers already'
            )
            self._link.refuse(envelope, error)
        else:
            self._spawn(self._run_handler(handler, envelope))

    def _run_inline(self, handler: Handler, envelope: Envelope) -> None:
        try:
            answer = handler(envelope.body, envelope)
        except Exception as error:
            answer = self._handlers.failure(error, envelope)
        self._reply(envelope, answer)

    async def _run_handler(self, handler: Handler, envelope: Envelope) -> None:
        try:
            answer = await handler(envelope.body, envelope)
        except Exception as error:
            answer = self._handlers.failure(error, envelope)
        self._reply(envelope, answer)

    def _reply(self, envelope: Envelope, answer: Message | ErrorInfo | None) -> None:
        if not envelope.wants_reply:
            return
        self._link.reply(envelope, answer if answer is not None else Ok())
        self._recheck_control()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def fatal_info(error: Exception) -> ErrorInfo:
    """Return what the root is told about a start that failed."""
    if isinstance(error, CortexError):
        return error.to_info()
    return Internal(f"{type(error).__name__}: {error}").to_info()
