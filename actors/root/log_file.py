"""The rotating log file: appends whole lines, rotates by size, outlives a bad disk.

Owned by `actors.root.logs`. A write that fails is reported once and retried after a pause; lines of
the pause are lost for the file (the rings still have them), the service never is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

_RETRY_AFTER_S: Final = 10.0


class RotatingFile:
    """`path`, `path.1` … `path.<max_files - 1>`, each of at most `max_bytes`."""

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int,
        max_files: int,
        now_s: Callable[[], float],
        on_failure: Callable[[OSError], None],
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._now_s = now_s
        self._on_failure = on_failure
        self._fd = -1
        self._size = 0
        self._retry_at_s = 0.0
        self.is_failing = False

    def __repr__(self) -> str:
        return f"RotatingFile({self._path}, {self._size} bytes, failing {self.is_failing})"

    def write(self, data: bytes) -> None:
        """Append; never raises."""
        if self.is_failing and self._now_s() < self._retry_at_s:
            return
        try:
            self._write(data)
        except OSError as error:
            self._retry_at_s = self._now_s() + _RETRY_AFTER_S
            was_failing, self.is_failing = self.is_failing, True
            self.close()
            if not was_failing:
                self._on_failure(error)
        else:
            self.is_failing = False

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, data: bytes) -> None:
        if self._fd < 0:
            self._open()
        if self._size and self._size + len(data) > self._max_bytes:
            self._rotate()
        self._size += os.write(self._fd, data)

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._fd).st_size

    def _rotate(self) -> None:
        self.close()
        for index in range(self._max_files - 1, 0, -1):
            older = self._numbered(index - 1)
            if older.exists():
                older.replace(self._numbered(index))
        if self._max_files == 1:
            self._path.unlink()
        self._open()

    def _numbered(self, index: int) -> Path:
        return self._path if index == 0 else self._path.with_name(f"{self._path.name}.{index}")
