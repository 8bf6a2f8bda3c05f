"""Log lines of a busy event loop, written several at a time.

A write for each line wakes its reader for each line: at a thousand requests a second that is more
work than the requests' routing.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Final, TextIO

_DELAY_S: Final = 0.05
_MAX_LINES: Final = 64


class BatchHandler(logging.Handler):
    """Writes what has come within a moment; a warning or worse goes out at once, after the rest."""

    def __init__(self, formatter: logging.Formatter | None, stream: TextIO | None = None) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._stream = stream or sys.stderr
        self._lines: list[str] = []
        self._is_scheduled = False

    def handle(self, record: logging.LogRecord) -> bool:
        """Take in one line without the lock, which the one append does not need."""
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Take in one line. Where no loop runs it is written at once."""
        try:
            self._lines.append(self.format(record))
            is_urgent = record.levelno >= logging.WARNING or len(self._lines) >= _MAX_LINES
            if is_urgent or not self._schedule():
                self._write()
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Write what waits; called at the end of the process too."""
        self.acquire()
        try:
            self._write()
        finally:
            self.release()

    def _schedule(self) -> bool:
        if self._is_scheduled:
            return True
        try:
            asyncio.get_running_loop().call_later(_DELAY_S, self._on_timer)
        except RuntimeError:  # this thread has no loop
            return False
        self._is_scheduled = True
        return True

    def _on_timer(self) -> None:
        self._is_scheduled = False
        self.flush()

    def _write(self) -> None:
        if self._lines:
            lines, self._lines = self._lines, []
            self._stream.write("\n".join(lines) + "\n")
            self._stream.flush()


def write_waiting_lines() -> None:
    """Write the lines of this process's log that wait."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def batch_log_lines() -> None:
    """Let this process's log, already configured, go through a `BatchHandler`."""
    root = logging.getLogger()
    formatter = root.handlers[0].formatter if root.handlers else None
    root.handlers = [BatchHandler(formatter)]
