"""Checks that go beyond a field's type: required fields, combinations, and what is not supported.

Pure functions of a decoded body; each raises the error that names the field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from actors.front.decode import decode_body, decode_raw
from actors.front.request import InferenceRequest, Prompt
from actors.front.structure import AnswerRule, Structure, answer_rule, structure_of
from cortexd.errors import InvalidType, InvalidValue, MissingParameter, UnsupportedParameter
from cortexd.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationFields,
    JsonObject,
)
from cortexd.tools import check_tool
from cortexd.translate import THINKING_VARIABLES

MAX_CHOICES = 128
_MAX_PROMPTS = 64
_UNSUPPORTED = ("truncate_prompt_tokens",)
_UNSUPPORTED_IN_CHAT = (
    "functions",
    "function_call",
    "audio",
    "web_search_options",
    "chat_template",
    "documents",
)
# Switches of other engines, and what they stand at here.
_FIXED = {
    "use_beam_search": False,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
}
_FIXED_IN_CHAT = {"echo": False}
_MAY_LACK_CONTENT = ("assistant", "tool", "function")


def parse_chat(body: bytes) -> InferenceRequest:
    """Return the checked request of `/v1/chat/completions`. Raises: InvalidRequest's children."""
    return check_chat(decode_body(body, ChatCompletionRequest))


def check_chat(
    fields: ChatCompletionRequest,
    *,
    prefill: str = "",
    answer: AnswerRule | None = None,
    schema_path: str = "function.parameters",
) -> InferenceRequest:
    """Return a chat request whose fields have the right types and ranges, checked as a whole.

    Another dialect gives what it has no field here for: the form of the answer, and where in a tool
    its schema stands.
    Raises: InvalidRequest's children.
    """
    model = _check_common(fields)
    _check_chat_only(fields)
    if fields.continue_final_message:
        turns, prefill = _split_prefill(fields)
        fields = msgspec.structs.replace(fields, messages=turns)
    if fields.messages is None:
        raise MissingParameter("messages is missing", param="messages")
    if not fields.messages:
        raise InvalidValue("messages is empty; at least one message is needed", param="messages")
    num_logprobs = -1
    if fields.logprobs:
        num_logprobs = fields.top_logprobs or 0
    elif fields.top_logprobs:
        raise InvalidValue("top_logprobs needs logprobs to be true", param="top_logprobs")
    tools = _callable_tools(fields)
    answer = answer_rule(fields) or answer
    structure = structure_of(fields, tools, answer, schema_path=schema_path)
    if structure is not None and prefill:
        raise InvalidValue(
            "an answer that the last message begins cannot be held to a structure; end messages "
            "with a user's turn",
            param="messages",
        )
    return InferenceRequest(
        kind="chat",
        model=model,
        fields=fields,
        max_tokens=fields.max_completion_tokens or fields.max_tokens,
        stop=_stop_strings(fields),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=_or_none_wanted(fields.prompt_logprobs),
        messages=[_message(index, message) for index, message in enumerate(fields.messages)],
        tools=tools,
        structure=structure,
        is_single_tool_call=fields.parallel_tool_calls is False,
        # As OpenAI has it: who names the tool knows that it is called.
        call_ending="stop" if structure is not None and structure.is_named else "tool_calls",
        template_kwargs=_template_kwargs(fields, prefill),
        prefill=prefill,
    )


def _template_kwargs(fields: ChatCompletionRequest, prefill: str) -> JsonObject | None:
    """Return the template's variables; those with fields of their own are among them."""
    variables: JsonObject = {}
    if fields.add_generation_prompt is not None and not prefill:
        variables["add_generation_prompt"] = fields.add_generation_prompt
    if fields.reasoning_effort is not None:
        variables["reasoning_effort"] = fields.reasoning_effort
    if fields.reasoning_effort == "none":
        variables |= dict.fromkeys(THINKING_VARIABLES, False)
    return variables | (fields.chat_template_kwargs or {}) or None


def _split_prefill(fields: ChatCompletionRequest) -> tuple[list[JsonObject], str]:
    """Return the turns before the answer, and the answer's beginning, which is the last one."""
    if fields.add_generation_prompt:
        raise InvalidValue(
            "continue_final_message and add_generation_prompt exclude each other; leave one",
            param="continue_final_message",
        )
    *turns, last = fields.messages or [{}]
    content = last.get("content")
    is_text = isinstance(content, str) and content and not last.get("tool_calls")
    if last.get("role") != "assistant" or not is_text or not turns:
        raise InvalidValue(
            "continue_final_message needs messages to end with an assistant's text, as a string",
            param="continue_final_message",
        )
    assert isinstance(content, str), "as was checked"
    return turns, content


