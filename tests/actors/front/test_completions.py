"""Legacy completions over a real socket."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from tests.doubles.fleet import MODEL
from tests.doubles.front import async_test, served_front

PATH = "/v1/completions"


def body(prompt: Any = "Once", **fields: Any) -> dict[str, Any]:
    """Return a request body."""
    return {"model": MODEL, "prompt": prompt, **fields}


def text_of(events: list[Any], index: int = 0) -> str:
    """Return the text one choice streamed."""
    return "".join(
        choice["text"]
        for event in events
        if isinstance(event, dict)
        for choice in event["choices"]
        if choice["index"] == index
    )


@async_test
async def test_completion_unary_and_stream_agree() -> None:
    """Both transports give the same text, finish reason and usage."""
    async with served_front() as front:
        status, answer, _ = await front.post(PATH, body())
        assert status == 200
        assert answer["object"] == "text_completion"
        assert answer["choices"][0] == {
            "index": 0,
            "text": "Hello, world!",
            "logprobs": None,
            "finish_reason": "stop",
        }
        events = await front.stream(PATH, body(stream=True, stream_options={"include_usage": True}))
        assert text_of(events) == "Hello, world!"
        assert events[-1] == "[DONE]"
        assert events[-2]["usage"] == answer["usage"]
        assert events[-3]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
@async_test
async def test_completion_prompt_forms_reach_the_engine(
    prompt: Any, expected: list[list[int]]
) -> None:
    """A string, strings, token ids and lists of those each give their sequences."""
    async with served_front() as front:
        _, answer, _ = await front.post(PATH, body(prompt, n=2))
        sent = [list(array("i", submit.prompt_token_ids)) for submit in front.fleet.submits]
        assert sent == [ids for ids in expected for _ in range(2)]
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(sent)))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


@async_test
async def test_completion_logprobs_run_parallel_with_offsets() -> None:
    """The four lists have one entry per token; offsets count characters of the answer."""
    async with served_front() as front:
        front.fleet.reply = b"abc"
        _, answer, _ = await front.post(PATH, body(logprobs=1))
        assert answer["choices"][0]["logprobs"] == {
            "tokens": ["a", "b", "c"],
            "token_logprobs": [-0.5, -0.5, -0.5],
            "top_logprobs": [{"a": -0.5}, {"a": -0.5, "b": -0.5}, {"a": -0.5, "c": -0.5}],
            "text_offset": [0, 1, 2],
        }
