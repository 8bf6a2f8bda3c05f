"""Bad requests in the Anthropic dialect: refused in its envelope, and the engine sees nothing."""

from __future__ import annotations

import asyncio
import gzip
from typing import Any

from tests.actors.front.test_bad_input import DEEP
from tests.doubles.fleet import MODEL
from tests.doubles.front import async_test, served_front

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf"}}


def user(content: Any) -> dict[str, Any]:
    """Return fields with one message of the user."""
    return {"messages": [{"role": "user", "content": content}]}


def assistant(block: Any) -> dict[str, Any]:
    """Return fields with a block of the assistant's in the middle."""
    turns = [{"role": "assistant", "content": [block]}, {"role": "user", "content": "x"}]
    return {"messages": turns}


# fields, then a piece of the message
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model is missing"),
    ({"model": 5}, "model is 5"),
    ({"max_tokens": None}, "max_tokens is missing"),
    ({"max_tokens": 0}, "max_tokens is 0; allowed: an integer from 1 to 2147483647"),
    ({"messages": None}, "messages is missing"),
    ({"messages": []}, "messages is empty"),
    ({"messages": ["x"]}, "messages[0] is not usable"),
    ({"messages": [{"content": "x"}]}, "messages[0].role is missing"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 'messages[0].role is "tool"; allowed'),
    ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
    (user(5), "messages[0].content must be"),
    (user(["x"]), "messages[0].content[0] must be an object"),
    (user([{"type": "text"}]), "messages[0].content[0].text is missing"),
    (user([{"type": "text", "text": 1}]), "messages[0].content[0].text must be a string"),
    (user([IMAGE]), 'messages[0].content[0].type "image" is not supported'),
    (user([PDF]), 'type "document" is not supported'),
    (
        user([{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}]),
        'messages[0].content[0].content[0].type "image" is not supported',
    ),
    (user([{"type": "tool_result"}]), "messages[0].content[0].tool_use_id is missing"),
    (assistant({"type": "tool_use"}), "messages[0].content[0].input must be an object"),
    (assistant({"type": "tool_use", "input": {}}), "messages[0].content[0].name is missing"),
    (assistant({"type": "thinking"}), "messages[0].content[0].thinking is missing"),
    ({"system": 5}, "system is 5"),
    ({"system": [{"type": "text"}]}, "system[0].text is missing"),
    ({"temperature": 1.5}, "temperature is 1.5; allowed: a number from 0 to 1"),
    ({"top_p": 0}, "top_p is 0"),
    ({"top_k": -1}, "top_k is -1"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"stream": 1}, "stream is 1"),
    ({"tools": [{}]}, "tools[0].name is missing"),
    ({"tools": [{"name": "a b"}]}, 'tools[0].name is "a b"; allowed'),
    ({"tools": [{"name": "a", "input_schema": 5}]}, "tools[0].input_schema must be an object"),
    ({"tools": [{"name": "a", "description": 5}]}, "tools[0].description must be a string"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type is"),
    ({"tools": [{"type": "function"}]}, "tools[0].function is missing"),
    ({"tool_choice": {}}, "tool_choice.type is null; allowed: auto"),
    ({"tool_choice": {"type": "any"}}, "wants a tool called, but tools is empty"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
    ({"tool_choice": {"type": "tool", "name": "a"}}, "is not among tools"),
    ({"thinking": {"type": "maybe"}}, 'thinking.type is "maybe"; allowed'),
    ({"mcp_servers": [{}]}, "mcp_servers is not supported"),
    ({"container": "c"}, "container is not supported"),
    ({"compaction": {"type": "summary"}}, "compaction is not supported"),
    ({"output_format": {"type": "json_schema"}}, "output_format.schema is missing"),
    ({"output_config": {"format": {}}}, "output_config.format.type must be json_schema"),
    (
        {"output_format": {"type": "json_schema", "schema": {"if": {}}}},
        'keyword "if" at output_format.schema.if',
    ),
    (user("refuse"), "the chat template refused"),
]
RAW: list[bytes] = [b"", b"{", b"[]", b"null", b"{}", DEEP, b'{"model": "\\ud800"}', b"\xff"]


def valid() -> dict[str, Any]:
    """Return a body that would do."""
    return {"model": MODEL, "max_tokens": 5, **user("Hi")}


def check(status: int, answer: Any, headers: Any) -> None:
    """The status and the envelope of a client's error."""
    assert status == 400, answer
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "invalid_request_error"
    assert set(answer["error"]) == {"type", "message"}
    assert answer["request_id"] == headers["request-id"] == headers["x-request-id"]


@async_test
async def test_each_bad_field_is_refused_by_name() -> None:
    """The message names the field as the client sent it, streaming or not."""
    async with served_front() as front:
        for fields, text in FIELDS:
            for stream in ({}, {"stream": True}):
                answer = await front.post(MESSAGES, {**valid(), **stream, **fields})
                check(*answer)
                assert text in answer[1]["error"]["message"], answer[1]
        assert front.fleet.submits == []


@async_test
async def test_count_tokens_checks_the_same() -> None:
    """What a message with it would be refused for, but for the fields it does not have."""
    only_messages = {"max_tokens", "temperature", "top_p", "top_k", "stop_sequences", "stream"}
    only_messages |= {"container", "compaction"}
    async with served_front() as front:
        for fields, text in FIELDS:
            if not only_messages & fields.keys():
                answer = await front.post(COUNT, {**valid(), **fields})
                if "forced" not in text:
                    check(*answer)


@async_test
async def test_thread_is_refused_in_the_words_the_sdk_knows() -> None:
    """Nothing is held here; a turn without its history would be answered as if it had none."""
    for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}):
        async with served_front() as front:
            for path in (MESSAGES, COUNT):
                status, answer, _ = await front.post(path, {**valid(), "thread": thread})
                assert status == 400
                assert "thread is not supported here" in answer["error"]["message"]
                assert answer["error"]["details"] == {
                    "error_code": "thread_unsupported_request",
                    "unsupported": ["thread"],
                }
            assert front.fleet.submits == []


