"""Who runs: names, incarnations and endpoints, as the root tells it.

Each actor keeps a view: the snapshot of `Welcome`, then every event in order. A gap in the sequence
is a programming error and ends the process, since a stale view would send messages to the dead.
"""

from __future__ import annotations

from cortexd.messages.control import (
    ActorDown,
    ActorInfo,
    ActorUp,
    GroupDown,
    GroupUp,
    Welcome,
)
from cortexd.messages.envelope import Address

RegistryEvent = ActorUp | ActorDown | GroupUp | GroupDown


class Registry:
    """A live view of the actors that serve. `get` and `all` know ready incarnations only."""

    def __init__(self) -> None:
        self._actors: dict[str, ActorInfo] = {}
        self._last_gone: dict[str, int] = {}
        self.sequence = 0

    def __repr__(self) -> str:
        return f"Registry(sequence {self.sequence}, {sorted(self._actors)})"

    def get(self, name: str) -> ActorInfo | None:
        """Return the ready incarnation of `name`, if there is one."""
        return self._actors.get(name)

    def all(self) -> list[ActorInfo]:
        """Return all ready actors."""
        return list(self._actors.values())

    def is_gone(self, address: Address) -> bool:
        """Return whether this incarnation is known to be dead."""
        return address.incarnation <= self._last_gone.get(address.name, 0)

    def welcome(self, snapshot: Welcome) -> None:
        """Start from a snapshot."""
        self.sequence = snapshot.sequence
        self._actors = {actor.name: actor for actor in snapshot.actors}

    def apply(self, event: RegistryEvent) -> None:
        """Take in the next event. Raises: RuntimeError when one was missed."""
        if event.sequence != self.sequence + 1:
            raise RuntimeError(
                f"registry event {event.sequence} came after {self.sequence}; one was lost"
            )
        self.sequence = event.sequence
        if isinstance(event, ActorUp):
            self._actors[event.actor.name] = event.actor
        elif isinstance(event, ActorDown):
            gone = max(event.incarnation, self._last_gone.get(event.name, 0))
            self._last_gone[event.name] = gone
            known = self._actors.get(event.name)
            if known is not None and known.incarnation <= gone:
                del self._actors[event.name]
