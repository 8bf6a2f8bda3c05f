"""Where the daemon keeps its sockets, state and downloads: XDG folders, verified.

The runtime folder holds the sockets that control the daemon, so it must belong to this user and be
closed to all others; a folder that somebody else prepared is refused, never repaired.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cortexd.errors import ConfigError
from cortexd.settings import Settings, Store

# sockaddr_un.sun_path is 108 bytes on Linux, the last one a terminating zero.
IPC_PATH_LIMIT: Final = 107
# An inbox: 23 bytes of the actor's name, its incarnation in up to six digits, and ".s".
LONGEST_SOCKET_NAME: Final = 23 + len(".") + 6 + len(".s")
ADMIN_SOCKET: Final = "admin.s"


def runtime_dir(settings: Settings, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of the sockets; nothing is created."""
    if settings.paths.runtime_dir is not None:
        return Path(settings.paths.runtime_dir)
    uid = os.getuid()
    base = _xdg(environ, "XDG_RUNTIME_DIR")
    if base is None and _is_owned(Path(f"/run/user/{uid}"), uid):
        base = Path(f"/run/user/{uid}")
    return base / "cortexd" if base else Path(f"/tmp/cortexd-{uid}")


def state_dir(settings: Settings, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of logs and remembered state; nothing is created."""
    if settings.paths.state_dir is not None:
        return Path(settings.paths.state_dir)
    return (_xdg(environ, "XDG_STATE_HOME") or home_dir(environ) / ".local/state") / "cortexd"


def cache_dir(store: Store, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of downloaded models that no other cache holds; nothing is created."""
    if store.cache_dir is not None:
        return Path(store.cache_dir)
    return (_xdg(environ, "XDG_CACHE_HOME") or home_dir(environ) / ".cache") / "cortexd"


def prepare_private_dir(folder: Path) -> Path:
    """Create `folder` for this user alone (mode 0700) where missing, and verify it.

    Raises: ConfigError when it cannot be created, is no folder, belongs to somebody else, or is
    open to others.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be created: {error.strerror}") from error
    verify_private_dir(folder)
    return folder


def verify_private_dir(folder: Path) -> None:
    """Check that `folder` is a real folder of this user with mode 0700 (root may use any).

    Raises: ConfigError that says what is wrong and what to do.
    """
    try:
        found = folder.lstat()  # a link could be turned elsewhere after the check
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{folder}: not a folder; remove it, or set paths.runtime_dir")
    if os.getuid() not in (0, found.st_uid):
        raise ConfigError(
            f"{folder}: belongs to user id {found.st_uid}, not to {os.getuid()}; "
            "run as that user, or set paths.runtime_dir"
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"{folder}: has mode {mode:04o}, open to other users; allowed: 0700; "
            f"run: chmod 700 {folder}"
        )


def check_room_for_sockets(folder: Path) -> None:
    """Check that the path of every socket in `folder` will fit: some are bound much later.

    Raises: ConfigError.
    """
    size = len(os.fsencode(folder))
    most = IPC_PATH_LIMIT - len("/") - LONGEST_SOCKET_NAME
    if size > most:
        raise ConfigError(
            f"{folder}: a path of {size} bytes; allowed for the folder of the sockets: at most "
            f"{most}; set paths.runtime_dir to a shorter folder"
        )


def ipc_path(folder: Path, name: str) -> Path:
    """Return the path of a socket in `folder`. Raises: ConfigError when the system's limit is hit.

    `name` is the socket's file name, such as `admin.s`.
    """
    path = folder / name
    size = len(os.fsencode(path))
    if size > IPC_PATH_LIMIT:
        raise ConfigError(
            f"{path}: a socket path of {size} bytes; allowed: at most {IPC_PATH_LIMIT}; "
            "set paths.runtime_dir to a shorter folder"
        )
    return path


def admin_socket(settings: Settings, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the admin socket. Raises: ConfigError when it is too long."""
    return ipc_path(runtime_dir(settings, environ), ADMIN_SOCKET)


def config_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of the user's own configuration."""
    return (_xdg(environ, "XDG_CONFIG_HOME") or home_dir(environ) / ".config") / "cortexd"


def home_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the user's home, also where HOME is unset (as under some service managers)."""
    return Path(environ.get("HOME") or "~").expanduser()


def _xdg(environ: Mapping[str, str], name: str) -> Path | None:
    """Return an XDG folder; unset, empty and relative values do not count (as its rules say)."""
    value = environ.get(name, "")
    return Path(value) if os.path.isabs(value) else None


def _is_owned(folder: Path, uid: int) -> bool:
    try:
        return folder.stat().st_uid == uid
    except OSError:
        return False
