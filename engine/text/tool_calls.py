"""Reads tool calls from the words a model wrote them in: JSON, or the XML of Qwen's coders.

`{"name": "f", "arguments": {"a": 1}}` or `<function=f><parameter=a>1</parameter></function>`;
Mistral writes a list of the former, or `f[ARGS]{"a": 1}`. What is none of these is no call; the
caller keeps it as text. XML values are words, so they take the type that the tool declares for
them; JSON arguments stay byte for byte as the model wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from engine.text.answer import ToolCall
from engine.text.schema_types import coerce

JsonObject = dict[str, Any]
# Tool name → the JSON schema of its parameters.
ToolSchemas = Mapping[str, JsonObject]

_FUNCTION: Final = re.compile(r"\s*<function=([^<>\s]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER: Final = re.compile(r"\s*<parameter=([^<>\s]+)>(.*?)</parameter>", re.DOTALL)
# A name and what Mistral may put between it and the arguments.
_NAME: Final = r"\s*([A-Za-z0-9_.:/-]+)\s*(?:\[CALL_ID\][^\[\]{}]*)?(?:\[ARGS\])?\s*"
_NAME_AND_ARGUMENTS: Final = re.compile(_NAME + r"(\{.*\})\s*", re.DOTALL)
# JSON, perhaps after such a name: complete strings and all that is none, then a string that is
# still open. A raw line break ends a string in no JSON: what holds one was never meant to be JSON.
_OPEN_STRING: Final = re.compile(
    rf"(?:{_NAME})?" + r'\s*[\[{](?:[^"]|"(?:[^"\\\n]|\\.)*+")*+"(?:[^"\\\n]|\\.)*+\\?'
)
# A number beyond the range of a double is still a number.
_DECODER: Final = msgspec.json.Decoder(float_hook=float)


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
    return _parse_json(body.encode(errors="surrogatepass"))


def parse_mistral_calls(body: str) -> list[ToolCall]:
    """Return the calls that follow Mistral's marker, [] when these are none."""
    named = _NAME_AND_ARGUMENTS.fullmatch(body)
    if named is not None:
        arguments = _checked_arguments(named[2].encode(errors="surrogatepass"))
        return [] if arguments is None else [ToolCall(named[1], arguments)]
    try:
        items = msgspec.json.decode(body.encode(), type=list[msgspec.Raw])
    except (ValueError, RecursionError):
        return []
    calls = [_parse_json(bytes(item)) for item in items]
    found = [call for call in calls if call is not None]
    return found if len(found) == len(calls) else []


def goes_on(body: str) -> bool:
    """Tell whether `body` ends within a value: an end marker that follows belongs to it."""
    if body.lstrip().startswith("<function="):
        return body.rfind("<parameter=") > body.rfind("</parameter>")
    return _OPEN_STRING.fullmatch(body) is not None


def _parse_json(body: bytes) -> ToolCall | None:
    try:
        call = msgspec.json.decode(body, type=_JsonCall)
    except (ValueError, RecursionError):  # msgspec's and Unicode's errors are ValueErrors
        return None
    arguments = _checked_arguments(bytes(call.arguments) or bytes(call.parameters) or b"{}")
    return None if arguments is None or not call.name else ToolCall(call.name, arguments)


def _checked_arguments(raw: bytes) -> str | None:
    """Return the JSON of an object, None when it is none."""
    try:
        arguments = _DECODER.decode(raw)
        if isinstance(arguments, str):  # an object within a string, as the API itself has it
            raw = arguments.encode()
            arguments = _DECODER.decode(raw)
    except (ValueError, RecursionError):
        return None
    return raw.decode() if isinstance(arguments, dict) else None


def _parse_xml(body: str, schemas: ToolSchemas) -> ToolCall | None:
    function = _FUNCTION.fullmatch(body)
    if function is None:
        return None
    name, inner = function[1], function[2]
    schema = schemas.get(name, {})
    properties = schema.get("properties")
    arguments: JsonObject = {}
    end = 0
    while (parameter := _PARAMETER.match(inner, end)) is not None:
        key, end = parameter[1], parameter.end()
        declared = properties.get(key) if isinstance(properties, dict) else None
        arguments[key] = coerce(_unwrapped(parameter[2]), declared, schema)
    if inner[end:].strip():
        return None
    return ToolCall(name, msgspec.json.encode(arguments).decode())


def _unwrapped(value: str) -> str:
    """Return a value without the line breaks that set it off from its tags."""
    return value.removeprefix("\n").removesuffix("\n")