@async_test
async def test_bodies_that_are_no_request_are_refused() -> None:
    """Hostile and broken JSON on both endpoints."""
    async with served_front() as front:
        for body in RAW:
            for path in (MESSAGES, COUNT, MESSAGES + "?beta=true"):
                check(*await front.post(path, body))


@async_test
async def test_sizes_over_the_limit_are_413() -> None:
    """Declared, chunked and packed bodies over the limit."""
    async with served_front(max_body_mib=1) as front:

        async def chunks() -> Any:
            for _ in range(40):
                yield b" " * 65536
                await asyncio.sleep(0)

        packed = gzip.compress(b" " * (8 * 2**20))
        for data, headers in (
            (b" " * (2**20 + 1), {}),
            (chunks(), {}),
            (packed, {"Content-Encoding": "gzip"}),
        ):
            async with front.http.post(
                front.url + MESSAGES, data=data, headers=headers
            ) as response:
                assert response.status == 413
                assert (await response.json())["error"]["type"] == "request_too_large"


@async_test
async def test_unknown_model_and_route_are_404() -> None:
    """A model nobody knows, control characters and all, and a path that does not exist."""
    async with served_front() as front:
        for model in ("none", "a\nb\x1b[31m"):
            status, answer, _ = await front.post(MESSAGES, {**valid(), "model": model})
            assert (status, answer["error"]["type"]) == (404, "not_found_error")
        status, answer, _ = await front.post("/v1/messages/batches", b"{}")
        assert (status, answer["error"]["type"]) == (404, "not_found_error")
        assert {record.model for record in await front.fleet.wait_for_finished(2)} == {"unknown"}


@async_test
async def test_patience_and_draining_are_529_with_retry_after() -> None:
    """A load that takes too long, and a server that ends."""
    async with served_front(unary_load_wait_s=0.0) as front:
        front.fleet.begin_loading()
        status, answer, headers = await front.post(MESSAGES, valid())
        assert (status, answer["error"]["type"]) == (529, "overloaded_error")
        assert headers["Retry-After"] == "8"
        front.services.is_draining = True
        status, answer, headers = await front.post(MESSAGES, valid())
        assert (status, answer["error"]["type"]) == (529, "overloaded_error")
        assert headers["Retry-After"] == "5"


@async_test
async def test_template_without_tools_is_400() -> None:
    """Tools that cannot reach the model are refused, not dropped."""
    async with served_front() as front:
        front.text_model.can_call_tools = False
        answer = await front.post(MESSAGES, {**valid(), "tools": [{"name": "f"}]})
        check(*answer)
        assert "does not render tools" in answer[1]["error"]["message"]
