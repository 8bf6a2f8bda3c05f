"""Is a child alive and at work? Beats, step counts and start deadlines; pure, times are handed in.

A light actor beats from its event loop, so silence means a stuck loop. A rank beats from a thread
(the process lives) and counts steps (the work goes on); while it loads it may hold the interpreter
for long, so only its progress counts then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from cortexd.messages.control import Beat, Progress
from cortexd.settings import Supervision

# A look more often than this would be polling.
_MIN_CHECK_S: Final = 0.01


@dataclass(slots=True, frozen=True)
class Hung:
    """It will not come back by itself."""

    reason: str


Health = Literal["fine", "silent"] | Hung


class Liveness:
    """What is known of one incarnation's health."""

    def __init__(
        self,
        supervision: Supervision,
        *,
        start_timeout_s: float,
        beats_while_starting: bool,
        now_s: float,
    ) -> None:
        self._supervision = supervision
        self._beats_while_starting = beats_while_starting
        self._start_deadline_s: float | None = now_s + start_timeout_s
        self._progress: Progress | None = None
        self._last_beat_s: float | None = None
        self._num_steps = 0
        self._step_since_s: float | None = None  # None: idle

    def __repr__(self) -> str:
        return f"Liveness(last beat {self._last_beat_s}, step since {self._step_since_s})"

    def hello(self, now_s: float) -> None:
        """The process is up and begins to beat."""
        if self._beats_while_starting:
            self._last_beat_s = now_s

    def ready(self, now_s: float) -> None:
        """The start is over."""
        self._start_deadline_s = None
        self._last_beat_s = now_s

    def progress(self, progress: Progress, now_s: float) -> None:
        """Extend the start deadline, if this is progress indeed."""
        if self._start_deadline_s is not None and progress != self._progress:
            self._progress = progress
            extended_s = now_s + self._supervision.load_stall_timeout_s
            self._start_deadline_s = max(self._start_deadline_s, extended_s)

    def beat(self, beat: Beat, now_s: float) -> None:
        """Take in a beat."""
        if self._last_beat_s is not None:
            self._last_beat_s = now_s
        if not beat.busy:
            self._step_since_s = None
        elif beat.progress != self._num_steps or self._step_since_s is None:
            self._step_since_s = now_s
        self._num_steps = beat.progress

    def forgive_silence(self, now_s: float) -> None:
        """The listener itself was away: what was not heard is no one's fault."""
        if self._last_beat_s is not None:
            self._last_beat_s = now_s

    def health(self, now_s: float) -> Health:
        """Return the verdict as of now."""
        if self._start_deadline_s is not None and now_s >= self._start_deadline_s:
            return Hung("did not get ready in time")
        if (
            self._start_deadline_s is None
            and self._step_since_s is not None
            and now_s - self._step_since_s >= self._supervision.step_timeout_s
        ):
            return Hung(f"step {self._num_steps + 1} does not end")
        if self._last_beat_s is None:
            return "fine"
        silent_s = now_s - self._last_beat_s
        if silent_s >= self._supervision.kill_after_s:
            return Hung(f"silent for {silent_s:.1f} s")
        return "silent" if silent_s >= self._supervision.suspect_after_s else "fine"

    def next_check_s(self, now_s: float) -> float:
        """Return after how long the verdict may be another without any message."""
        moments = [now_s + self._supervision.suspect_after_s]
        if self._start_deadline_s is not None:
            moments.append(self._start_deadline_s)
        if self._step_since_s is not None:
            moments.append(self._step_since_s + self._supervision.step_timeout_s)
        if self._last_beat_s is not None:
            # The comparison of `health`, to the last bit: else a rounding hides one verdict.
            is_silent = now_s - self._last_beat_s >= self._supervision.suspect_after_s
            limit_s = (
                self._supervision.kill_after_s if is_silent else self._supervision.suspect_after_s
            )
            moments.append(self._last_beat_s + limit_s)
        return max(_MIN_CHECK_S, min(moments) - now_s)
