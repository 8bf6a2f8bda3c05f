"""Reads the answers of an HTTP/1.1 server from the bytes of its connection: heads, bodies, ends.

Pure. Stricter than a browser: what could be read in two ways is refused, since the other reading
would let one answer pass for two. Source: RFC 9112, sections 4 to 7.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NoReturn

from multidict import CIMultiDict

_MAX_HEAD_BYTES: Final = 64 * 1024
_MAX_CHUNK_LINE_BYTES: Final = 4096
_HEAD: Final = re.compile(
    r"HTTP/1\.([01]) ([1-9]\d\d)(?: [^\r\n\0]*)?"
    r"((?:\r\n[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\r\n\0]*)*)"
)
_FIELD: Final = re.compile(r"\r\n([^:]+):[ \t]*([^\r\n]*)")
_LENGTH: Final = re.compile(r"\d{1,18}")
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\r\n]*)?\r\n")
_NO_BODY: Final = frozenset({204, 304})


class BadAnswer(Exception):
    """The bytes are no answer, or not a whole one."""


class AnswerParser:
    """Follows one answer; a connection makes a new one for each request."""

    def __init__(self) -> None:
        self.status = 0  # 0: the head is not whole yet
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.is_complete = False
        self.keeps_alive = False
        self._held = b""
        self._left: int | None = 0  # bytes of the body, or of a chunk; None: until the end
        self._is_chunked = False
        self._is_in_trailer = False
        self._is_before_chunk = False

    @property
    def is_before_chunk(self) -> bool:
        """Tell whether nothing is held and the next bytes are those of a new chunk."""
        return self._is_before_chunk

    def push(self, data: bytes) -> bytes:
        """Return the bytes of the body that `data` brings. Raises: BadAnswer."""
        if self._is_before_chunk:
            # Nearly all of a stream comes so: one whole chunk at a time.
            line = _CHUNK_LINE.match(data)
            if line is not None:
                start, end = line.end(), len(data) - 2
                if start < end == start + int(line[1], 16) and data.endswith(b"\r\n"):
                    return data[start:end]
        if self._held:
            data, self._held = self._held + data, b""
        if not self.status:
            data = self._read_heads(data)
            if not self.status:
                return b""
        if self._is_chunked:
            return self._unchunk(data)
        if self._left is None:
            return data
        if len(data) > self._left:
            self.keeps_alive = False  # more than was asked for: nothing after it can be trusted
            data = data[: self._left]
        self._left -= len(data)
        self.is_complete = self._left == 0
        return data

    def end(self) -> None:
        """Note that the server has closed. Raises: BadAnswer when the answer is not whole."""
        if not self.status:
            _refuse("the connection was closed")
        if self._left is not None or self._is_chunked:
            _refuse("the connection was closed before the end of the body")
        self.is_complete = True

    def _read_heads(self, data: bytes) -> bytes:
        """Read the head, after those that only inform; return what follows it."""
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0 or end > _MAX_HEAD_BYTES:
                if len(data) > _MAX_HEAD_BYTES:
                    _refuse(f"its head is over {_MAX_HEAD_BYTES} bytes")
                self._held = data
                return b""
            head, data = data[:end], data[end + 4 :]
            status = self._read_head(head)
            if status >= 200:
                self.status = status
                return data
            if status == 101:
                _refuse("it switches to a protocol that was not asked for")

    def _read_head(self, head: bytes) -> int:
        text = head.decode("utf-8", "surrogateescape")
        found = _HEAD.fullmatch(text)
        if found is None:
            _refuse(f"its head is not as HTTP/1.1 has it: {text[:200]!r}")
        old, status_text, lines = found.groups()
        self.headers = CIMultiDict(
            [(name, value.rstrip(" \t")) for name, value in _FIELD.findall(lines)]
        )
        status = int(status_text)
        if status >= 200:
            self._read_framing(status, is_old=old == "0")
        return status

    def _read_framing(self, status: int, *, is_old: bool) -> None:
        """Learn where the body ends, and whether the connection goes on after it."""
        headers = self.headers
        connection = headers.get("Connection", "").lower()
        self.keeps_alive = "keep-alive" in connection if is_old else "close" not in connection
        lengths = headers.getall("Content-Length", [])
        codings = headers.getall("Transfer-Encoding", [])
        if codings:
            if lengths or [coding.lower() for coding in codings] != ["chunked"]:
                _refuse(f"its transfer-encoding is {', '.join(codings)!r}, allowed: chunked")
            self._is_chunked = True
        elif lengths:
            if len(set(lengths)) > 1 or _LENGTH.fullmatch(lengths[0]) is None:
                _refuse(f"its content-length is {', '.join(lengths)[:80]!r}")
            self._left = int(lengths[0])
        else:
            self._left, self.keeps_alive = None, False
        if status in _NO_BODY:
            self._is_chunked, self._left = False, 0

    def _unchunk(self, data: bytes) -> bytes:
        """Return the contents of the chunks in `data`; what is cut off is held."""
        pieces: list[bytes] = []
        at = 0
        while at < len(data) and not self.is_complete:
            if self._is_in_trailer:
                at = self._skip_trailer(data, at)
                break
            if self._left:
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left:
                    break
                self._left = None  # the line end after the chunk
            if self._left is None:
                if len(data) < at + 2:
                    break
                if data[at : at + 2] != b"\r\n":
                    _refuse("a chunk is longer than it says")
                at, self._left = at + 2, 0
            line = _CHUNK_LINE.match(data, at)
            if line is None:
                if len(data) - at > _MAX_CHUNK_LINE_BYTES or data.find(b"\n", at) >= 0:
                    _refuse(f"a chunk has no size: {data[at : at + 80]!r}")
                break
            at, size = line.end(), int(line[1], 16)
            end = at + size
            if size and data.startswith(b"\r\n", end):
                pieces.append(data[at:end])
                at = end + 2
                continue
            self._left, self._is_in_trailer = size, size == 0
        self._held = data[at:]
        self._is_before_chunk = self._left == 0 and not self._held and not self._is_in_trailer
        if self.is_complete and self._held:
            self.keeps_alive, self._held = False, b""
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _skip_trailer(self, data: bytes, at: int) -> int:
        """Read to the empty line that ends the answer; return where it ends, else where it was."""
        if data.startswith(b"\r\n", at):
            self.is_complete = True
            return at + 2
        end = data.find(b"\r\n\r\n", at)
        if end < 0:
            if len(data) - at > _MAX_HEAD_BYTES:
                _refuse(f"its trailer is over {_MAX_HEAD_BYTES} bytes")
            return at
        self.is_complete = True
        return end + 4


@lru_cache(maxsize=4096)
def chunk_line(num_bytes: int) -> bytes:
    """Return the line before a chunk that takes `num_bytes` with that line and its own line end.

    As nearly every server writes it: in small letters, without leading noughts, nothing after it.
    Where no chunk takes so many bytes the result is one that no chunk begins with.
    """
    num_digits = 1
    while (size := num_bytes - num_digits - 4) > 0:
        line = b"%x\r\n" % size
        if len(line) == num_digits + 2:
            return line
        num_digits += 1
    return b"\r"


def _refuse(what: str) -> NoReturn:
    raise BadAnswer(what)
