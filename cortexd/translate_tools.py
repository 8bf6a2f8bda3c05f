"""Translates Anthropic tool definitions and tool choices into OpenAI's. Pure."""

from __future__ import annotations

from typing import Final

from cortexd.errors import InvalidValue, UnsupportedParameter
from cortexd.openai import JsonObject
from cortexd.tools import check_function, check_tool, shown, string_field

_CHOICES: Final = ("auto", "any", "tool", "none")


def translate_tool(at: str, tool: JsonObject) -> JsonObject:
    """Return the tool as OpenAI has it; one that is in that form already passes.

    Raises: InvalidRequest's children, naming the field.
    """
    kind = tool.get("type")
    if kind == "function":
        return check_tool(at, tool)
    if kind not in {None, "custom"}:
        raise UnsupportedParameter(
            f"{at}.type is {shown(kind)}, which is not supported here; only tools that the client "
            "runs itself and describes with an input_schema",
            param=f"{at}.type",
        )
    check_function(at, tool, schema_key="input_schema")
    function: JsonObject = {"name": tool["name"]}
    if tool.get("description") is not None:
        function["description"] = string_field(f"{at}.description", tool["description"])
    function["parameters"] = tool.get("input_schema") or {"type": "object"}
    return {"type": "function", "function": function}


def translate_tool_choice(choice: JsonObject | None) -> str | JsonObject | None:
    """Return OpenAI's `tool_choice`. Raises: InvalidValue, MissingParameter, InvalidType."""
    if choice is None:
        return None
    kind = choice.get("type")
    if kind not in _CHOICES:
        raise InvalidValue(
            f"tool_choice.type is {shown(kind)}; allowed: {', '.join(_CHOICES)}",
            param="tool_choice.type",
        )
    if kind == "tool":
        name = string_field("tool_choice.name", choice.get("name"))
        return {"type": "function", "function": {"name": name}}
    return "required" if kind == "any" else str(kind)
