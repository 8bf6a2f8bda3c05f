"""Bad requests: each is refused with its status, code and field, and nothing reaches the engine."""

from __future__ import annotations

import asyncio
import gzip
from typing import Any

import pytest

from actors.front.connection import Connection
from tests.doubles.fleet import CONTEXT, MODEL, Fleet
from tests.doubles.front import async_test, chat_body, served_front

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
DEEP = b"[" * 10_000 + b"]" * 10_000

CHAT_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -0.1}, "invalid_value", "temperature"),
    ({"temperature": 2.1}, "invalid_value", "temperature"),
    ({"temperature": "hot"}, "invalid_type", "temperature"),
    ({"top_p": 0}, "invalid_value", "top_p"),
    ({"top_p": 1.01}, "invalid_value", "top_p"),
    ({"top_k": -2}, "invalid_value", "top_k"),
    ({"top_k": 1.5}, "invalid_type", "top_k"),
    ({"min_p": 1.5}, "invalid_value", "min_p"),
    ({"presence_penalty": 3}, "invalid_value", "presence_penalty"),
    ({"frequency_penalty": -3}, "invalid_value", "frequency_penalty"),
    ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
    ({"repetition_penalty": 10.5}, "invalid_value", "repetition_penalty"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_completion_tokens": -1}, "invalid_value", "max_completion_tokens"),
    ({"max_tokens": True}, "invalid_type", "max_tokens"),
    ({"min_tokens": -1}, "invalid_value", "min_tokens"),
    ({"seed": 2**63}, "invalid_value", "seed"),
    ({"seed": 10**40}, "invalid_value", "seed"),
    ({"n": 0}, "invalid_value", "n"),
    ({"n": 17}, "invalid_value", "n"),
    ({"stop": ["x"] * 17}, "invalid_value", "stop"),
    ({"stop": [1]}, "invalid_type", "stop[0]"),
    ({"stop": ""}, "invalid_value", "stop"),
    ({"stop": {"a": 1}}, "invalid_type", "stop"),
    ({"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids[0]"),
    ({"stop_token_ids": [9999]}, "invalid_value", "stop_token_ids"),
    ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias.*"),
    ({"logit_bias": {"x": 1}}, "invalid_type", "logit_bias.*"),
    ({"logit_bias": {"9999": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": [1]}, "invalid_type", "logit_bias"),
    ({"stream": "yes"}, "invalid_type", "stream"),
    ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        "invalid_type",
        "stream_options.include_usage",
    ),
    ({"logprobs": 3}, "invalid_type", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    ({"ignore_eos": 1}, "invalid_type", "ignore_eos"),
    ({"chat_template_kwargs": []}, "invalid_type", "chat_template_kwargs"),
    ({"chat_template": "{{ x }}"}, "unsupported_parameter", "chat_template"),
    ({"tools": {}}, "invalid_type", "tools"),
    ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function"),
    ({"tools": [{"function": 5}]}, "invalid_type", "tools[0].function"),
    ({"tools": [{"function": {}}]}, "missing_required_parameter", "tools[0].function.name"),
    ({"tools": [{"function": {"name": 1}}]}, "invalid_type", "tools[0].function.name"),
    ({"tools": [{"function": {"name": "a b"}}]}, "invalid_value", "tools[0].function.name"),
    (
        {"tools": [{"function": {"name": "a", "parameters": []}}]},
        "invalid_type",
        "tools[0].function.parameters",
    ),
    ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools[0].type"),
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"tool_choice": "any"}, "unsupported_parameter", "tool_choice"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        "invalid_value",
        "tool_choice",
    ),
    ({"parallel_tool_calls": 1}, "invalid_type", "parallel_tool_calls"),
    ({"functions": []}, "unsupported_parameter", "functions"),
    ({"response_format": "json"}, "invalid_type", "response_format"),
    ({"response_format": {"type": "xml"}}, "unsupported_parameter", "response_format.type"),
    (
        {"response_format": {"type": "json_schema"}},
        "missing_required_parameter",
        "response_format.json_schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        "missing_required_parameter",
        "response_format.json_schema.schema",
    ),
    ({"guided_grammar": "root ::= x"}, "unsupported_parameter", "guided_grammar"),
    (
        {"guided_json": {"items": {"not": {}}}},
        "unsupported_parameter",
        "guided_json.items.not",
    ),
    ({"guided_json": {"type": "what"}}, "invalid_value", "guided_json.type"),
    ({"guided_json": {"minLength": "1}/"}}, "invalid_value", "guided_json.minLength"),
    ({"guided_json": {"$ref": "http://a/b"}}, "unsupported_parameter", "guided_json.$ref"),
    ({"guided_json": "{"}, "invalid_value", "guided_json"),
    ({"guided_json": {"enum": []}}, "invalid_value", "guided_json"),
    ({"guided_json": {"pattern": "(?=a)"}}, "invalid_value", "guided_json"),
    ({"guided_regex": "["}, "invalid_value", "guided_regex"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "invalid_value", "guided_choice"),
    ({"guided_choice": []}, "invalid_value", "guided_choice"),
    ({"guided_choice": [1]}, "invalid_type", "guided_choice"),
    (
        {"structured_outputs": {"grammar": "x"}},
        "unsupported_parameter",
        "structured_outputs.grammar",
    ),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "invalid_value", "structured_outputs"),
    ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
    ({"audio": {"voice": "x"}}, "unsupported_parameter", "audio"),
    ({"best_of": 3}, "unsupported_parameter", "best_of"),
    ({"use_beam_search": True}, "unsupported_parameter", "use_beam_search"),
    ({"skip_special_tokens": False}, "unsupported_parameter", "skip_special_tokens"),
    ({"include_stop_str_in_output": True}, "unsupported_parameter", "include_stop_str_in_output"),
    ({"echo": True}, "unsupported_parameter", "echo"),
    ({"truncate_prompt_tokens": 9}, "unsupported_parameter", "truncate_prompt_tokens"),
    ({"grammar": 'root ::= "a"'}, "unsupported_parameter", "grammar"),
    ({"documents": [{"text": "x"}]}, "unsupported_parameter", "documents"),
    ({"continue_final_message": True}, "invalid_value", "continue_final_message"),
    (
        {"continue_final_message": True, "messages": [{"role": "assistant", "content": "a"}]},
        "invalid_value",
        "continue_final_message",
    ),
    (
        {
            "continue_final_message": True,
            "add_generation_prompt": True,
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ],
        },
        "invalid_value",
        "continue_final_message",
    ),
    ({"model": None}, "missing_required_parameter", "model"),
    ({"model": 5}, "invalid_type", "model"),
    ({"model": ""}, "invalid_value", "model"),
    ({"messages": None}, "missing_required_parameter", "messages"),
    ({"messages": []}, "invalid_value", "messages"),
    ({"messages": "hi"}, "invalid_type", "messages"),
    ({"messages": [{}] * 100_001}, "invalid_value", "messages"),
    ({"messages": ["hi"]}, "invalid_type", "messages[0]"),
    ({"messages": [{"content": "x"}]}, "missing_required_parameter", "messages[0].role"),
    ({"messages": [{"role": 1, "content": "x"}]}, "invalid_type", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "unsupported_parameter",
        "messages[0].content[0].type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
        "invalid_type",
        "messages[0].content[0].text",
    ),
    ({"messages": [{"role": "user", "content": "refuse"}]}, "invalid_request", "messages"),
]

