"""How many connections each front of this daemon holds, in memory that they share.

Each front writes its own number, and reads the others' when a connection comes. A dead front's is
that of its last moment, so a number is a reason to leave a connection to another front for a
moment, and never to refuse one.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Final

FILE_SUFFIX: Final = ".share"
_NUMBER_BYTES: Final = 4
_MAX_NUMBER: Final = 2**32 - 1
# A front may be ahead by so many, and by this share of what the other has: a difference that costs
# nobody anything is not worth waiting for.
_LEAD: Final = 2
_LEAD_SHARE: Final = 1 / 8


class ConnectionShare:
    """The numbers of all fronts. Each front writes only its own."""

    def __init__(self, runtime_dir: Path, num_fronts: int, index: int) -> None:
        """Share a file of the runtime directory; the connections of a dead front are gone."""
        fd = os.open(
            runtime_dir / f"fronts{FILE_SUFFIX}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            os.ftruncate(fd, num_fronts * _NUMBER_BYTES)
            self._numbers = memoryview(mmap.mmap(fd, num_fronts * _NUMBER_BYTES)).cast("I")
        finally:
            os.close(fd)
        self._index = index
        self._numbers[index] = 0

    def __repr__(self) -> str:
        return f"ConnectionShare({self._numbers.tolist()}, own {self._index})"

    def opened(self) -> None:
        """Count a connection of this front."""
        self._numbers[self._index] += 1

    def closed(self) -> None:
        """Count one less."""
        if self._numbers[self._index] != _MAX_NUMBER:
            self._numbers[self._index] -= 1

    @property
    def is_ahead(self) -> bool:
        """Tell whether another front has clearly fewer connections than this one."""
        least = min(self._numbers)
        return self._numbers[self._index] > least + _LEAD + least * _LEAD_SHARE

    def leave(self) -> None:
        """Let nobody wait for this front, which takes no connections any more."""
        self._numbers[self._index] = _MAX_NUMBER
