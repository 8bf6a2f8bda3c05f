"""Reads one tool call from the words a model wrote it in: JSON, or the XML of Qwen's coders.

`{"name": "f", "arguments": {"a": 1}}` or `<function=f><parameter=a>1</parameter></function>`. What
is neither is no call; the caller keeps it as text. XML values are words, so they take the type that
the tool declares for them; JSON arguments stay byte for byte as the model wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from engine.text.answer import ToolCall

JsonObject = dict[str, Any]
# Tool name → the JSON schema of its parameters.
ToolSchemas = Mapping[str, JsonObject]

_FUNCTION: Final = re.compile(r"\s*<function=([^<>\s]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER: Final = re.compile(r"\s*<parameter=([^<>\s]+)>(.*?)</parameter>", re.DOTALL)


class _JsonCall(msgspec.Struct, frozen=True):
    """A call as JSON; Llama's models say "parameters"."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"")
    parameters: msgspec.Raw = msgspec.Raw(b"")


def schemas_of(tools: list[JsonObject]) -> dict[str, JsonObject]:
    """Return the parameter schemas of OpenAI tool definitions, by name."""
    functions = [tool["function"] for tool in tools]
    return {function["name"]: function.get("parameters") or {} for function in functions}


def parse_tool_call(body: str, schemas: ToolSchemas) -> ToolCall | None:
    """Return the call that `body` spells, None when it spells none."""
    if body.lstrip().startswith("<function="):
        return _parse_xml(body, schemas)
    return _parse_json(body)


def _parse_json(body: str) -> ToolCall | None:
    try:
        call = msgspec.json.decode(body.encode(), type=_JsonCall)
        raw = bytes(call.arguments) or bytes(call.parameters) or b"{}"
        arguments = msgspec.json.decode(raw)
        if isinstance(arguments, str):  # an object within a string, as the API itself has it
            raw = arguments.encode()
            arguments = msgspec.json.decode(raw)
    except (ValueError, RecursionError):  # msgspec's and Unicode's errors are ValueErrors
        return None
    if not call.name or not isinstance(arguments, dict):
        return None
    return ToolCall(call.name, raw.decode())


def _parse_xml(body: str, schemas: ToolSchemas) -> ToolCall | None:
    function = _FUNCTION.fullmatch(body)
    if function is None:
        return None
    name, inner = function[1], function[2]
    properties = schemas.get(name, {}).get("properties")
    arguments: JsonObject = {}
    end = 0
    while (parameter := _PARAMETER.match(inner, end)) is not None:
        key, end = parameter[1], parameter.end()
        schema = properties.get(key) if isinstance(properties, dict) else None
        arguments[key] = coerce(_unwrapped(parameter[2]), schema)
    if inner[end:].strip():
        return None
    return ToolCall(name, msgspec.json.encode(arguments).decode())


def _unwrapped(value: str) -> str:
    """Return a value without the line breaks that set it off from its tags."""
    return value.removeprefix("\n").removesuffix("\n")


def coerce(value: str, schema: object) -> object:
    """Return `value` as the first of its declared types that it can be, else as the string."""
    for kind in _declared_types(schema):
        if kind == "string":
            return value
        try:
            converted = msgspec.json.decode(value.strip().encode())
        except (ValueError, RecursionError):
            converted = _python_word(value.strip())
        if _is_of(kind, converted):
            return int(converted) if kind == "integer" else converted
    return value


def _python_word(word: str) -> object:
    """Return what Python's spelling of a constant means; models mix the two languages up."""
    return {"True": True, "False": False, "None": None}.get(word, word)


def _declared_types(schema: object) -> list[str]:
    """Return the type names a schema allows, "string" last: any value could be one."""
    if not isinstance(schema, dict):
        return []
    declared = schema.get("type")
    kinds = [declared] if isinstance(declared, str) else []
    if isinstance(declared, list):
        kinds = [kind for kind in declared if isinstance(kind, str)]
    for name in ("anyOf", "oneOf"):
        options = schema.get(name)
        for option in options if isinstance(options, list) else []:
            kinds += _declared_types(option)
    return sorted(kinds, key="string".__eq__)


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
