"""Chat completions over a real socket: whole answers, streams, and that they agree."""

from __future__ import annotations

from typing import Any

import pytest

from tests.doubles.fleet import ALIAS, MODEL
from tests.doubles.front import async_test, chat_body, served_front

CHAT = "/v1/chat/completions"


def text_of(events: list[Any], index: int = 0) -> str:
    """Return the text one choice streamed."""
    return "".join(
        choice["delta"].get("content") or ""
        for event in events
        if isinstance(event, dict)
        for choice in event["choices"]
        if choice["index"] == index
    )


def finish_reasons(events: list[Any]) -> dict[int, str]:
    """Return each choice's finish reason."""
    return {
        choice["index"]: choice["finish_reason"]
        for event in events
        if isinstance(event, dict)
        for choice in event["choices"]
        if choice["finish_reason"]
    }


@async_test
async def test_chat_unary_answers_text_usage_and_ids() -> None:
    """A whole answer has OpenAI's shape, its usage, and the request id in a header."""
    async with served_front() as front:
        front.fleet.num_cached_tokens = 4
        status, body, headers = await front.chat()
        assert status == 200
        assert body["object"] == "chat.completion"
        assert body["id"].startswith("chatcmpl-")
        assert body["model"] == MODEL
        assert body["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello, world!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ]
        prompt_tokens = len("user: Hi\nassistant: ")
        assert body["usage"] == {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 13,
            "total_tokens": prompt_tokens + 13,
            "prompt_tokens_details": {"cached_tokens": 4},
        }
        assert headers["x-request-id"]
        assert headers["Content-Type"] == "application/json"


@async_test
async def test_chat_stream_equals_unary_text() -> None:
    """A stream adds up to the unary text: role first, one finish, then [DONE]."""
    async with served_front() as front:
        front.fleet.reply = "naïve 🙂 日本".encode()
        _, unary, _ = await front.chat()
        events = await front.stream(CHAT, chat_body(stream=True))
        assert text_of(events) == unary["choices"][0]["message"]["content"] == "naïve 🙂 日本"
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert events[-1] == "[DONE]"
        assert events[-2]["choices"][0]["finish_reason"] == "stop"
        assert len({event["id"] for event in events[:-1]}) == 1
        assert {event["object"] for event in events[:-1]} == {"chat.completion.chunk"}
        assert {event["system_fingerprint"] for event in events[:-1]} == {
            unary["system_fingerprint"]
        }
        # One event for each whole character at most: no event without text but role and finish.
        assert len(events) <= len("naïve 🙂 日本") + 3


@async_test
async def test_chat_stream_include_usage_adds_a_last_chunk() -> None:
    """With include_usage, a chunk without choices holds the usage, just before [DONE]."""
    async with served_front() as front:
        body = chat_body(stream=True, stream_options={"include_usage": True})
        events = await front.stream(CHAT, body)
        assert events[-2]["choices"] == []
        assert events[-2]["usage"]["completion_tokens"] == 13
        assert all(event["usage"] is None for event in events[:-2])


@pytest.mark.parametrize("stream", [False, True])
@async_test
async def test_chat_n_gives_each_choice_its_own_text(stream: bool) -> None:
    """With n=2, both choices come complete, and the prompt counts once."""
    async with served_front() as front:
        front.fleet.replies = [b"first", b"the second"]
        body = chat_body(n=2, stream=stream, seed=2**63 - 1)
        if stream:
            body["stream_options"] = {"include_usage": True}
            events = await front.stream(CHAT, body)
            texts = [text_of(events, 0), text_of(events, 1)]
            usage = events[-2]["usage"]
            assert finish_reasons(events) == {0: "stop", 1: "stop"}
        else:
            _, answer, _ = await front.post(CHAT, body)
            texts = [choice["message"]["content"] for choice in answer["choices"]]
            usage = answer["usage"]
        assert texts == ["first", "the second"]
        assert usage["completion_tokens"] == 15
        assert usage["prompt_tokens"] == len("user: Hi\nassistant: ")
        seeds = [submit.seed for submit in front.fleet.submits]
        assert seeds == [2**63 - 1, -(2**63)]


@pytest.mark.parametrize("stream", [False, True])
@async_test
async def test_chat_stop_string_across_tokens_ends_and_cancels(stream: bool) -> None:
    """A stop string made of several tokens is cut off; the engine is told to stop."""
    async with served_front() as front:
        front.fleet.reply = b"one two END three four"
        body = chat_body(stop=["END", "never"], stream=stream)
        if stream:
            events = await front.stream(CHAT, body)
            text, reason = text_of(events), finish_reasons(events)[0]
        else:
            _, answer, _ = await front.post(CHAT, body)
            text = answer["choices"][0]["message"]["content"]
            reason = answer["choices"][0]["finish_reason"]
            assert answer["usage"]["completion_tokens"] == len("one two END")
        assert (text, reason) == ("one two ", "stop")
        assert front.fleet.num_running == 0


@async_test
async def test_chat_half_a_stop_string_is_sent_after_all() -> None:
    """Text held back as a possible stop string is not lost when the answer ends."""
    async with served_front() as front:
        front.fleet.reply = b"almost EN"
        _, answer, _ = await front.chat(stop="END")
        assert answer["choices"][0]["message"]["content"] == "almost EN"


@async_test
async def test_chat_max_tokens_ends_with_length() -> None:
    """`max_completion_tokens` wins over `max_tokens`; the answer ends with "length"."""
    async with served_front() as front:
        _, answer, _ = await front.chat(max_tokens=9, max_completion_tokens=5)
        assert answer["choices"][0]["message"]["content"] == "Hello"
        assert answer["choices"][0]["finish_reason"] == "length"


@async_test
async def test_chat_unfinished_character_becomes_a_replacement() -> None:
    """An answer cut within a character ends with U+FFFD in both transports."""
    async with served_front() as front:
        front.fleet.reply = "ab🙂".encode()[:-1]
        _, answer, _ = await front.chat()
        events = await front.stream(CHAT, chat_body(stream=True))
        assert text_of(events) == answer["choices"][0]["message"]["content"] == "ab\ufffd"


@pytest.mark.parametrize("stream", [False, True])
@async_test
async def test_chat_logprobs_are_given_per_token(stream: bool) -> None:
    """Every token has its log probability, bytes and rivals, in both transports."""
    async with served_front() as front:
        front.fleet.reply = "é!".encode()
        body = chat_body(logprobs=True, top_logprobs=2, stream=stream)
        if stream:
            events = await front.stream(CHAT, body)
            choices = [event["choices"][0] for event in events[:-1]]
            content = [
                entry
                for choice in choices
                if choice["logprobs"]
                for entry in choice["logprobs"]["content"]
            ]
            assert text_of(events) == "é!"
        else:
            _, answer, _ = await front.post(CHAT, body)
            content = answer["choices"][0]["logprobs"]["content"]
        assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], [0x21]]
        assert content[2]["token"] == "!"
        assert content[2]["top_logprobs"] == [
            {"token": "a", "logprob": -0.5, "bytes": [97]},
            {"token": "b", "logprob": -1.5, "bytes": [98]},
        ]


