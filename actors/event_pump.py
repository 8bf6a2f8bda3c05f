"""Hands registry events to an async actor one after the other, in order of arrival."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Awaitable

from actors.dispatch import EventListener, call_listener
from actors.registry import RegistryEvent
from cortexd.log import event


class EventPump:
    """A queue of events in front of one actor; nothing is handed over before `open`."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._listener: EventListener | None = None
        self._events: deque[RegistryEvent] = deque()
        self._running: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"EventPump({len(self._events)} waiting)"

    def open(self, listener: EventListener) -> None:
        """Hand over what has waited, and from now on each event as it comes."""
        self._listener = listener
        self._pump()

    def push(self, registry_event: RegistryEvent) -> None:
        """Take in one event."""
        self._events.append(registry_event)
        self._pump()

    def close(self) -> None:
        """Cancel the callback that runs."""
        if self._running is not None:
            self._running.cancel()

    def _pump(self) -> None:
        """Call back until an async callback must be awaited; it delays the events after it."""
        while self._listener is not None and self._events and self._running is None:
            try:
                result = call_listener(self._listener, self._events.popleft())
            except Exception as error:
                self._log_failure(error)
                continue
            if inspect.isawaitable(result):
                self._running = asyncio.get_running_loop().create_task(self._finish(result))

    async def _finish(self, callback: Awaitable[None]) -> None:
        try:
            await callback
        except Exception as error:
            self._log_failure(error)
        self._running = None
        self._pump()

    def _log_failure(self, error: Exception) -> None:
        event(self._log, "actor.callback_failed", 40, exc_info=True, error=repr(error))
