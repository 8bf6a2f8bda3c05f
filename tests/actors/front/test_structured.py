"""Structured output in both dialects: what reaches the engine, and how forced calls come back."""

from __future__ import annotations

from typing import Any

import pytest

from engine.grammar.matcher import byte_vocabulary, compile_grammar
from tests.actors.front.test_tools import CHAT, JSON_CALL, TOOLS, both_ways, give_markers
from tests.doubles.fleet import MODEL
from tests.doubles.front import ServedFront, async_test, chat_body, served_front

MESSAGES = "/v1/messages"
NAMED = {"type": "function", "function": {"name": "weather"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
TEXT_FIELDS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (
        {"response_format": {"type": "json_object"}},
        ['{"x": [1, null]}', "{}"],
        ["[]", "1", "text", ""],
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
            }
        },
        ['{"a": 5}', '{\n  "a": -5\n}'],
        ["{}", '{"a": "x"}', '{ \n"a": 1}'],
    ),
    ({"guided_json": SCHEMA}, ['{"a":5}'], ["{}"]),
    ({"guided_json": '{"type": "null"}'}, ["null"], ["0"]),
    ({"guided_regex": "a/[0-9]{2}\n?"}, ["a/12", "a/12\n"], ["a/1", "b"]),
    ({"guided_choice": ['y"es', "no\\"]}, ['y"es', "no\\"], ["maybe"]),
    ({"structured_outputs": {"choice": ["a"]}}, ["a"], ["b"]),
    ({"structured_outputs": {"json_object": True}}, ["{}"], ["1"]),
]


def accepts(grammar: str, text: str) -> bool:
    """Tell whether a grammar allows a whole text."""
    matcher = compile_grammar(grammar, byte_vocabulary()).copy()
    for byte in text.encode():
        if not matcher.allowed[byte]:
            return False
        matcher.advance(byte)
    return matcher.may_end


async def grammar_of(front: ServedFront, path: str = CHAT, **fields: Any) -> str:
    """Return the grammar that the engine gets for a request."""
    body = {**chat_body(), "max_tokens": 5, **fields}
    status, answer, _ = await front.post(path, body)
    assert status == 200, answer
    return front.fleet.submits[-1].grammar


