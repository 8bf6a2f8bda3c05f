"""Ends a rank whose step takes too long: a collective that waits for a dead peer never returns.

A thread of the leader. It must not touch the device, the sockets or any lock that the step may
hold, so all it does is to end the process; the root then kills the other ranks.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final

from cortexd.log import event

_LOOKS_PER_TIMEOUT: Final = 10
_SHORTEST_LOOK_S: Final = 0.02


class StepWatchdog:
    """Use as a context manager around each step."""

    def __init__(self, timeout_s: float, exit_code: int, log: logging.Logger) -> None:
        assert timeout_s > 0, "a step without a deadline may hang for ever"
        self._timeout_s = timeout_s
        self._exit_code = exit_code
        self._log = log
        self._began_s: float | None = None
        self._exit: Callable[[int], None] = os._exit
        threading.Thread(target=self._watch, name="step-watchdog", daemon=True).start()

    def __enter__(self) -> None:
        self._began_s = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._began_s = None

    def _watch(self) -> None:
        period_s = max(self._timeout_s / _LOOKS_PER_TIMEOUT, _SHORTEST_LOOK_S)
        while True:
            time.sleep(period_s)
            began_s = self._began_s
            if began_s is not None and time.monotonic() - began_s > self._timeout_s:
                event(
                    self._log,
                    "step.deadline_missed",
                    50,
                    deadline_s=self._timeout_s,
                    action="the group is ended",
                )
                self._exit(self._exit_code)
