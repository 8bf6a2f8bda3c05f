"""The watchdog ends a process whose step does not end."""

from __future__ import annotations

import logging
import threading

import pytest

from actors.step_watchdog import StepWatchdog
from tests.waiting import DEADLINE_S


def test_step_over_its_deadline_ends_the_process() -> None:
    """The exit code is the one for a poisoned device."""
    codes: list[int] = []
    ended = threading.Event()
    watchdog = StepWatchdog(0.05, 70, logging.getLogger("test"))

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    watchdog._exit = end
    with watchdog:
        assert ended.wait(DEADLINE_S)
    assert codes[0] == 70


def test_deadline_is_never_zero() -> None:
    """Without one a lost rank would hang the group for ever."""
    with pytest.raises(AssertionError, match="deadline"):
        StepWatchdog(0.0, 70, logging.getLogger("test"))
