"""Messages to a server that speaks only OpenAI's dialect: the official SDK, and raw bytes."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest
from aiohttp import web
from anthropic.types import MessageParam, ToolParam

from actors.front.foreign_messages import ForeignStream, whole_message
from cortexd.errors import UpstreamError, UpstreamInterrupted
from tests.actors.front.test_proxy import MODEL, NEURONS, replica, upstream
from tests.doubles.front import async_test, served_front

TOOLS: list[ToolParam] = [{"name": "weather", "input_schema": {"type": "object"}}]
CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"d":1}'}},
    {"id": "call_2", "type": "function", "function": {"name": "weather", "arguments": ""}},
]
USAGE = {
    "prompt_tokens": 20,
    "completion_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 16},
}
WHOLE = {
    "choices": [
        {
            "message": {"reasoning_content": "hm", "content": "Grüße", "tool_calls": CALLS},
            "finish_reason": "tool_calls",
        }
    ],
    "usage": USAGE,
}
DELTAS: list[dict[str, Any]] = [
    {"role": "assistant", "content": ""},
    {"reasoning_content": "h"},
    {"reasoning_content": "m"},
    {"content": "Grü"},
    {"content": "ße"},
    {"tool_calls": [{"index": 0, "id": "call_1", "function": {"name": "weather"}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"d"'}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]},
    {"tool_calls": [{"index": 1, "id": "call_2", "function": {"name": "weather"}}]},
]


def chunk(**fields: Any) -> bytes:
    """One event of a chat stream."""
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


STREAM = (
    b": a comment\r\n\r\n"
    + b"".join(chunk(choices=[{"delta": delta}]) for delta in DELTAS)
    + chunk(choices=[{"delta": {}, "finish_reason": "tool_calls"}])
    + chunk(choices=[], usage=USAGE)
    + b"data: [DONE]\n\n"
)


def message_events(data: bytes) -> list[dict[str, Any]]:
    """The documents of a messages stream."""
    lines = data.split(b"\n")
    return [json.loads(line[6:]) for line in lines if line.startswith(b"data: ")]


def foreign_stream() -> ForeignStream:
    """A fresh translator."""
    return ForeignStream(message_id="msg_1", model="m", node="x")


@async_test
async def test_sdk_gets_the_same_message_unary_and_streamed() -> None:
    """The SDK's own accumulation of the translated stream is the translated whole answer."""
    seen: list[tuple[str, dict[str, Any]]] = []

    async def handler(request: web.Request) -> web.Response:
        body = await request.json()
        seen.append((request.path, body))
        if body.get("stream"):
            return web.Response(body=STREAM, content_type="text/event-stream")
        return web.json_response(WHOLE)

    messages: list[MessageParam] = [{"role": "user", "content": "Hi"}]
    async with upstream(handler) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url, kind="openai", model="org/real")]
        client = anthropic.AsyncAnthropic(base_url=front.url, api_key="none", max_retries=0)
        async with client:
            unary = await client.messages.create(
                model=MODEL, max_tokens=50, messages=messages, tools=TOOLS
            )
            async with client.messages.stream(
                model=MODEL, max_tokens=50, messages=messages, tools=TOOLS
            ) as stream:
                streamed = await stream.get_final_message()
    assert [block.to_dict() for block in streamed.content] == [
        block.to_dict() for block in unary.content
    ]
    assert [block.type for block in unary.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert unary.content[2].to_dict()["input"] == {"d": 1}
    assert unary.content[3].to_dict()["input"] == {}
    for message in (unary, streamed):
        assert (message.stop_reason, message.model) == ("tool_use", MODEL)
        usage = message.usage
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (
            4,
            16,
            9,
        )
    assert [path for path, _ in seen] == ["/v1/chat/completions"] * 2
    assert [body["model"] for _, body in seen] == ["org/real"] * 2
    assert seen[1][1]["stream_options"] == {"include_usage": True}


@async_test
async def test_request_reaches_the_server_in_its_dialect() -> None:
    """Calls carry their arguments as text, images become parts, a begun answer is continued."""
    bodies: list[dict[str, Any]] = []

    async def handler(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        return web.json_response(WHOLE)

    image = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    sent = {
        "model": MODEL,
        "max_tokens": 9,
        "system": "Be brief.",
        "stop_sequences": ["END"],
        "top_k": 5,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "tools": TOOLS,
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "messages": [
            {"role": "user", "content": [{"type": "image", "source": image}]},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {"d": 1}}],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "sunny"}],
            },
            {"role": "assistant", "content": "It is"},
        ],
    }
    async with upstream(handler) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url, kind="openai")]
        status, _, _ = await front.post("/v1/messages", json.dumps(sent).encode())
        assert status == 200
    (body,) = bodies
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    function = {"name": "weather", "arguments": '{"d":1}'}
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [part]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "sunny"},
        {"role": "assistant", "content": "It is"},
    ]
    assert (body["stop"], body["top_k"], body["max_tokens"]) == (["END"], 5, 9)
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("required", False)
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert body["chat_template_kwargs"]["enable_thinking"] is True
    assert "temperature" not in body


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_stream_is_the_same_wherever_it_is_cut(newline: bytes) -> None:
    """Every cut in two, and every byte alone, gives the bytes of one piece."""
    data = STREAM.replace(b"\r\n", b"\n").replace(b"\n", newline)
    whole = foreign_stream()
    expected = whole.push(data) + whole.flush()
    for cut in range(len(data)):
        stream = foreign_stream()
        assert stream.push(data[:cut]) + stream.push(data[cut:]) + stream.flush() == expected
    stream = foreign_stream()
    assert b"".join(stream.push(data[at : at + 1]) for at in range(len(data))) == expected
    assert stream.counts() == whole.counts()
    assert (whole.counts().prompt_tokens, whole.finish_reason) == (20, "tool_use")


