"""How the engine of rank 0 keeps the other ranks in step; the leader actor implements it.

Every decision that depends on data is in the plan that `begin_step` sends, so ranks cannot part.
"""

from __future__ import annotations

from typing import Protocol

from engine.cache.kv_cache import CacheSize
from engine.scheduling.step_plan import StepPlan


class Lockstep(Protocol):
    """What the engine asks of whoever speaks with the workers."""

    def shards_loaded(self, free_bytes: int) -> int:
        """Wait until all ranks hold their weights; return the least free memory of any rank."""
        ...

    def make_cache(self, size: CacheSize) -> int:
        """Let every worker make its cache of this size; return all their memory in bytes."""
        ...

    def begin_step(self, plan: StepPlan) -> None:
        """Send the plan to all workers. They run it while rank 0 does."""
        ...

    def end_step(self) -> None:
        """Wait for every worker's answer. Raises: when any of them failed or is late."""
        ...


class Alone:
    """The lockstep of one rank: nobody to wait for."""

    def shards_loaded(self, free_bytes: int) -> int:
        """Return the only rank's free memory."""
        return free_bytes

    def make_cache(self, size: CacheSize) -> int:
        """Do nothing."""
        return 0

    def begin_step(self, plan: StepPlan) -> None:
        """Do nothing."""

    def end_step(self) -> None:
        """Do nothing."""