COMPLETION_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "missing_required_parameter", "prompt"),
    ({"prompt": []}, "invalid_value", "prompt"),
    ({"prompt": ""}, "invalid_value", "prompt"),
    ({"prompt": 5}, "invalid_type", "prompt"),
    ({"prompt": {"a": 1}}, "invalid_type", "prompt"),
    ({"prompt": ["a", 5]}, "invalid_type", "prompt[1]"),
    ({"prompt": [[1], []]}, "invalid_type", "prompt[1]"),
    ({"prompt": [True]}, "invalid_type", "prompt[0]"),
    ({"prompt": [-1]}, "invalid_value", "prompt"),
    ({"prompt": [10**30]}, "invalid_value", "prompt"),
    ({"prompt": [257]}, "invalid_value", "prompt"),
    ({"prompt": ["a"] * 65}, "invalid_value", "prompt"),
    ({"prompt": ["a"] * 10, "n": 16}, "invalid_value", "n"),
    ({"logprobs": 21}, "invalid_value", "logprobs"),
    ({"logprobs": True}, "invalid_type", "logprobs"),
    ({"echo": "yes"}, "invalid_type", "echo"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_tokens": -1, "echo": True}, "invalid_value", "max_tokens"),
    ({"suffix": "x"}, "unsupported_parameter", "suffix"),
]

