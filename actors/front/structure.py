"""What a request says its answer must be: a JSON document, a text of some form, calls of tools.

Read from the fields of both dialects and of vLLM when the request is checked. What it means as a
grammar depends on the model's own format, so `grammars` writes that once the prompt is known. Pure;
every error names the field.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from cortexd.errors import InvalidType, InvalidValue, MissingParameter, UnsupportedParameter
from cortexd.openai import ChatCompletionRequest, GenerationFields, JsonObject
from cortexd.tools import shown, string_field
from engine.grammar.schema import checked_schema
from engine.grammar.source import choice, json_value, regex

_FORMATS: Final = "text, json_object, json_schema"
_MAX_CHOICES: Final = 1024
_MAX_REGEX_LENGTH: Final = 16_384


@dataclass(slots=True, frozen=True)
class AnswerRule:
    """The form of a text answer: a grammar's expression, and the field that asked for it."""

    param: str
    expression: str


@dataclass(slots=True, frozen=True)
class CallRule:
    """The tools an answer may call, by name: the schemas of their arguments, and their fields."""

    schemas: dict[str, JsonObject]
    params: dict[str, str]
    is_single: bool


@dataclass(slots=True, frozen=True)
class Structure:
    """What the answer must be: one of the two when both are set. `is_named`: one tool, by name."""

    answer: AnswerRule | None
    calls: CallRule | None
    is_named: bool = False


def answer_rule(fields: GenerationFields) -> AnswerRule | None:
    """Return the form that a request wants of its text, None when it may be any.

    Raises: InvalidType, InvalidValue, MissingParameter, UnsupportedParameter.
    """
    for name in ("guided_grammar", "grammar"):
        if getattr(fields, name) is not None:
            raise UnsupportedParameter(f"{name} is not supported here; {_INSTEAD}", param=name)
    rules = [
        _response_format(fields.response_format),
        _structured_outputs(fields.structured_outputs),
        *(
            read(f"guided_{name}", getattr(fields, f"guided_{name}"))
            for name, read in _KINDS.items()
            if name != "json_object" and getattr(fields, f"guided_{name}") is not None
        ),
    ]
    found = [rule for rule in rules if rule is not None]
    if len(found) > 1:
        names = " and ".join(rule.param.partition(".")[0] for rule in found)
        raise InvalidValue(f"{names} exclude each other; leave one", param=found[1].param)
    return found[0] if found else None


def schema_rule(param: str, schema: object) -> AnswerRule:
    """Return the form of a JSON document. Raises: InvalidType, InvalidValue and its like."""
    return AnswerRule(param, json_value(checked_schema(schema, param)))


def structure_of(
    fields: ChatCompletionRequest,
    tools: list[JsonObject] | None,
    answer: AnswerRule | None,
    *,
    schema_path: str,
) -> Structure | None:
    """Return what a chat request's answer must be, None when it is free.

    `schema_path` is where the client's dialect has the schema of a tool.
    Raises: InvalidValue, InvalidType, MissingParameter, UnsupportedParameter.
    """
    wanted = _forced_names(fields.tool_choice, tools)
    if wanted is None and answer is None:
        return None
    callable_names = wanted if wanted is not None else _names(tools)
    calls = None
    if callable_names:
        calls = _call_rule(tools or [], callable_names, fields, schema_path)
    is_named = isinstance(fields.tool_choice, dict)
    return Structure(None if wanted is not None else answer, calls, is_named)