@async_test
async def test_chat_sampling_fields_reach_the_engine() -> None:
    """Request fields win over the model's defaults, which win over the API's."""
    async with served_front() as front:
        front.text_model.default_sampling = {"temperature": 0.25, "top_k": 20}
        await front.chat(
            top_k=-1,
            top_p=0.5,
            min_p=0.1,
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.5,
            logit_bias={"65": -100},
            seed=7,
            min_tokens=2,
            stop_token_ids=[10],
            user="ignored",
            temperature=None,
        )
        await front.chat(ignore_eos=True)
        first, second = front.fleet.submits
        assert (first.temperature, first.top_k, first.top_p, first.min_p) == (0.25, 0, 0.5, 0.1)
        assert (first.presence_penalty, first.frequency_penalty) == (1.0, -1.0)
        assert (first.repetition_penalty, first.seed, first.min_tokens) == (1.5, 7, 2)
        assert first.logit_bias == {65: -100.0}
        assert first.stop_token_ids == (10).to_bytes(4, "little") + (256).to_bytes(4, "little")
        assert (second.top_k, second.ignore_eos, second.stop_token_ids) == (20, True, b"")
        assert second.max_tokens == 128 - len("user: Hi\nassistant: ")


@async_test
async def test_chat_alias_keeps_its_name_and_is_recorded_as_the_model() -> None:
    """Clients see the name they asked for; metrics see the model behind it."""
    async with served_front() as front:
        _, answer, _ = await front.post(CHAT, {**chat_body(), "model": ALIAS})
        assert answer["model"] == ALIAS
        assert (await front.fleet.wait_for_finished())[0].model == MODEL


