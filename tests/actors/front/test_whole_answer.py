"""Servers that answer a stream request with a document, and a plain one with a stream."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import openai
import pytest
from aiohttp import web

from actors.front import written
from actors.front.foreign_messages import whole_message
from actors.front.relayed import RelayedStream
from actors.front.whole_answer import WholeAnswer
from cortexd.errors import UpstreamInterrupted, UpstreamProtocol
from tests.actors.front.test_foreign_messages import STREAM, WHOLE
from tests.actors.front.test_proxy import CHAT, MODEL, NEURONS, finished, replica, upstream
from tests.doubles.front import async_test, chat_body, parse_events, served_front

MESSAGES = "/v1/messages"
MIB = 2**20


async def whole(request: web.Request) -> web.Response:
    """Answer everything with one document."""
    return web.json_response({"id": "x", "object": "chat.completion", **WHOLE})


async def streamed(request: web.Request) -> web.Response:
    """Answer everything with a stream."""
    return web.Response(body=STREAM, content_type="text/event-stream")


def events_of(document: dict[str, Any]) -> list[Any]:
    """What becomes of a document, in two pieces as the network may cut it."""
    answer = WholeAnswer(RelayedStream(), "x")
    body = json.dumps(document).encode()
    assert answer.push(body[:9]) == answer.push(body[9:]) == b""
    return parse_events(answer.flush())


@pytest.mark.parametrize("hold_ms", [60_000, 0])
@async_test
async def test_openai_stream_gets_a_whole_answer_as_events(hold_ms: int) -> None:
    """The SDK accumulates the same answer; also when the head was sent before the node answered."""
    async with (
        upstream(whole) as url,
        served_front(neurons=NEURONS, first_byte_hold_ms=hold_ms) as front,
    ):
        front.fleet.replicas = [replica("a", url, kind="openai")]
        client = openai.AsyncOpenAI(base_url=front.url + "/v1", api_key="none", max_retries=0)
        async with client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=True
            )
            chunks = [chunk async for chunk in stream]
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(delta.content or "" for delta in deltas) == "Grüße"
        calls = [call for delta in deltas for call in delta.tool_calls or []]
        assert [(call.index, call.id) for call in calls] == [(0, "call_1"), (1, "call_2")]
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, "tool_calls"]
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        record = await finished(front)
        assert (record.status, record.error_code) == (200, None)
        assert (record.prompt_tokens, record.completion_tokens) == (20, 9)


@pytest.mark.parametrize("hold_ms", [60_000, 0])
@async_test
async def test_anthropic_stream_gets_a_whole_answer_as_events(hold_ms: int) -> None:
    """The SDK's accumulation is the translated document."""
    expected = json.loads(
        whole_message(json.dumps(WHOLE).encode(), message_id="m", model=MODEL, node="a")
    )
    async with (
        upstream(whole) as url,
        served_front(neurons=NEURONS, first_byte_hold_ms=hold_ms) as front,
    ):
        front.fleet.replicas = [replica("a", url, kind="openai")]
        client = anthropic.AsyncAnthropic(base_url=front.url, api_key="none", max_retries=0)
        async with (
            client,
            client.messages.stream(
                model=MODEL, max_tokens=50, messages=[{"role": "user", "content": "Hi"}]
            ) as stream,
        ):
            message = (await stream.get_final_message()).to_dict()
        types = [block["type"] for block in expected["content"]]
        assert types == ["thinking", "text", "tool_use", "tool_use"]
        content = message["content"]
        assert isinstance(content, list)
        assert [block["type"] for block in content] == types
        assert content[1]["text"] == "Grüße"
        assert content[2]["input"] == expected["content"][2]["input"]
        assert message["stop_reason"] == "tool_use"
        assert (await finished(front)).completion_tokens == 9


@pytest.mark.parametrize(
    ("path", "fields"), [(CHAT, {}), (MESSAGES, {"max_tokens": 9})], ids=["openai", "anthropic"]
)
@async_test
async def test_stream_where_none_was_asked_for_is_an_error(
    path: str, fields: dict[str, Any]
) -> None:
    """502 in the client's dialect that says what the server did and what to do."""
    async with upstream(streamed) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url, kind="openai")]
        status, body, headers = await front.post(path, chat_body(model=MODEL, **fields))
        assert status == 502
        assert body["error"]["message"] == (
            'node "a" answered a request without "stream" with an event stream; ask it with '
            '"stream": true, or try another'
        )
        assert headers["x-cortexd-error"] == "upstream_protocol"
        assert (await finished(front)).error_code == "upstream_protocol"


