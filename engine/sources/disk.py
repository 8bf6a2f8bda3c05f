"""Disk space: checked before a fetch, and a disk that fills up while writing.

Both end as `InsufficientDisk` naming the path and both sizes.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cortexd.errors import InsufficientDisk

_FULL_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def require_free(directory: Path, needed_bytes: int, setting: str) -> None:
    """Raise `InsufficientDisk` when the disk of `directory` cannot take `needed_bytes` more.

    `setting` is the option with which the user can choose another disk.
    """
    free_bytes = _free_bytes(directory)
    if needed_bytes > free_bytes:
        raise insufficient_disk(directory, needed_bytes, setting, free_bytes)


def insufficient_disk(
    directory: Path, needed_bytes: int, setting: str, free_bytes: int | None = None
) -> InsufficientDisk:
    """Return the error, with the free space of now unless it is given."""
    if free_bytes is None:
        free_bytes = _free_bytes(directory)
    return InsufficientDisk(
        f"{directory}: not enough disk space: {needed_bytes} bytes needed, {free_bytes} bytes "
        f"free; free some or set {setting} to a folder on another disk",
        path=str(directory),
        needed_bytes=needed_bytes,
        free_bytes=free_bytes,
    )


@contextmanager
def disk_full_as_error(directory: Path, needed_bytes: int, setting: str) -> Iterator[None]:
    """Turn a write that fails for want of space into `InsufficientDisk`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL_ERRORS:
            raise insufficient_disk(directory, needed_bytes, setting) from error
        raise


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(directory: Path) -> int:
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return shutil.disk_usage(directory).free
