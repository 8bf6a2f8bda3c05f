"""When a node is left alone although it answers its polls: a circuit breaker, with damping. Pure.

Closed: requests go there. Open, after failures in a row or three times down within a minute: none
goes there for a while, twice as long each time. Half open: one request tries it; its success closes
the breaker, its failure opens it again, and one that tells nothing lets another try. The clock is
handed in, monotonic seconds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final, Literal

BreakerState = Literal["closed", "open", "half_open"]

# One failure is tried elsewhere and forgotten; a row of them is the node's own.
_FAILURES_TO_OPEN: Final = 3
_FIRST_HOLD_S: Final = 2.0
_MAX_HOLD_S: Final = 60.0
_FLAPS_TO_OPEN: Final = 3
_FLAP_WINDOW_S: Final = 60.0
_FLAP_HOLD_S: Final = 10.0
# A trial request that hangs must not keep the node out for good.
_TRIAL_PATIENCE_S: Final = 30.0


@dataclass(slots=True)
class Breaker:
    """The breaker of one node."""

    _failures: int = 0
    _open_until: float | None = None  # None: closed
    _hold_s: float = 0.0
    _trial: str | None = None
    _trial_since: float = 0.0
    _downs: deque[float] = field(default_factory=deque)

    def state(self, now: float) -> BreakerState:
        """Return the state at this moment."""
        if self._open_until is None:
            return "closed"
        return "open" if now < self._open_until else "half_open"

    def allows(self, now: float) -> bool:
        """Tell whether a request may go there now."""
        match self.state(now):
            case "closed":
                return True
            case "open":
                return False
            case "half_open":
                return self._trial is None or now - self._trial_since > _TRIAL_PATIENCE_S

    def left_s(self, now: float) -> float:
        """Return the seconds until a request may try it."""
        return 0.0 if self._open_until is None else max(0.0, self._open_until - now)

    def sent(self, request_id: str, now: float) -> None:
        """A request goes there; in the half-open state it is the trial."""
        if self.state(now) == "half_open":
            self._trial, self._trial_since = request_id, now

    def succeeded(self, request_id: str, now: float) -> None:
        """The node answered; what was sent before it was found at fault does not count."""
        if self.state(now) == "closed":
            self._failures = 0
        elif self._trial == request_id:
            self._failures, self._open_until, self._hold_s, self._trial = 0, None, 0.0, None

    def failed(self, request_id: str, now: float) -> None:
        """The node did not answer, or failed."""
        self._failures += 1
        if self._trial == request_id or (
            self._open_until is None and self._failures >= _FAILURES_TO_OPEN
        ):
            self._open(now, _FIRST_HOLD_S)

    def ended(self, request_id: str) -> None:
        """A request ended that says nothing of the node: its client left."""
        if self._trial == request_id:
            self._trial = None

    def went_down(self, now: float) -> None:
        """The node stopped answering its polls; one that does so again and again is held down."""
        self._downs.append(now)
        while self._downs[0] <= now - _FLAP_WINDOW_S:
            self._downs.popleft()
        if len(self._downs) >= _FLAPS_TO_OPEN:
            self._open(now, _FLAP_HOLD_S)

    def _open(self, now: float, least_s: float) -> None:
        self._hold_s = min(max(2 * self._hold_s, least_s), _MAX_HOLD_S)
        self._open_until = now + self._hold_s
        self._trial = None
