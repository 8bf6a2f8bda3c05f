"""Anthropic Messages over a real socket: whole answers, streams, and that they agree."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cortexd.errors import (
    ActorDown,
    CortexError,
    DeadlineExceeded,
    InsufficientMemory,
    ModelLoadFailed,
    NonFiniteLogits,
    Overloaded,
)
from cortexd.messages import Route
from tests.doubles.fleet import ALIAS, CONTEXT, MODEL
from tests.doubles.front import ServedFront, async_test, served_front

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
VERSION = {"anthropic-version": "2023-06-01", "x-api-key": "anything"}
TOOLS = [
    {
        "name": "weather",
        "description": "Say the weather",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "n": 1.10}}\n</tool_call>'


def message_body(content: Any = "Hi", **fields: Any) -> dict[str, Any]:
    """Return a request's body."""
    messages = [{"role": "user", "content": content}]
    return {"model": MODEL, "max_tokens": 1000, "messages": messages, **fields}


def give_markers(front: ServedFront) -> None:
    """Make the model one for reasoning and tools, with room for both."""
    front.text_model.added_tokens = {"<think>", "</think>", "<tool_call>", "</tool_call>"}
    front.fleet.context = 4000


async def stream_events(front: ServedFront, body: dict[str, Any], query: str = "") -> list[Any]:
    """Return a stream's events, each checked: its name stands on both lines."""
    data = msgspec.json.encode({**body, "stream": True})
    async with front.http.post(front.url + MESSAGES + query, data=data) as response:
        assert response.status == 200, await response.text()
        assert response.headers["request-id"] == response.headers["x-request-id"]
        text = (await response.read()).decode()
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data_line = block.split("\n")
        event = msgspec.json.decode(data_line.removeprefix("data: "))
        assert name == "event: " + event["type"]
        events.append(event)
    return events


def message_of(events: list[Any]) -> dict[str, Any]:
    """Return the message a stream adds up to, as the official clients do it."""
    message: dict[str, Any] = {}
    texts: dict[int, str] = {}
    for event in events:
        kind = event["type"]
        if kind == "message_start":
            message = event["message"]
        elif kind == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
        elif kind == "content_block_delta":
            add_delta(message["content"][event["index"]], event["delta"], texts, event["index"])
        elif kind == "content_block_stop" and event["index"] in texts:
            message["content"][event["index"]]["input"] = msgspec.json.decode(texts[event["index"]])
        elif kind == "message_delta":
            message.update(event["delta"])
            message["usage"].update(event["usage"])
    assert events[-1] == {"type": "message_stop"}
    return message


def add_delta(block: dict[str, Any], delta: Any, texts: dict[int, str], index: int) -> None:
    """Grow a block."""
    for kind, key in (("text_delta", "text"), ("thinking_delta", "thinking")):
        if delta["type"] == kind:
            block[key] += delta[key]
    if delta["type"] == "signature_delta":
        block["signature"] = delta["signature"]
    if delta["type"] == "input_json_delta":
        texts[index] = texts.get(index, "") + delta["partial_json"]


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message that can be compared with another of the same request."""
    content = [
        {key: value for key, value in block.items() if key != "id"} for block in message["content"]
    ]
    return {**message, "id": "", "content": content}


async def both_ways(front: ServedFront, **fields: Any) -> dict[str, Any]:
    """Return the unary answer; the streamed one must be equal."""
    status, unary, _ = await front.post(MESSAGES, message_body(**fields))
    assert status == 200, unary
    streamed = message_of(await stream_events(front, message_body(**fields)))
    assert without_ids(streamed) == without_ids(unary)
    result: dict[str, Any] = unary
    return result


@async_test
async def test_message_has_the_apis_shape() -> None:
    """Text, stop reason, usage with cache counts, ids."""
    async with served_front() as front:
        front.fleet.num_cached_tokens = 4
        unary = await both_ways(front)
        assert unary.pop("id").startswith("msg_")
        assert unary == {
            "type": "message",
            "role": "assistant",
            "model": MODEL,
            "content": [{"type": "text", "text": "Hello, world!"}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {
                "input_tokens": len("user: Hi\nassistant: ") - 4,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 4,
                "output_tokens": 13,
            },
        }


@async_test
async def test_stream_event_order_and_first_counts() -> None:
    """message_start tells the prompt's tokens, then one block, then the ending."""
    async with served_front() as front:
        front.fleet.num_cached_tokens = 3
        front.fleet.reply = b"abc"
        events = await stream_events(front, message_body(), query="?beta=true")
        kinds = [event["type"] for event in events if event["type"] != "content_block_delta"]
        assert kinds == [
            "message_start",
            "content_block_start",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        usage = events[0]["message"]["usage"]
        assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (17, 3)
        assert events[-2]["usage"]["output_tokens"] == 3


@async_test
async def test_thinking_text_and_tool_use_blocks_keep_their_order() -> None:
    """Blocks come in the order in which the model wrote them, the same both ways."""
    async with served_front() as front:
        give_markers(front)
        front.fleet.reply = (
            f"<think>\nhm 🙂\n</think>\n\nFirst:\n{CALL}\nthen\n{CALL}<think>x</think>{CALL}"
        ).encode()
        unary = await both_ways(front, tools=TOOLS, thinking={"type": "adaptive"})
        kinds = [block["type"] for block in unary["content"]]
        assert kinds == ["thinking", "text", "tool_use", "text", "tool_use", "thinking", "tool_use"]
        thinking, text, call = unary["content"][:3]
        assert thinking["thinking"] == "hm 🙂"
        assert thinking["signature"]
        assert text["text"] == "First:"
        assert (call["name"], call["input"]) == ("weather", {"city": "Köln", "n": 1.10})
        assert call["id"].startswith("toolu_")
        assert unary["stop_reason"] == "tool_use"
        # The double's tokens are bytes: the last of a start marker's opens the section.
        thought = len(">\nhm 🙂\n</think>".encode()) + len(">x</think>")
        assert unary["usage"]["output_tokens_details"] == {"thinking_tokens": thought}


@pytest.mark.parametrize(
    ("reply", "fields", "ending"),
    [
        ("one END two", {"stop_sequences": ["x", "END"]}, ("stop_sequence", "END")),
        ("one two", {"max_tokens": 3}, ("max_tokens", None)),
        ("one", {"stop_sequences": ["END"]}, ("end_turn", None)),
        ("", {}, ("end_turn", None)),
    ],
)
@async_test
async def test_stop_reasons(
    reply: str, fields: dict[str, Any], ending: tuple[str, str | None]
) -> None:
    """Why an answer ended, and which stop sequence it was."""
    async with served_front() as front:
        front.fleet.reply = reply.encode()
        unary = await both_ways(front, **fields)
        assert (unary["stop_reason"], unary["stop_sequence"]) == ending
        if not reply:
            assert unary["content"] == []


@async_test
async def test_prefill_is_continued() -> None:
    """A last turn of the assistant is the beginning of the answer, not a turn of its own."""
    async with served_front() as front:
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [{"type": "text", "text": "Dear"}]},
        ]
        unary = await both_ways(front, messages=messages)
        prompt = b"user: Hi\nassistant: Dear"
        assert unary["usage"]["input_tokens"] == len(prompt)
        ids = front.fleet.submits[0].prompt_token_ids
        assert bytes(ids[::4]) == prompt


