"""Waits for time to pass or a key to be pressed, for the full-screen commands."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator

_QUIT = b"q"
_MAX_KEYS = 64


@contextlib.contextmanager
def quit_key() -> Iterator[Callable[[float], bool]]:
    """Yield what waits for some seconds, or for a key, and tells whether it was q.

    The terminal hands keys over at once, and does not show them, until the block ends.
    """
    if not sys.stdin.isatty():
        yield _only_wait
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def wait(seconds: float) -> bool:
        ready, _, _ = select.select([terminal], [], [], seconds)
        if not ready:
            return False
        keys = os.read(terminal, _MAX_KEYS)
        return not keys or _QUIT in keys  # none: the terminal is gone

    tty.setcbreak(terminal)
    try:
        yield wait
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _only_wait(seconds: float) -> bool:
    time.sleep(seconds)
    return False
