"""The official Anthropic SDK as a black-box client."""

from __future__ import annotations

import anthropic
import pytest
from anthropic.types import MessageParam, ToolParam

from tests.doubles.fleet import MODEL
from tests.doubles.front import ServedFront, async_test, served_front

MESSAGES: list[MessageParam] = [{"role": "user", "content": "Hi"}]
TOOLS: list[ToolParam] = [
    {
        "name": "weather",
        "input_schema": {"type": "object", "properties": {"days": {"type": "integer"}}},
    }
]
ANSWER = (
    b"<think>\nhm\n</think>\n\nLook:\n<tool_call>\n<function=weather>\n<parameter=days>\n2\n"
    b"</parameter>\n</function>\n</tool_call>"
)


def client_of(front: ServedFront) -> anthropic.AsyncAnthropic:
    """Return a client that does not retry."""
    return anthropic.AsyncAnthropic(base_url=front.url, api_key="none", max_retries=0)


@async_test
async def test_sdk_message_unary_and_streaming_are_equal() -> None:
    """The SDK's own accumulation of a stream gives the unary message."""
    async with served_front() as front, client_of(front) as client:
        front.text_model.added_tokens = {"<think>", "</think>", "<tool_call>", "</tool_call>"}
        front.fleet.context = 2000
        for reply in (b"Hello, world!", ANSWER):
            front.fleet.reply = reply
            unary = await client.messages.create(
                model=MODEL, max_tokens=500, messages=MESSAGES, tools=TOOLS
            )
            async with client.messages.stream(
                model=MODEL, max_tokens=500, messages=MESSAGES, tools=TOOLS
            ) as stream:
                streamed = await stream.get_final_message()
            assert streamed.usage.output_tokens == unary.usage.output_tokens == len(reply)
            assert streamed.usage.input_tokens == unary.usage.input_tokens
            assert streamed.stop_reason == unary.stop_reason
            for ours, theirs in zip(streamed.content, unary.content, strict=True):
                assert ours.to_dict() | {"id": ""} == theirs.to_dict() | {"id": ""}
        kinds = [block.type for block in unary.content]
        assert kinds == ["thinking", "text", "tool_use"]
        assert unary.content[2].to_dict()["input"] == {"days": 2}
        assert unary._request_id


@async_test
async def test_sdk_round_trip_of_a_tool() -> None:
    """What the SDK sends back after a call is understood, thinking included."""
    async with served_front() as front, client_of(front) as client:
        front.text_model.added_tokens = {"<think>", "</think>", "<tool_call>", "</tool_call>"}
        front.fleet.context = 2000
        front.fleet.replies = [ANSWER, b"Sun."]
        first = await client.messages.create(
            model=MODEL,
            max_tokens=500,
            messages=MESSAGES,
            tools=TOOLS,
            thinking={"type": "enabled", "budget_tokens": 1024},
        )
        call = next(block for block in first.content if block.type == "tool_use")
        second = await client.messages.create(
            model=MODEL,
            max_tokens=500,
            tools=TOOLS,
            messages=[
                *MESSAGES,
                {"role": "assistant", "content": first.content},
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": call.id, "content": "sun"},
                    ],
                },
            ],
        )
        assert second.content[0].to_dict()["text"] == "Sun."
        sent = front.text_model.rendered[1]
        assert [message["role"] for message in sent] == ["user", "assistant", "tool"]
        assert sent[1]["reasoning_content"] == "hm"
        assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"] == call.id
        kwargs = [
            bool(given and given["enable_thinking"]) for given in front.text_model.template_kwargs
        ]
        assert kwargs == [True, False]


@async_test
async def test_sdk_runs_tools_without_a_thread_of_ours() -> None:
    """The SDK's runner asks the server to hold the conversation: told no, it sends all of it."""

    @anthropic.beta_async_tool
    async def weather(days: int) -> str:
        """Tell the weather."""
        return f"sun for {days} days"

    async with served_front() as front, client_of(front) as client:
        front.text_model.added_tokens = {"<think>", "</think>", "<tool_call>", "</tool_call>"}
        front.fleet.context = 2000
        front.fleet.replies = [ANSWER, b"Sun."]
        runner = client.beta.messages.tool_runner(
            model=MODEL,
            max_tokens=500,
            messages=[{"role": "user", "content": "Hi"}],
            tools=[weather],
        )
        last = await runner.until_done()
        assert last.content[0].to_dict()["text"] == "Sun."
        roles = [[message["role"] for message in sent] for sent in front.text_model.rendered]
        assert roles == [["user"], ["user", "assistant", "tool"]]
        assert front.text_model.rendered[1][2]["content"] == "sun for 2 days"


@async_test
async def test_sdk_survives_pings_while_a_model_loads() -> None:
    """Pings before and after the first event do not disturb the SDK."""
    async with (
        served_front(first_byte_hold_ms=1, keepalive_s=0.005, event_keepalive_s=0.01) as front,
        client_of(front) as client,
    ):
        front.fleet.begin_loading()
        front.fleet.pause_after = 2
        async with client.messages.stream(model=MODEL, max_tokens=50, messages=MESSAGES) as stream:
            front.fleet.finish_loading()
            await front.fleet.paused.wait()
            front.fleet.resume()
            message = await stream.get_final_message()
        assert message.content[0].to_dict()["text"] == "Hello, world!"


@async_test
async def test_sdk_counts_tokens_and_lists_models() -> None:
    """The other endpoints the SDK knows."""
    async with served_front() as front, client_of(front) as client:
        counted = await client.messages.count_tokens(model=MODEL, messages=MESSAGES)
        answer = await client.messages.create(model=MODEL, max_tokens=5, messages=MESSAGES)
        assert counted.input_tokens == answer.usage.input_tokens
        assert MODEL in [model.id async for model in client.models.list()]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        beta = await client.beta.messages.create(
            model=MODEL, max_tokens=5, messages=MESSAGES, betas=["interleaved-thinking-2025-05-14"]
        )
        assert beta.stop_reason == "max_tokens"


@async_test
async def test_sdk_raises_its_own_errors() -> None:
    """Each error is the SDK's class for it, with the message and the request's id."""
    async with served_front() as front, client_of(front) as client:
        with pytest.raises(anthropic.NotFoundError, match="is not known here") as caught:
            await client.messages.create(model="none", max_tokens=5, messages=MESSAGES)
        assert caught.value.request_id
        with pytest.raises(anthropic.BadRequestError, match="max_tokens is 0"):
            await client.messages.create(model=MODEL, max_tokens=0, messages=MESSAGES)


@async_test
async def test_sdk_sees_an_error_in_the_stream() -> None:
    """An engine that dies mid-stream raises in the client instead of ending quietly."""
    async with served_front() as front, client_of(front) as client:
        front.fleet.pause_after = 2

        async def read_all() -> None:
            async with client.messages.stream(
                model=MODEL, max_tokens=50, messages=MESSAGES
            ) as stream:
                await front.fleet.paused.wait()
                front.kill_leader()
                await stream.get_final_message()

        with pytest.raises(anthropic.APIStatusError, match="engine of this model ended"):
            await read_all()