@pytest.mark.parametrize(
    ("path", "fields"), [(CHAT, {}), (MESSAGES, {"max_tokens": 9})], ids=["openai", "anthropic"]
)
@async_test
async def test_document_that_is_no_answer_ends_the_stream_with_an_error(
    path: str, fields: dict[str, Any]
) -> None:
    """An error event in the client's dialect, and nothing that looks like a finished answer."""

    async def page(request: web.Request) -> web.Response:
        return web.Response(body=b"<html>hello</html>", content_type="text/html")

    async with upstream(page) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url, kind="openai")]
        body = chat_body(model=MODEL, stream=True, **fields)
        async with front.http.post(front.url + path, json=body) as response:
            assert response.content_type == "text/event-stream"
            text = (await response.read()).decode()
        assert "answered a request for a stream with what is no JSON object" in text
        assert "[DONE]" not in text
        assert "message_stop" not in text
        assert (await finished(front)).error_code == "upstream_protocol"


def test_every_choice_and_unknown_field_is_kept() -> None:
    """Log-probabilities go with the words; the end and the usage come in the last event."""
    logprobs = {"content": []}
    choices = [
        {"index": 1, "message": {"content": "b"}, "finish_reason": "stop", "logprobs": logprobs},
        {"message": {"content": "a"}, "finish_reason": "length", "stop_reason": "x"},
    ]
    usage = {"prompt_tokens": 1}
    first, last, done = events_of({"id": "i", "own": 7, "choices": choices, "usage": usage})
    assert done == "[DONE]"
    assert (first["own"], last["own"], last["usage"]) == (7, 7, usage)
    assert "usage" not in first
    assert [choice["index"] for choice in first["choices"]] == [1, 1]
    assert first["choices"][0]["delta"] == {"content": "b"}
    assert first["choices"][0]["logprobs"] == logprobs
    assert [choice["finish_reason"] for choice in first["choices"]] == [None, None]
    assert last["choices"][1] == {
        "index": 1,
        "finish_reason": "length",
        "stop_reason": "x",
        "delta": {},
    }


def test_text_completions_keep_their_shape() -> None:
    """Their chunks are documents of the same kind."""
    first, last, _ = events_of({"choices": [{"index": 0, "text": "ab", "finish_reason": "stop"}]})
    assert first["object"] == last["object"] == "text_completion"
    assert first["choices"] == [{"index": 0, "text": "ab", "finish_reason": None}]
    assert last["choices"] == [{"index": 0, "text": "", "finish_reason": "stop"}]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"choices": []}, "a document that is no completion"),
        ({"choices": [1]}, "a document that is no completion"),
        ({"choices": [{"message": None}]}, "a document that is no completion"),
        ({"object": "list"}, "a document that is no completion"),
    ],
)
def test_what_is_no_completion_is_refused(document: dict[str, Any], words: str) -> None:
    """The error names the node and what it sent."""
    with pytest.raises(UpstreamProtocol, match=f'node "x" answered .* with {words}'):
        events_of(document)


def test_error_object_with_status_200_is_told() -> None:
    """Some servers say so."""
    with pytest.raises(UpstreamInterrupted, match='node "x": out of luck'):
        events_of({"error": {"message": "out of luck"}})


@async_test
async def test_client_that_does_not_read_a_long_last_piece_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What goes out with the end mark has its deadline as all before it."""
    monkeypatch.setattr(written, "WRITE_TIMEOUT_S", 0.05)

    async def long(request: web.Request) -> web.Response:
        choice = {"index": 0, "message": {"role": "assistant", "content": "x" * 16 * MIB}}
        return web.json_response({"choices": [choice]})

    async with (
        upstream(long) as url,
        served_front(neurons=NEURONS, send_buffer_bytes=4096) as front,
    ):
        front.fleet.replicas = [replica("a", url, kind="openai")]
        _, writer = await asyncio.open_connection("127.0.0.1", front.port, limit=1)
        body = json.dumps(chat_body(model=MODEL, stream=True))
        writer.write(
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        assert (await finished(front)).error_code == "slow_client"
        writer.close()