RAW_BODIES: list[tuple[bytes, str]] = [
    (b"", "invalid_json"),
    (b"{", "invalid_json"),
    (b"{} trailing", "invalid_json"),
    (b"not json", "invalid_json"),
    (b"[]", "invalid_type"),
    (b'"text"', "invalid_type"),
    (b"null", "invalid_type"),
    (b'{"model": "m", "temperature": NaN}', "invalid_json"),
    (b'{"model": "m", "temperature": 1e999}', "invalid_value"),
    (b'{"model": "\\ud800"}', "invalid_json"),
    (b'{"model": "\xff"}', "invalid_json"),
    (DEEP, "invalid_type"),
    (b'{"unknown": ' + DEEP + b"}", "invalid_json"),
    (b'{"messages": [{"a": ' + DEEP + b"}]}", "invalid_json"),
    (b'{"prompt": ' + DEEP + b', "model": "m"}', "invalid_json"),
    (b"{}", "missing_required_parameter"),
]


def assert_untouched(fleet: Fleet) -> None:
    """Nothing was submitted."""
    assert fleet.submits == []


@async_test
async def test_chat_each_bad_field_is_refused_by_name() -> None:
    """Wrong types, ranges, combinations and unsupported fields: 400 with the field in `param`."""
    async with served_front() as front:
        for fields, code, param in CHAT_FIELDS:
            status, body, _ = await front.post(CHAT, {**chat_body(), **fields})
            error = body["error"]
            assert (status, error["code"], error["param"]) == (400, code, param), (fields, error)
            assert error["type"] == "invalid_request_error"
            assert param.partition("[")[0].partition(".")[0] in error["message"], error
        assert_untouched(front.fleet)


@async_test
async def test_completions_each_bad_field_is_refused_by_name() -> None:
    """The same for the legacy endpoint."""
    async with served_front() as front:
        for fields, code, param in COMPLETION_FIELDS:
            body = {"model": MODEL, "prompt": "x", **fields}
            status, answer, _ = await front.post(COMPLETIONS, body)
            error = answer["error"]
            assert (status, error["code"], error["param"]) == (400, code, param), (fields, error)
        assert_untouched(front.fleet)


@async_test
async def test_error_names_value_and_range() -> None:
    """A range error shows what was sent and what is allowed."""
    async with served_front() as front:
        _, body, _ = await front.chat(temperature=3.5)
        assert body["error"]["message"] == "temperature is 3.5; allowed: a number from 0 to 2"
        _, body, _ = await front.chat(top_p=0)
        assert body["error"]["message"] == "top_p is 0; allowed: a number from above 0 to 1"
        _, body, _ = await front.chat(max_tokens=0)
        assert (
            body["error"]["message"] == "max_tokens is 0; allowed: an integer from 1 to 2147483647"
        )
        _, body, _ = await front.chat(max_tokens=2**31)
        assert "2147483648; allowed: an integer from 1 to 2147483647" in body["error"]["message"]
        _, body, _ = await front.chat(stop=[1])
        assert body["error"]["message"].startswith("stop[0] is not usable: expected `str`")


@async_test
async def test_bodies_that_are_no_json_object_are_refused() -> None:
    """Hostile and broken JSON: 400 with an envelope on both endpoints, never a 500."""
    async with served_front() as front:
        for body, code in RAW_BODIES:
            for path in (CHAT, COMPLETIONS):
                status, answer, _ = await front.post(path, body)
                assert status == 400, (path, body[:40], answer)
                if path == CHAT and b"prompt" not in body:
                    assert answer["error"]["code"] == code, (body[:40], answer)
        assert_untouched(front.fleet)


@async_test
async def test_duplicate_keys_unknown_fields_and_any_content_type_are_accepted() -> None:
    """The last of two keys counts, unknown fields are ignored, Content-Type does not matter."""
    async with served_front() as front:
        raw = (
            b'{"model":"x","model":"%s","foo":{"bar":1},"messages":[{"role":"user",'
            b'"content":"a\\u0000b"}]}' % MODEL.encode()
        )
        status, _, _ = await front.post(CHAT, raw, headers={"Content-Type": "text/plain"})
        assert status == 200


@async_test
async def test_unknown_model_is_404() -> None:
    """A model nobody knows: 404 model_not_found, and no metrics series of that name."""
    async with served_front() as front:
        for stream in (False, True):
            body = {**chat_body(stream=stream), "model": "no/such\nmodel"}
            status, answer, _ = await front.post(CHAT, body)
            assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert {record.model for record in await front.fleet.wait_for_finished(2)} == {"unknown"}


