"""Check a parsed TOML document against a struct and report everything that is wrong with it.

`msgspec.convert` stops at the first fault; a user who edits a file wants all of them. The types
and ranges are those of the struct itself (read through `msgspec.inspect`), so there is one place
that says what is allowed. Pure; called by `cortexd.config` and `cortexd.catalogue`.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, TypeVar, cast

import msgspec
from msgspec import inspect

from cortexd.problem import Problem, dotted, nearest
from cortexd.toml_lines import Path

S = TypeVar("S", bound=msgspec.Struct)
_INVALID: Final = object()
_MAX_SHOWN = 60  # characters of a bad value that a message repeats


def read_struct(document: dict[str, object], struct: type[S], problems: list[Problem]) -> S:
    """Return the document as `struct`, adding to `problems` what does not fit.

    A bad value is replaced by its default (a required one by an empty value), so that rules between
    keys can still be checked; use the result for nothing else when there are problems.
    """
    reader = _Reader(problems, tuple(option_paths(struct)))
    return cast(S, reader.struct(document, _struct_type(struct), ()))


def option_paths(struct: type[msgspec.Struct]) -> Iterator[Path]:
    """Yield the path of every option of a struct; array elements are not numbered."""
    yield from _option_paths(_struct_type(struct), ())


def _option_paths(struct: inspect.StructType, prefix: Path) -> Iterator[Path]:
    for field in struct.fields:
        path = (*prefix, field.encode_name)
        nested = _nested_struct(field.type)
        if nested is None:
            yield path
        else:
            yield from _option_paths(nested, path)


def option_type(struct: type[msgspec.Struct], path: Path) -> inspect.Type | None:
    """Return the type of the option at `path`, or None when there is no such option."""
    kind: inspect.Type = _struct_type(struct)
    for key in path:
        if not isinstance(kind, inspect.StructType):
            return None
        found = next((field for field in kind.fields if field.encode_name == key), None)
        if found is None:
            return None
        kind = found.type
    return kind


@lru_cache(maxsize=8)
def _struct_type(struct: type[msgspec.Struct]) -> inspect.StructType:
    return cast(inspect.StructType, inspect.type_info(struct))


def _nested_struct(kind: inspect.Type) -> inspect.StructType | None:
    if isinstance(kind, inspect.ListType):
        kind = kind.item_type
    if isinstance(kind, inspect.UnionType):
        kind = next((one for one in kind.types if isinstance(one, inspect.StructType)), kind)
    return kind if isinstance(kind, inspect.StructType) else None


class _Reader:
    """One pass over one document."""

    def __init__(self, problems: list[Problem], all_paths: tuple[Path, ...]) -> None:
        self._problems = problems
        self._all_paths = all_paths

    def struct(self, table: dict[str, object], kind: inspect.StructType, path: Path) -> object:
        known = {field.encode_name: field for field in kind.fields}
        for key in table:
            if key not in known:
                self._unknown_key(key, sorted(known), path)
        values: dict[str, object] = {}
        for name, field in known.items():
            value: object = _INVALID
            if name in table:
                value = self.value(table[name], field.type, (*path, name))
            elif field.required:
                self._problems.append(
                    Problem((*path, name), f"{dotted(path)} lacks its {name}; add {name} = …")
                )
            if value is not _INVALID:
                values[field.name] = value
            elif field.required:
                values[field.name] = _empty(field.type)
        return kind.cls(**values)

    def value(self, value: object, kind: inspect.Type, path: Path) -> object:
        """Return `value` as the struct wants it, or _INVALID after reporting why not."""
        if isinstance(kind, inspect.UnionType):
            # The only unions of a settings file are "T or absent"; TOML has no null.
            kind = next(one for one in kind.types if not isinstance(one, inspect.NoneType))
        if isinstance(kind, inspect.StructType) and isinstance(value, dict):
            return self.struct(value, kind, path)
        if isinstance(kind, inspect.ListType) and isinstance(value, list):
            items = [self.value(item, kind.item_type, (*path, i)) for i, item in enumerate(value)]
            return _INVALID if any(item is _INVALID for item in items) else items
        if isinstance(kind, inspect.DictType) and isinstance(value, dict):
            entries = {k: self.value(v, kind.value_type, (*path, k)) for k, v in value.items()}
            return {k: v for k, v in entries.items() if v is not _INVALID}
        if _fits(value, kind):
            return float(cast(float, value)) if isinstance(kind, inspect.FloatType) else value
        hint = ""
        if isinstance(kind, inspect.LiteralType) and isinstance(value, str):
            near = nearest(value, [str(one) for one in kind.values])
            hint = f'; did you mean "{near}"?' if near else ""
        message = f"{dotted(path)} must be {describe_type(kind)}, not {describe_value(value)}{hint}"
        self._problems.append(Problem(path, message))
        return _INVALID

    def _unknown_key(self, key: str, known: list[str], path: Path) -> None:
        near = nearest(key, known)
        if near is None:  # the right key in the wrong table is the next likely slip
            near = next((dotted(one) for one in self._all_paths if one[-1] == key), None)
        hint = f'did you mean "{near}"? ' if near else ""
        where = f"in {dotted(path)}" if path else "at the top level"
        message = f"{dotted((*path, key))} is an unknown key; {hint}known keys {where}: "
        self._problems.append(Problem((*path, key), message + ", ".join(known)))


def _fits(value: object, kind: inspect.Type) -> bool:
    if isinstance(kind, inspect.BoolType):
        return isinstance(value, bool)
    if isinstance(kind, inspect.LiteralType):
        return isinstance(value, str) and value in kind.values
    if isinstance(kind, inspect.StrType):
        return isinstance(value, str) and len(value) >= (kind.min_length or 0)
    if isinstance(value, bool):  # a bool is an int to Python, not to a user
        return False
    if isinstance(kind, inspect.IntType):
        return isinstance(value, int) and _in_range(value, kind)
    if isinstance(kind, inspect.FloatType):
        return isinstance(value, int | float) and _is_finite(value) and _in_range(value, kind)
    return False


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of a double
        return False


def _in_range(value: float, kind: inspect.IntType | inspect.FloatType) -> bool:
    return (
        (kind.ge is None or value >= kind.ge)
        and (kind.gt is None or value > kind.gt)
        and (kind.le is None or value <= kind.le)
        and (kind.lt is None or value < kind.lt)
    )


def _empty(kind: inspect.Type) -> object:
    """Stand in for a required value that is missing or bad."""
    if isinstance(kind, inspect.StrType):
        return ""
    if isinstance(kind, inspect.LiteralType):
        return kind.values[0]
    return 0


def describe_type(kind: inspect.Type) -> str:
    """Return what a value of this type looks like, range included: "an integer from 1 to 64"."""
    if isinstance(kind, inspect.UnionType):
        kind = next(one for one in kind.types if not isinstance(one, inspect.NoneType))
    if isinstance(kind, inspect.LiteralType):
        return "one of " + ", ".join(f'"{value}"' for value in kind.values)
    if isinstance(kind, inspect.IntType):
        return "an integer" + _describe_range(kind)
    if isinstance(kind, inspect.FloatType):
        return "a number" + _describe_range(kind)
    if isinstance(kind, inspect.ListType):
        return f"an array, each item {describe_type(kind.item_type)}"
    if isinstance(kind, inspect.BoolType):
        return "true or false"
    if isinstance(kind, inspect.StrType):
        return "a non-empty string" if kind.min_length else "a string"
    return "a table"


def _describe_range(kind: inspect.IntType | inspect.FloatType) -> str:
    if kind.ge is not None and kind.le is not None:
        return f" from {kind.ge} to {kind.le}"
    if kind.ge is not None:
        return f" >= {kind.ge}"
    if kind.gt is not None:
        return f" > {kind.gt}"
    return ""


def describe_value(value: object) -> str:
    """Return a value as TOML writes it, shortened."""
    if isinstance(value, str):
        text = msgspec.json.encode(value).decode()
        return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + '…"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > 64:
        return "an integer beyond 64 bits"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, datetime.date | datetime.time):
        return f"the date {value}"
    return str(value)