@async_test
async def test_request_reaches_template_and_engine_translated() -> None:
    """System, tools, history and sampling arrive where OpenAI's would."""
    async with served_front() as front:
        give_markers(front)
        body = {
            "model": ALIAS,
            "max_tokens": 7,
            "system": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}],
            "messages": [
                {"role": "user", "content": "u"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "t", "signature": "s"},
                        {"type": "tool_use", "id": "c1", "name": "weather", "input": {"a": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "c1", "content": "rain"},
                        {"type": "text", "text": "and?"},
                    ],
                },
            ],
            "tools": TOOLS,
            "tool_choice": {"type": "auto"},
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 5,
            "metadata": {"user_id": "x"},
            "service_tier": "auto",
            "context_management": {"edits": []},
            "output_config": {"effort": "high"},
        }
        status, answer, _ = await front.post(MESSAGES, body)
        assert status == 200, answer
        assert answer["model"] == ALIAS
        assert front.text_model.rendered[0] == [
            {"role": "system", "content": "A\n\nB"},
            {"role": "user", "content": "u"},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "t",
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": {"a": 1}},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
            {"role": "user", "content": "and?"},
        ]
        assert front.text_model.rendered_tools[0] == [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": "Say the weather",
                    "parameters": TOOLS[0]["input_schema"],
                },
            }
        ]
        assert front.text_model.template_kwargs[0] == {"enable_thinking": False, "thinking": False}
        submit = front.fleet.submits[0]
        assert (submit.temperature, submit.top_p, submit.top_k) == (0.5, 0.9, 5)
        assert submit.max_tokens == 7


@async_test
async def test_disabled_parallel_tool_use_ends_at_the_first_call() -> None:
    """The second call is never asked for."""
    async with served_front() as front:
        give_markers(front)
        front.fleet.reply = (CALL + CALL).encode()
        choice = {"type": "auto", "disable_parallel_tool_use": True}
        unary = await both_ways(front, tools=TOOLS, tool_choice=choice)
        assert len(unary["content"]) == 1
        assert unary["stop_reason"] == "tool_use"


@async_test
async def test_count_tokens_is_exact_and_needs_no_load() -> None:
    """The count is what the message is then billed; a model with known files is not routed to."""
    async with served_front() as front:
        give_markers(front)
        body = message_body("How many?", system="S", tools=TOOLS)
        count = {key: value for key, value in body.items() if key != "max_tokens"}
        for model in (MODEL, ALIAS):
            status, counted, headers = await front.post(COUNT, {**count, "model": model})
            assert status == 200
            assert headers["request-id"]
            assert front.fleet.all_sent(Route) == []
        _, answer, _ = await front.post(MESSAGES, body)
        assert counted == {"input_tokens": answer["usage"]["input_tokens"]}


