"""One fetch as seen from outside: its progress, its cancellation and its deadline.

Every source calls `check` (or `report`) between chunks; that is where a cancelled or late fetch
ends, by an exception that unwinds through the clean-up of the temporary files.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from cortexd.errors import Cancelled, DeadlineExceeded

# (stage, bytes done, bytes in all or 0 when unknown)
Progress = Callable[[str, int, int], None]

CHUNK_BYTES: Final = 1 << 20


class Transfer:
    """Progress callback, cancel event and deadline of one fetch."""

    def __init__(
        self, model_id: str, progress: Progress, cancel: threading.Event, timeout_s: float
    ) -> None:
        self.model_id = model_id
        self._progress = progress
        self._cancel = cancel
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s

    def check(self) -> None:
        """Raise `Cancelled` or `DeadlineExceeded` when the fetch must end."""
        if self._cancel.is_set():
            raise Cancelled(f'fetching "{self.model_id}" was cancelled')
        if time.monotonic() > self._deadline:
            raise DeadlineExceeded(
                f'fetching "{self.model_id}" took more than {self._timeout_s:g} s; '
                "raise store.download_timeout_s"
            )

    def report(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        """Report progress, after a check."""
        self.check()
        self._progress(stage, done_bytes, total_bytes)

    def wait(self, seconds: float) -> None:
        """Wait, less when cancelled; then check."""
        self._cancel.wait(seconds)
        self.check()