def _forced_names(tool_choice: object, tools: list[JsonObject] | None) -> list[str] | None:
    """Return the tools of which one must be called, None when none must."""
    if tool_choice in (None, "none", "auto"):
        return None
    names = _names(tools)
    if tool_choice == "required":
        if not names:
            raise InvalidValue(
                "tool_choice wants a tool called, but tools is empty", param="tool_choice"
            )
        return names
    if not isinstance(tool_choice, dict) or tool_choice.get("type") != "function":
        raise UnsupportedParameter(
            f"tool_choice is {shown(tool_choice)}; allowed: none, auto, required, or "
            '{"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )
    function = tool_choice.get("function")
    if not isinstance(function, dict):
        raise MissingParameter("tool_choice.function is missing", param="tool_choice.function")
    name = string_field("tool_choice.function.name", function.get("name"))
    if name not in names:
        known = ", ".join(names[:10]) or "none are sent"
        raise InvalidValue(
            f"tool_choice names the tool {shown(name)}, which is not among tools: {known}",
            param="tool_choice",
        )
    return [name]


def _names(tools: list[JsonObject] | None) -> list[str]:
    return [tool["function"]["name"] for tool in tools or []]


def _call_rule(
    tools: list[JsonObject], names: list[str], fields: ChatCompletionRequest, schema_path: str
) -> CallRule:
    schemas: dict[str, JsonObject] = {}
    params: dict[str, str] = {}
    for index, tool in enumerate(tools):
        function = tool["function"]
        if function["name"] not in names:
            continue
        param = f"tools[{index}].{schema_path}"
        checked = checked_schema(function.get("parameters") or {}, param)
        assert isinstance(checked, dict), "the tool's schema was checked to be an object"
        schemas[function["name"]], params[function["name"]] = checked, param
    is_named = isinstance(fields.tool_choice, dict)
    return CallRule(schemas, params, is_named or fields.parallel_tool_calls is False)


# The forms of a text


def _response_format(value: object) -> AnswerRule | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InvalidType("response_format must be an object", param="response_format")
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return schema_rule("response_format", {"type": "object"})
    if kind != "json_schema":
        raise UnsupportedParameter(
            f"response_format.type is {shown(kind)}; allowed: {_FORMATS}",
            param="response_format.type",
        )
    at = "response_format.json_schema"
    wanted = value.get("json_schema")
    if not isinstance(wanted, dict):
        raise MissingParameter(f"{at} is missing", param=at)
    string_field(f"{at}.name", wanted.get("name"))
    if wanted.get("schema") is None:
        raise MissingParameter(f"{at}.schema is missing", param=f"{at}.schema")
    return schema_rule(f"{at}.schema", wanted["schema"])


def _structured_outputs(value: object) -> AnswerRule | None:
    at = "structured_outputs"
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InvalidType(f"{at} must be an object", param=at)
    wanted = {name: one for name, one in value.items() if one is not None and one is not False}
    for name in wanted:
        if name not in _KINDS:
            raise UnsupportedParameter(
                f"{at}.{name[:60]} is not supported here; {_INSTEAD}", param=f"{at}.{name[:60]}"
            )
    if len(wanted) > 1:
        raise InvalidValue(f"{at} holds {', '.join(wanted)}; leave one", param=at)
    rules = [_KINDS[name](f"{at}.{name}", one) for name, one in wanted.items()]
    return rules[0] if rules else None


def _json(param: str, value: object) -> AnswerRule:
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (ValueError, RecursionError) as error:
            raise InvalidValue(f"{param} is not valid JSON: {error}", param=param) from None
    return schema_rule(param, value)


def _regex(param: str, value: object) -> AnswerRule:
    pattern = string_field(param, value)
    if not 0 < len(pattern) <= _MAX_REGEX_LENGTH:
        raise InvalidValue(
            f"{param} has {len(pattern)} characters; allowed: 1 to {_MAX_REGEX_LENGTH}", param=param
        )
    return AnswerRule(param, regex(pattern))


def _choice(param: str, value: object) -> AnswerRule:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise InvalidType(f"{param} must be a list of strings that are not empty", param=param)
    if not 0 < len(value) <= _MAX_CHOICES:
        raise InvalidValue(
            f"{param} has {len(value)} entries; allowed: 1 to {_MAX_CHOICES}", param=param
        )
    return AnswerRule(param, choice(value))


def _json_object(param: str, value: Any) -> AnswerRule:
    return schema_rule(param, {"type": "object"})


_KINDS: Final[dict[str, Callable[[str, object], AnswerRule]]] = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "json_object": _json_object,
}
_INSTEAD: Final = f"allowed: {', '.join(_KINDS)}"