@async_test
async def test_prompt_over_the_context_is_refused_with_both_numbers() -> None:
    """400 context_length_exceeded with `max` and `prompt_len`, before anything is submitted."""
    async with served_front() as front:
        for number, (path, body) in enumerate(
            (
                (CHAT, chat_body("x" * 500)),
                (COMPLETIONS, {"model": MODEL, "prompt": "x" * CONTEXT}),
            ),
            start=1,
        ):
            status, answer, _ = await front.post(path, body)
            error = answer["error"]
            assert (status, error["code"]) == (400, "context_length_exceeded")
            assert error["max"] == CONTEXT
            assert error["prompt_len"] >= CONTEXT
            assert f"maximum context length is {CONTEXT} tokens" in error["message"]
            assert str(error["prompt_len"]) in error["message"]
            assert (await front.fleet.wait_for_finished(number))[-1].model == MODEL
        assert_untouched(front.fleet)
        status, answer, _ = await front.post(
            COMPLETIONS, {"model": MODEL, "prompt": "x" * (CONTEXT - 1), "max_tokens": 50}
        )
        assert status == 200
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 1


@async_test
async def test_body_over_the_limit_is_413_declared_or_chunked() -> None:
    """A declared length is refused unread; a chunked body is cut at the limit."""
    async with served_front(max_body_mib=1) as front:

        async def chunks() -> Any:
            for _ in range(40):
                yield b" " * 65536
                await asyncio.sleep(0)

        for data in (b" " * (2**20 + 1), chunks()):
            async with front.http.post(front.url + CHAT, data=data) as response:
                answer = await response.json()
                assert response.status == 413
                assert answer["error"]["code"] == "request_too_large"


@async_test
async def test_gzip_bomb_is_413() -> None:
    """The limit counts decompressed bytes."""
    async with served_front(max_body_mib=1) as front:
        bomb = gzip.compress(b" " * (64 * 2**20))
        status, answer, _ = await front.post(CHAT, bomb, headers={"Content-Encoding": "gzip"})
        assert (status, answer["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/v1/chat/completions/", "did you mean /v1/chat/completions?"),
        ("/v1//chat/completions", "did you mean /v1/chat/completions?"),
        ("/v1/v1/chat/completions", "did you mean /v1/chat/completions?"),
        ("/completions", "did you mean /v1/completions?"),
        ("/openai/v1/messages", "did you mean /v1/messages?"),
        ("/api/generate", "served here: /detokenize, /health, /livez, /readyz, /tokenize, /v1/"),
        ("/v1/tokenize", "did you mean /tokenize?"),
        ("/v1/embeddings", "served here: "),
    ],
)
@async_test
async def test_unknown_route_names_the_one_that_was_meant_or_all(path: str, hint: str) -> None:
    """A base URL that is slightly off, and APIs of others: the text is all that a user sees."""
    async with served_front() as front:
        status, answer, _ = await front.post(path, chat_body())
        assert status == 404
        assert f"no route POST {path}; {hint}" in answer["error"]["message"]


@async_test
async def test_compression_that_is_not_read_names_those_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client cannot install what the server's library lacks."""
    monkeypatch.setattr("aiohttp.http_parser.HAS_BROTLI", False)
    async with served_front() as front:
        headers = {"Content-Encoding": "br"}
        async with front.http.post(front.url + CHAT, data=b"{}", headers=headers) as response:
            message = (await response.json())["error"]["message"]
        assert message == "the body's Content-Encoding is not read here; allowed: gzip, deflate"


@async_test
async def test_unknown_route_and_wrong_method_have_the_envelope() -> None:
    """404 and 405 speak the same error language."""
    async with served_front() as front:
        status, answer, _ = await front.post("/v1/nothing", b"{}")
        assert (status, answer["error"]["code"]) == (404, "not_found")
        async with front.http.get(front.url + CHAT) as response:
            assert response.status == 405
            assert response.headers["Allow"] == "POST"
            assert (await response.json())["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "raw",
    [
        b"NONSENSE\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n",
    ],
)
@async_test
async def test_bytes_that_are_no_http_get_400_with_the_envelope(raw: bytes) -> None:
    """Garbage, oversize headers and smuggling attempts: 400, then the connection closes."""
    async with served_front() as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(raw)
        answer = await reader.read()
        writer.close()
        assert answer.partition(b"\r\n")[0].endswith(b" 400 Bad Request")
        assert b'"code":"invalid_request"' in answer


@async_test
async def test_request_head_that_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow head gets 408 and the connection is closed; an idle connection is left alone."""
    monkeypatch.setattr(Connection, "head_timeout_s", 0.05)
    async with served_front() as front:
        _, idle = await asyncio.open_connection("127.0.0.1", front.port)
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(b"GET /livez HTTP/1.1\r\nHost")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408")
        assert not idle.transport.is_closing()
        writer.close()
        idle.close()
