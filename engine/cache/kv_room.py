"""The KV memory of one model in bytes: what a sequence needs, what is free, what there is.

Used by admission, the scheduler and the load report; pure arithmetic over the two pools. A sequence
holds blocks by its length and, of a hybrid model, one recurrent state. Blocks and states lie in
tensors of their own and cannot stand in for each other, so each pool is counted for itself and only
sums are told.
"""

from __future__ import annotations

from engine.cache.block_pool import BlockPool
from engine.cache.slot_pool import SlotPool


class KVRoom:
    """Both pools, and what one piece of each takes; `slots` only for a hybrid."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        block_bytes: int,
        slots: SlotPool | None = None,
        slot_bytes: int = 0,
    ) -> None:
        self.pool = pool
        self.slots = slots
        self.block_size = block_size
        self._block_bytes = block_bytes
        self._slot_bytes = slot_bytes

    def __repr__(self) -> str:
        return f"<KVRoom: {self.pool}, {self.slots}, {self.limit_bytes} bytes>"

    @property
    def limit_bytes(self) -> int:
        """Bytes that all sequences together may hold."""
        num_slots = 0 if self.slots is None else self.slots.num_slots
        return self.sum_bytes(self.pool.num_usable, num_slots)

    def num_blocks(self, num_tokens: int) -> int:
        """Return how many blocks hold the KV of so many tokens."""
        return -(-num_tokens // self.block_size)

    def sum_bytes(self, num_blocks: int, num_sequences: int) -> int:
        """Return the bytes of so many blocks and the states of so many sequences."""
        return num_blocks * self._block_bytes + num_sequences * self._slot_bytes
