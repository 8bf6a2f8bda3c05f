"""A barrier between processes that share memory; see barrier.h."""

from __future__ import annotations

from typing import Final

import torch

from engine.kernels.cpu import library

_WORD_BYTES: Final = 64
_ROUNDS: Final = 2**32


class Barrier:
    """One rank's end; every rank calls `wait` equally often."""

    def __init__(
        self,
        words: torch.Tensor,
        rank: int,
        world_size: int,
        num_spins: int,
        timeout_s: float,
    ) -> None:
        """Take `num_bytes` of shared memory, uint8 and zero at first; it must stay mapped."""
        assert words.nbytes >= self.num_bytes(world_size), f"{words.nbytes} bytes for the words"
        self._words = words
        self._wait = library.load().cortexd_barrier
        self._fixed = (num_spins, int(timeout_s * 1e6))
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._round = 0

    @staticmethod
    def num_bytes(world_size: int) -> int:
        """Return what the words take: one for each rank, and one for those that sleep."""
        return (world_size + 1) * _WORD_BYTES

    def wait(self) -> None:
        """Return when all ranks have come. Raises: RuntimeError when one did not in time."""
        self._round = (self._round + 1) % _ROUNDS
        missing = self._wait(
            self._words.data_ptr(), self._rank, self._world_size, self._round, *self._fixed
        )
        if missing >= 0:
            raise RuntimeError(
                f"rank {self._rank}: rank {missing} did not come to the sum within "
                f"{self._timeout_s:g} s"
            )
