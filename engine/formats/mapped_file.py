"""A model file mapped read-only into memory, with bounds-checked views.

Every reader in this folder goes through it, so a missing file, a directory, a pipe or an empty
file is refused in one place, with the file's name.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from pathlib import Path

from cortexd.errors import BadModelFile


class MappedFile:
    """One regular, non-empty file. `data` is the mapping, `size` its length in bytes."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for a writer for ever.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise BadModelFile(f"{self.path}: cannot be opened: {reason}") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadModelFile(f"{self.path}: not a regular file")
            if status.st_size == 0:
                raise BadModelFile(f"{self.path}: the file is empty")
            self.size = status.st_size
            self.data = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise BadModelFile(f"{self.path}: cannot be mapped: {error}") from None
        finally:
            os.close(descriptor)

    def view(self, begin: int, end: int) -> memoryview:
        """Return bytes `begin` to `end`, which the caller has checked against `size`."""
        assert 0 <= begin <= end <= self.size, f"view {begin}:{end} of {self.size} bytes"
        return memoryview(self.data)[begin:end]

    def release_pages(self) -> None:
        """Drop the mapping's pages from this process; the page cache keeps what it likes."""
        self.data.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap, unless views are held: then the mapping goes with the last of them."""
        with contextlib.suppress(BufferError):
            self.data.close()
