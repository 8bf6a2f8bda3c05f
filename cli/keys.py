"""`cortexd keys add|list|revoke`: edit the keys file; a running daemon reads it within a second."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Final

import msgspec

from cli.control import connected, settings_of
from cli.exit_code import NOT_FOUND, OK, USAGE, CommandError
from cli.format import complain, table
from cortexd.errors import ConfigError, CortexError, NotRunning
from cortexd.keys import Key, Keys, Window, check_key_id, key_digest, load_keys, new_key
from cortexd.settings import Settings
from cortexd.toml_lines import key_lines

# The header of another table than those inside a key.
_NEXT_TABLE: Final = re.compile(r"\s*\[(?!\s*keys\s*\.)")
_WRITE: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def keys(args: argparse.Namespace) -> int:
    """Run one of the three actions. Raises: ConfigError."""
    settings = settings_of(args).settings
    path = settings.entitlements.keys_file
    if path is None:
        raise ConfigError(
            "no keys file is configured; set keys_file in [entitlements] of cortex.toml, such as "
            'keys_file = "keys.toml"'
        )
    if args.action == "list":
        return _list(settings, Path(path))
    if args.key_id is None:
        raise CommandError(f"keys {args.action} needs the ID of a key", USAGE)
    return _add(Path(path), args) if args.action == "add" else _revoke(Path(path), args.key_id)


def _add(path: Path, args: argparse.Namespace) -> int:
    check_key_id(args.key_id)
    text = path.read_text() if path.exists() else ""
    known = load_keys(str(path)) if path.exists() else Keys()
    if any(key.key_id == args.key_id for key in known.keys):
        raise ConfigError(f'{path}: there is a key "{args.key_id}" already; name another')
    secret = new_key()
    window = None
    if args.window is not None:
        window = Window(kind="rolling", seconds=args.window)
    key = Key(
        key_id=args.key_id,
        key_sha256=key_digest(secret),
        account_id=args.account,
        models=args.model or None,
        hard_cap=args.cap,
        window=window,
        gateway=args.gateway,
    )
    separator = "\n" if text and not text.endswith("\n\n") else ""
    _replace(path, f"{text}{separator}{_as_toml(key)}", Keys([*known.keys, key]))
    complain(f'key "{key.key_id}" was added to {path}; it is shown this once:')
    print(secret)
    return OK


def _as_toml(key: Key) -> str:
    """Return a key's table; JSON's strings, numbers and arrays are TOML's too."""
    lines = ["[[keys]]"]
    for name, value in msgspec.structs.asdict(key).items():
        if isinstance(value, Window):
            lines.append(f'window = {{ kind = "{value.kind}", seconds = {value.seconds} }}')
        elif value is not None and value is not False:
            lines.append(f"{name} = {msgspec.json.encode(value).decode()}")
    return "\n".join(lines) + "\n"


def _revoke(path: Path, key_id: str) -> int:
    before = load_keys(str(path)).keys
    index = next((i for i, key in enumerate(before) if key.key_id == key_id), None)
    if index is None:
        raise CommandError(f'{path}: there is no key "{key_id}"', NOT_FOUND)
    lines = path.read_text().splitlines(keepends=True)
    begin = key_lines("".join(lines))["keys", index] - 1
    end = begin + 1
    while end < len(lines) and not _NEXT_TABLE.match(lines[end]):
        end += 1
    rest = [key for key in before if key.key_id != key_id]
    _replace(path, "".join(lines[:begin] + lines[end:]), Keys(rest))
    complain(f'key "{key_id}" was revoked')
    return OK


def _list(settings: Settings, path: Path) -> int:
    figures = _figures(settings)
    rows = [_row(key, figures.get(key.key_id, {})) for key in load_keys(str(path)).keys]
    print(table(["KEY", "ACCOUNT", "MODELS", "CAP", "WINDOW", "SPENT", "RESERVED"], rows))
    return OK


def _figures(settings: Settings) -> dict[str, dict[str, object]]:
    """Return what the daemon knows of each key; nothing when none runs."""
    try:
        with connected(settings) as channel:
            found = channel.request("keys", {})["keys"]
    except NotRunning:
        return {}
    except CortexError as error:
        complain(f"warning: what was spent is not known: {error.message}")
        return {}
    assert isinstance(found, list), "the budgets answer with a list"
    return {entry["key_id"]: entry for entry in found}


def _row(key: Key, figures: dict[str, object]) -> list[str]:
    window = "-"
    if key.window is not None:
        window = f"{key.window.seconds} s" if key.window.seconds else key.window.kind
    return [
        key.key_id,
        "(gateway)" if key.gateway else key.account,
        ", ".join(key.models) if key.models is not None else "all",
        "-" if key.hard_cap is None else str(key.hard_cap),
        window,
        str(figures.get("spent", "-")),
        str(figures.get("reserved", "-")),
    ]


def _replace(path: Path, text: str, expected: Keys) -> None:
    """Write the file anew if it then says what it should; it keeps its mode, a new one is 0600."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    fresh = path.with_name(path.name + ".new")
    try:
        with open(os.open(fresh, _WRITE, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if load_keys(str(fresh)) != expected:
            raise ConfigError(f"{path}: is written in a way that needs editing by hand")
        fresh.chmod(mode)
        os.replace(fresh, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        fresh.unlink(missing_ok=True)
