"""Translates Anthropic Messages requests into OpenAI chat requests.

Pure; every error names the field as the client sent it, so the result needs no second look. Words
are passed on as they are. What has no place in a chat template is left out: the `is_error` flag of
tool results, `cache_control`, redacted thinking (another service's secret), a thinking budget. A
block of a kind that is unknown here goes along as its own JSON; one that needs eyes is refused.
"""

from __future__ import annotations

from typing import Final

import msgspec

from cortexd.anthropic import CountTokensRequest, MessagesRequest
from cortexd.errors import InvalidType, InvalidValue, MissingParameter, UnsupportedParameter
from cortexd.openai import ChatCompletionRequest, EngineFields, JsonObject
from cortexd.tools import shown, string_field
from cortexd.translate_tools import translate_tool, translate_tool_choice

# The names that templates have for it; one without either ignores them.
THINKING_VARIABLES: Final = ("enable_thinking", "thinking")
_THINKING: Final = ("enabled", "adaptive", "between_tools", "disabled")


class Translation(msgspec.Struct, frozen=True):
    """The chat request, and the beginning of the answer when the client gave one.

    `answer_schema` is the schema the answer must follow, after the field that holds it.
    """

    request: ChatCompletionRequest
    prefill: str = ""
    answer_schema: tuple[str, object] | None = None


def to_chat_request(
    body: MessagesRequest | CountTokensRequest, *, with_images: bool = False
) -> Translation:
    """Return the same request as OpenAI has it. Raises: InvalidRequest's children.

    Images of user messages become `image_url` parts, unless they are refused (`with_images`).
    """
    _check_supported(body)
    if body.model is None:
        raise MissingParameter("model is missing", param="model")
    if body.messages is None:
        raise MissingParameter("messages is missing", param="messages")
    if not body.messages:
        raise InvalidValue("messages is empty; at least one message is needed", param="messages")
    turns, prefill = _split_prefill(body.messages)
    request = ChatCompletionRequest(
        model=body.model,
        messages=_messages(body, turns, with_images=with_images),
        tools=[translate_tool(f"tools[{n}]", tool) for n, tool in enumerate(body.tools or [])],
        tool_choice=translate_tool_choice(body.tool_choice),
        parallel_tool_calls=not (body.tool_choice or {}).get("disable_parallel_tool_use"),
        chat_template_kwargs=dict.fromkeys(THINKING_VARIABLES, _wants_thinking(body.thinking)),
    )
    if isinstance(body, MessagesRequest):
        request = msgspec.structs.replace(
            request,
            max_tokens=body.max_tokens,
            stop=body.stop_sequences,
            stream=body.stream,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            **{name: getattr(body, name) for name in EngineFields.__struct_fields__},
        )
    return Translation(request, prefill, _answer_schema(body))


def _answer_schema(body: CountTokensRequest) -> tuple[str, object] | None:
    """Return the schema an answer must follow; the beta's field and its successor say the same."""
    config = body.output_config or {}
    for at, wanted in (
        ("output_format", body.output_format),
        ("output_config.format", config.get("format")),
    ):
        if wanted is None:
            continue
        if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
            raise InvalidValue(f"{at}.type must be json_schema", param=f"{at}.type")
        if wanted.get("schema") is None:
            raise MissingParameter(f"{at}.schema is missing", param=f"{at}.schema")
        return f"{at}.schema", wanted["schema"]
    return None


def _check_supported(body: CountTokensRequest) -> None:
    if body.mcp_servers:
        raise _unsupported("mcp_servers")
    if body.thread is not None:
        # By this code the official client knows to send the whole conversation itself.
        raise UnsupportedParameter(
            "thread is not supported here; nothing is held: leave it out and send all messages",
            param="thread",
            error_code="thread_unsupported_request",
            unsupported=["thread"],
        )
    if isinstance(body, MessagesRequest):
        for name in ("container", "compaction"):
            if getattr(body, name) is not None:
                raise _unsupported(name)
        if body.max_tokens is None:
            raise MissingParameter("max_tokens is missing", param="max_tokens")


def _wants_thinking(thinking: JsonObject | None) -> bool:
    """Tell whether the client asked for reasoning: it would be paid for, and is seldom wanted."""
    if thinking is None:
        return False
    kind = thinking.get("type")
    if kind not in _THINKING:
        raise InvalidValue(
            f"thinking.type is {shown(kind)}; allowed: {', '.join(_THINKING)}",
            param="thinking.type",
        )
    return bool(kind != "disabled")


# Messages


def _split_prefill(messages: list[JsonObject]) -> tuple[list[JsonObject], str]:
    """Return the turns before the answer, and the answer's beginning if the last turn is one."""
    last = messages[-1]
    if last.get("role") != "assistant" or len(messages) == 1:
        return messages, ""
    message = _assistant(f"messages[{len(messages) - 1}]", last)
    if "tool_calls" in message or "reasoning_content" in message:
        return messages, ""
    return messages[:-1], message["content"]


