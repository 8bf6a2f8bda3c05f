"""The pool of state slots of a hybrid model: who holds one, and which is handed out next.

Called by the scheduler only; pure bookkeeping, no tensors. A wrong release is a programmer's error
and raises `AssertionError` at once.
"""

from __future__ import annotations

from collections import deque
from typing import Final

# Padding rows of a captured graph keep their state here; no sequence ever holds it.
NULL_SLOT: Final = 0


class SlotPool:
    """Slot ids 1..num_slots, each held by at most one owner."""

    def __init__(self, num_slots: int) -> None:
        assert num_slots >= 1, f"a pool needs a slot, got {num_slots}"
        self.num_slots = num_slots
        self._free = deque(range(1, num_slots + 1))
        self._held: set[int] = set()

    def __repr__(self) -> str:
        return f"<SlotPool: {self.num_used} used, {self.num_free} free>"

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Slots that somebody holds."""
        return len(self._held)

    def allocate(self) -> int:
        """Take a free slot; the caller made sure that there is one."""
        assert self._free, "no free slot"
        slot = self._free.popleft()
        self._held.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back."""
        assert slot in self._held, f"slot {slot} is not held"
        self._held.remove(slot)
        self._free.append(slot)
