"""How the command shows things: tables, sizes, durations, colour.

Standard library only: `cortexd status` has 150 ms, and rich takes 45 of them to import. Colour is
for terminals, and NO_COLOR switches it off there.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Final, TextIO

from cortexd.errors import CortexError

_COLOURS: Final[Mapping[str, str]] = {
    "green": "32",
    "yellow": "33",
    "red": "31",
    "bold": "1",
    "dim": "2",
}
_STATE_COLOURS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("ok", "ready", "loaded"), "green"),
    **dict.fromkeys(
        ("starting", "suspect", "draining", "stopping", "backoff", "loading", "recovering"),
        "yellow",
    ),
    **dict.fromkeys(("degraded", "impaired", "failed", "exited", "down"), "red"),
    "sleeping": "dim",
}
# Everything that could move the cursor or retitle the terminal: C0 and C1, but tab and newline.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-9;]*m")


def has_colour(stream: TextIO) -> bool:
    """Return whether colour may be written to this stream."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str, colour: str, *, enabled: bool) -> str:
    """Return `text` in a colour (green, yellow, red, bold, dim), or as it is."""
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if enabled else text


def state(name: str, *, colour: bool) -> str:
    """Return the name of a state in the colour that tells how good it is."""
    known = _STATE_COLOURS.get(name)
    return coloured(name, known, enabled=colour) if known else name


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns with a header line; a header that begins with ">" aligns right."""
    titles = [header.lstrip(">") for header in headers]
    lines = [titles, *rows]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(headers))]
    shown = []
    for line in lines:
        cells = [
            _pad(cell, width, right=header.startswith(">"))
            for cell, width, header in zip(line, widths, headers, strict=True)
        ]
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)


def _width(cell: str) -> int:
    return len(_ESCAPE_SEQUENCE.sub("", cell))


def _pad(cell: str, width: int, *, right: bool) -> str:
    space = " " * (width - _width(cell))
    return space + cell if right else cell + space


def size(num_bytes: float) -> str:
    """Return a number of bytes for people: `512 B`, `97.9 MiB`."""
    if num_bytes < 1024:
        return f"{num_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        num_bytes /= 1024
        if num_bytes < 1023.95:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1024:.1f} TiB"


def duration(seconds: float) -> str:
    """Return a time span for people: `0.4s`, `42s`, `3m12s`, `5h02m`, `3d04h`."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f}s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def number(document: Mapping[str, object], key: str) -> float:
    """Return a number of a JSON document; 0 when it is absent or something else."""
    value = document.get(key)
    return float(value) if isinstance(value, int | float) else 0.0


def printable(text: str) -> str:
    """Return text that cannot control the terminal (model output and log lines are foreign)."""
    return _CONTROL.sub("", text)


def complain(message: str) -> None:
    """Write `cortexd: <message>` on standard error."""
    print(f"cortexd: {printable(message)}", file=sys.stderr, flush=True)


def error_line(error: CortexError) -> str:
    """Return the one line that tells a user of an error, with when to retry."""
    if error.retry_after_s:
        return f"{error.message} (retry in {duration(error.retry_after_s)})"
    return error.message
