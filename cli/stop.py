"""`cortexd stop`: tell the daemon to end and wait until it has."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import time
from typing import Final

from cli.control import connected, settings_of
from cli.exit_code import OK, TIMEOUT, CommandError
from cortexd.errors import Internal

# On top of the drain: ordered stop of the actors, then of the root itself.
_STOP_MARGIN_S: Final = 30.0


def stop(args: argparse.Namespace) -> int:
    """Ask for shutdown and wait for the daemon's process. Raises: CommandError."""
    settings = settings_of(args).settings
    with connected(settings) as channel:
        pid = channel.request("status", {}).get("pid")
        if not isinstance(pid, int):
            raise Internal("the daemon did not tell its process id")
        process = _open_process(pid)
        channel.request("shutdown", {"now": args.now})
    drain_s = 0.0 if args.now else settings.gateway.drain_s
    started = time.monotonic()
    if process is not None:
        wait_s = drain_s + settings.supervision.stop_timeout_s + _STOP_MARGIN_S
        if not _ended(process, wait_s):
            raise CommandError(
                f"process {pid} still runs after {wait_s:.0f} s; see: cortexd status", TIMEOUT
            )
    print(f"stopped (process {pid}, {time.monotonic() - started:.1f} s)")
    return OK


def _open_process(pid: int) -> int | None:
    """Return a pidfd, which no later process of the same number can be mistaken for."""
    with contextlib.suppress(ProcessLookupError):  # it has ended already: that is what we want
        return os.pidfd_open(pid)
    return None


def _ended(process: int, timeout_s: float) -> bool:
    """Wait for the end of the process behind a pidfd, and close it."""
    try:
        poller = select.poll()
        poller.register(process, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))
    finally:
        os.close(process)
