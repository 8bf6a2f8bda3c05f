"""What an answer says of its prompt: the echo, its scores, vLLM's `prompt_logprobs`."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine.text.chat_template import ChatTemplate
from engine.text.text_model import TextModel
from tests.actors.front.test_completions import PATH, body, text_of
from tests.doubles.front import async_test, chat_body, served_front
from tests.engine.text.gguf_metadata import train_byte_level


def joined_logprobs(events: list[Any], index: int = 0) -> dict[str, list[Any]]:
    """Return one choice's lists, put together from its chunks."""
    joined: dict[str, list[Any]] = {}
    for event in events[:-1]:
        for choice in event["choices"]:
            for name, values in (choice["logprobs"] or {}).items():
                if choice["index"] == index:
                    joined.setdefault(name, []).extend(values)
    return joined


@async_test
async def test_echo_puts_the_prompt_before_the_answer() -> None:
    """Streamed or not, for several prompts and answers; nothing is asked of the engine for it."""
    async with served_front() as front:
        status, answer, _ = await front.post(PATH, body(["Once", "Twice"], echo=True, n=2))
        assert status == 200, answer
        texts = [choice["text"] for choice in answer["choices"]]
        assert texts == ["OnceHello, world!"] * 2 + ["TwiceHello, world!"] * 2
        assert answer["choices"][0]["logprobs"] is None
        assert "prompt_logprobs" not in answer["choices"][0]
        events = await front.stream(PATH, body(["Once", "Twice"], echo=True, n=2, stream=True))
        assert [text_of(events, index) for index in range(4)] == texts
        assert {submit.num_prompt_logprobs for submit in front.fleet.submits} == {-1}
        _, answer, _ = await front.post(PATH, body([79, 107], echo=True))
        assert answer["choices"][0]["text"] == "OkHello, world!"


@async_test
async def test_echo_with_logprobs_scores_the_prompt_in_the_same_lists() -> None:
    """The first token has none; offsets run on from the prompt into the answer."""
    async with served_front() as front:
        front.fleet.reply = b"cd"
        expected = {
            "tokens": ["a", "b", "c", "d"],
            "token_logprobs": [None, -0.75, -0.5, -0.5],
            "top_logprobs": [
                None,
                {"a": -0.125, "b": -0.75},
                {"a": -0.5, "c": -0.5},
                {"a": -0.5, "d": -0.5},
            ],
            "text_offset": [0, 1, 2, 3],
        }
        _, answer, _ = await front.post(PATH, body("ab", echo=True, logprobs=1))
        assert answer["choices"][0]["text"] == "abcd"
        assert answer["choices"][0]["logprobs"] == expected
        events = await front.stream(PATH, body("ab", echo=True, logprobs=1, stream=True))
        assert text_of(events) == "abcd"
        assert joined_logprobs(events) == expected


@async_test
async def test_first_answer_scores_the_prompt_for_all() -> None:
    """Answers that are ready before the scores wait for them, and none is lost."""
    async with served_front() as front:
        front.fleet.reply = b"x"
        fields = {"echo": True, "logprobs": 0, "n": 3}
        _, answer, _ = await front.post(PATH, body("a long prompt", **fields))
        wanted = [submit.num_prompt_logprobs for submit in front.fleet.submits]
        assert wanted == [0, -1, -1]
        first, *others = [choice["logprobs"] for choice in answer["choices"]]
        assert first["token_logprobs"] == [None] + [-0.75] * 12 + [-0.5]
        assert others == [first, first]
        events = await front.stream(PATH, body("a long prompt", stream=True, **fields))
        for index in range(3):
            assert text_of(events, index) == "a long promptx"
            assert joined_logprobs(events, index) == first


@async_test
async def test_prompt_alone_is_scored_with_max_tokens_0() -> None:
    """As evaluation harnesses do it: lists of token ids, echo, logprobs, no answer."""
    async with served_front() as front:
        fields = {"echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}
        _, answer, _ = await front.post(PATH, body([[97, 98, 99], [100]], **fields))
        assert [choice["text"] for choice in answer["choices"]] == ["abc", "d"]
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.75, -0.75]
        assert answer["choices"][1]["logprobs"]["token_logprobs"] == [None]
        assert answer["usage"]["completion_tokens"] == 0
        assert {submit.max_tokens for submit in front.fleet.submits} == {0}
        full = "x" * front.fleet.context
        status, answer, _ = await front.post(PATH, body(full, **fields))
        assert (status, answer["choices"][0]["text"]) == (200, full)
        status, answer, _ = await front.post(PATH, body(full + "x", **fields))
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


@async_test
async def test_prompt_logprobs_are_maps_by_token_id() -> None:
    """vLLM's extension, on both endpoints; an echo beside it keeps its own count."""
    async with served_front() as front:
        _, answer, _ = await front.post(PATH, body("ab", prompt_logprobs=1, echo=True, logprobs=0))
        expected = [
            None,
            {
                "98": {"logprob": -0.75, "rank": 2, "decoded_token": "b"},
                "97": {"logprob": -0.125, "rank": 1, "decoded_token": "a"},
            },
        ]
        assert answer["choices"][0]["prompt_logprobs"] == expected
        assert answer["choices"][0]["logprobs"]["top_logprobs"][:2] == [None, {"b": -0.75}]
        _, answer, _ = await front.chat("Hi", prompt_logprobs=0)
        maps = answer["prompt_logprobs"]
        assert len(maps) == answer["usage"]["prompt_tokens"]
        assert maps[0] is None
        assert [len(entries) for entries in maps[1:]] == [1] * (len(maps) - 1)
        assert answer["choices"][0]["message"]["content"] == "Hello, world!"
        for path, request in ((PATH, body()), ("/v1/chat/completions", chat_body())):
            status, answer, _ = await front.post(
                path, {**request, "prompt_logprobs": 1, "stream": True}
            )
            assert (status, answer["error"]["param"]) == (400, "prompt_logprobs")


@async_test
async def test_engine_that_leaves_scores_out_is_a_fault() -> None:
    """The client hears of it instead of waiting, or getting lists that are too short."""
    async with served_front() as front:
        front.fleet.scores_prompts = False
        status, _, _ = await front.post(PATH, body(echo=True, logprobs=1))
        assert status == 500


@pytest.mark.parametrize("text", ["Köln 🙂 x", " a  b", "<|im_end|>"])
@async_test
async def test_echo_of_a_real_tokenizer_is_the_text_with_its_offsets(text: str) -> None:
    """A character of several tokens begins where its first byte stands."""
    tokenizer = train_byte_level("qwen2")
    model = TextModel(tokenizer, ChatTemplate({"default": ""}, {}, "test/model"), prefix_ids=[0])
    async with served_front(real_text_model=model) as front:
        front.fleet.spec = msgspec.structs.replace(front.fleet.spec, vocab_size=model.vocab_size)
        front.fleet.reply = model.encode("end", add_special_tokens=False)
        fields = {"echo": True, "logprobs": 0, "max_tokens": 0}
        _, answer, _ = await front.post(PATH, body(text, **fields))
        choice = answer["choices"][0]
        assert choice["text"] == text
        offsets = choice["logprobs"]["text_offset"]
        assert offsets == sorted(offsets)
        assert offsets[:2] == [0, 0]  # the begin token has no text of its own
        assert offsets[-1] <= len(text)
        if "<" not in text:
            plain = [
                (token, text[offset : offset + len(token)])
                for token, offset in zip(choice["logprobs"]["tokens"][1:], offsets[1:], strict=True)
                if "�" not in token
            ]
            assert all(token == found for token, found in plain)
            assert plain
