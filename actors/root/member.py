"""One name under supervision: its spec, its life cycle over all incarnations, its last figures."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from actors.root.spec import ChildSpec, Lifecycle
from cortexd.messages.control import ActorInfo, ActorState
from cortexd.settings import Settings


@dataclass(slots=True)
class Member:
    """State that outlives an incarnation. Owned by the supervisor or a group."""

    spec: ChildSpec
    group: str = ""
    epoch: int = 0
    rank: int = 0
    world_size: int = 1
    incarnation: int = 0
    restarts: int = 0
    pid: int = 0
    rss_bytes: int = 0
    lag_ms: float = 0.0
    mailbox_depth: int = 0
    dead_letters: dict[str, int] = field(default_factory=dict)
    lifecycle: Lifecycle = field(default_factory=lambda: Lifecycle(since_s=time.monotonic()))

    def move(self, state: ActorState, reason: str) -> None:
        """Move the life cycle, now."""
        self.lifecycle.to(state, reason, time.monotonic())

    def start_timeout_s(self, settings: Settings) -> float:
        """Return how long a start may take without progress."""
        return self.spec.start_timeout_s or settings.supervision.start_timeout_s

    def stop_timeout_s(self, settings: Settings) -> float:
        """Return how long a stop may take before signals."""
        return self.spec.stop_timeout_s or settings.supervision.stop_timeout_s

    def info(self) -> ActorInfo:
        """Return the registry line as of now."""
        return ActorInfo(
            name=self.spec.name,
            incarnation=self.incarnation,
            state=self.lifecycle.state,
            pid=self.pid,
            group=self.group,
            epoch=self.epoch,
            rank=self.rank,
            restarts=self.restarts,
            since_s=round(time.monotonic() - self.lifecycle.since_s, 3),
            reason=self.lifecycle.reason,
            rss_bytes=self.rss_bytes,
            lag_ms=round(self.lag_ms, 2),
            mailbox_depth=self.mailbox_depth,
        )
