"""What a child is and when it is restarted: child specs, life cycle, back-off, intensity.

Pure: the clock is handed in as seconds, jitter as a function. The supervisor and the groups take
every decision here, so the rules are tested without a process.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from cortexd.messages.control import ActorState

RestartPolicy = Literal["permanent", "transient", "temporary"]
Preload = Literal["light", "engine"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,95}")
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# Engine groups stop after children of a higher and before children of a lower stop order.
GROUP_STOP_ORDER: Final = 50


class ChildSpec(msgspec.Struct, frozen=True):
    """One actor the root keeps running.

    `target` is "module:Class", `args` msgpack that the actor decodes, `listeners` the names of
    sockets it gets. Children start by rising `order` (equal ones together) and stop by falling
    `stop_order` (unset: `order`), see `GROUP_STOP_ORDER`. At a stop it may drain for `drain_s`.
    Unset timeouts are those of the `supervision` settings.
    """

    name: str
    target: str
    args: bytes = b""
    listeners: tuple[str, ...] = ()
    order: int = 0
    restart: RestartPolicy = "permanent"
    preload: Preload = "light"
    stop_order: int | None = None
    drain_s: float = 1.0
    start_timeout_s: float | None = None
    stop_timeout_s: float | None = None

    def __post_init__(self) -> None:
        if not is_valid_name(self.name) or self.name == "root":
            raise ValueError(f'bad actor name "{self.name}"; allowed: {_NAME.pattern}, not "root"')
        if not _TARGET.fullmatch(self.target):
            raise ValueError(f'{self.name}: bad target "{self.target}"; allowed: "module:Class"')


def is_valid_name(name: str) -> bool:
    """Return whether an actor may be called so."""
    return _NAME.fullmatch(name) is not None


_STARTED: Final[frozenset[ActorState]] = frozenset(
    {"draining", "stopping", "backoff", "exited", "failed"}
)
TRANSITIONS: Final[dict[ActorState, frozenset[ActorState]]] = {
    "idle": frozenset({"starting", "exited"}),
    "starting": _STARTED | {"ready"},
    "ready": _STARTED | {"suspect"},
    "suspect": _STARTED | {"ready"},
    "draining": frozenset({"stopping", "backoff", "exited", "failed"}),
    "stopping": frozenset({"exited", "backoff", "failed"}),
    "backoff": frozenset({"starting", "exited", "failed"}),
    "exited": frozenset({"starting"}),
    "failed": frozenset({"starting", "exited"}),
}


@dataclass(slots=True)
class Lifecycle:
    """The state of one child, and since when and why. The owner alone moves it."""

    state: ActorState = "idle"
    since_s: float = 0.0
    reason: str = ""

    def to(self, state: ActorState, reason: str, now_s: float) -> None:
        """Move on. Raises: RuntimeError when the life cycle has no such transition."""
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"no transition {self.state} → {state} ({reason})")
        self.state, self.reason, self.since_s = state, reason, now_s


@dataclass(slots=True)
class Backoff:
    """Delays between restarts: none at first, then doubling, with jitter, up to a cap."""

    first_s: float = 0.05
    cap_s: float = 5.0
    jitter: float = 0.2
    stable_after_s: float = 30.0
    random: Callable[[], float] = random.random
    _failures: int = 0

    def next_delay_s(self, ready_for_s: float) -> float:
        """Return the delay after a failure; having been ready long enough starts anew."""
        if ready_for_s >= self.stable_after_s:
            self._failures = 0
        self._failures += 1
        if self._failures == 1:
            return 0.0
        delay_s = min(self.cap_s, self.first_s * 2.0 ** min(self._failures - 2, 30))
        return delay_s * (1 + self.jitter * (2 * self.random() - 1))


# A group reload is costly: the second try waits a little, later ones five seconds.
GROUP_DELAYS_S: Final = (0.0, 0.5, 5.0)


@dataclass(slots=True)
class GroupBackoff:
    """Delays between the epochs of a group; a stable epoch starts anew."""

    stable_after_s: float = 300.0
    _failures: int = 0

    def next_delay_s(self, ready_for_s: float) -> float:
        """Return the delay before the next epoch."""
        if ready_for_s >= self.stable_after_s:
            self._failures = 0
        self._failures += 1
        return GROUP_DELAYS_S[min(self._failures, len(GROUP_DELAYS_S)) - 1]


@dataclass(slots=True)
class Intensity:
    """At most `max_restarts` failures within a sliding window."""

    max_restarts: int
    window_s: float
    _failures: deque[float] = field(default_factory=deque)

    def exceeded_by_failure_at(self, now_s: float) -> bool:
        """Count a failure; return whether it is one too many."""
        self._failures.append(now_s)
        while self._failures[0] <= now_s - self.window_s:
            self._failures.popleft()
        return len(self._failures) > self.max_restarts


@dataclass(slots=True, frozen=True)
class Exit:
    """How one incarnation ended. `commanded`: we asked for it, so it is no failure."""

    commanded: bool
    clean: bool  # exit code 0
    ready_for_s: float  # 0 when it never was ready


@dataclass(slots=True, frozen=True)
class RestartAfter:
    """Start again after this delay."""

    delay_s: float


Verdict = RestartAfter | Literal["exited", "failed"]


@dataclass(slots=True)
class RestartRule:
    """What follows an exit: OTP's policies with a back-off and an intensity bound."""

    policy: RestartPolicy
    backoff: Backoff | GroupBackoff
    intensity: Intensity

    def after(self, exit_: Exit, now_s: float) -> Verdict:
        """Return what to do now. A commanded exit never restarts."""
        if exit_.commanded or self.policy == "temporary":
            return "exited"
        if exit_.clean and self.policy == "transient":
            return "exited"
        if self.intensity.exceeded_by_failure_at(now_s):
            return "failed"
        return RestartAfter(self.backoff.next_delay_s(exit_.ready_for_s))
