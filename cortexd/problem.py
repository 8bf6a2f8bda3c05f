"""What is wrong with a configuration file, collected so that one message can tell it all.

Used by the readers of `cortex.toml` and `models.toml`. A `Problem` knows the path of its key; a
`Locations` turns that path into the file and line, the environment variable or the command-line
option that set it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cortexd.errors import ConfigError
from cortexd.toml_lines import Path


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong; `involves` are the keys whose values took part in the finding."""

    path: Path
    message: str
    involves: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Locations:
    """Where values come from: lines of one file, and overrides from elsewhere."""

    file: str  # shown in messages
    lines: Mapping[Path, int]
    overrides: Mapping[Path, str]  # path → "environment variable CORTEXD_ROLE"

    def of(self, problem: Problem) -> str:
        """Return where to look for this problem.

        The key itself if somebody set it, else another that took part, else the nearest table
        around them, else the file.
        """
        path = self._nearest(problem)
        if path in self.overrides:
            return self.overrides[path]
        return f"{self.file}:{self.lines[path]}" if path in self.lines else self.file

    def order(self, problem: Problem) -> tuple[bool, int]:
        """Return a sort key: problems of the file in reading order, then the overrides."""
        path = self._nearest(problem)
        return (path in self.overrides, self.lines.get(path, 0))

    def _nearest(self, problem: Problem) -> Path:
        paths = (problem.path, *problem.involves)
        enclosing = (path[:length] for path in paths for length in range(len(path) - 1, 0, -1))
        known = (path for path in (*paths, *enclosing) if self._is_set(path))
        return next(known, ())

    def _is_set(self, path: Path) -> bool:
        return path in self.overrides or path in self.lines


def raise_problems(problems: Iterable[Problem], locations: Locations) -> None:
    """Raise one ConfigError with a line for each problem; return when there is none."""
    ordered = sorted(problems, key=locations.order)
    lines = [f"{locations.of(problem)}: {problem.message}" for problem in ordered]
    lines = list(dict.fromkeys(lines))
    if not lines:
        return
    if len(lines) == 1:
        raise ConfigError(lines[0])
    summary = f"the configuration has {len(lines)} errors:"
    raise ConfigError("\n".join([summary, *lines]), problems=lines)


def dotted(path: Path) -> str:
    """Return a path as people write it: `neurons[1].endpoint`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that `word` most likely meant, if one is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
