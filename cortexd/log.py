"""Structured logging: one JSON object a line on standard error, event name first.

Every process calls `configure_logging` once. `event(log, "actor.restarted", name=..., pid=...)` is
the only way our code logs; the root adds nothing but where the line came from.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

import msgspec

_FIELDS = "cortexd_fields"


class JsonFormatter(logging.Formatter):
    """Format a record as `{"event", "level", "time", "actor", ...fields}`."""

    def __init__(self, actor: str) -> None:
        super().__init__()
        self._actor = actor

    def format(self, record: logging.LogRecord) -> str:
        """Return one line of JSON; control characters are escaped, so a line stays a line."""
        document = {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "actor": self._actor,
        }
        document.update(getattr(record, _FIELDS, {}))
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(document, enc_hook=str).decode()


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
        # As `log.log` does, less the search for the caller's line, which no line of ours shows.
        cause = sys.exc_info() if exc_info else None
        extra = {_FIELDS: fields}
        log.handle(log.makeRecord(log.name, level, "", 0, name, (), cause, extra=extra))
