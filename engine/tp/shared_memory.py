"""Sums and gathers of CPU ranks through memory that they share, many times faster than gloo.

Used by `Comm`. Each rank writes its part into a slot of its own; behind a barrier all ranks read
all slots, so every rank adds up the same terms in the same order. Slots are there twice and taken
in turn: whoever writes the second time has passed a barrier that all reach only after reading. The
memory has no name, so nothing is left behind whatever dies; a rank that does not come ends the wait
with a RuntimeError at its deadline (the supervisor, which ends the group with any rank, is faster).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from engine.kernels import cpu as native

# What does not fit goes in pieces. On two cores of a Zen 4, larger slots were no faster.
_SLOT_BYTES: Final = 2**20
# About 50 microseconds: ranks with a core each arrive closer together than that.
_NUM_SPINS: Final = 1500
_NUM_COPIES: Final = 2


def memory_bytes(world_size: int) -> int:
    """Return the size of a group's memory."""
    return _header_bytes(world_size) + _NUM_COPIES * world_size * _SLOT_BYTES


class SharedMemory:
    """One rank's view of the group's memory, which is all zero when the first rank comes."""

    def __init__(self, memory: mmap.mmap, rank: int, world_size: int, timeout_s: float) -> None:
        header = _header_bytes(world_size)
        raw = torch.frombuffer(memory, dtype=torch.uint8)
        self._slots = raw[header:].view(_NUM_COPIES, world_size, _SLOT_BYTES)
        has_cores = world_size * native.num_threads() <= len(os.sched_getaffinity(0))
        self._barrier = native.Barrier(
            raw[:header], rank, world_size, _NUM_SPINS if has_cores else 0, timeout_s
        )
        self._rank = rank
        self._num_exchanges = 0

    @classmethod
    def opened(cls, fd: int, rank: int, world_size: int, timeout_s: float) -> SharedMemory:
        """Map the memory behind a file descriptor. Raises: OSError."""
        return cls(mmap.mmap(fd, memory_bytes(world_size)), rank, world_size, timeout_s)

    def add_up(self, partial: Tensor) -> Tensor:
        """Return the sum over all ranks, in place of `partial`, which is contiguous."""
        flat = partial.view(-1)
        for piece, slots in self._exchanges(flat):
            torch.add(slots[0], slots[1], out=piece)
            for slot in slots[2:]:
                piece.add_(slot)
        return partial

    def gather(self, part: Tensor) -> list[Tensor]:
        """Return on rank 0 all ranks' equally large parts in order, on the others nothing."""
        world_size = self._slots.shape[1]
        parts = [torch.empty_like(part) for _ in range(world_size)] if self._rank == 0 else []
        begin = 0
        for piece, slots in self._exchanges(part.reshape(-1)):
            for whole, slot in zip(parts, slots, strict=False):
                whole.view(-1)[begin : begin + len(piece)].copy_(slot)
            begin += len(piece)
        return parts

    def _exchanges(self, flat: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield each piece with the slots of all ranks that hold theirs, valid until the next."""
        size = _SLOT_BYTES // flat.element_size()
        for piece in flat.split(size):
            copy = self._slots[self._num_exchanges % _NUM_COPIES, :, : piece.nbytes]
            slots = list(copy.view(flat.dtype).unbind())
            slots[self._rank].copy_(piece)
            self._num_exchanges += 1
            self._barrier.wait()
            yield piece, slots


def _header_bytes(world_size: int) -> int:
    """Return the bytes of the barrier's words, in whole pages."""
    return -(-native.Barrier.num_bytes(world_size) // mmap.PAGESIZE) * mmap.PAGESIZE
