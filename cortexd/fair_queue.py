"""Requests that wait for a free seat of one model, shared fairly between principals. Pure.

Next is the oldest request of the principal that has the fewest running. A full queue refuses the
newcomer, unless another principal holds more places than the newcomer's: then that one's latest
request gives its place up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class Ticket(Generic[T]):
    """One request's place; `since` orders the places of one principal."""

    request_id: str
    principal: str
    since: float
    waiter: T


@dataclass(slots=True)
class FairQueue(Generic[T]):
    """The places of one model's queue."""

    max_depth: int
    _places: dict[str, Ticket[T]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._places)

    def join(self, ticket: Ticket[T]) -> Ticket[T] | None:
        """Take a place; return the one that lost its own, which may be the newcomer."""
        self._places[ticket.request_id] = ticket
        if len(self._places) <= self.max_depth:
            return None
        held = Counter(one.principal for one in self._places.values())
        most = max(held.values())
        # At a tie the newcomer goes: nobody is put out for one who has as much already.
        greedy = {name for name, count in held.items() if count == most}
        loser = ticket
        if ticket.principal not in greedy:
            theirs = [one for one in self._places.values() if one.principal in greedy]
            loser = max(theirs, key=lambda one: one.since)
        self.leave(loser.request_id)
        return loser

    def find(self, request_id: str) -> Ticket[T] | None:
        """Return a request's place, if it holds one."""
        return self._places.get(request_id)

    def leave(self, request_id: str) -> None:
        """Give a place up, if it is held."""
        self._places.pop(request_id, None)

    def next(self, running: Mapping[str, int]) -> Ticket[T] | None:
        """Return who is next, given how many requests of each principal run; it keeps its place."""
        if not self._places:
            return None
        return min(
            self._places.values(), key=lambda one: (running.get(one.principal, 0), one.since)
        )
