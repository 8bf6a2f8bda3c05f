"""Translates Responses requests into chat requests.

Pure; every error names the field as the client sent it. All system and developer texts become the
one leading message that templates expect. A turn's reasoning, words and calls, which are items of
their own here, become one assistant message. Tools that are no functions are for the original
service to run: the model is not told of them, since clients send them to whatever server they use;
one that is forced (`tool_choice`) is refused.
"""

from __future__ import annotations

from typing import Final

from cortexd.errors import InvalidType, InvalidValue, MissingParameter, UnsupportedParameter
from cortexd.openai import ChatCompletionRequest, EngineFields, JsonObject
from cortexd.responses import ResponsesRequest
from cortexd.tools import check_function, shown, string_field

_STORED: Final = "nothing is stored; send the whole input"
_LEFT_OUT: Final = "leave it out"
# Field → what to do instead.
_UNSUPPORTED: Final = {
    "background": _LEFT_OUT,
    "conversation": _STORED,
    "previous_response_id": _STORED,
    "prompt": _LEFT_OUT,
    "top_logprobs": _LEFT_OUT,
}
_SYSTEM_ROLES: Final = ("system", "developer")
_TEXT_PARTS: Final = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_CALL_FIELDS: Final = ("call_id", "name", "arguments")
_FUNCTION_FIELDS: Final = ("name", "description", "parameters", "strict")


def to_chat_request(body: ResponsesRequest) -> ChatCompletionRequest:
    """Return the same request as the chat API has it. Raises: InvalidRequest's children."""
    for name, instead in _UNSUPPORTED.items():
        if getattr(body, name):
            raise UnsupportedParameter(f"{name} is not supported here; {instead}", param=name)
    if body.model is None:
        raise MissingParameter("model is missing", param="model")
    return ChatCompletionRequest(
        model=body.model,
        messages=_messages(body),
        tools=_tools(body.tools or []),
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_response_format(body.text),
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        stream=body.stream,
        chat_template_kwargs=body.chat_template_kwargs,
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        **{name: getattr(body, name) for name in EngineFields.__struct_fields__},
    )


def _messages(body: ResponsesRequest) -> list[JsonObject]:
    if body.input is None:
        raise MissingParameter("input is missing", param="input")
    turns = _Turns()
    if body.instructions:
        turns.system.append(body.instructions)
    if isinstance(body.input, str):
        turns.messages.append({"role": "user", "content": body.input})
    else:
        for index, item in enumerate(body.input):
            turns.add(f"input[{index}]", item)
    messages = turns.whole()
    if not messages:
        raise InvalidValue("input is empty; at least one item is needed", param="input")
    return messages


class _Turns:
    """The messages that the items read so far make."""

    def __init__(self) -> None:
        self.system: list[str] = []
        self.messages: list[JsonObject] = []
        self._thoughts = ""

    def whole(self) -> list[JsonObject]:
        """Return them all, what is said to the model first."""
        leading = "\n\n".join(text for text in self.system if text)
        head = [{"role": "system", "content": leading}] if leading else []
        return [*head, *self.messages]

    def add(self, at: str, item: JsonObject) -> None:
        """Read one item. Raises: InvalidRequest's children."""
        match item.get("type", "message"):
            case "message":
                self._add_message(at, item)
            case "reasoning":
                self._thoughts += _text(f"{at}.content", item.get("content") or [])
            case "function_call":
                call = {key: string_field(f"{at}.{key}", item.get(key)) for key in _CALL_FIELDS}
                function = {"name": call["name"], "arguments": call["arguments"]}
                self._assistant().setdefault("tool_calls", []).append(
                    {"id": call["call_id"], "type": "function", "function": function}
                )
            case "function_call_output":
                call_id = string_field(f"{at}.call_id", item.get("call_id"))
                output = _text(f"{at}.output", item.get("output"))
                self.messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
            case kind:
                raise UnsupportedParameter(
                    f"{at}.type is {shown(kind)}, which is not supported here; only message, "
                    "reasoning, function_call and function_call_output",
                    param=f"{at}.type",
                )

    def _add_message(self, at: str, item: JsonObject) -> None:
        role = string_field(f"{at}.role", item.get("role"))
        text = _text(f"{at}.content", item.get("content"))
        if role in _SYSTEM_ROLES:
            self.system.append(text)
        elif role == "user":
            self.messages.append({"role": role, "content": text})
        elif role == "assistant":
            message = self._assistant()
            message["content"] += text
        else:
            raise InvalidValue(
                f"{at}.role is {shown(role)}; allowed: user, assistant, system, developer",
                param=f"{at}.role",
            )

    def _assistant(self) -> JsonObject:
        """Return the model's turn that is being read, a new one after anything else."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": ""})
        message = self.messages[-1]
        if self._thoughts:
            message["reasoning_content"] = message.get("reasoning_content", "") + self._thoughts
            self._thoughts = ""
        return message


def _text(at: str, content: object) -> str:
    """Return the words of a string or of a list of parts."""
    if content is None:
        raise MissingParameter(f"{at} is missing", param=at)
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidType(f"{at} must be a string or a list of parts", param=at)
    return "".join(_part(f"{at}[{index}]", part) for index, part in enumerate(content))


def _part(at: str, part: object) -> str:
    if not isinstance(part, dict):
        raise InvalidType(f"{at} must be an object", param=at)
    kind = part.get("type")
    if kind == "refusal":
        return string_field(f"{at}.refusal", part.get("refusal"))
    if kind not in _TEXT_PARTS:
        raise UnsupportedParameter(
            f"{at}.type is {shown(kind)}, which is not supported here; only text parts",
            param=f"{at}.type",
        )
    return string_field(f"{at}.text", part.get("text"))


def _tools(tools: list[JsonObject]) -> list[JsonObject]:
    functions = []
    for index, tool in enumerate(tools):
        if tool.get("type") != "function":
            continue
        check_function(f"tools[{index}]", tool, schema_key="parameters")
        function = {key: tool[key] for key in _FUNCTION_FIELDS if tool.get(key) is not None}
        functions.append({"type": "function", "function": function})
    return functions


def _tool_choice(choice: object) -> str | JsonObject | None:
    if choice is None or isinstance(choice, str):
        return choice
    if not isinstance(choice, dict) or choice.get("type") != "function":
        raise UnsupportedParameter(
            f"tool_choice is {shown(choice)}, which is not supported here; only auto, none, "
            'required, or {"type": "function", "name": ...}',
            param="tool_choice",
        )
    name = string_field("tool_choice.name", choice.get("name"))
    return {"type": "function", "function": {"name": name}}


def _response_format(text: JsonObject | None) -> JsonObject | None:
    wanted = (text or {}).get("format")
    if wanted is None:
        return None
    if not isinstance(wanted, dict):
        raise InvalidType("text.format must be an object", param="text.format")
    if wanted.get("type") != "json_schema":
        return wanted
    named = {key: value for key, value in wanted.items() if key != "type"}
    return {"type": "json_schema", "json_schema": named}
