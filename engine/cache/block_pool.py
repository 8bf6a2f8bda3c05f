"""The pool of KV-cache block ids: who holds a block, and which one is handed out next.

Called by the scheduler and its prefix cache; pure bookkeeping, no tensors. A block is held by
counted references, so sequences may share one. A block without references is free; when the prefix
cache still knows its content it stands in a list of its own, from which the least recently used one
is taken only after all others. A wrong release is a programmer's error and raises `AssertionError`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

# Padding rows of a captured graph write somewhere: to block 0, which no sequence ever holds.
NULL_BLOCK: Final = 0


class BlockPool:
    """Counted references over the block ids 1..num_blocks-1.

    `on_evict` is called with a known block whose content must go; it has to call `forget` for it.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, f"a pool needs a null block and one more, got {num_blocks}"
        self.num_blocks = num_blocks
        self.on_evict: Callable[[int], None] = self.forget
        self._ref_counts = [0] * num_blocks
        self._ref_counts[NULL_BLOCK] = 1
        self._known = [False] * num_blocks
        # Both in the order in which their blocks became free.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<BlockPool: {self.num_used} used, {self.num_free} free>"

    @property
    def num_usable(self) -> int:
        """Blocks that sequences may hold in all."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, whether their content is known or not."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose content is known."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_usable - self.num_free

    def is_held(self, block: int) -> bool:
        """Tell whether anybody holds the block."""
        return self._ref_counts[block] > 0

    def allocate(self, count: int, after: int = NULL_BLOCK) -> list[int]:
        """Take `count` free blocks; the caller made sure that there are so many.

        The block behind `after` is preferred, and then its successors: attention reads a table of
        consecutive blocks in place, any other one through a copy.
        """
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        blocks: list[int] = []
        for _ in range(count):
            if not self._free:
                self.on_evict(next(iter(self._cached)))
            after = after + 1 if after + 1 in self._free else next(iter(self._free))
            del self._free[after]
            self._ref_counts[after] = 1
            blocks.append(after)
        return blocks

    def share(self, blocks: list[int]) -> None:
        """Add one reference to each block; a free one leaves its list."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._list_of(block)[block]
            self._ref_counts[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Drop one reference of each block; the last reference makes it free."""
        for block in blocks:
            assert block != NULL_BLOCK, "the null block is never released"
            assert self._ref_counts[block] > 0, f"block {block} released twice"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._list_of(block)[block] = None

    def remember(self, block: int) -> None:
        """Mark a held block's content as known: it is kept as long as there are other free ones."""
        assert self.is_held(block), f"block {block} is published by nobody who holds it"
        self._known[block] = True

    def forget(self, block: int) -> None:
        """Mark a block's content as unknown."""
        self._known[block] = False
        if block in self._cached:
            del self._cached[block]
            self._free[block] = None

    def evict_all(self) -> None:
        """Forget the content of all blocks that nobody holds."""
        while self._cached:
            self.on_evict(next(iter(self._cached)))

    def _list_of(self, block: int) -> OrderedDict[int, None]:
        return self._cached if self._known[block] else self._free
