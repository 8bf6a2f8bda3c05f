"""How late the event loop of a front is, watched while requests run.

What holds the loop up holds every stream up: the lag of a timer is the delay that any chunk may see
here. Owned by one front; an idle one has no timer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

# Costs a thousandth of a core; any stall that is longer is met by a timer.
_PERIOD_S: Final = 0.01
_TOLD_AT_ONCE: Final = 100


class LoopLag:
    """Measures from `start` on, until nothing runs any more."""

    def __init__(self, is_busy: Callable[[], bool], tell: Callable[[list[float]], None]) -> None:
        self._is_busy = is_busy
        self._tell = tell  # takes lags, in seconds
        self._lags: list[float] = []
        self.is_running = False

    def __repr__(self) -> str:
        return f"LoopLag({'running' if self.is_running else 'idle'}, {len(self._lags)} untold)"

    def start(self) -> None:
        """Measure, if that is not done already."""
        if not self.is_running:
            self.is_running = True
            self._wait()

    def _wait(self) -> None:
        # Not the loop's clock: uvloop's counts whole milliseconds.
        due = time.monotonic() + _PERIOD_S
        asyncio.get_running_loop().call_later(_PERIOD_S, self._on_timer, due)

    def _on_timer(self, due: float) -> None:
        self._lags.append(max(0.0, time.monotonic() - due))
        self.is_running = self._is_busy()
        if self.is_running:
            self._wait()
        if len(self._lags) >= _TOLD_AT_ONCE or not self.is_running:
            lags, self._lags = self._lags, []
            self._tell(lags)