@async_test
async def test_chat_one_record_per_request() -> None:
    """Each request, good or bad, gives metrics exactly one record with its counts."""
    async with served_front() as front:
        await front.chat()
        await front.stream(CHAT, chat_body(stream=True))
        await front.post(CHAT, b"{")
        good, streamed, bad = await front.fleet.wait_for_finished(3)
        assert (good.status, good.finish_reason, good.completion_tokens) == (200, "stop", 13)
        assert good.ttft_s is not None
        assert good.ttft_s <= good.duration_s
        assert streamed.stream
        assert (bad.status, bad.error_code, bad.model) == (400, "invalid_json", "unknown")


@async_test
async def test_chat_text_parts_tools_and_null_content_reach_the_template() -> None:
    """Text parts stay parts, a null assistant content stays, tools go along with "none"."""
    async with served_front() as front:
        messages = [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": None, "refusal": "no"},
            {"role": "user", "content": "b"},
        ]
        status, _, _ = await front.post(
            CHAT,
            {
                "model": MODEL,
                "messages": messages,
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": "none",
            },
        )
        assert status == 200
        assert front.text_model.rendered == [messages]


@async_test
async def test_chat_final_message_is_continued() -> None:
    """As vLLM has it: no turn is opened, the answer holds only what follows."""
    async with served_front() as front:
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Dear"},
        ]
        body = {"model": MODEL, "messages": messages, "continue_final_message": True}
        for fields in ({}, {"add_generation_prompt": False}):
            status, answer, _ = await front.post(CHAT, {**body, **fields})
            assert status == 200
            assert answer["choices"][0]["message"]["content"] == "Hello, world!"
        for submit in front.fleet.submits:
            assert bytes(submit.prompt_token_ids[::4]) == b"user: Hi\nassistant: Dear"
        assert front.text_model.template_kwargs == [None, None]


@async_test
async def test_chat_generation_prompt_can_be_left_out() -> None:
    """The template is told."""
    async with served_front() as front:
        await front.chat(add_generation_prompt=False, chat_template_kwargs={"a": 1})
        await front.chat(add_generation_prompt=True)
        assert front.text_model.template_kwargs == [
            {"a": 1, "add_generation_prompt": False},
            {"add_generation_prompt": True},
        ]


@async_test
async def test_effort_of_reasoning_is_told_to_the_template() -> None:
    """In the words of both of OpenAI's APIs; "none" by the names for no reasoning at all."""
    off = {"enable_thinking": False, "thinking": False}
    async with served_front() as front:
        await front.chat(reasoning_effort="low")
        await front.chat(reasoning_effort="none", chat_template_kwargs={"thinking": True})
        body = {"model": MODEL, "input": "Hi", "reasoning": {"effort": "none", "summary": "auto"}}
        status, _, _ = await front.post("/v1/responses", body)
        assert status == 200
        assert front.text_model.template_kwargs == [
            {"reasoning_effort": "low"},
            {"reasoning_effort": "none", "enable_thinking": False, "thinking": True},
            {"reasoning_effort": "none", **off},
        ]


@async_test
async def test_chat_client_request_id_is_echoed_only_when_harmless() -> None:
    """A well-formed x-request-id comes back; any other is replaced."""
    async with served_front() as front:
        for offered, is_kept in [("abc-1.2:3_X", True), ("bad id", False), ("x" * 129, False)]:
            _, _, headers = await front.post(CHAT, chat_body(), headers={"x-request-id": offered})
            assert (headers["x-request-id"] == offered) is is_kept


@async_test
async def test_catalogue_defaults_fill_what_the_request_leaves_open() -> None:
    """The request wins over the catalogue, the catalogue over the model's own."""
    async with served_front() as front:
        front.fleet.defaults = {"top_k": 7.0, "temperature": 0.25, "max_tokens": 3.0}
        await front.chat(temperature=0.5, max_tokens=None)
        await front.chat(top_k=2, max_tokens=2)
        first, second = front.fleet.submits
        assert (first.temperature, first.top_k, first.max_tokens) == (0.5, 7, 3)
        assert (second.temperature, second.top_k, second.max_tokens) == (0.25, 2, 2)
