"""Where each key of a TOML document stands: a locator that `tomllib` does not offer.

Called by `cortexd.toml_file` after `tomllib` has accepted the text, so the scan trusts the syntax
and only follows its structure: headers, dotted and quoted keys, arrays, inline tables. A path is
the keys from the top, with a number for each array element. No state outlives a call.
"""

from __future__ import annotations

import re
from bisect import bisect_right

Path = tuple[str | int, ...]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")  # whitespace, line ends and comments
_SCALAR = re.compile(r"[^,\]}#\n]*")  # numbers, booleans and dates end at the next delimiter
_BASIC = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
_LITERAL = re.compile(r"'([^'\n]*)'")
# A multi-line string may end in up to two quotes of its own before the closing three.
_MULTILINE_BASIC = re.compile(r'"""(?:[^\\]|\\.)*?"{3,5}(?!")', re.DOTALL)
_MULTILINE_LITERAL = re.compile(r"'''.*?'{3,5}(?!')", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))")
_ESCAPED_CHARACTERS = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r"}


def key_lines(source: str) -> dict[Path, int]:
    """Return the line (from 1) of every key and array element of a valid TOML document.

    A table that several headers or dotted keys build has the line of its first mention.
    """
    return _Locator(source.replace("\r\n", "\n")).run()


class _Locator:
    """One pass over one document."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._position = 0
        self._line_ends = [match.start() for match in re.finditer("\n", source)]
        self._lines: dict[Path, int] = {}
        self._num_elements: dict[Path, int] = {}  # of arrays that `[[header]]`s build

    def run(self) -> dict[Path, int]:
        table: Path = ()
        self._skip(_BLANK)
        while self._position < len(self._source):
            if self._looking_at("[["):
                table = self._array_header()
            elif self._looking_at("["):
                table = self._table_header()
            else:
                self._assignment(table)
            self._skip(_BLANK)
        return self._lines

    def _array_header(self) -> Path:
        line = self._line()
        self._position += 2
        keys = self._keys()
        self._position += 2
        array = (*self._enter(keys[:-1], line), keys[-1])
        index = self._num_elements.get(array, 0)
        self._num_elements[array] = index + 1
        self._lines.setdefault(array, line)
        self._lines[(*array, index)] = line
        return (*array, index)

    def _table_header(self) -> Path:
        line = self._line()
        self._position += 1
        keys = self._keys()
        self._position += 1
        return self._enter(keys, line)

    def _enter(self, keys: list[str], line: int) -> Path:
        """Return the path that a header's keys mean: through an array, its newest element."""
        path: Path = ()
        for key in keys:
            path = (*path, key)
            self._lines.setdefault(path, line)
            if path in self._num_elements:
                path = (*path, self._num_elements[path] - 1)
        return path

    def _assignment(self, table: Path) -> None:
        line = self._line()
        path = table
        for key in self._keys():
            path = (*path, key)
            self._lines.setdefault(path, line)
        self._position += 1  # the equals sign
        self._skip(_SPACE)
        self._value(path)

    def _keys(self) -> list[str]:
        """Read `a."b c".d` up to the character after it."""
        keys = []
        while True:
            self._skip(_SPACE)
            keys.append(self._key())
            self._skip(_SPACE)
            if not self._looking_at("."):
                return keys
            self._position += 1

    def _key(self) -> str:
        if self._looking_at('"'):
            return _ESCAPE.sub(_unescape, self._skip(_BASIC)[1:-1])
        if self._looking_at("'"):
            return self._skip(_LITERAL)[1:-1]
        return self._skip(_BARE_KEY)

    def _value(self, path: Path) -> None:
        if self._looking_at("["):
            self._array(path)
        elif self._looking_at("{"):
            self._inline_table(path)
        elif self._looking_at('"""'):
            self._skip(_MULTILINE_BASIC)
        elif self._looking_at("'''"):
            self._skip(_MULTILINE_LITERAL)
        elif self._looking_at('"'):
            self._skip(_BASIC)
        elif self._looking_at("'"):
            self._skip(_LITERAL)
        else:
            self._skip(_SCALAR)

    def _array(self, path: Path) -> None:
        self._position += 1
        self._skip(_BLANK)
        index = 0
        while not self._looking_at("]"):
            self._lines[(*path, index)] = self._line()
            self._value((*path, index))
            index += 1
            self._skip_comma()
        self._position += 1

    def _inline_table(self, path: Path) -> None:
        self._position += 1
        self._skip(_BLANK)
        while not self._looking_at("}"):
            self._assignment(path)
            self._skip_comma()
        self._position += 1

    def _skip_comma(self) -> None:
        self._skip(_BLANK)
        if self._looking_at(","):
            self._position += 1
            self._skip(_BLANK)

    def _looking_at(self, text: str) -> bool:
        return self._source.startswith(text, self._position)

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._source, self._position)
        assert match, f"tomllib accepted what the locator cannot follow, line {self._line()}"
        self._position = match.end()
        return match.group()

    def _line(self) -> int:
        return bisect_right(self._line_ends, self._position - 1) + 1


def _unescape(match: re.Match[str]) -> str:
    short, long, character = match.groups()
    if character is not None:
        return _ESCAPED_CHARACTERS.get(character, character)
    return chr(int(short or long, 16))
