"""The timers over one incarnation's `Liveness`: looks again exactly when its verdict may change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from actors.root.liveness import Hung, Liveness
from cortexd.messages.control import Beat, Progress

# A root that was itself stopped or starved must not blame its children for the silence.
ROOT_LAG_S: Final = 0.5


class Watch:
    """Runs on the root's loop until `stop`, or until it has found a hang."""

    def __init__(
        self,
        liveness: Liveness,
        *,
        read_waiting: Callable[[], None],
        on_silent: Callable[[], None],
        on_hung: Callable[[str], None],
    ) -> None:
        self._liveness = liveness
        self._read_waiting = read_waiting
        self._on_silent = on_silent
        self._on_hung = on_hung
        self._is_stopped = False
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = 0.0
        self._schedule(time.monotonic())

    def __repr__(self) -> str:
        return f"Watch({self._liveness})"

    def hello(self) -> None:
        """The process is up and begins to beat."""
        now_s = time.monotonic()
        self._liveness.hello(now_s)
        self._schedule(now_s)

    def ready(self) -> None:
        """The start is over."""
        now_s = time.monotonic()
        self._liveness.ready(now_s)
        self._schedule(now_s)

    def progress(self, progress: Progress) -> None:
        """The start goes on."""
        now_s = time.monotonic()
        self._liveness.progress(progress, now_s)
        self._schedule(now_s)

    def beat(self, beat: Beat) -> None:
        """Take in a beat; the timer finds out by itself."""
        self._liveness.beat(beat, time.monotonic())

    def stop(self) -> None:
        """Look no more."""
        self._is_stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        self._read_waiting()  # nobody is blamed for what only waits to be read
        if self._is_stopped:
            return
        now_s = time.monotonic()
        if now_s - self._due_s > ROOT_LAG_S:
            self._liveness.forgive_silence(now_s)
        health = self._liveness.health(now_s)
        if isinstance(health, Hung):
            self.stop()
            self._on_hung(health.reason)
            return
        if health == "silent":
            self._on_silent()
        self._schedule(now_s)

    def _schedule(self, now_s: float) -> None:
        if self._is_stopped:
            return
        if self._timer is not None:
            self._timer.cancel()
        delay_s = self._liveness.next_check_s(now_s)
        self._due_s = now_s + delay_s
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._check)
