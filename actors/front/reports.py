"""Reports of ended requests on their way to the metrics actor: many in one message.

A message costs both ends more than a report does, and nobody looks at metrics within the delay. A
request stays among the open ones (`actors.open_requests`) until its log line is written and its
report told, so one that ends in the moment before its front is killed is recorded all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from actors.open_requests import OpenRequest, OpenRequests
from cortexd.log_batch import write_waiting_lines
from cortexd.messages import RequestFinished, RequestsFinished

_DELAY_S: Final = 0.05


class Reports:
    """Knows what runs; collects what has ended for a moment, then tells. Owned by one front."""

    def __init__(
        self, tell: Callable[[RequestsFinished], None], open_requests: OpenRequests
    ) -> None:
        self._tell = tell
        self._open = open_requests
        self._waiting: list[RequestFinished] = []
        self._ended: list[int] = []

    def __repr__(self) -> str:
        return f"Reports({len(self._waiting)} waiting)"

    def begin(self, request: OpenRequest) -> int:
        """Note a request that has come; return what `update` and `end` want."""
        return self._open.begin(request)

    def update(self, slot: int, request: OpenRequest) -> None:
        """Note what more is known of a request."""
        self._open.update(slot, request)

    def end(self, slot: int, finished: RequestFinished) -> None:
        """Take in the report of one request; its log line has been handed over already."""
        if not self._waiting:
            asyncio.get_running_loop().call_later(_DELAY_S, self.flush)
        self._waiting.append(finished)
        self._ended.append(slot)

    def flush(self) -> None:
        """Write and tell what waits."""
        if not self._waiting:
            return
        write_waiting_lines()
        waiting, self._waiting = self._waiting, []
        ended, self._ended = self._ended, []
        self._tell(RequestsFinished(waiting))
        for slot in ended:
            self._open.end(slot)

    def close(self) -> None:
        """Tell the last ones; called when no request runs any more."""
        self.flush()
        self._open.close()
