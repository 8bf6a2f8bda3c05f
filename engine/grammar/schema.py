"""Check a client's JSON schema before it becomes a grammar.

A keyword that the grammar could not enforce is refused with its path, never dropped, and size and
depth are bounded. Annotations say nothing about values; they are left out of the result. What only
the grammar's compiler can tell (a pattern with look-ahead, a contradiction) is refused by it.

Source: JSON Schema 2020-12 and llguidance 1.9 `docs/json_schema.md` for what can be enforced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from cortexd.errors import InvalidType, InvalidValue, UnsupportedParameter

JsonObject = dict[str, Any]

MAX_DEPTH: Final = 32
# 9,000 subschemas take half a second to compile and as long for their first mask.
MAX_SUBSCHEMAS: Final = 4096
MAX_VALUES: Final = 4096  # of all enums together
MAX_PATTERN_LENGTH: Final = 4096
_TYPES: Final = ("string", "number", "integer", "boolean", "null", "object", "array")

_ANNOTATIONS: Final = frozenset(
    {
        "$comment",
        "$id",
        "$schema",
        "contentEncoding",
        "contentMediaType",
        "default",
        "deprecated",
        "description",
        "example",
        "examples",
        "id",
        "readOnly",
        "title",
        "writeOnly",
    }
)
_PLAIN: Final = frozenset(
    {
        "const",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "maximum",
        "minimum",
        "multipleOf",
        "required",
    }
)
_COUNTS: Final = frozenset(
    {"maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties"}
)
_MAX_COUNT: Final = 1_000_000
_ONE_SCHEMA: Final = frozenset({"additionalProperties", "items"})
_SCHEMA_LISTS: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_SCHEMA_MAPS: Final = frozenset({"$defs", "definitions", "patternProperties", "properties"})


def checked_schema(schema: object, at: str) -> JsonObject | bool:
    """Return the schema without its annotations; `at` is where the client wrote it.

    Raises: UnsupportedParameter for a keyword that cannot be enforced, InvalidType, InvalidValue.
    """
    return _Checker().schema(schema, at, 0)


class _Checker:
    """One walk over one schema."""

    def __init__(self) -> None:
        self._num_subschemas = 0
        self._num_values = 0
        self._special: dict[str, Callable[[object, str], object]] = {
            "$ref": _reference,
            "enum": self._enum,
            "pattern": _pattern,
            "type": _type,
        }

    def schema(self, schema: object, at: str, depth: int) -> JsonObject | bool:
        """Return one subschema."""
        self._num_subschemas += 1
        if self._num_subschemas > MAX_SUBSCHEMAS:
            raise InvalidValue(
                f"{at}: the schema has more than {MAX_SUBSCHEMAS} subschemas; make it smaller",
                param=at,
            )
        if depth > MAX_DEPTH:
            raise InvalidValue(
                f"the schema is nested more than {MAX_DEPTH} deep; use $ref and $defs",
                param=at[:200],
            )
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise InvalidType(f"{at} must be a schema: an object, true or false", param=at)
        checked: JsonObject = {}
        for keyword, value in schema.items():
            if keyword in _ANNOTATIONS or keyword.startswith("x-"):
                continue
            checked[keyword] = self._keyword(keyword, value, f"{at}.{keyword}", depth + 1)
        return checked

    def _keyword(self, keyword: str, value: object, at: str, depth: int) -> object:
        if keyword in _PLAIN:
            return value
        if keyword in _COUNTS:
            return _count(value, at)
        if keyword in self._special:
            return self._special[keyword](value, at)
        if keyword in _ONE_SCHEMA:
            return self.schema(value, at, depth)
        if keyword in _SCHEMA_LISTS:
            if not isinstance(value, list):
                raise InvalidType(f"{at} must be a list of schemas", param=at)
            return [self.schema(one, f"{at}[{n}]", depth) for n, one in enumerate(value)]
        if keyword in _SCHEMA_MAPS:
            if not isinstance(value, dict):
                raise InvalidType(f"{at} must be an object of schemas", param=at)
            return {name: self.schema(one, f"{at}.{name}", depth) for name, one in value.items()}
        raise UnsupportedParameter(
            f'the schema keyword "{keyword[:60]}" at {at[:200]} cannot be enforced here; '
            "leave it out",
            param=at[:200],
        )

    def _enum(self, value: object, at: str) -> object:
        if not isinstance(value, list):
            raise InvalidType(f"{at} must be a list of values", param=at)
        self._num_values += len(value)
        if self._num_values > MAX_VALUES:
            raise InvalidValue(
                f"{at}: the enums of the schema have more than {MAX_VALUES} values", param=at
            )
        return value


def _count(value: object, at: str) -> object:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_COUNT:
        raise InvalidValue(f"{at} must be an integer from 0 to {_MAX_COUNT}", param=at)
    return value


def _reference(value: object, at: str) -> object:
    if not isinstance(value, str) or not value.startswith("#"):
        raise UnsupportedParameter(
            f'{at} must point into this schema ("#/$defs/..."); nothing is fetched', param=at
        )
    return value


def _pattern(value: object, at: str) -> object:
    if not isinstance(value, str) or len(value) > MAX_PATTERN_LENGTH:
        raise InvalidValue(
            f"{at} must be a regular expression of at most {MAX_PATTERN_LENGTH} characters",
            param=at,
        )
    return value


def _type(value: object, at: str) -> object:
    for name in value if isinstance(value, list) else [value]:
        if name not in _TYPES:
            raise InvalidValue(f"{at} must be of: {', '.join(_TYPES)}", param=at)
    return value
