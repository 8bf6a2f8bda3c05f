"""Memory in 2 MiB pages: for packed weights few large mappings, for a KV cache one.

Used by `linear.pack` and `cache.kv_cache`. State: the mapping that is being filled; a mapping is
freed when the last tensor in it is. Huge pages matter: 4 KiB pages read memory at 86 % of the
bandwidth at best, 2 MiB pages at 100 % (measured on a streaming 4-bit kernel), and the kernel gives
them only to who asks.
"""

from __future__ import annotations

import mmap
from typing import Final

import torch
from torch import Tensor

HUGE_PAGE: Final = 2 << 20
CHUNK_BYTES: Final = 64 << 20
ALIGNMENT: Final = 64


class Arena:
    """Hands out 64-byte aligned byte tensors, one after the other, from huge-page mappings."""

    def __init__(self) -> None:
        self._chunk: Tensor | None = None
        self._used = 0

    def allocate(self, num_bytes: int) -> Tensor:
        """Return a zeroed uint8 tensor of `num_bytes` that keeps its mapping alive."""
        if num_bytes > CHUNK_BYTES // 4:
            return map_huge(num_bytes)
        if self._chunk is None or self._used + num_bytes > self._chunk.numel():
            self._chunk = map_huge(CHUNK_BYTES)
            self._used = 0
        begin = self._used
        self._used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return self._chunk[begin : begin + num_bytes]


def map_huge(num_bytes: int) -> Tensor:
    """Return a zeroed uint8 tensor in huge pages, which take memory once they are touched.

    Raises: MemoryError.
    """
    size = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
    try:
        mapping = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot map {size + HUGE_PAGE} bytes: {error.strerror}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE_PAGE
    return whole[begin : begin + num_bytes]
