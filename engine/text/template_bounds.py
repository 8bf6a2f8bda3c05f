"""How large a value template code may build: checks before operators, string methods and filters.

Used by `template_sandbox` only; no state. Each check estimates the size of a result from its
operands and raises `TemplateTooCostly` before the memory is taken.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterable
from typing import Any, Final

import jinja2
from jinja2 import filters
from jinja2.exceptions import SecurityError

# 16 Mi characters are some four million tokens, above the context of any model there is.
MAX_VALUE_LENGTH: Final = 16 * 2**20
_MAX_INT_BITS: Final = 4096
_MAX_JSON_INDENT: Final = 64
# Widths and precisions of five digits and more, or taken from an argument.
_LARGE_FIELD: Final = re.compile(r"\d{5,}|\{")
_LARGE_PERCENT_FIELD: Final = re.compile(
    r"%(?:\([^)]*\))?[#0\- +]*(?:\*|\d{5,}|\d*\.(?:\*|\d{5,}))"
)


class TemplateTooCostly(jinja2.TemplateRuntimeError):
    """A render passed its deadline or built too large a value."""


def check_length(length: int) -> None:
    """Raise `TemplateTooCostly` when a value would have more elements than allowed."""
    if length > MAX_VALUE_LENGTH:
        raise TemplateTooCostly(
            f"the template builds a value of {length} elements; allowed: {MAX_VALUE_LENGTH}"
        )


def bounded_concat(pieces: Iterable[str]) -> str:
    pieces = pieces if isinstance(pieces, list | tuple) else list(pieces)
    check_length(sum(map(len, pieces)))
    return "".join(pieces)


def check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "%":
        if isinstance(left, str):
            _check_percent_format(left)
        return
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length(), right.bit_length()
        product = {"+": max(bits), "*": sum(bits), "**": bits[0] * max(right, 0)}[operator]
        if product > _MAX_INT_BITS:
            raise TemplateTooCostly("the template builds an integer of more than 4096 bits")
    elif operator == "+":
        if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            check_length(len(left) + len(right))
    elif operator == "*":
        sequence, factor = (right, left) if isinstance(left, int) else (left, right)
        if isinstance(sequence, str | list | tuple) and isinstance(factor, int):
            check_length(len(sequence) * max(factor, 0))


def _check_percent_format(pattern: str) -> None:
    if _LARGE_PERCENT_FIELD.search(pattern.replace("%%", "")):
        raise TemplateTooCostly(f"the template formats with {pattern[:80]!r}: width too large")


def check_format_fields(pattern: str) -> None:
    for _, _, spec, _ in string.Formatter().parse(pattern):
        if spec and _LARGE_FIELD.search(spec):
            raise TemplateTooCostly(f"the template formats with {pattern[:80]!r}: width too large")


def check_string_method(
    text: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Check how long the result of a string method would be; return its arguments."""
    if method in ("center", "ljust", "rjust", "zfill") and args:
        check_length(int(args[0]))
    elif method == "expandtabs":
        size = next(iter([*args, *kwargs.values()]), 8)
        check_length(len(text) + text.count("\t") * int(size))
    elif method == "replace" and len(args) >= 2:
        check_length(len(text) + text.count(args[0]) * len(args[1]))
    elif method == "translate":
        raise SecurityError("str.translate is not available in chat templates")
    elif method == "join" and args:
        pieces = list(args[0])
        check_length(sum(len(piece) + len(text) for piece in pieces))
        return (pieces,)
    return args


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, str):
        indent = len(indent)
    if indent is not None and indent > _MAX_JSON_INDENT:
        raise TemplateTooCostly(f"tojson: indent {indent}; allowed: 0 to {_MAX_JSON_INDENT}")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _center(value: Any, width: int = 80) -> str:
    check_length(width)
    return filters.do_center(value, width)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    size = width if isinstance(width, int) else len(width)
    check_length(len(text) + size * (text.count("\n") + 1))
    return filters.do_indent(text, width, first, blank)


def _format(pattern: Any, *args: Any, **kwargs: Any) -> str:
    _check_percent_format(str(pattern))
    return filters.do_format(pattern, *args, **kwargs)


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    check_length(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment,
    values: Iterable[Any],
    separator: Any = "",
    attribute: str | int | None = None,
) -> str:
    if attribute is not None:
        values = map(filters.make_attrgetter(environment, attribute), values)
    pieces, separator = [str(value) for value in values], str(separator)
    check_length(sum(map(len, pieces)) + len(separator) * len(pieces))
    return separator.join(pieces)


def _batch(values: Iterable[Any], size: int, fill_with: Any = None) -> Iterable[list[Any]]:
    check_length(size)
    return filters.do_batch(values, size, fill_with)


@jinja2.pass_environment
def _sum(
    environment: jinja2.Environment,
    values: Iterable[Any],
    attribute: str | int | None = None,
    start: Any = 0,
) -> Any:
    if not isinstance(start, int | float):
        raise SecurityError("sum: only numbers can be added in chat templates")
    if attribute is not None:
        values = map(filters.make_attrgetter(environment, attribute), values)
    return sum(values, start)


BOUNDED_FILTERS: Final[dict[str, Callable[..., Any]]] = {
    "batch": _batch,
    "center": _center,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "sum": _sum,
    "tojson": _tojson,
}
