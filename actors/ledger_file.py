"""The budgets' journal: one JSON line for each thing that happened to the ledger.

Owned by the budgets actor. A line is written before its answer is sent and survives the death of
the process; `sync` makes it survive the machine's, which costs at most what happened since the last
one. At a start all lines are replayed and written anew as one line each for what still counts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from cortexd.ledger import Ledger, Reservation

_NAME: Final = "budgets.jsonl"
# What is replayed at a start in well under a second.
_MAX_BYTES: Final = 16 * 2**20


class Reserved(msgspec.Struct, frozen=True, tag="r", array_like=True):
    """A request reserved tokens."""

    at: float
    request_id: str
    key_id: str
    holder: str
    tokens: int


class Used(msgspec.Struct, frozen=True, tag="u", array_like=True):
    """A running request has used so much; with `is_final` it ended so."""

    at: float
    request_id: str
    prompt_tokens: int
    completion_tokens: int
    is_final: bool


class Spent(msgspec.Struct, frozen=True, tag="s", array_like=True):
    """A key spent tokens at a time."""

    at: float
    key_id: str
    tokens: int


Line = Reserved | Used | Spent
_DECODER: Final = msgspec.json.Decoder(Line)


class LedgerFile:
    """Append, replay, rewrite."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        self._file: BinaryIO | None = None
        self._num_bytes = 0
        self._is_dirty = False
        self.num_bad_lines = 0

    def replay(self, ledger: Ledger) -> None:
        """Bring a ledger to where the journal ends; lines that cannot be read are counted."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        for text in data.splitlines():
            try:
                _apply(_DECODER.decode(text), ledger)
            except (msgspec.DecodeError, UnicodeDecodeError):
                self.num_bad_lines += 1

    def rewrite(self, ledger: Ledger, now: float) -> None:
        """Replace the journal by what still counts. Raises: OSError."""
        lines: list[Line] = [Spent(at, key, tokens) for key, at, tokens in ledger.all_parts(now)]
        for name, one in ledger.reservations.items():
            lines.append(Reserved(one.heard_at, name, one.key_id, one.holder, one.tokens))
            lines.append(Used(one.heard_at, name, one.prompt_tokens, one.completion_tokens, False))
        data = _encode(lines)
        fresh = self._path.with_suffix(".new")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self._path)
        self.close()
        self._file = self._path.open("ab", buffering=0)
        self._num_bytes = len(data)

    @property
    def is_long(self) -> bool:
        """Tell whether it is time to rewrite."""
        return self._num_bytes > _MAX_BYTES

    def append(self, lines: Iterable[Line]) -> None:
        """Write lines. Raises: OSError."""
        data = _encode(lines)
        if data and self._file is not None:
            self._file.write(data)
            self._num_bytes += len(data)
            self._is_dirty = True

    def sync(self) -> None:
        """Bring what was written to the disk; blocks. Raises: OSError."""
        if self._is_dirty and self._file is not None:
            self._is_dirty = False
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def _encode(lines: Iterable[Line]) -> bytes:
    return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)


def _apply(line: Line, ledger: Ledger) -> None:
    match line:
        case Reserved():
            # Not `reserve`: what was granted stands, whatever the caps are today.
            reservation = Reservation(line.key_id, line.holder, line.tokens, line.at)
            ledger.take_over(line.request_id, reservation)
        case Used():
            ledger.report(line.request_id, line.prompt_tokens, line.completion_tokens, line.at)
            if line.is_final:
                ledger.settle(line.request_id, line.at)
        case Spent():
            ledger.restore(line.key_id, line.at, line.tokens)
