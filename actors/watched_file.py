"""One file that is read again when it changes: its last good value, and what a new one changes.

Owned by the reloader. A version that cannot be used changes nothing: the value before it stays in
force until a good version comes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

import msgspec

from cortexd.errors import ConfigError
from cortexd.messages.control import Message

T = TypeVar("T")
Signature = tuple[int, int, int]
_ABSENT: Signature = (0, 0, 0)


class Reload(msgspec.Struct, frozen=True, kw_only=True):
    """What one look at a file came to."""

    file: str
    status: Literal["unchanged", "reloaded", "rejected"]
    changes: list[str] = []
    error: str | None = None


@dataclass(slots=True)
class WatchedFile(Generic[T]):
    """How one kind of file is read, compared and told.

    `read` raises ConfigError; `changes` lists in words what the second value has otherwise than the
    first; `receivers` are names of actors, or prefixes of them that end in a dot.
    """

    name: str
    path: Path
    read: Callable[[], T]
    changes: Callable[[T, T], list[str]]
    message: Callable[[T], Message]
    receivers: tuple[str, ...]
    value: T | None = None
    error: str | None = None
    _seen: Signature = field(default=_ABSENT)

    @property
    def has_changed(self) -> bool:
        """Tell whether the file is another one than at the last look."""
        return self._signature() != self._seen

    def look(self) -> Reload:
        """Read the file and take its value over if it can be used; blocks on the disk."""
        # Before reading: a write in between then counts as the next change.
        self._seen = self._signature()
        try:
            value = self.read()
        except ConfigError as error:
            self.error = error.message
            return Reload(file=str(self.path), status="rejected", error=error.message)
        self.error = None
        changes = [] if self.value is None else self.changes(self.value, value)
        is_new = self.value != value
        self.value = value
        return Reload(
            file=str(self.path), status="reloaded" if is_new else "unchanged", changes=changes
        )

    def is_for(self, actor: str) -> bool:
        """Tell whether an actor is told of this file."""
        return any(
            actor == name or (name.endswith(".") and actor.startswith(name))
            for name in self.receivers
        )

    def _signature(self) -> Signature:
        try:
            found = os.stat(self.path)
        except OSError:
            return _ABSENT
        return (found.st_mtime_ns, found.st_size, found.st_ino)
