"""`/v1/responses`, as the official SDK and as bare events see it."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.actors.front.test_tools import JSON_CALL, give_markers
from tests.doubles.fleet import LEADER, MODEL
from tests.doubles.front import ServedFront, async_test, served_front

PATH = "/v1/responses"
FUNCTION = {
    "type": "function",
    "name": "weather",
    "description": "Tell it.",
    "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
    {"type": "message", "role": "user", "content": "Weather?"},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [
        {"type": "reasoning_text", "text": "I ask."}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Wait."}]},
    {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
    {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    {"type": "function_call_output", "call_id": "c2", "output": [
        {"type": "input_text", "text": "sun"}]},
]  # fmt: skip


def client_of(front: ServedFront) -> openai.AsyncOpenAI:
    """Return a client that does not retry."""
    return openai.AsyncOpenAI(base_url=front.url + "/v1", api_key="none", max_retries=0)


async def stream(front: ServedFront, body: dict[str, Any]) -> list[Any]:
    """Return the events of a stream; each is named as its data says."""
    request = front.http.post(front.url + PATH, json={**body, "stream": True})
    async with request as response:
        assert response.status == 200, await response.text()
        text = await response.text()
    events = []
    for frame in text.removesuffix("\n\n").split("\n\n"):
        head, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert head == f"event: {events[-1]['type']}"
    return events


def items_of(events: list[Any]) -> list[Any]:
    """Return the items a stream adds up to, after checking its events against each other."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    for index, item in enumerate(items):
        own = [event for event in events if event.get("output_index") == index]
        deltas = [event["delta"] for event in own if event["type"].endswith(".delta")]
        whole = item["arguments"] if "arguments" in item else item["content"][0]["text"]
        assert "".join(deltas) == whole
        assert {event["item_id"] for event in own if "item_id" in event} == {item["id"]}
    return items


@async_test
async def test_sdk_reads_whole_answers_and_streams() -> None:
    """Text, usage and status are the same both ways."""
    async with served_front() as front, client_of(front) as client:
        whole = await client.responses.create(model=MODEL, input="Hi", instructions="Be brief.")
        assert (whole.output_text, whole.status) == ("Hello, world!", "completed")
        assert whole.id.startswith("resp_")
        async with client.responses.stream(
            model=MODEL, input="Hi", instructions="Be brief."
        ) as sdk_stream:
            kinds = [event.type async for event in sdk_stream]
            final = await sdk_stream.get_final_response()
        assert final.output_text == whole.output_text
        assert final.usage == whole.usage
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] == "response.completed"


@async_test
async def test_reasoning_words_and_calls_are_items_in_their_order() -> None:
    """The stream's items are those of the whole answer; a call names its tool and arguments."""
    async with served_front() as front:
        give_markers(front)
        front.fleet.reply = f"<think>\nhm\n</think>\n\nLook: {JSON_CALL}".encode()
        body = {"model": MODEL, "input": "Hi", "tools": [FUNCTION]}
        status, whole, _ = await front.post(PATH, body)
        assert status == 200, whole
        items = items_of(await stream(front, body))
        for found in (whole["output"], items):
            reasoning, message, call = found
            assert reasoning["content"][0]["text"] == "hm"
            assert message["content"][0]["text"].strip() == "Look:"
            assert (call["type"], call["name"]) == ("function_call", "weather")
            assert json.loads(call["arguments"]) == {"city": "Köln", "days": 2}
            assert call["call_id"].startswith("call_")
        assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


@async_test
async def test_items_become_the_turns_of_a_chat() -> None:
    """System texts lead; a turn's reasoning, words and calls are one message; hosted tools go."""
    async with served_front() as front:
        give_markers(front)
        body = {
            "model": MODEL,
            "instructions": "You help.",
            "input": CONVERSATION,
            "tools": [FUNCTION, {"type": "web_search"}, {"type": "namespace", "tools": []}],
            "store": True,
            "include": ["reasoning.encrypted_content"],
        }
        status, answer, _ = await front.post(PATH, body)
        assert status == 200, answer
        assert answer["store"] is False
        (messages,) = front.text_model.rendered
        assert [message["role"] for message in messages] == [
            "system", "user", "assistant", "tool", "tool"
        ]  # fmt: skip
        system, _, assistant, *results = messages
        assert system["content"] == "You help.\n\nBe brief."
        assert (assistant["content"], assistant["reasoning_content"]) == ("Wait.", "I ask.")
        assert [call["id"] for call in assistant["tool_calls"]] == ["c1", "c2"]
        assert [(one["tool_call_id"], one["content"]) for one in results] == [
            ("c1", "rain"), ("c2", "sun")
        ]  # fmt: skip
        ((tool,),) = front.text_model.rendered_tools
        assert tool["function"]["name"] == "weather"


@async_test
async def test_answer_that_is_cut_off_is_incomplete() -> None:
    """Both ways say so, and why."""
    async with served_front() as front:
        body = {"model": MODEL, "input": "Hi", "max_output_tokens": 3}
        _, whole, _ = await front.post(PATH, body)
        *_, last = await stream(front, body)
        assert last["type"] == "response.incomplete"
        for response in (whole, last["response"]):
            assert response["status"] == response["output"][0]["status"] == "incomplete"
            assert response["incomplete_details"] == {"reason": "max_output_tokens"}


@async_test
async def test_engine_that_dies_ends_the_stream_with_a_failed_response() -> None:
    """After the first byte an error is the last event."""
    async with served_front() as front:
        front.fleet.pause_after = 3
        body = {"model": MODEL, "input": "Hi", "stream": True}
        async with front.http.post(front.url + PATH, json=body) as response:
            while b"output_text.delta" not in await response.content.readline():
                pass
            front.kill_leader()
            lines = (await response.read()).decode().splitlines()
        last = json.loads([line for line in lines if line.startswith("data: ")][-1][6:])
        assert last["type"] == "response.failed"
        assert last["response"]["error"]["code"] == "engine_restarting"


class City(BaseModel):
    """A schema."""

    name: str


@async_test
async def test_sdk_parses_a_structured_answer() -> None:
    """`text.format` is held to as `response_format` is."""
    async with served_front() as front, client_of(front) as client:
        front.fleet.reply = b'{"name": "Paris"}'
        answer = await client.responses.parse(model=MODEL, input="Hi", text_format=City)
        assert answer.output_parsed == City(name="Paris")
        assert "name" in front.fleet.submits[0].grammar


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"text": {"format": 1}}, "text.format"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
@async_test
async def test_what_cannot_be_served_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    """The field as the client sent it; nothing reaches the engine."""
    async with served_front() as front:
        status, answer, _ = await front.post(PATH, {"model": MODEL, "input": "Hi", **fields})
        assert (status, answer["error"]["param"]) == (400, param)
        assert front.fleet.submits == []
        assert front.fleet.incarnation_of(LEADER) is not None
