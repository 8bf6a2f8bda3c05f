"""Asks of an actor without an event loop: send to several peers, then wait for all answers.

Owned by a `SyncActor`, which feeds it the answers and the deaths it hears of.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from actors.link import Link
from actors.mailbox import AskTable, Outcome
from cortexd.errors import CortexError
from cortexd.messages.control import Message
from cortexd.messages.envelope import Address, Envelope


@dataclass(slots=True, eq=False)
class SyncAsk:
    """One open ask; `outcome` is its end: the answer, the peer's error, or why there is none."""

    dst: Address
    outcome: Outcome | None = None

    def end(self, outcome: Outcome) -> None:
        """Take the outcome."""
        self.outcome = outcome


class SyncAsks:
    """The open asks of one actor."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._table = AskTable()

    def __repr__(self) -> str:
        return f"SyncAsks({self._table})"

    def begin(self, dst: Address, body: Message, deadline_s: float) -> SyncAsk:
        """Send a request; a failure to send is the ask's outcome already."""
        ask = SyncAsk(dst)
        ask_id = self._link.next_id()
        deadline_ns = time.monotonic_ns() + int(deadline_s * 1e9)
        self._table.open(ask_id, dst, deadline_ns, ask.end)
        try:
            self._link.send(dst, body, message_id=ask_id, deadline_ns=deadline_ns)
        except CortexError as error:
            self._table.discard(ask_id)
            ask.end(error)
        return ask

    def resolve(self, envelope: Envelope) -> bool:
        """Hand an answer to its ask; False when nobody awaits it."""
        return self._table.resolve(envelope)

    def fail_peer(self, gone: Address, reason: str) -> None:
        """End all asks to a dead incarnation."""
        self._table.fail_peer(gone, reason)

    def expire(self) -> None:
        """End the asks whose deadline has passed."""
        self._table.expire(time.monotonic_ns())

    @property
    def next_deadline_s(self) -> float:
        """Seconds until the next ask expires; 0 when one has or none is open."""
        deadline_ns = self._table.next_deadline_ns
        return 0.0 if deadline_ns is None else max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9)
