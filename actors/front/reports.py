"""Reports of ended requests on their way to the metrics actor: many in one message.

A message costs both ends more than a report does, and nobody looks at metrics within the delay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from cortexd.messages import RequestFinished, RequestsFinished

_DELAY_S: Final = 0.02


class Reports:
    """Collects for a moment, then tells. Owned by one front."""

    def __init__(self, tell: Callable[[RequestsFinished], None]) -> None:
        self._tell = tell
        self._waiting: list[RequestFinished] = []

    def __repr__(self) -> str:
        return f"Reports({len(self._waiting)} waiting)"

    def add(self, finished: RequestFinished) -> None:
        """Take in the report of one request."""
        if not self._waiting:
            asyncio.get_running_loop().call_later(_DELAY_S, self.flush)
        self._waiting.append(finished)

    def flush(self) -> None:
        """Tell what waits."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            self._tell(RequestsFinished(waiting))
