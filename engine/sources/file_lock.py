"""A lock between processes for one folder of the model cache."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from engine.sources.transfer import Transfer

_POLL_S: Final = 0.1


@contextmanager
def lock_file(path: Path, transfer: Transfer) -> Iterator[None]:
    """Hold the lock `path`, waiting for another holder until cancelled or late.

    The kernel releases it when the holder dies; the file itself stays, since removing it would let
    two processes hold locks on different files of one name.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while not _try_lock(descriptor):
            transfer.report("waiting for another download", 0, 0)
            transfer.wait(_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
