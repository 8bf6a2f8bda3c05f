"""The typed values of a GGUF metadata section, and the bounds-checked cursor that reads them.

Private to `engine/formats/gguf.py`. Scalars are decoded at once; arrays are walked (so that the
next key is found and every length is checked) and decoded later.
"""

from __future__ import annotations

import mmap
import struct
from typing import Final

from cortexd.errors import BadModelFile

Scalar = bool | int | float | str
Value = Scalar | list[Scalar]

# No real header comes near it (a 250,000-token vocabulary with merges takes about 12 MB); it
# bounds what a huge hostile file can make us walk and hold.
MAX_HEADER_BYTES: Final = 256 * 1024 * 1024
# A list item takes at least 8 bytes of ours for one byte of the file, so the count is bounded too.
MAX_ARRAY_ITEMS: Final = 1 << 22

_BOOL: Final = 7
_STRING: Final = 8
_ARRAY: Final = 9
# GGUF value type → struct format
_SCALARS: Final = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    _BOOL: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_U64: Final = struct.Struct("<Q")


class Cursor:
    """A read position in the mapped header; every step is checked against the file's end."""

    __slots__ = ("data", "path", "position", "size")

    def __init__(self, data: mmap.mmap, size: int, path: str) -> None:
        self.data = data
        self.size = min(size, MAX_HEADER_BYTES)
        self.path = path
        self.position = 0

    def take(self, num_bytes: int, what: str) -> bytes:
        """Return the next bytes. Raises BadModelFile when the header ends before them."""
        begin = self.position
        self.skip(num_bytes, what)
        return self.data[begin : self.position]

    def skip(self, num_bytes: int, what: str) -> None:
        """Step over bytes. Raises BadModelFile when the header ends before them."""
        if num_bytes > self.size - self.position:
            raise self.truncated(what)
        self.position += num_bytes

    def truncated(self, what: str) -> BadModelFile:
        """Return the error for a header that ends inside `what`."""
        limit = (
            f"the header limit of {MAX_HEADER_BYTES} bytes"
            if self.size == MAX_HEADER_BYTES
            else f"the end of the file ({self.size} bytes)"
        )
        return BadModelFile(
            f"{self.path}: {what} at byte {self.position} reaches beyond {limit}; "
            "truncated or corrupt"
        )

    def u32(self, what: str) -> int:
        """Return the next little-endian u32."""
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        """Return the next little-endian u64."""
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str, max_bytes: int | None = None) -> str:
        """Return the next string (u64 length, UTF-8)."""
        begin = self.position
        length = self.u64(f"length of {what}")
        if max_bytes is not None and length > max_bytes:
            raise BadModelFile(
                f"{self.path}: {what} at byte {begin} has {length} bytes; at most {max_bytes}"
            )
        raw = self.take(length, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise BadModelFile(f"{self.path}: {what} at byte {begin} is not UTF-8") from None


class LazyArray:
    """An array whose extent in the file is known and checked, and whose items are not yet read."""

    __slots__ = ("_begin", "_count", "_cursor", "_key", "_type")

    def __init__(self, cursor: Cursor, key: str) -> None:
        self._cursor = cursor
        self._key = key
        self._type = cursor.u32(f"array type of {key[:120]!r}")
        self._count = cursor.u64(f"array length of {key[:120]!r}")
        self._begin = cursor.position
        self._walk()

    def __len__(self) -> int:
        return self._count

    def _walk(self) -> None:
        """Move the cursor to the array's end, checking every length on the way."""
        cursor, what = self._cursor, f"array {self._key[:120]!r} of {self._count} items"
        if self._count > MAX_ARRAY_ITEMS:
            raise BadModelFile(f"{cursor.path}: {what} is absurd; at most {MAX_ARRAY_ITEMS} items")
        if self._type in _SCALARS:
            cursor.skip(self._count * struct.calcsize(f"<{_SCALARS[self._type]}"), what)
        elif self._type == _STRING:
            if self._count * 8 > cursor.size - cursor.position:
                raise cursor.truncated(what)
            data, position, size = cursor.data, cursor.position, cursor.size
            unpack = _U64.unpack_from
            for _ in range(self._count):
                if position + 8 > size:
                    raise cursor.truncated(what)
                position += 8 + unpack(data, position)[0]
            if position > size:
                raise cursor.truncated(what)
            cursor.position = position
        elif self._type == _ARRAY:
            raise BadModelFile(f"{cursor.path}: {what} is an array of arrays; not supported")
        else:
            raise BadModelFile(f"{cursor.path}: {what} has unknown item type {self._type}")

    def decode(self) -> list[Scalar]:
        """Return the items. Raises BadModelFile for a string that is not UTF-8."""
        data, position = self._cursor.data, self._begin
        if self._type != _STRING:
            code = _SCALARS[self._type]
            return list(struct.unpack_from(f"<{self._count}{code}", data, position))
        items: list[Scalar] = []
        unpack = _U64.unpack_from
        try:
            for _ in range(self._count):
                begin = position + 8
                position = begin + unpack(data, position)[0]
                items.append(data[begin:position].decode("utf-8"))
        except UnicodeDecodeError:
            raise BadModelFile(
                f"{self._cursor.path}: item {len(items)} of {self._key[:120]!r} is not UTF-8"
            ) from None
        return items


def read_value(cursor: Cursor, key: str) -> Value | LazyArray:
    """Read the typed value at the cursor. Raises BadModelFile."""
    value_type = cursor.u32(f"value type of {key[:120]!r}")
    what = f"value of {key[:120]!r}"
    if value_type == _STRING:
        return cursor.string(what)
    if value_type == _ARRAY:
        return LazyArray(cursor, key)
    if value_type not in _SCALARS:
        raise BadModelFile(f"{cursor.path}: {what} has unknown type {value_type}")
    layout = struct.Struct(f"<{_SCALARS[value_type]}")
    value: Scalar = layout.unpack(cursor.take(layout.size, what))[0]
    return value
