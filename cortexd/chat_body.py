"""A Messages request as the chat request that another OpenAI-compatible server understands. Pure.

Beyond the fields of OpenAI's own API it uses those that vLLM, SGLang and llama-server share, and
only when the client asked for what they do: `top_k` and its like, `chat_template_kwargs` for
thinking, and `continue_final_message` for an answer that the client has begun.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cortexd.anthropic import MessagesRequest
from cortexd.openai import EngineFields, JsonObject
from cortexd.translate import to_chat_request


def chat_body(body: MessagesRequest, model: str) -> bytes:
    """Return the JSON body for `/v1/chat/completions`. Raises: InvalidRequest's children."""
    translation = to_chat_request(body, with_images=True)
    request = translation.request
    messages = [_on_the_wire(message) for message in request.messages or []]
    document: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": request.stop,
        "stream": request.stream,
    }
    if request.stream:
        document["stream_options"] = {"include_usage": True}
    if request.tools:
        document["tools"] = request.tools
        document["tool_choice"] = request.tool_choice
        document["parallel_tool_calls"] = None if request.parallel_tool_calls else False
    document |= {name: getattr(body, name) for name in EngineFields.__struct_fields__}
    if translation.answer_schema is not None:
        schema = {"name": "answer", "strict": True, "schema": translation.answer_schema[1]}
        document["response_format"] = {"type": "json_schema", "json_schema": schema}
    if body.thinking is not None:
        document["chat_template_kwargs"] = request.chat_template_kwargs
    if translation.prefill:
        messages.append({"role": "assistant", "content": translation.prefill})
        document["continue_final_message"] = True
        document["add_generation_prompt"] = False
    return msgspec.json.encode(
        {name: value for name, value in document.items() if value is not None}
    )


def _on_the_wire(message: JsonObject) -> JsonObject:
    """Return a message with its calls' arguments as text, which only templates have as objects."""
    calls = message.get("tool_calls")
    if calls is None:
        return message
    return {**message, "tool_calls": [_call_on_the_wire(call) for call in calls]}


def _call_on_the_wire(call: JsonObject) -> JsonObject:
    function = call["function"]
    arguments = msgspec.json.encode(function["arguments"]).decode()
    return {**call, "function": {**function, "arguments": arguments}}
