"""What all processes print: read from their pipes, kept in rings, written to one JSON file.

Each child's output is a pipe that the root reads, so a crashing actor's last words are kept. Lines
of our logger pass as they are; anything else (libraries, C++ warnings, stack dumps) is wrapped with
actor and pid. A flood is cut to a rate with a note of how many lines are missing. Owned by the
root's loop; reading never blocks.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec

from actors.root.log_file import RotatingFile
from cortexd.settings import Logging

RING_LINES: Final = 512
# Names come and go with the models; the oldest ring goes first.
_MAX_RINGS: Final = 256
_READ_BYTES: Final = 65536
_READS_PER_TURN: Final = 8
_MAX_LINE_BYTES: Final = 65536
# Sustained lines a second of one actor, and how many it may have in a burst.
_LINES_PER_S: Final = 500.0
_BURST_LINES: Final = 2000.0
_SUPPRESSED_NOTE_S: Final = 1.0
# A grandchild may hold the pipe for ever; after its actor's death this long is enough.
_DRAIN_AFTER_DEATH_S: Final = 0.1

_encode = msgspec.json.Encoder(enc_hook=str).encode
_object_decoder = msgspec.json.Decoder(dict)


class RateLimit:
    """A token bucket that counts what it refuses."""

    def __init__(self, per_s: float, burst: float, now_s: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._tokens = burst
        self._at_s = now_s
        self.num_suppressed = 0

    def admits(self, now_s: float) -> bool:
        """Take one token, or count a suppressed line."""
        self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._tokens < 1.0:
            self.num_suppressed += 1
            return False
        self._tokens -= 1.0
        return True


class LineSplitter:
    """Cuts a byte stream into lines; an endless line is cut at a bound."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, data: bytes) -> list[bytes]:
        """Return the lines that `data` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        return [line for line in lines if line.strip()]

    def flush(self) -> list[bytes]:
        """Return what was left without an end."""
        rest, self._rest = self._rest, b""
        return [rest] if rest.strip() else []


def json_line(line: bytes, actor: str, pid: int, time_s: float) -> bytes:
    """Return `line` when it is a JSON object, else a JSON object that holds it as `text`."""
    line = line.strip()[:_MAX_LINE_BYTES]
    if line.startswith(b"{"):
        try:
            _object_decoder.decode(line)
            return line
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            pass  # text that only looks like JSON is wrapped below
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time_s))
    return _encode(
        {
            "event": "output",
            "level": "info",
            "time": f"{stamp}.{int(time_s * 1000) % 1000:03d}Z",
            "actor": actor,
            "pid": pid,
            "text": line.decode(errors="replace"),
        }
    )


Follower = Callable[[str, bytes], None]


class LogHub:
    """Rings by actor name, the file, and whoever follows."""

    def __init__(
        self, folder: Path, settings: Logging, on_failure: Callable[[OSError], None]
    ) -> None:
        self._rings: dict[str, deque[tuple[int, bytes]]] = {}
        self._num_lines = 0
        self._followers: set[Follower] = set()
        self._pending: list[bytes] = []
        self._pipes: set[LogPipe] = set()
        self._is_closed = False
        self.path = folder / "cortexd.log"
        self._file = RotatingFile(
            self.path,
            max_bytes=settings.max_file_mib * 1024 * 1024,
            max_files=settings.max_files,
            now_s=time.monotonic,
            on_failure=on_failure,
        )

    def __repr__(self) -> str:
        return f"LogHub({self._num_lines} lines, {len(self._pipes)} pipes, {self._file})"

    def add(self, actor: str, line: bytes) -> None:
        """Take in one JSON line; it is on disk at the end of this turn of the loop."""
        ring = self._rings.setdefault(actor, deque(maxlen=RING_LINES))
        if len(self._rings) > _MAX_RINGS:
            del self._rings[next(iter(self._rings))]
        self._num_lines += 1
        ring.append((self._num_lines, line))
        if not self._pending and not self._is_closed:
            asyncio.get_running_loop().call_soon(self.flush)
        self._pending.append(line + b"\n")
        if self._is_closed:  # what is said after the loop's end
            self.flush()
        for follower in list(self._followers):
            follower(actor, line)

    def flush(self) -> None:
        """Write what waits."""
        data, self._pending = b"".join(self._pending), []
        if data:
            self._file.write(data)

    def lines(self, actor: str | None, count: int) -> list[bytes]:
        """Return the last lines of one actor, or of all in order of arrival."""
        rings: Iterable[deque[tuple[int, bytes]]] = (
            self._rings.values() if actor is None else [self._rings.get(actor, deque())]
        )
        numbered = sorted(entry for ring in rings for entry in ring)
        return [line for _, line in numbered[-count:]] if count > 0 else []

    def knows(self, actor: str) -> bool:
        """Return whether this actor ever printed anything."""
        return actor in self._rings

    def follow(self, follower: Follower) -> None:
        """Call `follower(actor, line)` for every new line."""
        self._followers.add(follower)

    def unfollow(self, follower: Follower) -> None:
        """Stop calling it."""
        self._followers.discard(follower)

    def capture(self, actor: str, read_fd: int) -> LogPipe:
        """Read a child's output until it ends; takes the descriptor over."""
        pipe = LogPipe(self, actor, read_fd, self._pipes.discard)
        self._pipes.add(pipe)
        return pipe

    def close(self) -> None:
        """Take in what the pipes still hold, and close everything."""
        for pipe in list(self._pipes):
            pipe.close()
        self._is_closed = True
        self.flush()
        self._file.close()


