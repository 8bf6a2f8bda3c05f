"""Checks of tool definitions that both dialects share. Pure; every error names the field."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from cortexd.errors import InvalidType, InvalidValue, MissingParameter, UnsupportedParameter
from cortexd.openai import JsonObject

# Such names look the same in a prompt, as JSON and as XML.
_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")
_MAX_SHOWN: Final = 60


def check_tool(at: str, tool: JsonObject) -> JsonObject:
    """Return an OpenAI tool definition as it is.

    Raises: MissingParameter, InvalidType, InvalidValue, UnsupportedParameter.
    """
    kind = tool.get("type", "function")
    if kind != "function":
        raise UnsupportedParameter(
            f'{at}.type is {shown(kind)}, which is not supported here; only "function"',
            param=f"{at}.type",
        )
    function = tool.get("function")
    if function is None:
        raise MissingParameter(f"{at}.function is missing", param=f"{at}.function")
    if not isinstance(function, dict):
        raise InvalidType(f"{at}.function must be an object", param=f"{at}.function")
    check_function(f"{at}.function", function, schema_key="parameters")
    return tool


def check_function(at: str, function: JsonObject, *, schema_key: str) -> None:
    """Refuse a function without a usable name or with a schema that is no object."""
    name = string_field(f"{at}.name", function.get("name"))
    if not _TOOL_NAME.fullmatch(name):
        raise InvalidValue(
            f"{at}.name is {shown(name)}; allowed: 1 to 256 of A-Z a-z 0-9 _ . : / -",
            param=f"{at}.name",
        )
    schema = function.get(schema_key)
    if schema is not None and not isinstance(schema, dict):
        raise InvalidType(f"{at}.{schema_key} must be an object", param=f"{at}.{schema_key}")


def string_field(at: str, value: object) -> str:
    """Return a field that must be a string. Raises: MissingParameter, InvalidType."""
    if value is None:
        raise MissingParameter(f"{at} is missing", param=at)
    if not isinstance(value, str):
        raise InvalidType(f"{at} must be a string", param=at)
    return value


def shown(value: object) -> str:
    """Return a client's value for an error text, shortened."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
