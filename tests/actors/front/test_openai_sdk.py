"""The official OpenAI SDK as a black-box client."""

from __future__ import annotations

import openai
import pytest

from tests.doubles.fleet import MODEL
from tests.doubles.front import ServedFront, async_test, served_front

MESSAGES = [{"role": "user", "content": "Hi"}]


def client_of(front: ServedFront) -> openai.AsyncOpenAI:
    """Return a client that does not retry."""
    return openai.AsyncOpenAI(base_url=front.url + "/v1", api_key="none", max_retries=0)


@async_test
async def test_sdk_chat_unary_and_streaming() -> None:
    """Text, usage and finish reason come through both ways."""
    async with served_front() as front, client_of(front) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert answer.choices[0].message.content == "Hello, world!"
        assert answer.usage is not None
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        text, usage = "", None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
        assert text == "Hello, world!"
        assert usage == answer.usage


@async_test
async def test_sdk_survives_keepalives() -> None:
    """Comments and empty events while a model loads do not disturb the SDK's decoder."""
    async with (
        served_front(first_byte_hold_ms=1, keepalive_s=0.005, event_keepalive_s=0.01) as front,
        client_of(front) as client,
    ):
        front.fleet.begin_loading()
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        text, num_empty = "", 0
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            num_empty += not chunk.choices[0].delta.content
            if num_empty == 3:
                front.fleet.finish_loading()
        assert text == "Hello, world!"


@async_test
async def test_sdk_completions_models_and_errors() -> None:
    """The legacy endpoint, the model list, and errors as the SDK's own classes."""
    async with served_front() as front, client_of(front) as client:
        answer = await client.completions.create(model=MODEL, prompt="Hi", logprobs=2)
        assert answer.choices[0].text == "Hello, world!"
        assert (await client.models.list()).data[0].id == MODEL
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError, match="is not known here"):
            await client.chat.completions.create(model="nothing", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError, match="temperature is 3"):
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3)


@async_test
async def test_sdk_sees_an_error_in_the_stream() -> None:
    """An engine that dies mid-stream raises in the client instead of ending quietly."""
    async with served_front() as front, client_of(front) as client:
        front.fleet.pause_after = 2
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)

        async def read_all() -> None:
            async for chunk in stream:
                if chunk.choices[0].delta.content == "e":
                    front.kill_leader()

        with pytest.raises(openai.APIError, match="engine of this model ended"):
            await read_all()