class LogPipe:
    """One incarnation's output."""

    def __init__(
        self, hub: LogHub, actor: str, fd: int, on_close: Callable[[LogPipe], None]
    ) -> None:
        self._hub = hub
        self._actor = actor
        self._fd = fd
        self._on_close = on_close
        self._splitter = LineSplitter()
        self._limit = RateLimit(_LINES_PER_S, _BURST_LINES, time.monotonic())
        self._note: asyncio.TimerHandle | None = None
        self.pid = 0
        os.set_blocking(fd, False)
        asyncio.get_running_loop().add_reader(fd, self._on_readable)

    def close_soon(self) -> None:
        """The process is dead: read on until the end, but not for long."""
        if self._fd >= 0:
            asyncio.get_running_loop().call_later(_DRAIN_AFTER_DEATH_S, self.close)

    def close(self) -> None:
        """Read what is there and close."""
        if self._fd >= 0 and self._read(_READS_PER_TURN):
            self._end()

    def _on_readable(self) -> None:
        self._read(_READS_PER_TURN)

    def _read(self, num_reads: int) -> bool:
        """Read at most so often; return False when the pipe has ended and is closed."""
        for _ in range(num_reads):
            try:
                data = os.read(self._fd, _READ_BYTES)
            except BlockingIOError:
                return True
            if not data:
                self._end()
                return False
            for line in self._splitter.push(data):
                self._add(line)
        return True

    def _add(self, line: bytes) -> None:
        if self._limit.admits(time.monotonic()):
            self._hub.add(self._actor, json_line(line, self._actor, self.pid, time.time()))
        elif self._note is None:
            self._note = asyncio.get_running_loop().call_later(_SUPPRESSED_NOTE_S, self._note_loss)

    def _note_loss(self) -> None:
        self._note = None
        count, self._limit.num_suppressed = self._limit.num_suppressed, 0
        if count:
            text = f"suppressed {count} lines".encode()
            self._hub.add(self._actor, json_line(text, self._actor, self.pid, time.time()))

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1
        for line in self._splitter.flush():
            self._add(line)
        if self._note is not None:
            self._note.cancel()
            self._note_loss()
        self._on_close(self)


class HubStream:
    """A text stream for the root's own logger that ends in the hub."""

    def __init__(self, hub: LogHub, actor: str) -> None:
        self._hub = hub
        self._actor = actor
        self._splitter = LineSplitter()

    def write(self, text: str) -> int:
        """Take in text."""
        for line in self._splitter.push(text.encode()):
            self._hub.add(self._actor, json_line(line, self._actor, os.getpid(), time.time()))
        return len(text)

    def flush(self) -> None:
        """Nothing waits here."""
