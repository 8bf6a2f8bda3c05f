"""The actor that owns a device: a plain loop of work and messages, without asyncio.

Subclass `SyncActor` for the ranks of an engine group. The loop takes in all waiting messages, then
runs one unit of work (`poll`), and blocks only when there is neither. A thread beats for the
process and carries the step counter that shows the work (`actors.beat_thread`).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Final, NoReturn

from actors.actor import ActorContext
from actors.actor_loop import FATAL_ACK_S, fatal_info
from actors.beat_thread import start_beating
from actors.dispatch import HandlerTable, call_listener
from actors.link import Link, resident_bytes
from actors.mailbox import Outcome
from actors.registry import Registry, RegistryEvent
from actors.sync_asks import SyncAsk, SyncAsks
from actors.transport.sockets import LinkPoller
from cortexd.errors import ErrorInfo, Internal, MailboxFull
from cortexd.log import event
from cortexd.messages.control import (
    ActorDown,
    ActorUp,
    Beat,
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

# A rank whose state cannot be trusted: an error that recurs, a lost or late rank; EX_SOFTWARE.
POISONED_EXIT_CODE: Final = 70
# A rank whose device fails every call from now on; EX_OSERR of sysexits.
DEVICE_FAULT_EXIT_CODE: Final = 71
_IDLE_WAIT_S: Final = 0.5  # bounds how late a SIGTERM is seen
_WELCOME_TIMEOUT_S: Final = 10.0
_MAX_EARLY: Final = 1000
# An answer may still arrive just after its deadline; one more look costs nothing.
_DEADLINE_SLACK_S: Final = 0.001


class _Stopped(Exception):
    """The root said Stop while the actor was starting."""


class SyncActor:
    """Base of the ranks. All methods run on the process's main thread."""

    _link: Link
    _asks: SyncAsks
    _poller: LinkPoller

    def __init__(self, context: ActorContext) -> None:
        self.context = context
        self.log = context.log
        self._num_steps = 0
        self._is_busy = False
        self._is_welcome = False
        self._is_started = False
        self._is_stopping = False
        self._is_serving_early = False
        self._is_deferring = False  # messages wait: the actor is in the middle of something
        self._drain_until_s: float | None = None
        self._drain_request: Envelope | None = None
        self._handlers = HandlerTable(self, context.name, context.log)
        self._early: list[Envelope | RegistryEvent] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.context.address}, {self._num_steps} steps)"

    @property
    def peers(self) -> Registry:
        """Return the view of the other actors; it moves between two units of work."""
        return self._link.peers

    def tell(self, name: str, body: Message) -> None:
        """Send without waiting. Raises: ActorDown, MailboxFull, RequestTooLarge."""
        self._link.tell(name, body)

    def begin_ask(self, dst: Address, body: Message, *, deadline_s: float) -> SyncAsk:
        """Send a request to an incarnation, which may still be starting; see `collect`."""
        return self._asks.begin(dst, body, deadline_s)

    def collect(self, asks: Sequence[SyncAsk]) -> list[Outcome]:
        """Wait until every ask has ended; return the outcomes in order, errors among them.

        Other messages wait meanwhile, so no handler runs in the middle of a step.
        """
        self._is_deferring = True
        try:
            while any(ask.outcome is None for ask in asks):
                self._poller.wait(min(_IDLE_WAIT_S, self._asks.next_deadline_s + _DEADLINE_SLACK_S))
                self._take_in()
                self._asks.expire()
                if self._is_stopping and not self._is_started:
                    raise _Stopped
        finally:
            self._is_deferring = False
        return [ask.outcome for ask in asks if ask.outcome is not None]

    def serve_until(self, is_done: Callable[[], bool]) -> None:
        """Handle messages in `on_start` already, until `is_done`; the rest follows after it."""
        self._is_serving_early = True
        while not is_done():
            self._take_in()  # first: the welcome may have come after requests
            if self._is_stopping:
                raise _Stopped
            if not is_done():
                self._poller.wait(_IDLE_WAIT_S)
        self._is_serving_early = False

    def reply(self, envelope: Envelope, body: Message) -> None:
        """Answer a request now; for a handler that does not return."""
        self._link.reply(envelope, body)

    def request_stop(self) -> None:
        """End once the message at hand is handled."""
        self._is_stopping = True

    @property
    def is_stopping(self) -> bool:
        """Whether the root has told this actor to stop."""
        return self._is_stopping

    def count_progress(self) -> None:
        """Call once per finished step: a busy actor whose count stands still is killed."""
        self._num_steps += 1

    def report_progress(self, fraction: float, stage: str) -> None:
        """Extend the start deadline; call it in `on_start` while loading goes on."""
        self._link.tell_root(Progress(fraction, stage))
        was_deferring, self._is_deferring = self._is_deferring, True
        self._take_in()
        self._is_deferring = was_deferring
        if self._is_stopping:
            raise _Stopped

    def exit_poisoned(self, reason: str, *, is_device_lost: bool = False) -> NoReturn:
        """End the process at once: the device, or the engine's state, cannot be trusted."""
        exit_code = DEVICE_FAULT_EXIT_CODE if is_device_lost else POISONED_EXIT_CODE
        event(self.log, "actor.poisoned", 50, reason=reason, exit_code=exit_code)
        self._report_fatal(Internal(reason).to_info())
        os._exit(exit_code)

    def on_start(self) -> None:
        """Get ready to serve (load the model); the root hears READY after it returns."""

    def poll(self) -> bool:
        """Do one unit of work; return whether more waits (else the loop blocks on messages)."""
        return False

    def on_drain(self, deadline_s: float) -> None:
        """Take no new work; what `poll` still has to do is finished within the deadline."""

    def on_stop(self) -> None:
        """Let go of what the end of the process would not."""

    def on_actor_up(self, up: ActorUp) -> None:
        """Another actor is ready."""

    def on_actor_down(self, down: ActorDown) -> None:
        """An incarnation is gone, whether or not it ever was ready."""

    def on_group_up(self, up: GroupUp) -> None:
        """All ranks of an epoch are ready."""

    def on_group_down(self, down: GroupDown) -> None:
        """An epoch is dead."""

    def run(self) -> int:
        """Live: connect, start, serve, stop; return the exit code."""
        self._link = Link(self.context)
        self._asks = SyncAsks(self._link)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._link.hello(os.getpid())
        start_beating(self.context, self._take_beat)
        self._poller = LinkPoller(self._link.inbox, self._link.control)
        try:
            self._wait_for_welcome()
            self.on_start()
        except _Stopped:
            return self._finish()
        except Exception as error:
            event(self.log, "actor.start_failed", 40, exc_info=True, error=repr(error))
            self._report_fatal(fatal_info(error))
            return 1
        self._is_started = True
        self._link.tell_root(Ready())
        self._replay_early()
        self._serve()
        return self._finish()

    def _serve(self) -> None:
        while not self._is_stopping:
            self._take_in()
            self._is_busy = True
            has_more = self.poll()
            self._is_busy = has_more
            self._check_drained(has_more)
            if not has_more and not self._is_stopping and not self._early:
                self._poller.wait(_IDLE_WAIT_S)

    def _finish(self) -> int:
        try:
            self.on_stop()
        except Exception as error:
            event(self.log, "actor.on_stop_failed", 40, exc_info=True, error=repr(error))
        self._link.tell_root(Bye())
        self._link.close()
        return 0

    def _wait_for_welcome(self) -> None:
        deadline_s = time.monotonic() + _WELCOME_TIMEOUT_S
        while not self._is_welcome:
            if time.monotonic() > deadline_s:
                raise Internal("the root supervisor did not answer Hello")
            self._poller.wait(_IDLE_WAIT_S)
            self._take_in()

    def _report_fatal(self, info: ErrorInfo) -> None:
        """Tell the root, and give it a moment to read it: it answers with Stop."""
        self._link.tell_root(info)
        poller = LinkPoller(self._link.inbox, self._link.control)
        deadline_s = time.monotonic() + FATAL_ACK_S
        while not self._is_stopping and (left_s := deadline_s - time.monotonic()) > 0:
            poller.wait(left_s)
            self._take_in_control()

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self._is_stopping = True

    @property
    def _may_dispatch(self) -> bool:
        return (self._is_started or self._is_serving_early) and not self._is_deferring

    def _take_in(self) -> None:
        """Handle every waiting message; deferred ones first, they came first."""
        if self._early and self._may_dispatch:
            self._replay_early()
        self._take_in_control()
        while True:
            got_one, envelope = self._link.receive_inbox()
            if not got_one:
                return
            if envelope is not None:
                self._on_message(envelope)

    def _take_in_control(self) -> None:
        while True:
            got_one, envelope = self._link.receive_control()
            if not got_one:
                return
            if envelope is not None:
                self._on_control(envelope)

    def _on_control(self, envelope: Envelope) -> None:
        body = envelope.body
        match body:
            case Welcome():
                self._link.peers.welcome(body)
                self._is_welcome = True
            case ActorUp() | ActorDown() | GroupUp() | GroupDown():
                self._link.apply(body)
                if isinstance(body, ActorDown):
                    self._asks.fail_peer(Address(body.name, body.incarnation), body.reason)
                self._on_registry_event(body)
            case Stop():
                self._is_stopping = True
            case Drain():
                self._drain_until_s = time.monotonic() + body.deadline_s
                self._drain_request = envelope
                self.on_drain(body.deadline_s)
            case SetLogLevel():
                self.log.root.setLevel(body.level.upper())
            case _:
                self._on_message(envelope)

    def _check_drained(self, has_more: bool) -> None:
        if self._drain_request is None or self._drain_until_s is None:
            return
        if not has_more or time.monotonic() > self._drain_until_s:
            self._link.reply(self._drain_request, Ok())
            self._drain_request = None

    def _on_registry_event(self, registry_event: RegistryEvent) -> None:
        if not self._is_started or self._is_deferring:
            self._early.append(registry_event)
            return
        call_listener(self, registry_event)

    def _replay_early(self) -> None:
        early, self._early = self._early, []
        for item in early:
            if isinstance(item, Envelope):
                self._dispatch(item)
            else:
                self._on_registry_event(item)

    def _on_message(self, envelope: Envelope) -> None:
        if envelope.re:
            if not self._asks.resolve(envelope):
                self._link.late_answer(envelope)
        elif isinstance(envelope.body, Ping):
            self._link.reply(envelope, Pong())
        elif self._may_dispatch:
            self._dispatch(envelope)
        elif len(self._early) < _MAX_EARLY:
            self._early.append(envelope)
        else:
            self._link.refuse(envelope, MailboxFull(f'actor "{self.context.name}" is busy'))

    def _dispatch(self, envelope: Envelope) -> None:
        try:
            handler = self._handlers.find(envelope)
        except Internal as error:
            self._link.refuse(envelope, error)
            return
        answer: Message | ErrorInfo | None
        try:
            answer = handler(envelope.body, envelope)
        except Exception as error:
            answer = self._handlers.failure(error, envelope)
        if envelope.wants_reply:
            self._link.reply(envelope, answer if answer is not None else Ok())

    def _take_beat(self) -> Beat:
        """Return what the root hears; called on the beat's thread, so it only reads."""
        return Beat(
            0.0,
            len(self._early),
            resident_bytes(),
            self._num_steps,
            self._is_busy,
            self._link.dead_letters.snapshot(),
        )
