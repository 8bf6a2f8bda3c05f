"""The grammar of model ids: what a user may write where a model is named. Pure.

`org/name[@revision]` is a hub repository; `scheme:rest` names the source, as in
`pypi:<dist>==<version>`; what begins with `/`, `./`, `../` or `~`, or is a `.gguf` file that cannot
be `org/name`, is a local path. Whether the model exists is the source's business.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cortexd.errors import ConfigError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_PYPI = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?==[A-Za-z0-9][A-Za-z0-9._+!-]*")
_ALLOWED = "allowed: org/name, a local path, or pypi:<distribution>==<version>"


def is_local_path(model_id: str) -> bool:
    """Return whether this id names a file or folder of this machine."""
    if model_id.startswith(("/", "./", "../", "~")) or model_id in (".", ".."):
        return True
    is_file = model_id.lower().endswith(".gguf") and ":" not in model_id
    return is_file and model_id.count("/") != 1


def absolute_model_id(model_id: str, folder: Path, home: Path) -> str:
    """Return the id with a local path made absolute: relative ones lie in `folder`."""
    if not is_local_path(model_id):
        return model_id
    if model_id == "~" or model_id.startswith("~/"):
        return str(home / model_id[2:])
    if model_id.startswith("~"):  # another user's home: the source expands it
        return model_id
    return os.path.normpath(folder / model_id)


def check_model_id(model_id: str) -> None:
    """Check an id against the grammar. Raises: ConfigError that says what is wrong."""
    fault = _fault(model_id)
    if fault:
        raise ConfigError(f'model id "{model_id}" {fault}; {_ALLOWED}')


def _fault(model_id: str) -> str | None:
    if not model_id:
        return "is empty"
    if any(not character.isprintable() for character in model_id):
        return "holds a control character"
    if model_id != model_id.strip():
        return "begins or ends with a space"
    if is_local_path(model_id):
        return None
    scheme, colon, rest = model_id.partition(":")
    if not colon:
        return _repository_fault(model_id)
    if "/" in scheme:
        return "has a colon after a slash"
    if not _SCHEME.fullmatch(scheme):
        return "has an empty or malformed scheme before the colon"
    if scheme == "pypi":
        return None if _PYPI.fullmatch(rest) else "does not pin a distribution to a version"
    return _repository_fault(rest)


def _repository_fault(repository: str) -> str | None:
    org, slash, name = repository.partition("/")
    if not slash:
        return "has no slash between organisation and name"
    if not org or not name:
        return "has an empty organisation or name"
    if ":" in name:
        return "has a colon in its name"
    if "/" in name or " " in repository:
        return "is not one organisation and one name"
    return None
