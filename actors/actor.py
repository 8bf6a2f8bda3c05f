"""The interface of an actor on an event loop: subclass `AsyncActor`, mark handlers with `handles`.

Messages are at most once and ordered between two incarnations. A handler's returned message answers
an ask; a raised `CortexError` is sent as the error; anything else is logged and sent as `Internal`.
`actors.actor_loop` runs it in its own process.
"""

from __future__ import annotations

import inspect
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from actors.registry import Registry
from cortexd.messages.control import ActorDown, ActorInfo, ActorUp, GroupDown, GroupUp, Message
from cortexd.messages.envelope import Address
from cortexd.settings import Settings

_Function = TypeVar("_Function", bound=Callable[..., Any])
Handler = Callable[..., Any]


@dataclass(slots=True)
class ActorContext:
    """What one incarnation is given at its start."""

    name: str
    incarnation: int
    settings: Settings
    args: bytes
    listeners: dict[str, socket.socket]
    log: logging.Logger
    runtime_dir: Path
    group: str = ""
    epoch: int = 0
    rank: int = 0
    world_size: int = 1

    @property
    def address(self) -> Address:
        """Return the incarnation's own address."""
        return Address(self.name, self.incarnation)


class Runtime(Protocol):
    """What an actor asks of the loop that runs it."""

    @property
    def peers(self) -> Registry:
        """The live view of the other actors."""

    def tell(self, name: str, body: Message) -> None:
        """Send without waiting for an answer."""

    async def ask(self, name: str, body: Message, *, deadline_s: float) -> Message:
        """Send and await the answer."""

    async def wait_for(self, name: str, *, deadline_s: float) -> ActorInfo:
        """Await a ready incarnation."""

    def report_progress(self, fraction: float, stage: str) -> None:
        """Tell the root how far a start is."""


def handles(message_type: type[Message]) -> Callable[[_Function], _Function]:
    """Mark a method as the handler of one message type: `(self, message, envelope)`."""

    def mark(function: _Function) -> _Function:
        function._handles = message_type  # type: ignore[attr-defined]
        return function

    return mark


def handlers_of(actor: object) -> dict[type[Message], Handler]:
    """Return an actor's bound handlers by message type; a subclass's wins."""
    handlers: dict[type[Message], Handler] = {}
    for klass in reversed(type(actor).__mro__):
        for name, function in vars(klass).items():
            if inspect.isfunction(function) and hasattr(function, "_handles"):
                handlers[function._handles] = getattr(actor, name)
    return handlers


class AsyncActor:
    """Base of the light actors. An `async` handler runs as a task of its own, a plain one inline.

    Inline handlers keep the order of arrival and must not block.
    """

    _runtime: Runtime

    def __init__(self, context: ActorContext) -> None:
        self.context = context
        self.log = context.log

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.context.address})"

    def attach(self, runtime: Runtime) -> None:
        """Called once, before `on_start`, by what runs the actor."""
        self._runtime = runtime

    @property
    def peers(self) -> Registry:
        """Return the live view of the other actors."""
        return self._runtime.peers

    def tell(self, name: str, body: Message) -> None:
        """Send without waiting. Raises: ActorDown, MailboxFull, RequestTooLarge."""
        self._runtime.tell(name, body)

    async def ask(self, name: str, body: Message, *, deadline_s: float) -> Message:
        """Return the answer of actor `name` ("root" is the supervisor).

        Raises: the peer's CortexError, DeadlineExceeded, ActorDown or MailboxFull.
        """
        return await self._runtime.ask(name, body, deadline_s=deadline_s)

    async def wait_for(self, name: str, *, deadline_s: float) -> ActorInfo:
        """Return actor `name` as soon as it is ready. Raises: DeadlineExceeded."""
        return await self._runtime.wait_for(name, deadline_s=deadline_s)

    def report_progress(self, fraction: float, stage: str) -> None:
        """Extend the start deadline; call it in `on_start` while work goes on."""
        self._runtime.report_progress(fraction, stage)

    async def on_start(self) -> None:
        """Get ready to serve; the root hears READY after it returns."""

    async def on_drain(self, deadline_s: float) -> None:
        """Take no new work and finish what runs; return when done."""

    async def on_stop(self) -> None:
        """Let go of what the end of the process would not."""

    def on_actor_up(self, up: ActorUp) -> Awaitable[None] | None:
        """Another actor is ready (those before our own start are in `peers`)."""

    def on_actor_down(self, down: ActorDown) -> Awaitable[None] | None:
        """An incarnation is gone, whether or not it ever was ready."""

    def on_group_up(self, up: GroupUp) -> Awaitable[None] | None:
        """All ranks of an epoch are ready."""

    def on_group_down(self, down: GroupDown) -> Awaitable[None] | None:
        """An epoch is dead."""
