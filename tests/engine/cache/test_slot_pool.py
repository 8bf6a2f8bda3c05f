"""Which state slots are handed out, and what a wrong release does."""

from __future__ import annotations

import pytest

from engine.cache.slot_pool import NULL_SLOT, SlotPool


def test_slots_are_unique_and_never_the_null_slot() -> None:
    """All slots can be held at once; none twice."""
    pool = SlotPool(3)
    held = [pool.allocate() for _ in range(3)]
    assert sorted(held) == [1, 2, 3]
    assert NULL_SLOT not in held
    assert (pool.num_free, pool.num_used) == (0, 3)
    with pytest.raises(AssertionError, match="no free slot"):
        pool.allocate()


def test_released_slot_is_used_last() -> None:
    """What a slot held stays there as long as others are free."""
    pool = SlotPool(3)
    first = pool.allocate()
    pool.release(first)
    assert [pool.allocate() for _ in range(3)] == [2, 3, first]


@pytest.mark.parametrize("slot", [NULL_SLOT, 2, 99])
def test_wrong_release_is_refused(slot: int) -> None:
    """The null slot, a free one and an unknown one."""
    pool = SlotPool(3)
    pool.allocate()
    with pytest.raises(AssertionError, match="is not held"):
        pool.release(slot)
