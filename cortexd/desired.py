"""Which models should run: written before it is acted on, read by a restarted router.

One JSON file in the runtime directory, so it lives as long as the daemon: a new `cortexd start`
begins from the configuration.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import msgspec

from cortexd.models import LoadOptions, ModelPolicy

_FILE = "desired.json"
_DRAINING_FILE = "draining"
_MAX_SLUG = 32


class DesiredModel(msgspec.Struct, frozen=True):
    """One model that was asked for, the group that runs it, and what its loader said of it."""

    options: LoadOptions
    group: str
    policy: ModelPolicy | None = None


def group_name(model_id: str) -> str:
    """Return the engine group's name for a model: readable, file-name safe, unique per id."""
    slug = re.sub(r"[^a-z0-9]+", "-", model_id.lower()).strip("-")[-_MAX_SLUG:].strip("-")
    return f"{slug}-{hashlib.sha256(model_id.encode()).hexdigest()[:6]}"


def read_desired(runtime_dir: Path) -> list[DesiredModel] | None:
    """Return what was written last, or None when nothing was (or it cannot be read)."""
    try:
        text = (runtime_dir / _FILE).read_bytes()
        return msgspec.json.decode(text, type=list[DesiredModel])
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def write_desired(runtime_dir: Path, models: list[DesiredModel]) -> None:
    """Replace the file atomically."""
    temporary = runtime_dir / f"{_FILE}.tmp"
    temporary.write_bytes(msgspec.json.encode(models))
    os.replace(temporary, runtime_dir / _FILE)


def forget_desired(runtime_dir: Path) -> None:
    """Remove what is remembered: a new daemon starts from its configuration."""
    (runtime_dir / _FILE).unlink(missing_ok=True)
    remember_draining(runtime_dir, is_on=False)


def is_draining(runtime_dir: Path) -> bool:
    """Tell whether an operator said to take no new requests."""
    return (runtime_dir / _DRAINING_FILE).exists()


def remember_draining(runtime_dir: Path, *, is_on: bool) -> None:
    """Keep for a restarted router what the operator said."""
    mark = runtime_dir / _DRAINING_FILE
    if is_on:
        mark.touch()
    else:
        mark.unlink(missing_ok=True)