def test_unary_blocks_equal_the_stream() -> None:
    """Both forms hold the same blocks, as bytes."""
    stream = foreign_stream()
    events = message_events(stream.push(STREAM))
    texts = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    joined = "".join(delta.get("text", "") for delta in texts)
    body = whole_message(json.dumps(WHOLE).encode(), message_id="m", model="m", node="x")
    message = json.loads(body)
    assert message["content"][1] == {"type": "text", "text": joined}
    signature = next(delta["signature"] for delta in texts if "signature" in delta)
    assert message["content"][0]["signature"] == signature


def test_call_that_was_forced_by_name_is_a_use_of_a_tool() -> None:
    """OpenAI ends it with "stop"; an agent of this dialect would take that for the last word."""
    calls = [{"index": 0, "id": "t", "function": {"name": "f", "arguments": "{}"}}]
    whole = {"choices": [{"message": {"tool_calls": calls}, "finish_reason": "stop"}]}
    body = whole_message(json.dumps(whole).encode(), message_id="m", model="m", node="x")
    assert json.loads(body)["stop_reason"] == "tool_use"
    stream = foreign_stream()
    stream.push(chunk(choices=[{"delta": {"tool_calls": calls}}]))
    stream.push(chunk(choices=[{"delta": {}, "finish_reason": "stop"}]))
    assert stream.finish_reason == "tool_use"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (STREAM[: STREAM.index(b'"finish_reason"')], "middle"),
        (chunk(error={"message": "out of memory"}), "out of memory"),
        (b"data: {\n\n" * 3, "no chunks"),
        (
            chunk(choices=[{"delta": {"tool_calls": [{"index": 1}]}}])
            + chunk(choices=[{"delta": {"tool_calls": [{"index": 0}]}}]),
            "went back",
        ),
    ],
)
def test_broken_stream_is_an_interruption(data: bytes, words: str) -> None:
    """What cannot be a whole message is never ended as one."""
    stream = foreign_stream()
    events = stream.push(data)
    with pytest.raises(UpstreamInterrupted, match=words):
        stream.flush()
    assert b"message_stop" not in events


def test_stop_string_and_missing_counts() -> None:
    """vLLM's `stop_reason` names the sequence; without counts the chunks are counted."""
    stream = foreign_stream()
    events = message_events(
        stream.push(
            chunk(choices=[{"delta": {"content": "a"}}])
            + chunk(choices=[{"delta": {}, "finish_reason": "stop", "stop_reason": "END"}])
        )
        + stream.flush()
    )
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "END"}
    assert events[-2]["usage"]["output_tokens"] == 1


@pytest.mark.parametrize(
    "document",
    [{}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"tool_calls": [{}]}}]}],
)
def test_answer_without_a_message_is_an_error(document: dict[str, Any]) -> None:
    """Broken calls count too, but a call without arguments is an empty object."""
    body = json.dumps(document).encode()
    if document.get("choices") and document["choices"][0]:
        body = body.replace(b"[{}]", b'[{"function": {"arguments": "{"}}]')
    with pytest.raises(UpstreamError, match="no chat completion"):
        whole_message(body, message_id="m", model="m", node="x")


@async_test
async def test_errors_are_told_in_the_clients_dialect() -> None:
    """Status class, words and Retry-After survive; an overlong prompt is as agents know it."""
    answers = [
        (
            400,
            "This model's maximum context length is 10 tokens, not 20",
            400,
            "prompt is too long",
        ),
        (429, "slow down", 529, "slow down"),
        (400, "bad knob", 400, "bad knob"),
    ]
    current = answers[0]

    async def handler(request: web.Request) -> web.Response:
        error = {"error": {"message": current[1], "type": "x", "code": current[0]}}
        return web.json_response(error, status=current[0], headers={"Retry-After": "7"})

    sent = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    async with upstream(handler) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url, kind="openai")]
        for answer in answers:
            current = answer
            for stream in (False, True):
                body = json.dumps(sent | {"stream": stream}).encode()
                status, document, headers = await front.post("/v1/messages", body)
                assert (status, document["type"]) == (answer[2], "error")
                assert answer[3] in document["error"]["message"]
                assert headers.get("Retry-After") == ("7" if answer[0] == 429 else None)
