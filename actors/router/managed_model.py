"""One model as the router sees it: its state, who uses it, and who waits for it.

Only the router's loop touches it. Every transition wakes all waiters, which look again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from cortexd.catalogue import DEFAULT_PRIORITY
from cortexd.errors import CortexError
from cortexd.messages import Loading, ModelLoaded
from cortexd.models import (
    LoadOptions,
    ModelFiles,
    ModelLimits,
    ModelPolicy,
    ModelSpec,
    ModelState,
    ModelStatus,
)

_FIRST_COOLDOWN_S = 10.0
_MAX_COOLDOWN_S = 600.0


class Lease(NamedTuple):
    """One request that holds a model, here or at a node: for whom, and which front asked."""

    model_id: str
    front: str  # "name.incarnation"
    account: str  # "": anonymous


@dataclass(slots=True)
class ManagedModel:
    """State of one model on this host."""

    options: LoadOptions
    group: str
    is_known: bool  # in the catalogue or configuration: may be loaded by a request
    state: ModelState = "unloaded"
    epoch: int = 0
    leader: str = ""
    leader_incarnation: int = 0
    files: ModelFiles | None = None
    spec: ModelSpec | None = None
    limits: ModelLimits | None = None
    memory_bytes: int = 0
    device: str = ""
    progress: float | None = None
    stage: str | None = None
    error: CortexError | None = None
    leases: dict[str, Lease] = field(default_factory=dict)  # by request id
    last_used: float = field(default_factory=time.monotonic)
    loaded_at: float | None = None
    state_since: float = field(default_factory=time.monotonic)
    failures: int = 0
    last_load_s: float | None = None
    expected_s: float | None = None  # what the present state takes, where that is known
    sleep_bytes: int = 0
    listed_policy: ModelPolicy = field(default_factory=ModelPolicy)  # by this host's catalogue
    given_policy: ModelPolicy | None = None  # by who had it loaded; goes before the catalogue's
    num_cycles: int = 0  # unloads of other models since this one's engine was started
    load_task: asyncio.Task[None] | None = None
    is_due: bool = False  # to be brought up in its turn since the daemon's start
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def become(
        self,
        state: ModelState,
        *,
        stage: str | None = None,
        error: CortexError | None = None,
        expected_s: float | None = None,
    ) -> None:
        """Enter a state and wake everyone who waits for a change."""
        self.state = state
        self.stage = stage
        self.error = error
        self.expected_s = expected_s
        self.progress = 0.0 if state in {"loading", "recovering"} else None
        self.state_since = time.monotonic()
        if state in {"unloaded", "failed"}:
            self.epoch, self.leader, self.leader_incarnation = 0, "", 0
            self.memory_bytes, self.loaded_at = 0, None
        if state == "failed":
            self.failures += 1
        self.wake()

    def set_loaded(self, loaded: ModelLoaded, leader: str, incarnation: int, epoch: int) -> None:
        """Take over what the leader said of itself."""
        self.options, self.files, self.spec = loaded.options, loaded.files, loaded.spec
        self.limits, self.memory_bytes = loaded.limits, loaded.memory_bytes
        self.device, self.sleep_bytes = loaded.device, loaded.sleep_bytes
        self.leader, self.leader_incarnation, self.epoch = leader, incarnation, epoch
        self.loaded_at = time.time()
        self.last_used = time.monotonic()
        self.failures = self.num_cycles = 0
        self.last_load_s = loaded.load_s
        self.become("sleeping" if loaded.is_asleep else "loaded")

    def offer(self, context: int) -> None:
        """Take over the context that the engine offers at its present speed; 0: as loaded."""
        if context and self.limits is not None and context != self.limits.context:
            self.limits = ModelLimits(context=context, output=context - 1)

    def is_in(self, *states: ModelState) -> bool:
        """Tell whether the model is in one of these states now (it may change at any await)."""
        return self.state in states

    def wake(self) -> None:
        """Wake all waiters."""
        self._changed.set()
        self._changed = asyncio.Event()

    def wait_changed(self) -> Coroutine[object, object, bool]:
        """Await this to return at the next change after the call.

        The event is taken now, not when a task made of this first runs: a change in between would
        be missed.
        """
        return self._changed.wait()

    @property
    def policy(self) -> ModelPolicy:
        """How it is treated while it runs."""
        return self.listed_policy if self.given_policy is None else self.given_policy

    @property
    def priority(self) -> int:
        """The residency class."""
        own = self.policy.residency_priority
        return DEFAULT_PRIORITY if own is None else own

    @property
    def cooldown_left_s(self) -> float:
        """Seconds until a failed load is tried again by a request; 0 when it may be now."""
        if self.state != "failed" or not self.failures:
            return 0.0
        cooldown_s = min(_FIRST_COOLDOWN_S * 2.0 ** min(self.failures - 1, 10), _MAX_COOLDOWN_S)
        return max(0.0, self.state_since + cooldown_s - time.monotonic())

    @property
    def eta_s(self) -> float | None:
        """Expected seconds until loaded, from progress so far or the last load; None: unknown."""
        if self.state not in {"loading", "recovering"}:
            return None
        elapsed_s = time.monotonic() - self.state_since
        if self.progress:
            return elapsed_s * (1 - self.progress) / self.progress
        if self.expected_s is not None:
            return max(0.0, self.expected_s - elapsed_s)
        if self.last_load_s is not None:
            return max(0.0, self.last_load_s - elapsed_s)
        return None

    @property
    def loading(self) -> Loading:
        """How far its load is."""
        return Loading(self.stage, self.progress, self.eta_s)

    def status(self, queue_depth: int = 0) -> ModelStatus:
        """Return the public view; `queue_depth` requests wait for a seat."""
        return ModelStatus(
            model_id=self.options.model_id,
            state=self.state,
            harness=self.options.harness,
            quant=self.options.quant,
            tensor_parallel=self.options.tensor_parallel,
            devices=self.options.devices or (),
            group=self.group,
            epoch=self.epoch,
            leader=self.leader or None,
            files=self.files,
            spec=self.spec,
            limits=self.limits,
            memory_bytes=self.memory_bytes,
            in_flight=len(self.leases),
            queue_depth=queue_depth,
            progress=self.progress,
            stage=self.stage,
            eta_s=self.eta_s,
            error=self.error.message if self.error else None,
            last_used_s=time.monotonic() - self.last_used,
            priority=self.priority,
            idle_ttl_s=self.policy.idle_ttl_s,
            num_cycles=self.num_cycles,
            loaded_at=self.loaded_at,
            sleep_bytes=self.sleep_bytes,
            device=self.device,
            state_s=time.monotonic() - self.state_since,
            is_due=self.is_due,
        )


def anonymous_by_place(leases: Iterable[tuple[str, Lease]]) -> Counter[tuple[str, str]]:
    """Return how many of the requests have no account, by (node, model)."""
    found: Counter[tuple[str, str]] = Counter()
    for node, lease in leases:
        found[node, lease.model_id] += not lease.account
    return found
