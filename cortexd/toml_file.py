"""Read one TOML file with the lines of its keys; every failure names the file and the line.

Called by the readers of `cortex.toml` and `models.toml`. A file that cannot be read or parsed ends
in a ConfigError; nothing else leaves this module.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Final

from cortexd.errors import ConfigError
from cortexd.toml_lines import Path, key_lines

# Far above any real configuration; a wrong path (a model file, a log) is refused before it is read.
MAX_FILE_BYTES: Final = 4 << 20
_POSITION = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


@dataclass(frozen=True, slots=True)
class TomlFile:
    """A parsed file: `lines` maps each key's path to its line."""

    name: str  # as messages show it
    document: dict[str, object]
    lines: dict[Path, int]


def read_toml(path: FilePath) -> TomlFile:
    """Read and parse `path`.

    Raises: ConfigError when it is missing, unreadable, too large, not UTF-8 or not TOML.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{name}: larger than {MAX_FILE_BYTES >> 20} MiB; is this a TOML file?")
    return parse_toml(data, name)


def parse_toml(data: bytes, name: str) -> TomlFile:
    """Parse the bytes of a TOML file that messages call `name`. Raises: ConfigError."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8 text; save the file as UTF-8") from error
    try:
        return TomlFile(name, tomllib.loads(text), key_lines(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_error(name, text, str(error))) from error
    except RecursionError as error:
        raise ConfigError(f"{name}: arrays or tables are nested too deeply") from error
    except ValueError as error:  # such as an integer of thousands of digits
        raise ConfigError(f"{name}: {error}") from error


def _syntax_error(name: str, text: str, message: str) -> str:
    match = _POSITION.search(message)
    if match is None:
        return f"{name}: not valid TOML: {message}"
    line = int(match[1]) if match[1] else text.rstrip().count("\n") + 1
    what = message[: match.start()]
    where = f", column {match[2]}" if match[2] else ", the file ends too early"
    return f"{name}:{line}: not valid TOML: {what[:1].lower()}{what[1:]}{where}"
