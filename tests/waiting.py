"""How tests wait for what other processes and threads do.

One deadline for all: it only ends what is broken, so it is long enough for a machine with ten
times the work it can do. What a test asserts is never how long something took.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

DEADLINE_S: Final = 120.0
_Value = TypeVar("_Value")


def wait_for(condition: Callable[[], _Value], what: str) -> _Value:
    """Return the condition's first true value, or fail naming what did not happen."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)  # between two looks at another process, which cannot notify us
    raise AssertionError(f"{what} did not happen in {DEADLINE_S:g} s")
