"""What lies in one folder of the model cache, so that a start need not hash it again.

A folder without a manifest is not a model: the manifest is written, synced, before the folder gets
its final name. Sizes and times are compared at each start; a changed time leads to a full hash.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

from engine.sources.transfer import Transfer
from engine.sources.wheel_archive import UnpackedFile, sha256_of

MANIFEST_NAME: Final = "manifest.json"
_VERSION: Final = 1


class ManifestFile(msgspec.Struct, frozen=True):
    """One file: `mtime_ns` is its modification time when its digest was last seen right."""

    name: str
    size_bytes: int
    sha256: str
    mtime_ns: int


class Manifest(msgspec.Struct, frozen=True):
    """The content of `manifest.json`."""

    version: int
    origin: str
    files: list[ManifestFile]


def write_manifest(directory: Path, origin: str, files: list[UnpackedFile]) -> None:
    """Write the manifest of `directory`, synced to disk."""
    entries = [
        ManifestFile(
            file.name, file.size_bytes, file.sha256, (directory / file.name).stat().st_mtime_ns
        )
        for file in files
    ]
    content = msgspec.json.format(msgspec.json.encode(Manifest(_VERSION, origin, entries)))
    partial = directory / (MANIFEST_NAME + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / MANIFEST_NAME)


def read_intact_files(directory: Path, transfer: Transfer) -> list[str] | None:
    """Return the names of the cached files, or None when the folder is no intact model."""
    manifest = _read_manifest(directory)
    if manifest is None or manifest.version != _VERSION or not manifest.files:
        return None
    touched = False
    for entry in manifest.files:
        path = directory / entry.name
        try:
            status = path.stat()
        except OSError:
            return None
        if entry.name != os.path.basename(entry.name) or status.st_size != entry.size_bytes:
            return None
        if status.st_mtime_ns != entry.mtime_ns:
            if sha256_of(path, transfer) != entry.sha256:
                return None
            touched = True
    if touched:
        known = [UnpackedFile(file.name, file.size_bytes, file.sha256) for file in manifest.files]
        _refresh_manifest(directory, manifest.origin, known)
    return [entry.name for entry in manifest.files]


def _read_manifest(directory: Path) -> Manifest | None:
    try:
        return msgspec.json.decode((directory / MANIFEST_NAME).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _refresh_manifest(directory: Path, origin: str, files: list[UnpackedFile]) -> None:
    """Remember the new times. A cache that is mounted read-only is hashed at each start."""
    if os.access(directory, os.W_OK):
        write_manifest(directory, origin, files)
