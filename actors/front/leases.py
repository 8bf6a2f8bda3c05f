"""The leases this front holds at the router: whom it tells of them, and when.

A node that is open to this front (`RoutedRemote.open_until`) gets requests without a question to
the router, which hears of them within a moment, many in one message. A router that was restarted
is told of all that is held: without it a model in use would count as idle until those requests end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from cortexd.messages import EndRequest, HeldLease, HeldLeases, LeaseReport, RoutedRemote
from cortexd.messages.control import Message

_DELAY_S: Final = 0.05


class Leases:
    """What was leased and not ended. Owned by one front; `tell` reaches the router."""

    def __init__(self, tell: Callable[[Message], None]) -> None:
        self._tell = tell
        self._held: dict[str, HeldLease] = {}
        self._open: dict[str, RoutedRemote] = {}  # by the name that clients use
        self._unhurried: set[str] = set()  # leases whose end nobody waits for
        self._begun: list[HeldLease] = []
        self._ended: list[EndRequest] = []
        self._is_scheduled = False

    def __repr__(self) -> str:
        return f"Leases({len(self._held)} held, {len(self._open)} open)"

    def hold(self, lease: HeldLease) -> None:
        """Note what the router has granted."""
        self._held[lease.request_id] = lease

    def note_open(self, model: str, lease: HeldLease, routed: RoutedRemote) -> None:
        """Note where requests for a model may go without asking, if the router says so."""
        if routed.open_until:
            self._open[model] = routed
            self._unhurried.add(lease.request_id)

    def open_node(self, model: str) -> RoutedRemote | None:
        """Return where a request for a model may go without asking."""
        routed = self._open.get(model)
        if routed is not None and time.monotonic() >= routed.open_until:
            del self._open[model]
            return None
        return routed

    def close_node(self, node: str) -> None:
        """Ask again before anything goes to a node: it failed. What is untold is told first."""
        self._open = {name: one for name, one in self._open.items() if one.node != node}
        self.flush()

    def begin(self, lease: HeldLease) -> None:
        """Hold a lease on an open node; the router is told in a moment."""
        self._held[lease.request_id] = lease
        self._unhurried.add(lease.request_id)
        self._begun.append(lease)
        self._schedule()

    def end(self, request_id: str, *, is_answered: bool = False) -> None:
        """End a lease, or the wait for one. Where nobody waits for the seat, it is told later."""
        self._held.pop(request_id, None)
        ended = EndRequest(request_id, is_answered)
        if request_id in self._unhurried:
            self._unhurried.discard(request_id)
            self._ended.append(ended)
            self._schedule()
        else:
            self._tell(ended)

    def flush(self) -> None:
        """Tell what has begun and ended."""
        if self._begun or self._ended:
            report = LeaseReport(self._begun, self._ended)
            self._begun, self._ended = [], []
            self._tell(report)

    def announce(self) -> None:
        """Tell a router that knows of none."""
        if self._held:
            self._tell(HeldLeases(list(self._held.values())))

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_later(_DELAY_S, self._on_timer)

    def _on_timer(self) -> None:
        self._is_scheduled = False
        self.flush()
