"""Tools and reasoning in the OpenAI dialect: unary and streamed answers, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.doubles.fleet import MODEL
from tests.doubles.front import ServedFront, async_test, chat_body, served_front

CHAT = "/v1/chat/completions"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]
MARKERS = {"<think>", "</think>", "<tool_call>", "</tool_call>"}
JSON_CALL = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
)
XML_CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)


def give_markers(front: ServedFront) -> None:
    """Make the model one for reasoning and tools, with room for both."""
    front.text_model.added_tokens = MARKERS
    front.fleet.context = 2000


def message_of(events: list[Any]) -> dict[str, Any]:
    """Return the message a stream adds up to."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for event in events:
        for choice in event["choices"] if isinstance(event, dict) else []:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            message["tool_calls"] += delta.get("tool_calls") or []
            message["finish_reason"] = choice["finish_reason"]
    return message


async def both_ways(front: ServedFront, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the unary answer and the streamed message of the same request; they must agree."""
    status, unary, _ = await front.chat(**fields)
    assert status == 200, unary
    body = chat_body(stream=True, stream_options={"include_usage": True}, **fields)
    events = await front.stream(CHAT, body)
    streamed = message_of(events)
    choice = unary["choices"][0]
    assert streamed["content"] == (choice["message"]["content"] or "")
    assert streamed["reasoning_content"] == choice["message"].get("reasoning_content", "")
    assert [call["function"] for call in streamed["tool_calls"]] == [
        call["function"] for call in choice["message"].get("tool_calls", [])
    ]
    assert streamed["finish_reason"] == choice["finish_reason"]
    assert events[-2]["usage"] == unary["usage"]
    return unary, streamed


@async_test
async def test_tool_calls_come_with_ids_and_their_finish_reason() -> None:
    """JSON and XML calls become tool_calls; content is null when there is nothing else."""
    async with served_front() as front:
        give_markers(front)
        front.fleet.reply = f"{JSON_CALL}\n{XML_CALL}".encode()
        unary, streamed = await both_ways(front, tools=TOOLS)
        message = unary["choices"][0]["message"]
        assert message["content"] is None
        assert unary["choices"][0]["finish_reason"] == "tool_calls"
        calls = [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]]
        assert calls == [{"city": "Köln", "days": 2}, {"city": "12", "days": 3}]
        ids = [call["id"] for call in message["tool_calls"] + streamed["tool_calls"]]
        assert all(identifier.startswith("call_") for identifier in ids)
        assert len(set(ids)) == 4
        assert [call["index"] for call in streamed["tool_calls"]] == [0, 1]
        assert front.text_model.rendered_tools == [TOOLS, TOOLS]


@async_test
async def test_reasoning_is_split_off_and_counted() -> None:
    """Reasoning has a field of its own; its tokens are counted, markers included."""
    async with served_front() as front:
        give_markers(front)
        front.fleet.reply = b"<think>\nhm 1\n</think>\n\nyes"
        unary, _ = await both_ways(front)
        message = unary["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm 1", "yes")
        assert "tool_calls" not in message
        details = unary["usage"]["completion_tokens_details"]
        # The double's tokens are bytes: the last of the marker's opens the section.
        assert details == {"reasoning_tokens": len(">\nhm 1\n</think>")}


@async_test
async def test_reasoning_opened_by_the_prompt_is_seen() -> None:
    """A template that opens the section itself; an answer cut off in it is all reasoning."""
    async with served_front() as front:
        give_markers(front)
        front.text_model.opening = "<think>\n"
        front.fleet.reply = b"hm</think>yes"
        unary, _ = await both_ways(front)
        assert unary["choices"][0]["message"]["reasoning_content"] == "hm"
        unary, _ = await both_ways(front, max_tokens=2)
        message = unary["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm", "")
        assert unary["choices"][0]["finish_reason"] == "length"


@async_test
async def test_block_that_is_no_call_stays_text() -> None:
    """What cannot be read, or was cut off, is shown instead of lost."""
    async with served_front() as front:
        give_markers(front)
        for text in ("a <tool_call>{broken</tool_call> b", 'a\n<tool_call>{"name": "we'):
            front.fleet.reply = text.encode()
            unary, _ = await both_ways(front, tools=TOOLS)
            assert unary["choices"][0]["message"]["content"] == text
            assert unary["choices"][0]["finish_reason"] == "stop"


@async_test
async def test_without_tools_nothing_is_a_call() -> None:
    """A request without tools, or with tool_choice none, gets the model's words as they are."""
    async with served_front() as front:
        front.text_model.added_tokens = {"<tool_call>", "</tool_call>"}
        front.fleet.reply = JSON_CALL.encode()
        for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            unary, _ = await both_ways(front, **fields)
            assert unary["choices"][0]["message"]["content"] == JSON_CALL
        assert front.text_model.rendered_tools == [None] * 4


@async_test
async def test_single_tool_call_ends_the_answer() -> None:
    """parallel_tool_calls false: the first call ends it, and the engine is told."""
    async with served_front() as front:
        give_markers(front)
        front.fleet.reply = (JSON_CALL + JSON_CALL).encode()
        unary, _ = await both_ways(front, tools=TOOLS, parallel_tool_calls=False)
        assert len(unary["choices"][0]["message"]["tool_calls"]) == 1
        assert unary["choices"][0]["finish_reason"] == "tool_calls"
        assert unary["usage"]["completion_tokens"] == len(JSON_CALL.encode())
        assert front.fleet.num_running == 0


@async_test
async def test_stop_strings_count_in_the_text_only() -> None:
    """A stop string within reasoning or a call does not end the answer; one in the text does."""
    async with served_front() as front:
        give_markers(front)
        front.fleet.reply = f"<think>a STOP b</think>x ST{JSON_CALL}y STOP z".encode()
        unary, _ = await both_ways(front, tools=TOOLS, stop=["STOP", "weather"])
        message = unary["choices"][0]["message"]
        assert message["reasoning_content"] == "a STOP b"
        assert message["content"] == "x STy "
        assert len(message["tool_calls"]) == 1
        assert unary["choices"][0]["finish_reason"] == "stop"


@async_test
async def test_logprobs_of_pieces_are_all_given() -> None:
    """Every token's log probability is there, whatever its piece is."""
    async with served_front() as front:
        give_markers(front)
        front.fleet.reply = b"<think>a</think>b"
        body = chat_body(logprobs=True, stream=True)
        events = await front.stream(CHAT, body)
        entries = [
            entry["token"]
            for event in events[:-1]
            for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
        assert "".join(entries) == "<think>a</think>b"


@pytest.mark.parametrize("stream", [False, True])
@async_test
async def test_template_without_tools_is_422(stream: bool) -> None:
    """Tools that cannot reach the model are refused, not dropped."""
    async with served_front() as front:
        front.text_model.can_call_tools = False
        status, answer, _ = await front.chat(tools=TOOLS, stream=stream)
        assert (status, answer["error"]["code"]) == (422, "template_render_failed")
        assert answer["error"]["param"] == "tools"
        assert (await front.chat(tools=TOOLS, tool_choice="none"))[0] == 200


@async_test
async def test_sdk_round_trip_with_tools_and_reasoning() -> None:
    """The official SDK reads the call, sends its result, and gets the answer."""
    async with (
        served_front() as front,
        openai.AsyncOpenAI(base_url=front.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        give_markers(front)
        front.fleet.replies = [f"<think>hm</think>{JSON_CALL}".encode(), b"Rain."]
        messages: list[Any] = [{"role": "user", "content": "Weather?"}]
        first = await client.chat.completions.create(
            model=MODEL, messages=messages, tools=TOOLS, tool_choice="auto"
        )
        answer = first.choices[0].message
        assert answer.tool_calls is not None
        messages += [
            answer.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "rain"},
        ]
        stream = await client.chat.completions.create(
            model=MODEL, messages=messages, tools=TOOLS, stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == "Rain."
        sent = front.text_model.rendered[1]
        assert [message["role"] for message in sent] == ["user", "assistant", "tool"]
        assert sent[1]["reasoning_content"] == "hm"
        assert sent[1]["tool_calls"][0]["function"]["name"] == "weather"
