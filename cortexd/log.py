"""Structured logging: one JSON object a line on standard error, event name first.

Every process calls `configure_logging` once. `event(log, "actor.restarted", name=..., pid=...)` is
the only way our code logs; the root adds nothing but where the line came from.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Final, TextIO

import msgspec

_encode = msgspec.json.Encoder(enc_hook=str).encode

# What formatters of others may ask for, and a record of ours does not know.
_UNKNOWN: Final[dict[str, Any]] = {
    **dict.fromkeys(("pathname", "filename", "module", "funcName"), ""),
    **dict.fromkeys(("lineno", "process", "thread", "relativeCreated"), 0),
    **dict.fromkeys(("args", "exc_text", "stack_info", "processName", "threadName", "taskName")),
}


class EventRecord(logging.LogRecord):
    """A record of one event: what our lines show, without what takes long to find out."""

    def __init__(
        self, log: logging.Logger, level: int, name: str, fields: dict[str, object], *, cause: Any
    ) -> None:
        # Without the base class's part, which asks for thread, process and file.
        self.__dict__.update(_UNKNOWN)
        self.name = log.name
        self.levelno = level
        self.levelname = logging.getLevelName(level)
        self.msg = name
        self.cortexd_fields = fields
        self.exc_info = cause
        self.created = time.time()
        self.msecs = self.created % 1 * 1000


class JsonFormatter(logging.Formatter):
    """Format a record as `{"event", "level", "time", "actor", ...fields}`."""

    def __init__(self, actor: str) -> None:
        super().__init__()
        self._actor = actor
        self._second = -1
        self._second_text = ""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line of JSON; all that is not printable is escaped, so a line stays a line.

        JSON itself lets line separators other than those of ASCII through.
        """
        document: dict[str, object] = {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "time": f"{self._time_to_second(record.created)}.{int(record.msecs):03d}Z",
            "actor": self._actor,
        }
        if isinstance(record, EventRecord):
            document |= record.cortexd_fields
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        line = _encode(document).decode()
        if line.isprintable():
            return line
        return "".join([char if char.isprintable() else json.dumps(char)[1:-1] for char in line])

    def _time_to_second(self, created: float) -> str:
        second = int(created)
        if second != self._second:
            self._second = second
            self._second_text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return self._second_text


def configure_logging(actor: str, level: str, stream: TextIO | None = None) -> None:
    """Send this process's log to `stream` (default: standard error) as JSON lines."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(actor))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def event(
    log: logging.Logger,
    name: str,
    level: int = logging.INFO,
    /,
    *,
    exc_info: bool = False,
    **fields: object,
) -> None:
    """Log one event with its fields."""
    if log.isEnabledFor(level):
        cause = sys.exc_info() if exc_info else None
        log.callHandlers(EventRecord(log, level, name, fields, cause=cause))  # we set no filters
