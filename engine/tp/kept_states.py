"""Copies of sequences' KV blocks and recurrent states that a worker keeps at the leader's request.

Named by ids that the leader chooses. Bounded: each copy takes memory beside the cache. Between
steps only, so a copy is of one moment. What a request names is checked, since a wrong block or slot
is another sequence's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from cortexd.errors import InvalidValue
from engine.cache.kv_cache import KVCache
from engine.cache.slot_pool import NULL_SLOT
from engine.token_ids import unpack_token_ids

MAX_KEPT: Final = 64


@dataclass(frozen=True, slots=True)
class KeptState:
    """(num_layers, num_blocks, ...) of the KV cache; S and the tail of all linear layers."""

    blocks: Tensor
    states: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes it takes."""
        return sum(tensor.nbytes for tensor in (self.blocks, *self.states))


class KeptStates:
    """See the module's text. `cache` answers the rank's present cache."""

    def __init__(self, cache: Callable[[], KVCache | None]) -> None:
        self._cache = cache
        self._kept: dict[int, KeptState] = {}

    def __repr__(self) -> str:
        return f"<KeptStates: {len(self._kept)} of at most {MAX_KEPT}>"

    def __contains__(self, snapshot_id: int) -> bool:
        return snapshot_id in self._kept

    @torch.inference_mode()
    def keep(self, snapshot_id: int, packed_blocks: bytes, slot: int) -> int:
        """Copy blocks and the state in `slot`; return the bytes. Raises: InvalidValue."""
        cache, blocks = self._checked(packed_blocks, slot)
        if snapshot_id in self._kept:
            raise InvalidValue(f"snapshot {snapshot_id} is kept already; drop it first")
        if len(self._kept) >= MAX_KEPT:
            raise InvalidValue(f"{MAX_KEPT} snapshots are kept; at most that many; drop one")
        index = torch.tensor(blocks, device=cache.blocks.device)
        states = () if cache.states is None else cache.states.tensors
        kept = KeptState(
            cache.blocks.index_select(1, index), tuple(state[:, slot].clone() for state in states)
        )
        self._kept[snapshot_id] = kept
        return kept.num_bytes

    @torch.inference_mode()
    def restore(self, snapshot_id: int, packed_blocks: bytes, slot: int) -> None:
        """Write a kept copy into other blocks and `slot`. Raises: InvalidValue.

        The id is known; see `in`.
        """
        cache, blocks = self._checked(packed_blocks, slot)
        kept = self._kept[snapshot_id]
        if len(blocks) != kept.blocks.shape[1]:
            raise InvalidValue(
                f"snapshot {snapshot_id} has {kept.blocks.shape[1]} blocks, not {len(blocks)}"
            )
        index = torch.tensor(blocks, device=cache.blocks.device)
        cache.blocks.index_copy_(1, index, kept.blocks)
        states = () if cache.states is None else cache.states.tensors
        for state, copy in zip(states, kept.states, strict=True):
            state[:, slot].copy_(copy)

    def drop(self, snapshot_id: int) -> None:
        """Forget a copy, if it is there."""
        self._kept.pop(snapshot_id, None)

    def clear(self) -> None:
        """Forget all copies: they are of a cache that is no more."""
        self._kept.clear()

    def _checked(self, packed_blocks: bytes, slot: int) -> tuple[KVCache, list[int]]:
        cache = self._cache()
        if cache is None:
            raise InvalidValue("there is no KV cache yet")
        size, blocks = cache.size, unpack_token_ids(packed_blocks, "blocks")
        if not blocks or min(blocks) < 0 or max(blocks) >= size.num_blocks:
            raise InvalidValue(f"blocks {blocks[:10]}; allowed: some of 0 to {size.num_blocks - 1}")
        if len(set(blocks)) < len(blocks):
            raise InvalidValue(f"blocks {blocks[:10]}: each must be named once")
        first = NULL_SLOT + 1 if size.num_state_slots else NULL_SLOT
        if not first <= slot <= size.num_state_slots:
            raise InvalidValue(f"state slot {slot}; allowed: {first} to {size.num_state_slots}")
        return cache, blocks
