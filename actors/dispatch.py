"""What the two actor loops share of handing a message or a registry event to an actor.

Which handler takes a message, and what the asker is told when there is none or when it fails.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

from actors.actor import Handler, handlers_of
from actors.registry import RegistryEvent
from cortexd.errors import CortexError, ErrorInfo, Internal
from cortexd.log import event
from cortexd.messages.control import ActorDown, ActorUp, GroupDown, GroupUp
from cortexd.messages.envelope import Envelope


class EventListener(Protocol):
    """An actor, as far as it hears of others; a callback may be a coroutine function."""

    def on_actor_up(self, up: ActorUp) -> Any:
        """Another actor is ready."""

    def on_actor_down(self, down: ActorDown) -> Any:
        """An incarnation is gone."""

    def on_group_up(self, up: GroupUp) -> Any:
        """All ranks of an epoch are ready."""

    def on_group_down(self, down: GroupDown) -> Any:
        """An epoch is dead."""


def call_listener(listener: EventListener, registry_event: RegistryEvent) -> Any:
    """Call the one callback for an event; return what it returned."""
    match registry_event:
        case ActorUp():
            return listener.on_actor_up(registry_event)
        case ActorDown():
            return listener.on_actor_down(registry_event)
        case GroupUp():
            return listener.on_group_up(registry_event)
        case GroupDown():
            return listener.on_group_down(registry_event)


class HandlerTable:
    """The handlers of one actor, by message type."""

    def __init__(self, actor: object, name: str, log: logging.Logger) -> None:
        self._handlers = handlers_of(actor)
        self._name = name
        self._log = log

    def __repr__(self) -> str:
        return f"HandlerTable({self._name}, {len(self._handlers)} handlers)"

    def find(self, envelope: Envelope) -> Handler:
        """Return the handler of a message. Raises: Internal when there is none (logged)."""
        handler = self._handlers.get(type(envelope.body))  # type: ignore[arg-type]
        if handler is None:
            message = type(envelope.body).__name__
            event(self._log, "actor.no_handler", 40, message=message)
            raise Internal(f'actor "{self._name}" has no handler for {message}')
        return handler

    def failure(self, error: Exception, envelope: Envelope) -> ErrorInfo:
        """Return what the asker is told of a failed handler.

        The log has the traceback of what was not foreseen, and of what nobody would be told.
        """
        if isinstance(error, CortexError) and envelope.wants_reply:
            return error.to_info()
        event(
            self._log,
            "actor.handler_failed",
            40,
            exc_info=True,
            message=type(envelope.body).__name__,
            src=str(envelope.src),
            error=repr(error),
        )
        if isinstance(error, CortexError):
            return error.to_info()
        return Internal(f'actor "{self._name}" failed: {type(error).__name__}').to_info()
