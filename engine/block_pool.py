"""The pool of KV-cache block ids: who holds a block, and which one is handed out next.

Called by the scheduler only; pure bookkeeping, no tensors. A block is held by counted references,
so sequences may share one. A block without references stands in the free list, least recently
freed first. A wrong release is a programmer's error and raises `AssertionError` at once.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

# Padding rows of a captured graph write somewhere: to block 0, which no sequence ever holds.
NULL_BLOCK: Final = 0


class BlockPool:
    """Counted references over the block ids 1..num_blocks-1."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, f"a pool needs a null block and one more, got {num_blocks}"
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._ref_counts[NULL_BLOCK] = 1
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    def __repr__(self) -> str:
        return f"<BlockPool: {self.num_used} used, {self.num_free} free>"

    @property
    def num_usable(self) -> int:
        """Blocks that sequences may hold in all."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_usable - len(self._free)

    def allocate(self, count: int, after: int = NULL_BLOCK) -> list[int]:
        """Take `count` free blocks; the caller made sure that there are so many.

        The block behind `after` is preferred, and then its successors: attention reads a table of
        consecutive blocks in place, any other one through a copy.
        """
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        blocks: list[int] = []
        for _ in range(count):
            after = after + 1 if after + 1 in self._free else next(iter(self._free))
            del self._free[after]
            self._ref_counts[after] = 1
            blocks.append(after)
        return blocks

    def share(self, blocks: list[int]) -> None:
        """Add one reference to each block; a free one leaves the free list."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Drop one reference of each block; the last reference makes it free."""
        for block in blocks:
            assert block != NULL_BLOCK, "the null block is never released"
            assert self._ref_counts[block] > 0, f"block {block} released twice"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