def _messages(
    body: CountTokensRequest, turns: list[JsonObject], *, with_images: bool
) -> list[JsonObject]:
    """Return the turns; all system texts become the one leading message templates expect."""
    system = [_joined("system", body.system)] if body.system is not None else []
    translated: list[JsonObject] = []
    for index, message in enumerate(turns):
        at = f"messages[{index}]"
        role = message.get("role")
        if role == "system":
            system.append(_joined(f"{at}.content", message.get("content")))
        elif role == "assistant":
            translated.append(_assistant(at, message))
        elif role == "user":
            translated += _user(at, message, with_images=with_images)
        elif role is None:
            raise MissingParameter(f"{at}.role is missing", param=f"{at}.role")
        else:
            raise InvalidValue(
                f"{at}.role is {shown(role)}; allowed: user, assistant, system", param=f"{at}.role"
            )
    leading = "\n\n".join(text for text in system if text)
    return [{"role": "system", "content": leading}, *translated] if leading else translated


def _joined(at: str, content: object) -> str:
    return "\n\n".join(_text(where, block) for where, block in _blocks(at, content))


def _blocks(at: str, content: object) -> list[tuple[str, JsonObject]]:
    """Return each block with its path; a string is one block of text."""
    if content is None:
        raise MissingParameter(f"{at} is missing", param=at)
    if isinstance(content, str):
        return [(at, {"type": "text", "text": content})]
    if not isinstance(content, list):
        raise InvalidType(f"{at} must be a string or a list of blocks", param=at)
    located = [(f"{at}[{index}]", block) for index, block in enumerate(content)]
    for where, block in located:
        if not isinstance(block, dict):
            raise InvalidType(f"{where} must be an object", param=where)
    return located


def _text(at: str, block: JsonObject) -> str:
    """Return a block's words. Raises: UnsupportedParameter for what is not made of words."""
    kind = block.get("type")
    if kind == "text":
        return string_field(f"{at}.text", block.get("text"))
    source = block.get("source")
    if kind == "document" and isinstance(source, dict) and source.get("type") == "text":
        return string_field(f"{at}.source.data", source.get("data"))
    if kind in ("image", "document", "audio", "video", "container_upload"):
        raise UnsupportedParameter(
            f'{at}.type "{kind}" is not supported here; this model reads text only',
            param=f"{at}.type",
        )
    return msgspec.json.encode(block).decode()


def _assistant(at: str, message: JsonObject) -> JsonObject:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[JsonObject] = []
    for where, block in _blocks(f"{at}.content", message.get("content")):
        kind = block.get("type")
        if kind == "tool_use":
            calls.append(_tool_call(where, block))
        elif kind == "thinking":
            thoughts.append(string_field(f"{where}.thinking", block.get("thinking")))
        elif kind != "redacted_thinking":
            texts.append(_text(where, block))
    translated: JsonObject = {"role": "assistant", "content": "".join(texts)}
    if any(thoughts):
        translated["reasoning_content"] = "".join(thoughts)
    if calls:
        translated["tool_calls"] = calls
    return translated


def _tool_call(at: str, block: JsonObject) -> JsonObject:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise InvalidType(f"{at}.input must be an object", param=f"{at}.input")
    # The arguments stay an object, which is what templates iterate over.
    function = {"name": string_field(f"{at}.name", block.get("name")), "arguments": arguments}
    return {
        "id": string_field(f"{at}.id", block.get("id")),
        "type": "function",
        "function": function,
    }


def _user(at: str, message: JsonObject, *, with_images: bool) -> list[JsonObject]:
    """Return tool results as messages of their own, then the rest of the turn."""
    results: list[JsonObject] = []
    parts: list[JsonObject] = []
    for where, block in _blocks(f"{at}.content", message.get("content")):
        if block.get("type") == "tool_result":
            results.append(_tool_result(where, block))
        elif with_images and block.get("type") == "image":
            parts.append({"type": "image_url", "image_url": {"url": _image_url(where, block)}})
        else:
            parts.append({"type": "text", "text": _text(where, block)})
    if not parts:
        return results or [{"role": "user", "content": ""}]
    is_text = len(parts) == 1 and parts[0]["type"] == "text"
    content = parts[0]["text"] if is_text else parts
    return [*results, {"role": "user", "content": content}]


def _image_url(at: str, block: JsonObject) -> str:
    """Return where an image is; one that came along is a data URL (RFC 2397)."""
    source = block.get("source")
    if not isinstance(source, dict):
        raise InvalidType(f"{at}.source must be an object", param=f"{at}.source")
    kind = source.get("type")
    if kind == "url":
        return string_field(f"{at}.source.url", source.get("url"))
    if kind == "base64":
        media_type = string_field(f"{at}.source.media_type", source.get("media_type"))
        data = string_field(f"{at}.source.data", source.get("data"))
        return f"data:{media_type};base64,{data}"
    raise InvalidValue(
        f"{at}.source.type is {shown(kind)}; allowed: base64, url", param=f"{at}.source.type"
    )


def _tool_result(at: str, block: JsonObject) -> JsonObject:
    content = block.get("content")
    blocks = [] if content is None else _blocks(f"{at}.content", content)
    return {
        "role": "tool",
        "tool_call_id": string_field(f"{at}.tool_use_id", block.get("tool_use_id")),
        "content": "\n".join(_text(where, inner) for where, inner in blocks),
    }


def _unsupported(param: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"{param} is not supported here; leave it out", param=param)
