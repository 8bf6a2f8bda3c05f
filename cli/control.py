"""Talk to the running daemon over its admin socket.

Every command but `start`, `config` and `version` goes through here. A daemon that does not run is
told from one that does not answer, without waiting: a plain connect to the socket decides.
"""

from __future__ import annotations

import argparse
import os
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, Protocol

from cli.exit_code import CommandError
from cortexd.config import LoadedSettings, load_settings
from cortexd.errors import ErrorInfo, Internal, NotRunning
from cortexd.paths import admin_socket, verify_private_dir
from cortexd.settings import Settings

REPLY_TIMEOUT_S: Final = 10.0
Document = dict[str, object]


class Channel(Protocol):
    """What `actors.transport.admin_channel.AdminChannel` offers."""

    def request(self, op: str, args: Mapping[str, object]) -> Document:
        """Run one operation. Raises: the CortexError it ended in, DeadlineExceeded."""

    def events(self) -> Iterator[Document]:
        """Yield the events of the operations and streams this channel began."""


def settings_of(args: argparse.Namespace) -> LoadedSettings:
    """Load the settings a command runs with. Raises: ConfigError."""
    return load_settings(args.config, os.environ, Path.cwd())


@contextmanager
def connected(settings: Settings) -> Iterator[Channel]:
    """Open a channel to the daemon of these settings.

    Raises: NotRunning, ConfigError when its folder cannot be trusted.
    """
    path = admin_socket(settings)
    if not is_running(settings):
        raise NotRunning(f"not running: nothing answers at {path}; start it with: cortexd start")
    verify_private_dir(path.parent)
    with open_channel(path) as channel:
        yield channel


def open_channel(path: Path) -> AbstractContextManager[Channel]:
    """Return a channel to the admin socket at `path`."""
    # Lazy: zmq is worth importing only once there is somebody to talk to.
    from actors.transport.admin_channel import AdminChannel

    return AdminChannel(path, timeout_s=REPLY_TIMEOUT_S)


def is_running(settings: Settings) -> bool:
    """Return whether a daemon listens on the admin socket; a dead one's socket does not count."""
    path = admin_socket(settings)
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(REPLY_TIMEOUT_S)
            probe.connect(str(path))
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return False
    except PermissionError as error:
        raise CommandError(
            f"{path}: permission denied; run as the daemon's user, or set paths.runtime_dir"
        ) from error
    return True


def wait_for_operation(
    channel: Channel, accepted: Document, on_progress: Callable[[Document], None]
) -> Document:
    """Follow an accepted operation to its end; return what it ended with.

    Raises: the CortexError it failed with, Internal when the daemon goes away meanwhile.
    """
    operation = accepted.get("op_id")
    for event in channel.events():
        if event.get("op_id") != operation:
            continue
        data = event.get("data")
        document = data if isinstance(data, dict) else {}
        if event.get("event") == "progress":
            on_progress(document)
        elif event.get("event") == "failed":
            raise error_of(document)
        else:
            return document
    raise Internal("the daemon ended before the operation did; see: cortexd logs")


def error_of(document: Document) -> Exception:
    """Return the exception an error document stands for."""
    code, message = document.get("code"), document.get("message")
    param, retry_after_s = document.get("param"), document.get("retry_after_s")
    info = ErrorInfo(
        code if isinstance(code, str) else Internal.code,
        message if isinstance(message, str) else "the operation failed; see: cortexd logs",
        param if isinstance(param, str) else None,
        retry_after_s if isinstance(retry_after_s, int | float) else None,
    )
    return info.to_exception()
