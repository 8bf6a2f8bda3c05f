"""Anthropic requests as OpenAI requests: the rules of the translation, one by one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cortexd.anthropic import CountTokensRequest, MessagesRequest
from cortexd.errors import UnsupportedParameter
from cortexd.translate import Translation, to_chat_request


def translate(*turns: dict[str, Any], **fields: Any) -> Translation:
    """Return the translation of some turns."""
    body = {"model": "m", "max_tokens": 5, "messages": list(turns), **fields}
    return to_chat_request(msgspec.convert(body, MessagesRequest))


def user(*blocks: Any) -> dict[str, Any]:
    """Return a turn of the user's."""
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    """Return a turn of the assistant's."""
    return {"role": "assistant", "content": list(blocks)}


def text(words: str) -> dict[str, Any]:
    """Return a text block, with a field that has no meaning here."""
    return {"type": "text", "text": words, "cache_control": {"type": "ephemeral"}}


def messages_of(translation: Translation) -> list[dict[str, Any]]:
    """Return the translated turns."""
    assert translation.request.messages is not None
    return translation.request.messages


def test_system_texts_become_one_leading_message() -> None:
    """Clients put system messages in the middle of a conversation; templates want one, first."""
    translated = translate(
        user(text("a")),
        {"role": "system", "content": [text("two"), text("three")]},
        user(text("b")),
        system="one",
    )
    assert [message["role"] for message in messages_of(translated)] == ["system", "user", "user"]
    assert messages_of(translated)[0]["content"] == "one\n\ntwo\n\nthree"
    for nothing in ("", [], [text("")]):
        assert len(messages_of(translate(user(text("a")), system=nothing))) == 1


def test_user_texts_stay_parts_and_one_becomes_a_string() -> None:
    """Several blocks are parts for the template to join; nothing but words is in them."""
    several = messages_of(translate(user(text("a"), text("b"))))
    assert several[0]["content"] == [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b"},
    ]
    assert messages_of(translate(user(text("a"))))[0]["content"] == "a"
    assert messages_of(translate(user()))[0]["content"] == ""


def test_tool_results_come_before_the_rest_of_their_turn() -> None:
    """Results are messages of their own; their content is flattened."""
    results = [
        {"type": "tool_result", "tool_use_id": "1", "content": [text("x"), text("y")]},
        {"type": "tool_result", "tool_use_id": "2", "is_error": True},
    ]
    translated = messages_of(translate(user(text("before"), *results, text("after"))))
    assert translated[:2] == [
        {"role": "tool", "tool_call_id": "1", "content": "x\ny"},
        {"role": "tool", "tool_call_id": "2", "content": ""},
    ]
    assert [part["text"] for part in translated[2]["content"]] == ["before", "after"]
    assert len(messages_of(translate(user(*results)))) == 2


def test_assistant_blocks_become_one_message() -> None:
    """Text is joined as it was written, calls keep their arguments as objects."""
    translated = messages_of(
        translate(
            user(text("q")),
            assistant(
                {"type": "thinking", "thinking": "t1", "signature": "s"},
                {"type": "redacted_thinking", "data": "secret"},
                text("a"),
                text("b"),
                {"type": "tool_use", "id": "1", "name": "f", "input": {"x": [1]}},
            ),
            user(text("r")),
        )
    )
    assert translated[1] == {
        "role": "assistant",
        "content": "ab",
        "reasoning_content": "t1",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": [1]}}}
        ],
    }


def test_last_assistant_turn_is_the_answers_beginning() -> None:
    """Unless it holds more than words, or is all there is."""
    translated = translate(user(text("q")), assistant(text("Dear")))
    assert translated.prefill == "Dear"
    assert len(messages_of(translated)) == 1
    call = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    for turns in ([user(text("q")), assistant(call)], [assistant(text("a"))]):
        translated = translate(*turns)
        assert translated.prefill == ""
        assert messages_of(translated)[-1]["role"] == "assistant"


def test_unknown_blocks_go_along_as_json() -> None:
    """One new kind of block does not cost the whole conversation; words in a document do count."""
    block = {"type": "search_result", "title": "T"}
    translated = messages_of(translate(user(block)))
    assert translated[0]["content"] == '{"type":"search_result","title":"T"}'
    document = {"type": "document", "source": {"type": "text", "data": "words"}}
    assert messages_of(translate(user(document)))[0]["content"] == "words"


@pytest.mark.parametrize(
    ("choice", "expected", "is_parallel"),
    [
        (None, None, True),
        ({"type": "auto"}, "auto", True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "any"}, "required", True),
        ({"type": "none"}, "none", True),
        (
            {"type": "tool", "name": "f"},
            {"type": "function", "function": {"name": "f"}},
            True,
        ),
    ],
)
def test_tool_choice(choice: Any, expected: Any, is_parallel: bool) -> None:
    """Each choice has its counterpart."""
    request = translate(user(text("q")), tool_choice=choice).request
    assert (request.tool_choice, request.parallel_tool_calls) == (expected, is_parallel)


def test_tools_become_functions() -> None:
    """Definitions in either form; a missing schema is an object; extras are left behind."""
    openai = {"type": "function", "function": {"name": "g", "strict": True}}
    tools = [
        {"name": "f", "description": "d", "input_schema": {"a": 1}, "cache_control": {}},
        {"type": "custom", "name": "h"},
        openai,
    ]
    assert translate(user(text("q")), tools=tools).request.tools == [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"a": 1}}},
        {"type": "function", "function": {"name": "h", "parameters": {"type": "object"}}},
        openai,
    ]


def test_sampling_and_limits_are_mapped() -> None:
    """Everything that has a counterpart."""
    fields = {"temperature": 0.5, "top_p": 0.5, "top_k": 3, "stream": True, "max_tokens": 9}
    request = translate(user(text("q")), stop_sequences=["x"], **fields).request
    for name, value in fields.items():
        assert getattr(request, name) == value
    assert request.stop == ["x"]


@pytest.mark.parametrize(
    ("thinking", "wanted"),
    [
        (None, False),
        ({"type": "disabled"}, False),
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "adaptive"}, True),
        ({"type": "between_tools"}, True),
    ],
)
def test_thinking_tells_the_template(thinking: Any, wanted: bool) -> None:
    """Reasoning is asked for, or not: by default not, as the original service has it."""
    request = translate(user(text("q")), thinking=thinking).request
    assert request.chat_template_kwargs == {"enable_thinking": wanted, "thinking": wanted}


def test_count_tokens_needs_no_max_tokens() -> None:
    """The same translation without what only an answer needs."""
    body = CountTokensRequest(model="m", messages=[user(text("q"))])
    assert to_chat_request(body).request.max_tokens is None


def test_images_are_refused_wherever_they_are() -> None:
    """Also in a tool's result and in the system prompt."""
    image = {"type": "image", "source": {"type": "url", "url": "http://x"}}
    places: list[tuple[tuple[dict[str, Any], ...], dict[str, Any]]] = [
        ((user(image),), {}),
        ((user({"type": "tool_result", "tool_use_id": "1", "content": [image]}),), {}),
        ((user(text("q")), assistant(image), user(text("q"))), {}),
        ((user(text("q")),), {"system": [image]}),
    ]
    for turns, fields in places:
        with pytest.raises(UnsupportedParameter, match=r'type "image" is not supported here'):
            translate(*turns, **fields)
