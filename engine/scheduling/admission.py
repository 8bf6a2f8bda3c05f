"""Who waits to be run, whether the first of them may begin, and when one has waited too long.

Part of the scheduler. First in, first out: a sequence begins when a seat is free and its whole
prompt has room beside what the running prompts still need; without that it would only be preempted
again. What it shares with a cached prefix that somebody holds takes no room. A sequence that has
not begun after `engine.kv_wait_s` is given up, since its client should ask elsewhere; one that was
preempted has promised its client an answer, stands at the head and gets the next room there is.

Room is counted in bytes (`KVRoom`). None is reserved for answers, as an answer that finds no block
preempts instead of failing; and what could never have its blocks is refused by its length, since a
full context always fits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from cortexd.errors import Overloaded, QueueTimeout
from cortexd.settings import Engine as EngineSettings
from engine.cache.kv_room import KVRoom
from engine.cache.prefix_cache import PrefixCache
from engine.cache.prefix_tree import PrefixNode
from engine.cache.slot_pool import NULL_SLOT
from engine.scheduling.sequence import Sequence

_QUEUE_RETRY_AFTER_S: Final = 1.0
# Room comes when an answer ends, which takes seconds.
_ROOM_RETRY_AFTER_S: Final = 5.0


class Admission:
    """The waiting queue of one engine; `max_running` is the most sequences that run at once."""

    def __init__(
        self,
        settings: EngineSettings,
        room: KVRoom,
        prefix_cache: PrefixCache,
        max_running: int,
        clock: Callable[[], float],
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        self._room = room
        self._prefix_cache = prefix_cache
        self._max_running = max_running
        self._max_depth = settings.max_queue_depth
        self._max_wait_s = settings.kv_wait_s
        self._clock = clock

    def __repr__(self) -> str:
        return f"<Admission: {len(self.waiting)} waiting, {self._room}>"

    @property
    def waiting_bytes(self) -> int:
        """Bytes that the waiting sequences will take when they begin."""
        num_blocks = sum(self._num_blocks(sequence) for sequence in self.waiting)
        return self._room.sum_bytes(num_blocks, len(self.waiting))

    def check(self, running: list[Sequence]) -> None:
        """Raise `Overloaded` when one more sequence would stand beyond the queue's bound."""
        if len(self.waiting) - (self._max_running - len(running)) < self._max_depth:
            return
        raise Overloaded(
            f"the engine's queue holds {self._max_depth} requests, the most it may "
            f"(engine.max_queue_depth), which wait for {self.waiting_bytes} bytes of KV memory; "
            f"{self._available_bytes(running)} of {self._room.limit_bytes} are free; retry later",
            retry_after_s=_QUEUE_RETRY_AFTER_S,
        )

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait behind all others."""
        sequence.waiting_since = self._clock()
        self.waiting.append(sequence)

    def find(self, running: list[Sequence]) -> list[PrefixNode] | None:
        """Return the cached prefix of the first sequence, None when it has no room yet.

        The caller has made sure that a seat is free.
        """
        if not self.waiting or not self._has_state():
            return None
        sequence = self.waiting[0]
        found = self._prefix_cache.find(sequence)
        is_fitting = self._needed_blocks(sequence, found) <= self._unclaimed_blocks(running)
        return found if is_fitting or not running else None

    def overdue(self, running: list[Sequence]) -> list[tuple[Sequence, QueueTimeout]]:
        """Return the sequences that have waited as long as they may, each with its error."""
        since = self._clock() - self._max_wait_s
        found = []
        for place, sequence in enumerate(self.waiting):
            if sequence.num_preemptions:
                continue
            if sequence.waiting_since > since:
                break  # those behind it came later
            found.append((sequence, self._timeout(sequence, place, running)))
        return found

    def _timeout(self, sequence: Sequence, place: int, running: list[Sequence]) -> QueueTimeout:
        num_blocks = self._needed_blocks(sequence, self._prefix_cache.find(sequence))
        needed, available = self._room.sum_bytes(num_blocks, 1), self._available_bytes(running)
        return QueueTimeout(
            f"request {sequence.submit.request_id} could not begin within {self._max_wait_s:g} s "
            f"(engine.kv_wait_s): it needs {needed} bytes of KV memory, {available} of "
            f"{self._room.limit_bytes} are free (engine.kv_cache_mib); {len(running)} of at most "
            f"{self._max_running} requests run and {place} wait before it; retry later, or send a "
            "shorter prompt",
            retry_after_s=_ROOM_RETRY_AFTER_S,
            needed_bytes=needed,
            available_bytes=available,
            limit_bytes=self._room.limit_bytes,
        )

    def _has_state(self) -> bool:
        snapshots = self._prefix_cache.snapshots
        return snapshots is None or snapshots.has_room

    def _num_blocks(self, sequence: Sequence) -> int:
        """Blocks of all its tokens and of the next one."""
        return self._room.num_blocks(len(sequence.token_ids) + 1)

    def _needed_blocks(self, sequence: Sequence, found: list[PrefixNode]) -> int:
        return self._num_blocks(sequence) - self._prefix_cache.num_held(found)

    def _unclaimed_blocks(self, running: list[Sequence]) -> int:
        """Free blocks less those that running prompts still need."""
        claimed = sum(
            max(0, self._num_blocks(sequence) - len(sequence.block_table)) for sequence in running
        )
        return self._room.pool.num_free - claimed

    def _available_bytes(self, running: list[Sequence]) -> int:
        """Bytes that a sequence which begins now could have; a snapshot's place counts as free."""
        num_slots = 0
        if self._room.slots is not None:
            held = sum(sequence.state_slot != NULL_SLOT for sequence in running)
            num_slots = self._room.slots.num_slots - held
        return self._room.sum_bytes(max(0, self._unclaimed_blocks(running)), num_slots)
