"""The pool of KV blocks."""

import pytest

from engine.cache.block_pool import NULL_BLOCK, BlockPool


def test_allocate_all_blocks_hands_out_each_once_and_never_the_null_block() -> None:
    """Every usable block is handed out exactly once."""
    pool = BlockPool(9)
    blocks = pool.allocate(3) + pool.allocate(5)
    assert sorted(blocks) == list(range(1, 9))
    assert NULL_BLOCK not in blocks
    assert (pool.num_free, pool.num_used) == (0, 8)


def test_allocate_after_a_block_prefers_its_successor() -> None:
    """A growing sequence keeps consecutive blocks while they are free."""
    pool = BlockPool(16)
    first = pool.allocate(2)
    assert pool.allocate(2, after=first[-1]) == [3, 4]
    assert pool.allocate(1, after=2) == [5]


def test_allocate_more_than_free_is_a_programmers_error() -> None:
    """The caller has to make room first."""
    with pytest.raises(AssertionError, match="5 blocks wanted, 3 free"):
        BlockPool(4).allocate(5)


def test_release_of_a_shared_block_frees_it_with_the_last_reference() -> None:
    """A shared block outlives its first holder."""
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_used == 1
    pool.release(blocks)
    assert pool.num_used == 0


def test_share_of_a_free_block_takes_it_off_the_free_list() -> None:
    """A cached block that nobody holds can be held again."""
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    pool.release(blocks)
    pool.share(blocks)
    assert blocks[0] not in pool.allocate(2)


def test_release_twice_is_a_programmers_error() -> None:
    """A double free is seen at once."""
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)


def test_allocate_reuses_the_least_recently_freed_block_first() -> None:
    """Free blocks are reused in the order in which they were freed."""
    pool = BlockPool(6)
    pool.allocate(5)
    for block in (4, 2, 5):
        pool.release([block])
    assert pool.allocate(1) == [4]
    assert repr(pool) == "<BlockPool: 3 used, 2 free>"
