"""API keys: the file that lists them, what each may do, and how a presented key is recognised.

The file holds digests, never keys: who reads it can use none of them. A key is 32 random bytes, so
one round of SHA-256 is enough; it is looked up by its digest, which tells a guesser nothing about
how near the guess was. Read at start and at each change by the reloader; pure but for the reading.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path as FilePath
from typing import Annotated, Final, Literal

from msgspec import Meta

from cortexd.errors import ConfigError
from cortexd.problem import Locations, Problem, dotted, raise_problems
from cortexd.schema import read_struct
from cortexd.settings import NeuronEntry, PositiveInt, Section, Settings
from cortexd.toml_file import read_toml
from cortexd.toml_lines import Path

KEY_PREFIX: Final = "sk-cortexd-"
_KEY_BYTES: Final = 32
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
# Ids are labels of metrics and words of log lines.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
# Others may not read or write, the group may not write: 0640 and closer.
_FORBIDDEN_MODE: Final = 0o027

NonEmpty = Annotated[str, Meta(min_length=1)]


class Window(Section, frozen=True):
    """When spent tokens count no more: never ("balance"), or `seconds` later ("rolling")."""

    kind: Literal["balance", "rolling"] = "balance"
    seconds: PositiveInt | None = None


class Key(Section, frozen=True):
    """One `[[keys]]` table. `hard_cap` is in tokens, prompt and answer together."""

    key_id: str
    key_sha256: str
    account_id: str | None = None
    models: list[NonEmpty] | None = None  # patterns as of a shell; None: all
    hard_cap: PositiveInt | None = None
    window: Window | None = None
    gateway: bool = False

    @property
    def account(self) -> str:
        """Return whose key it is: keys of one account share a prefix cache and a fair share."""
        return self.account_id or self.key_id

    def may_use(self, model: str) -> bool:
        """Tell whether this key opens a model, by the name that the client asked for."""
        return self.models is None or any(fnmatchcase(model, one) for one in self.models)


class Keys(Section, frozen=True):
    """The whole of the keys file."""

    keys: list[Key] = []


def new_key() -> str:
    """Return a fresh key; it is shown once and kept nowhere."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def key_digest(key: str) -> str:
    """Return what the file holds of a key: its SHA-256, in hexadecimal digits."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def load_keys(keys_file: str) -> Keys:
    """Load the keys. Raises: ConfigError with one line for each thing that is wrong."""
    path = FilePath(keys_file)
    if not path.exists():
        raise ConfigError(f"{path}: does not exist; make it with: cortexd keys add ID")
    check_secret_mode(path)
    file = read_toml(path)
    problems: list[Problem] = []
    keys = read_struct(file.document, Keys, problems)
    failed = {problem.path for problem in problems}
    problems += [found for found in _check(keys) if found.path not in failed]
    raise_problems(problems, Locations(file.name, file.lines, {}))
    return keys


def read_key_file(path: FilePath) -> str:
    """Return the one key that a file holds, for use at another server. Raises: ConfigError."""
    check_secret_mode(path)
    try:
        text = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a key: {error}") from error
    if not text or any(not "!" <= character <= "~" for character in text):
        raise ConfigError(f"{path}: does not hold one key; allowed: one line without spaces")
    return text


def node_keys(neurons: Iterable[NeuronEntry]) -> dict[str, str]:
    """Return the key to show to each neuron that wants one, by name. Raises: ConfigError."""
    return {
        entry.name: read_key_file(FilePath(entry.key_file))
        for entry in neurons
        if entry.key_file is not None
    }


def check_secrets(settings: Settings) -> None:
    """Read every file of secrets that the settings name. Raises: ConfigError."""
    if settings.entitlements.keys_file is not None:
        load_keys(settings.entitlements.keys_file)
    node_keys(settings.neurons)


def check_secret_mode(path: FilePath) -> None:
    """Check who may read a file of secrets. Raises: ConfigError that says what to do."""
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    mode = stat.S_IMODE(found.st_mode)
    if mode & _FORBIDDEN_MODE:
        raise ConfigError(
            f"{path}: has mode {mode:04o}, open to other users; allowed: 0640 or closer; "
            f"run: chmod 600 {path}"
        )
    if found.st_uid not in (0, os.getuid()):
        raise ConfigError(
            f"{path}: belongs to user id {found.st_uid}; allowed: root or {os.getuid()}, who "
            "runs this"
        )


def check_key_id(key_id: str) -> None:
    """Check a key's or account's name. Raises: ConfigError."""
    if not _NAME.fullmatch(key_id):
        raise ConfigError(
            f'"{key_id}" is no name of a key or account; allowed: up to 64 letters, digits and '
            "._@-, the first a letter or digit"
        )


def key_changes(old: Keys, new: Keys) -> list[str]:
    """Return what a person reads at a reload; no digests."""
    before = {key.key_id: key for key in old.keys}
    after = {key.key_id: key for key in new.keys}
    lines = [f'+ key "{key_id}"' for key_id in after if key_id not in before]
    lines += [f'- key "{key_id}"' for key_id in before if key_id not in after]
    lines += [
        f'~ key "{key_id}"'
        for key_id in after
        if before.get(key_id, after[key_id]) != after[key_id]
    ]
    return lines


def _check(keys: Keys) -> Iterator[Problem]:
    ids: dict[str, int] = {}
    digests: dict[str, int] = {}
    for i, key in enumerate(keys.keys):
        path: Path = ("keys", i)
        for name in ("key_id", "account_id"):
            value = getattr(key, name)
            if value is not None and not _NAME.fullmatch(value):
                yield _bad_name((*path, name), value)
        if not _DIGEST.fullmatch(key.key_sha256):
            message = "is no SHA-256; allowed: 64 hexadecimal digits; see: cortexd keys add"
            yield Problem((*path, "key_sha256"), f"{dotted((*path, 'key_sha256'))} {message}")
        for name, value, firsts in (
            ("key_id", key.key_id, ids),
            ("key_sha256", key.key_sha256, digests),
        ):
            first = firsts.setdefault(value, i)
            if first != i:
                message = f"{dotted((*path, name))} is also that of keys[{first}]"
                yield Problem((*path, name), message)
        yield from _check_window(key, path)


def _bad_name(path: Path, value: str) -> Problem:
    try:
        check_key_id(value)
    except ConfigError as error:
        return Problem(path, f"{dotted(path)}: {error}")
    raise AssertionError("called for bad names only")


def _check_window(key: Key, path: Path) -> Iterator[Problem]:
    window = key.window
    if window is None:
        return
    where = dotted((*path, "window"))
    if key.hard_cap is None:
        yield Problem((*path, "window"), f"{where} bounds nothing without hard_cap; add it")
    if (window.kind == "rolling") != (window.seconds is not None):
        message = 'allowed: {kind = "rolling", seconds = ...} or {kind = "balance"}'
        yield Problem((*path, "window"), f"{where}: {message}")
