"""The event log of the root: every life-cycle step, numbered, kept for the admin socket, logged."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from cortexd import log as cortexd_log

_KEPT_EVENTS: Final = 1000


class Event(msgspec.Struct, frozen=True):
    """One event: `sequence` counts from 1, `time` is unix seconds."""

    sequence: int
    time: float
    event: str
    fields: dict[str, object]


class EventLog:
    """The last events, and whoever follows."""

    def __init__(self) -> None:
        self._log = logging.getLogger("cortexd.root")
        self._events: deque[Event] = deque(maxlen=_KEPT_EVENTS)
        self._followers: set[Callable[[Event], None]] = set()
        self._sequence = 0

    def __repr__(self) -> str:
        return f"EventLog({self._sequence} events)"

    def add(self, name: str, level: int = logging.INFO, /, **fields: object) -> None:
        """Record and log one event."""
        self._sequence += 1
        event = Event(self._sequence, time.time(), name, fields)
        self._events.append(event)
        cortexd_log.event(self._log, name, level, exc_info=False, **fields)
        for follower in list(self._followers):
            follower(event)

    def since(self, sequence: int) -> list[Event]:
        """Return the kept events after `sequence`."""
        return [event for event in self._events if event.sequence > sequence]

    def follow(self, follower: Callable[[Event], None]) -> None:
        """Call `follower` for every new event."""
        self._followers.add(follower)

    def unfollow(self, follower: Callable[[Event], None]) -> None:
        """Stop calling it."""
        self._followers.discard(follower)
