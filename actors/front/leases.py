"""The leases this front holds at the router, so that a router that was restarted hears of them.

Without it a model in use would count as idle until those requests end.
"""

from __future__ import annotations

from collections.abc import Callable

from cortexd.messages import EndRequest, HeldLease, HeldLeases
from cortexd.messages.control import Message


class Leases:
    """What was leased and not ended. Owned by one front; `tell` reaches the router."""

    def __init__(self, tell: Callable[[Message], None]) -> None:
        self._tell = tell
        self._held: dict[str, HeldLease] = {}

    def __repr__(self) -> str:
        return f"Leases({len(self._held)} held)"

    def hold(self, lease: HeldLease) -> None:
        """Note what the router has granted."""
        self._held[lease.request_id] = lease

    def end(self, request_id: str, *, is_answered: bool = False) -> None:
        """End a lease, or the wait for one."""
        self._held.pop(request_id, None)
        self._tell(EndRequest(request_id, is_answered))

    def announce(self) -> None:
        """Tell a router that knows of none."""
        if self._held:
            self._tell(HeldLeases(list(self._held.values())))
