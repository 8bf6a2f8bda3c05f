"""Environment overrides: `CORTEXD_SECTION__KEY=value`, typed by the option it names. Pure."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from msgspec import inspect

from cortexd.problem import Problem, dotted, nearest
from cortexd.schema import option_paths, option_type
from cortexd.settings import Settings
from cortexd.toml_lines import Path

PREFIX: Final = "CORTEXD_"
# Ours, and no options: read by `cortexd chat`, and where the CPU kernels are built and loaded.
RESERVED: Final = frozenset(
    {"CORTEXD_CONFIG", "CORTEXD_API_KEY", "CORTEXD_CPU_ISA", "CORTEXD_KERNELS_DIR"}
)


@dataclass(frozen=True, slots=True)
class Override:
    """A value that replaces what the file says; `origin` is where to look when it is wrong."""

    path: Path
    value: object
    origin: str


def environment_overrides(
    environ: Mapping[str, str], problems: list[Problem], origins: dict[Path, str]
) -> Iterable[Override]:
    """Return the overrides of the environment; add to `problems` the variables that name nothing.

    `origins` receives where each bad variable is to be looked for.
    """
    options = {_variable(path): path for path in _variable_paths()}
    overrides = []
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in RESERVED:
            continue
        path = options.get(name.upper())
        if path is None:
            pseudo_path: Path = (name,)
            origins[pseudo_path] = f"environment variable {name}"
            problems.append(Problem(pseudo_path, _unknown(name, options)))
            continue
        value = _parse(environ[name], path)
        overrides.append(Override(path, value, f"environment variable {name}"))
    return overrides


def _variable_paths() -> Iterable[Path]:
    """Every option a variable can name: arrays of tables as a whole, not their elements' keys."""
    arrays = {
        field for field in Settings.__struct_fields__ if isinstance(_type((field,)), _ARRAY_TYPES)
    }
    yield from ((array,) for array in sorted(arrays))
    yield from (path for path in option_paths(Settings) if path[0] not in arrays)


_ARRAY_TYPES = (inspect.ListType,)


def _type(path: Path) -> inspect.Type:
    kind = option_type(Settings, path)
    assert kind is not None, f"{dotted(path)} is no option"
    if isinstance(kind, inspect.UnionType):
        kind = next(one for one in kind.types if not isinstance(one, inspect.NoneType))
    return kind


def _variable(path: Path) -> str:
    return PREFIX + "__".join(str(part) for part in path).upper()


def _unknown(name: str, options: Mapping[str, Path]) -> str:
    section = name[len(PREFIX) :].lower()
    keys = [variable for variable, path in options.items() if path[0] == section and len(path) > 1]
    if keys:
        return f"names the table {section}; set one of its keys: {', '.join(sorted(keys))}"
    near = nearest(section, [variable[len(PREFIX) :].lower() for variable in options])
    hint = f'; did you mean "{PREFIX}{near.upper()}"?' if near else ""
    return f"names no option{hint} (form: {PREFIX}SECTION__KEY, such as {PREFIX}GATEWAY__LISTEN)"


def _parse(text: str, path: Path) -> object:
    """Return the text as the option's TOML value; text that is none is left for the type check."""
    kind = _type(path)
    if isinstance(kind, inspect.StrType | inspect.LiteralType):
        return text
    try:
        value: object = tomllib.loads(f"value = {text.strip()}")["value"]
    except (ValueError, RecursionError):
        return text
    # "1\nx = 2" is TOML too; only a document of this one value is a value.
    return text if "\n" in text.strip() and not isinstance(value, list) else value