def parse_completion(body: bytes) -> InferenceRequest:
    """Return the checked request of `/v1/completions`. Raises: InvalidRequest's children."""
    fields = decode_body(body, CompletionRequest)
    model = _check_common(fields)
    if fields.suffix:
        raise _unsupported("suffix", "only text after the prompt is generated")
    prompts = _prompts(fields.prompt)
    if len(prompts) * (fields.n or 1) > MAX_CHOICES:
        raise InvalidValue(
            f"n is {fields.n} for {len(prompts)} prompts; at most {MAX_CHOICES} answers in all",
            param="n",
        )
    if fields.max_tokens == 0 and not fields.echo and fields.prompt_logprobs is None:
        raise InvalidValue(
            "max_tokens is 0: nothing would be answered; allowed: at least 1, or 0 with echo or "
            "prompt_logprobs",
            param="max_tokens",
        )
    answer = answer_rule(fields)
    return InferenceRequest(
        kind="completion",
        model=model,
        fields=fields,
        max_tokens=fields.max_tokens,
        stop=_stop_strings(fields),
        num_logprobs=_or_none_wanted(fields.logprobs),
        num_prompt_logprobs=_or_none_wanted(fields.prompt_logprobs),
        is_echoed=fields.echo is True,
        prompts=prompts,
        structure=None if answer is None else Structure(answer, None),
    )


def _check_common(fields: GenerationFields) -> str:
    """Return the model's name after the checks both dialects share."""
    if fields.model is None:
        raise MissingParameter("model is missing", param="model")
    _refuse(fields, _UNSUPPORTED)
    _check_fixed(fields, _FIXED)
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise _unsupported("best_of", "leave it out or set it to n")
    if fields.prompt_logprobs is not None and fields.stream:
        raise InvalidValue(
            "prompt_logprobs cannot be streamed; leave out stream, or use echo with logprobs",
            param="prompt_logprobs",
        )
    if fields.stream_options is not None and not fields.stream:
        raise InvalidValue("stream_options needs stream to be true", param="stream_options")
    return fields.model


def _check_chat_only(fields: ChatCompletionRequest) -> None:
    _refuse(fields, _UNSUPPORTED_IN_CHAT)
    _check_fixed(fields, _FIXED_IN_CHAT)
    if fields.modalities not in (None, ["text"]):
        raise _unsupported("modalities", 'only ["text"]')


def _refuse(fields: GenerationFields, names: Iterable[str]) -> None:
    for name in names:
        if getattr(fields, name) is not None:
            raise _unsupported(name)


def _check_fixed(fields: GenerationFields, switches: Mapping[str, bool]) -> None:
    for name, value in switches.items():
        if getattr(fields, name) not in (None, value):
            raise _unsupported(name, f"leave it out; allowed: {str(value).lower()}")


def _callable_tools(fields: ChatCompletionRequest) -> list[JsonObject] | None:
    """Return the tools the model may call; with tool_choice "none" it is not told of them."""
    tools = [check_tool(f"tools[{n}]", tool) for n, tool in enumerate(fields.tools or [])]
    return None if fields.tool_choice == "none" else tools or None


def _unsupported(param: str, instead: str = "leave it out") -> UnsupportedParameter:
    return UnsupportedParameter(f"{param} is not supported here; {instead}", param=param)


def _or_none_wanted(count: int | None) -> int:
    return -1 if count is None else count


def _stop_strings(fields: GenerationFields) -> tuple[str, ...]:
    if fields.stop is None:
        return ()
    return (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop)


def _message(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with text parts only; all other fields stay as sent."""
    at = f"messages[{index}]"
    role = message.get("role")
    if role is None:
        raise MissingParameter(f"{at}.role is missing", param=f"{at}.role")
    if not isinstance(role, str) or not role:
        raise InvalidType(f"{at}.role must be a string", param=f"{at}.role")
    content = message.get("content")
    if content is None and role not in _MAY_LACK_CONTENT:
        raise MissingParameter(f"{at}.content is missing", param=f"{at}.content")
    if content is None or isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise InvalidType(
            f"{at}.content must be a string or a list of parts", param=f"{at}.content"
        )
    parts = [_text_part(f"{at}.content[{index}]", part) for index, part in enumerate(content)]
    return {**message, "content": parts}


def _text_part(at: str, part: object) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise InvalidType(f"{at} must be an object", param=at)
    kind = part.get("type")
    if kind not in {"text", "refusal"}:
        shown = kind if isinstance(kind, str) else "none"
        raise UnsupportedParameter(
            f'{at}.type "{shown[:40]}" is not supported here; only text parts', param=f"{at}.type"
        )
    text = part.get(kind)
    if not isinstance(text, str):
        raise InvalidType(f"{at}.{kind} must be a string", param=f"{at}.{kind}")
    return {"type": "text", "text": text}


def _prompts(raw: msgspec.Raw) -> list[Prompt]:
    """Return the prompts of a string, a list of strings, token ids, or a list of those."""
    value = decode_raw(raw)
    if value is None:
        raise MissingParameter("prompt is missing", param="prompt")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise _bad_prompt("prompt")
    if not value:
        raise InvalidValue("prompt is empty; at least one is needed", param="prompt")
    if _is_token_ids(value):
        return [value]
    if len(value) > _MAX_PROMPTS:
        raise InvalidValue(
            f"prompt holds {len(value)} prompts; at most {_MAX_PROMPTS}", param="prompt"
        )
    for index, item in enumerate(value):
        if not isinstance(item, str) and not (isinstance(item, list) and _is_token_ids(item)):
            raise _bad_prompt(f"prompt[{index}]")
    return value


def _is_token_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(item) is int for item in value)


def _bad_prompt(param: str) -> InvalidType:
    return InvalidType(
        f"{param} is not usable; prompt must be a string, a list of strings, a list of token ids "
        "or a list of those",
        param=param,
    )
