"""Requests that wait for something to change, and those of them that end meanwhile.

Part of the router actor (same loop), used for loads here and at other nodes. A request that has
ended must not go on to get a lease, since nobody would close it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cortexd.errors import Cancelled


class OpenWaits:
    """See the module's text."""

    def __init__(self) -> None:
        self._has_ended: dict[str, bool] = {}

    def __repr__(self) -> str:
        return f"OpenWaits({len(self._has_ended)} waiting)"

    @contextmanager
    def of(self, request_id: str) -> Iterator[None]:
        """Wait inside. Raises: Cancelled at the end when the request has ended meanwhile."""
        self._has_ended[request_id] = False
        try:
            yield
        finally:
            has_ended = self._has_ended.pop(request_id, False)
        if has_ended:
            raise Cancelled(f"request {request_id} ended while it waited")

    def end(self, request_id: str) -> None:
        """Note that a request has ended, if it waits."""
        if request_id in self._has_ended:
            self._has_ended[request_id] = True