@async_test
async def test_count_tokens_fetches_what_is_not_there_and_leaves_no_lease() -> None:
    """A cold model is waited for, within the unary patience; an unknown one is 404."""
    async with served_front(unary_load_wait_s=0.01) as front:
        front.fleet.begin_loading()
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
        status, answer, headers = await front.post(COUNT, body)
        assert (status, answer["error"]["type"]) == (529, "overloaded_error")
        assert headers["Retry-After"] == "8"
        status, answer, _ = await front.post(COUNT, {**body, "model": "none"})
        assert (status, answer["error"]["type"]) == (404, "not_found_error")
        front.fleet.finish_loading()
        assert (await front.post(COUNT, body))[0] == 200


@async_test
async def test_pings_fill_the_wait_for_a_load() -> None:
    """While a model loads: pings; message_start comes when the prompt is counted."""
    async with served_front(
        first_byte_hold_ms=5, keepalive_s=0.005, event_keepalive_s=0.01
    ) as front:
        front.fleet.begin_loading()
        front.fleet.pause_after = 0
        data = msgspec.json.encode(message_body(stream=True))
        async with front.http.post(front.url + MESSAGES, data=data) as response:
            lines: list[bytes] = []
            while lines.count(b"event: ping\n") < 2:
                lines.append(await response.content.readline())
            assert b"event: message_start\n" not in lines
            front.fleet.finish_loading()
            while b"event: message_start\n" not in lines:
                lines.append(await response.content.readline())
            front.fleet.resume()
            rest = await response.read()
        assert (b"".join(lines) + rest).count(b"event: message_start\n") == 1
        assert rest.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')


@async_test
async def test_error_mid_stream_is_an_error_event() -> None:
    """An engine that dies: what was sent stays, then one error event, no message_stop."""
    async with served_front() as front:
        front.fleet.pause_after = 3
        data = msgspec.json.encode(message_body(stream=True))
        async with front.http.post(front.url + MESSAGES, data=data) as response:
            await front.fleet.paused.wait()
            front.kill_leader()
            text = (await response.read()).decode()
            request_id = response.headers["request-id"]
        last = msgspec.json.decode(text.removesuffix("\n\n").rpartition("data: ")[2])
        assert last["type"] == "error"
        assert last["error"]["type"] == "overloaded_error"
        assert last["request_id"] == request_id
        assert "message_stop" not in text


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("full", retry_after_s=9), 529, "overloaded_error"),
        (NonFiniteLogits("not finite"), 500, "api_error"),
        (ModelLoadFailed("broken"), 529, "overloaded_error"),
        (InsufficientMemory("too big"), 529, "overloaded_error"),
        (ActorDown("gone"), 529, "overloaded_error"),
        (DeadlineExceeded("late"), 504, "timeout_error"),
    ],
)
@async_test
async def test_errors_have_the_dialects_types(error: CortexError, status: int, kind: str) -> None:
    """Each class has its status and type; a retry's time is kept."""
    async with served_front() as front:
        front.fleet.delta_error = error
        got, answer, headers = await front.post(MESSAGES, message_body())
        assert (got, answer["error"]["type"]) == (status, kind)
        assert answer == {
            "type": "error",
            "error": {"type": kind, "message": error.message},
            "request_id": headers["request-id"],
        }
        assert ("Retry-After" in headers) == error.retriable


@async_test
async def test_overlong_prompt_says_so_in_the_words_agents_know() -> None:
    """Agents compact their history on this text."""
    async with served_front() as front:
        status, answer, _ = await front.post(MESSAGES, message_body("x" * 500))
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        prompt_len = 500 + len("user: \nassistant: ")
        assert answer["error"]["message"] == (
            f"prompt is too long: {prompt_len} tokens > {CONTEXT} maximum"
        )


@async_test
async def test_models_in_the_shape_of_the_asking_client() -> None:
    """With the version header, the list and one model are Anthropic's; errors too."""
    async with served_front() as front:
        async with front.http.get(front.url + "/v1/models?limit=1000", headers=VERSION) as response:
            page = await response.json()
        assert page == {
            "data": [
                {
                    "type": "model",
                    "id": model,
                    "display_name": model,
                    "created_at": "2023-11-14T22:13:20Z",
                    "lifecycle": "active",
                    "max_input_tokens": CONTEXT - 1,
                    "max_tokens": CONTEXT,
                }
                for model in (MODEL, ALIAS)
            ],
            "has_more": False,
            "first_id": MODEL,
            "last_id": ALIAS,
        }
        async with front.http.get(f"{front.url}/v1/models/{MODEL}", headers=VERSION) as response:
            assert (await response.json())["type"] == "model"
        async with front.http.get(f"{front.url}/v1/models/none", headers=VERSION) as response:
            assert response.status == 404
            assert (await response.json())["error"]["type"] == "not_found_error"
        async with front.http.get(front.url + MESSAGES) as response:
            assert response.status == 405
            assert (await response.json())["error"]["type"] == "invalid_request_error"