@pytest.mark.parametrize(("fields", "good", "bad"), TEXT_FIELDS)
@async_test
async def test_form_of_the_text_reaches_the_engine(
    fields: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    """Each field, on chat and legacy completions; what clients write is no grammar of its own."""
    async with served_front() as front:
        grammar = await grammar_of(front, **fields)
        assert [accepts(grammar, text) for text in good + bad] == [True] * len(good) + [
            False
        ] * len(bad)
        body = {"model": MODEL, "prompt": "x", **fields}
        assert (await front.post("/v1/completions", body))[0] == 200
        assert front.fleet.submits[-1].grammar == grammar
        assert await grammar_of(front, response_format={"type": "text"}) == ""


@async_test
async def test_reasoning_comes_before_the_structure() -> None:
    """Optional when the model may open it, needed when the prompt has, gone when it was closed."""
    async with served_front() as front:
        give_markers(front)
        fields = {"guided_choice": ["yes"]}
        for opening, free, thought, closing in (
            ("", True, True, False),
            ("<think>\n", False, True, True),
            ("<think>\n\n</think>\n\n", True, False, False),
        ):
            front.text_model.opening = opening
            grammar = await grammar_of(front, **fields)
            texts = ("yes", "<think>hm</think>\n\nyes", "hm</think>yes")
            assert [accepts(grammar, text) for text in texts] == [free, thought, closing]


@async_test
async def test_forced_tools_in_the_openai_dialect() -> None:
    """required and named; one call where parallel calls are off; the ending OpenAI has for each."""
    async with served_front() as front:
        give_markers(front)
        front.fleet.reply = CALL.encode()
        for choice, ending in (("required", "tool_calls"), (NAMED, "stop")):
            fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice}
            unary, _ = await both_ways(front, **fields)
            assert unary["choices"][0]["finish_reason"] == ending
            assert unary["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"
            grammar = front.fleet.submits[-1].grammar
            assert accepts(grammar, CALL)
            assert accepts(grammar, "<think>x</think>" + CALL)
            assert not accepts(grammar, "Hello")
            assert not accepts(grammar, CALL.replace("Ulm", 'Ulm", "x": "y'))
            assert accepts(grammar, f"{CALL}\n{CALL}") == (choice == "required")
        grammar = await grammar_of(
            front, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
        )
        assert not accepts(grammar, f"{CALL}\n{CALL}")
        assert await grammar_of(front, tools=TOOLS, tool_choice="auto") == ""
        assert await grammar_of(front, tools=TOOLS, tool_choice="none") == ""


@async_test
async def test_forced_tools_in_the_anthropic_dialect() -> None:
    """any, tool and disable_parallel_tool_use; the answer ends with tool_use either way."""
    tools = [{"name": "weather", "input_schema": TOOLS[0]["function"]["parameters"]}]
    async with served_front() as front:
        give_markers(front)
        front.fleet.reply = CALL.encode()
        for choice, is_many in (
            ({"type": "any"}, True),
            ({"type": "any", "disable_parallel_tool_use": True}, False),
            ({"type": "tool", "name": "weather"}, False),
        ):
            body = {**chat_body(), "max_tokens": 500, "tools": tools, "tool_choice": choice}
            status, answer, _ = await front.post(MESSAGES, body)
            assert status == 200, answer
            assert answer["stop_reason"] == "tool_use"
            assert answer["content"][0]["input"] == {"city": "Ulm"}
            grammar = front.fleet.submits[-1].grammar
            assert accepts(grammar, CALL)
            assert accepts(grammar, CALL + "\n" + CALL) == is_many
        for field in ({"output_format": {"type": "json_schema", "schema": SCHEMA}},):
            grammar = await grammar_of(front, MESSAGES, **field)
            assert accepts(grammar, '{"a": 1}')
            assert not accepts(grammar, "text")


@async_test
async def test_cut_off_call_is_text_and_length() -> None:
    """What exists of a forced call that max_tokens cut off is shown as it is."""
    async with served_front() as front:
        give_markers(front)
        front.fleet.reply = JSON_CALL.encode()
        unary, _ = await both_ways(front, tools=TOOLS, tool_choice="required", max_tokens=30)
        assert unary["choices"][0]["finish_reason"] == "length"
        assert unary["choices"][0]["message"]["content"] == JSON_CALL[:30]


@async_test
async def test_bad_tool_schema_is_named_in_the_clients_words() -> None:
    """The path is the dialect's own; nothing reaches the engine; auto does not look at it."""
    async with served_front() as front:
        give_markers(front)
        bad = {"type": "object", "properties": {"a": {"uniqueItems": True}}}
        tools = [{"type": "function", "function": {"name": "f", "parameters": bad}}]
        status, body, _ = await front.chat(tools=tools, tool_choice="required")
        at = "tools[0].function.parameters.properties.a.uniqueItems"
        assert (status, body["error"]["param"]) == (400, at)
        request = {**chat_body(), "max_tokens": 5, "tool_choice": {"type": "any"}}
        request["tools"] = [{"name": "f", "input_schema": bad}]
        status, body, _ = await front.post(MESSAGES, request)
        assert status == 400
        assert "tools[0].input_schema.properties.a.uniqueItems" in body["error"]["message"]
        unsatisfiable = {"properties": {"a": {"minimum": 2, "maximum": 1, "type": "integer"}}}
        tools[0]["function"]["parameters"] = {**unsatisfiable, "required": ["a"]}  # type: ignore[index]
        status, body, _ = await front.chat(tools=tools, tool_choice="required")
        assert (status, body["error"]["param"]) == (400, "tools[0].function.parameters")
        assert front.fleet.submits == []
        assert (await front.chat(tools=tools))[0] == 200


@async_test
async def test_prefill_cannot_be_structured() -> None:
    """An answer that the client began is not the whole document."""
    async with served_front() as front:
        body = {**chat_body(), "max_tokens": 5}
        body["messages"] = [*body["messages"], {"role": "assistant", "content": "{"}]
        body["output_format"] = {"type": "json_schema", "schema": SCHEMA}
        status, answer, _ = await front.post(MESSAGES, body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
