"""Which requests a front has begun and not recorded yet, in a file that outlives a killed front.

A front keeps one entry for each request, in memory that the kernel shares with a file of the
runtime directory, so an entry costs no system call and a SIGKILL loses none. The entry goes when
the request's log line has been written and its report told. What is left of a dead front is what
the router records in its place: whether it dies at the same moment or not, the file waits for the
next router. A front that ends in order removes its file.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Final

import msgspec

FILE_SUFFIX: Final = ".open"
_SLOT_BYTES: Final = 512
_FIRST_SLOTS: Final = 1024
_LENGTH_BYTES: Final = 2
_MAX_BYTES: Final = _SLOT_BYTES - _LENGTH_BYTES
# Request ids and routes are short by their own rules; a model's name may be anything.
_MAX_NAME: Final = 100


class OpenRequest(msgspec.Struct, frozen=True, array_like=True):
    """What is known of a request before its end."""

    request_id: str
    route: str
    model: str
    node: str


_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(OpenRequest)


def open_requests_path(runtime_dir: Path, front: str, incarnation: int) -> Path:
    """Return where one incarnation of a front keeps its entries."""
    return runtime_dir / f"{front}.{incarnation}{FILE_SUFFIX}"


class OpenRequests:
    """The entries of one front. Owned by its loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, _FIRST_SLOTS * _SLOT_BYTES)
        self._map = mmap.mmap(self._fd, 0)
        self._free = list(range(_FIRST_SLOTS - 1, -1, -1))

    def __repr__(self) -> str:
        return f"OpenRequests({self._path}, {len(self._free)} free)"

    def begin(self, request: OpenRequest) -> int:
        """Enter a request; return the slot that `update` and `end` want."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self.update(slot, request)
        return slot

    def update(self, slot: int, request: OpenRequest) -> None:
        """Replace an entry. One that is cut off in the middle is no JSON, and so it is none."""
        data = _encode(request)
        if len(data) > _MAX_BYTES:
            data = msgspec.json.encode(
                msgspec.structs.replace(
                    request, model=request.model[:_MAX_NAME], node=request.node[:_MAX_NAME]
                )
            )[:_MAX_BYTES]
        start = slot * _SLOT_BYTES
        end = start + _LENGTH_BYTES + len(data)
        self._map[start:end] = len(data).to_bytes(_LENGTH_BYTES, "little") + data

    def end(self, slot: int) -> None:
        """Remove an entry: the request is on record."""
        start = slot * _SLOT_BYTES
        self._map[start : start + _LENGTH_BYTES] = bytes(_LENGTH_BYTES)
        self._free.append(slot)

    def close(self) -> None:
        """Remove the file, all requests being on record."""
        self._map.close()
        os.close(self._fd)
        self._path.unlink(missing_ok=True)

    def _grow(self) -> None:
        num_slots = len(self._map) // _SLOT_BYTES
        self._map.resize(2 * num_slots * _SLOT_BYTES)
        self._free = list(range(2 * num_slots - 1, num_slots - 1, -1))


def take_left(runtime_dir: Path, front: str, *, before: int) -> list[OpenRequest]:
    """Return what dead fronts of a name have left, and remove their files.

    `before`: the first incarnation that may be alive.
    """
    left = []
    for path in sorted(runtime_dir.glob(f"{front}.*{FILE_SUFFIX}")):
        incarnation = path.name.removeprefix(f"{front}.").removesuffix(FILE_SUFFIX)
        if not incarnation.isdecimal() or int(incarnation) >= before:
            continue
        left += _read(path)
        path.unlink(missing_ok=True)
    return left


def _read(path: Path) -> list[OpenRequest]:
    data = path.read_bytes()
    found = []
    for start in range(0, len(data), _SLOT_BYTES):
        body = start + _LENGTH_BYTES
        length = int.from_bytes(data[start:body], "little")
        if not length:
            continue
        try:
            found.append(_decoder.decode(data[body : body + length]))
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue  # its front was killed in the middle of writing it
    return found
