"""Bring the messages of a chat request into the shape chat templates expect.

Called by `ChatTemplate.render`; pure. The words of the user are passed on as they are: text that
spells a control token is not escaped, as in Hugging Face's own rendering.
"""

from __future__ import annotations

import json
from typing import Any, Final, Literal

from cortexd.errors import InvalidType, InvalidValue, MissingParameter, UnsupportedParameter

Message = dict[str, Any]
# What content is where a message only calls tools.
NoWords = Literal["null", "empty", "as sent"]

# Clients name the reasoning of earlier turns differently; templates read the first name.
_REASONING_FIELDS: Final = ("reasoning_content", "thinking", "reasoning")


def has_parts(messages: list[Message]) -> bool:
    """Return whether any message has its content as a list of parts; any input will do."""
    return isinstance(messages, list) and any(
        isinstance(message, dict) and isinstance(message.get("content"), list)
        for message in messages
    )


def has_wordless_calls(messages: list[Message]) -> bool:
    """Return whether any message has tool calls and no words beside them; any input will do."""
    return isinstance(messages, list) and any(
        isinstance(message, dict) and message.get("tool_calls") and not message.get("content")
        for message in messages
    )


def prepare_messages(
    messages: list[Message], *, accepts_parts: bool, no_words: NoWords = "as sent"
) -> list[Message]:
    """Return copies of `messages` for the template.

    Lists of text parts are joined by newlines unless the template iterates over parts
    (`accepts_parts`); tool-call arguments become objects; a missing content becomes "", and beside
    tool calls `no_words`, for which templates test in their own way.
    Raises: InvalidRequest (a subclass) naming the field.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidValue("messages: must be a non-empty list", param="messages")
    return [
        _prepare_message(message, f"messages[{index}]", accepts_parts, no_words)
        for index, message in enumerate(messages)
    ]


def _prepare_message(
    message: Message, where: str, accepts_parts: bool, no_words: NoWords
) -> Message:
    if not isinstance(message, dict):
        raise InvalidType(f"{where}: must be an object", param=where)
    if not isinstance(message.get("role"), str):
        raise MissingParameter(f"{where}.role: must be a string", param=f"{where}.role")
    prepared = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        texts = [_part_text(part, f"{where}.content[{n}]") for n, part in enumerate(content)]
        if not accepts_parts:
            prepared["content"] = "\n".join(texts)
    elif content in (None, "") and message.get("tool_calls"):
        prepared["content"] = {"null": None, "empty": "", "as sent": content}[no_words]
    elif content is None:
        prepared["content"] = ""
    elif not isinstance(content, str):
        raise InvalidType(
            f"{where}.content: must be a string, a list of parts or null", param=f"{where}.content"
        )
    if message.get("tool_calls"):
        prepared["tool_calls"] = _prepare_tool_calls(message["tool_calls"], f"{where}.tool_calls")
    return _with_reasoning_names(prepared)


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise InvalidType(f"{where}: must be an object", param=where)
    if part.get("type") != "text":
        raise UnsupportedParameter(
            f"{where}.type: {part.get('type')!r} is not supported by this model; supported: text",
            param=f"{where}.type",
        )
    if not isinstance(part.get("text"), str):
        raise InvalidType(f"{where}.text: must be a string", param=f"{where}.text")
    text: str = part["text"]
    return text


def _prepare_tool_calls(calls: Any, where: str) -> list[Message]:
    if not isinstance(calls, list):
        raise InvalidType(f"{where}: must be a list", param=where)
    return [_prepare_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _prepare_tool_call(call: Any, where: str) -> Message:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise InvalidType(f"{where}.function: must be an object", param=f"{where}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parse_arguments(arguments, f"{where}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def _parse_arguments(text: str, where: str) -> Message:
    try:
        arguments = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise InvalidValue(f"{where}: not valid JSON: {error}", param=where) from error
    if not isinstance(arguments, dict):
        raise InvalidValue(f"{where}: must be a JSON object", param=where)
    return arguments


def _with_reasoning_names(message: Message) -> Message:
    reasoning = next(
        (message[name] for name in _REASONING_FIELDS if message.get(name) is not None), None
    )
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
