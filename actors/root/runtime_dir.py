"""The runtime directory of one running daemon: its lock, and no file of an earlier one."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from actors import connection_share, open_requests
from cortexd.errors import AlreadyRunning
from cortexd.paths import prepare_private_dir


class RuntimeDir:
    """Holds the directory's lock until closed. The kernel drops it if the process dies."""

    def __init__(self, path: Path) -> None:
        """Take the lock. Raises: AlreadyRunning naming the holder, ConfigError for a bad folder."""
        self.path = prepare_private_dir(path)
        self._fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise AlreadyRunning(
                f"cortexd is already running (pid {holder}) with runtime folder {path}; stop it "
                'with "cortexd stop", or set paths.runtime_dir to another folder',
                pid=int(holder) if holder.isdigit() else None,
            ) from None
        os.ftruncate(self._fd, 0)
        os.write(self._fd, str(os.getpid()).encode())
        self._remove_leftovers()

    def __repr__(self) -> str:
        return f"RuntimeDir({self.path})"

    def close(self) -> None:
        """Remove what was left and let go of the lock."""
        self._remove_leftovers()
        os.ftruncate(self._fd, 0)
        os.close(self._fd)

    def _remove_leftovers(self) -> None:
        for pattern in ("*.s", f"*{open_requests.FILE_SUFFIX}", f"*{connection_share.FILE_SUFFIX}"):
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)
