"""The seam between the HTTP code and the actor runtime; tests put a double here."""

from __future__ import annotations

from typing import Protocol

from cortexd.messages.control import Message


class Bus(Protocol):
    """What a front needs of the runtime."""

    def tell(self, name: str, body: Message) -> None:
        """Send without an answer; never blocks. Raises: ActorDown, MailboxFull."""

    async def ask(self, name: str, body: Message, *, deadline_s: float) -> Message:
        """Send and return the answer. Raises: what the peer raised, DeadlineExceeded, ActorDown."""

    def incarnation_of(self, name: str) -> int | None:
        """Return the incarnation of a ready actor, None when there is none."""
