"""What a tool's schema says of a value that a model wrote as bare words.

Pure; used to type the values of XML calls, and to write the grammar that forces them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

_MAX_REFERENCES: Final = 16
_TYPE_NAMES: Final = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    type(None): "null",
}


def coerce(value: str, schema: object, root: Mapping[str, Any] | None = None) -> object:
    """Return `value` as the first of its declared types that it can be, else as the string.

    `root` is the schema that holds the definitions `schema` may refer to.
    """
    for kind in declared_types(schema, root or {}):
        if kind == "string":
            return value
        try:
            converted = msgspec.json.decode(value.strip().encode())
        except (ValueError, RecursionError):
            converted = _python_word(value.strip())
        if _is_of(kind, converted):
            return int(converted) if kind == "integer" else converted
    return value


def declared_types(schema: object, root: Mapping[str, Any]) -> list[str]:
    """Return the type names a schema allows, "string" last: any value could be one."""
    schema = resolved(schema, root)
    if not isinstance(schema, dict):
        return []
    declared = schema.get("type")
    kinds = [declared] if isinstance(declared, str) else []
    if isinstance(declared, list):
        kinds = [kind for kind in declared if isinstance(kind, str)]
    for name in ("anyOf", "oneOf"):
        options = schema.get(name)
        for option in options if isinstance(options, list) else []:
            kinds += declared_types(option, root)
    if not kinds:
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        kinds = [_TYPE_NAMES[type(one)] for one in values] if isinstance(values, list) else []
    return sorted(dict.fromkeys(kinds), key="string".__eq__)


def resolved(schema: object, root: Mapping[str, Any]) -> object:
    """Return what a schema that is a reference into `root` points to, else the schema itself."""
    for _ in range(_MAX_REFERENCES):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or not reference.startswith("#"):
            return schema
        schema = root
        for part in reference[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            schema = schema.get(name) if isinstance(schema, dict) else None
    return None


def _python_word(word: str) -> object:
    """Return what Python's spelling of a constant means; models mix the two languages up."""
    return {"True": True, "False": False, "None": None}.get(word, word)


def _is_of(kind: str, value: Any) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if kind == "number":
        return isinstance(value, int | float)
    return (kind == "object" and isinstance(value, dict)) or (
        kind == "array" and isinstance(value, list)
    )
