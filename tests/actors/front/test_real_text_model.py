"""The front with a real tokenizer and template: markers that are tokens, tools in the prompt."""

from __future__ import annotations

import json
from array import array

import msgspec
import pytest

from engine.text.chat_template import ChatTemplate
from engine.text.text_model import TextModel
from tests.doubles.front import async_test, chat_body, served_front
from tests.engine.text.chat_templates import THINKING_WITH_TOOLS
from tests.engine.text.gguf_metadata import train_byte_level

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ANSWER = (
    "<think>\nLet me see.\n</think>\n\nOne moment 🙂\n\n<tool_call>\n"
    '{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def text_model() -> TextModel:
    """A tokenizer of Qwen's kind, whose markers are tokens, with a template for tools."""
    template = ChatTemplate({"default": THINKING_WITH_TOOLS}, {}, "test/model")
    tokenizer = train_byte_level("qwen2")
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    return TextModel(tokenizer, template)


@async_test
async def test_prompt_has_the_tools_and_the_answer_its_parts(text_model: TextModel) -> None:
    """A marker is one token, so the counts are exact; both ways give the same."""
    async with served_front(real_text_model=text_model) as front:
        front.fleet.context = 2000
        front.fleet.spec = msgspec.structs.replace(
            front.fleet.spec, vocab_size=text_model.vocab_size
        )
        answer = text_model.encode(ANSWER, add_special_tokens=False)
        front.fleet.reply = answer
        status, unary, _ = await front.chat(tools=TOOLS)
        assert status == 200, unary
        message = unary["choices"][0]["message"]
        assert message["reasoning_content"] == "Let me see."
        assert message["content"] == "One moment 🙂"
        arguments = message["tool_calls"][0]["function"]["arguments"]
        assert json.loads(arguments) == {"city": "Köln"}
        thought = ANSWER.partition("\n\nOne")[0]
        assert unary["usage"]["completion_tokens_details"]["reasoning_tokens"] == len(
            text_model.encode(thought, add_special_tokens=False)
        )
        prompt = text_model.decode(array("i", front.fleet.submits[0].prompt_token_ids))
        assert '"name": "weather"' in prompt
        events = await front.stream("/v1/chat/completions", chat_body(tools=TOOLS, stream=True))
        deltas = [event["choices"][0]["delta"] for event in events[:-1]]
        assert "".join(delta.get("content") or "" for delta in deltas) == message["content"]
        calls = [call for delta in deltas for call in delta.get("tool_calls") or []]
        assert [call["function"]["arguments"] for call in calls] == [arguments]


@async_test
async def test_thinking_that_is_off_is_closed_in_the_prompt(text_model: TextModel) -> None:
    """A message that does not ask for thinking gets a prompt with the section closed."""
    async with served_front(real_text_model=text_model) as front:
        front.fleet.context = 2000
        front.fleet.spec = msgspec.structs.replace(
            front.fleet.spec, vocab_size=text_model.vocab_size
        )
        front.fleet.reply = text_model.encode("yes", add_special_tokens=False)
        body = {**chat_body(), "max_tokens": 50}
        for thinking in ({"type": "disabled"}, {"type": "adaptive"}):
            status, answer, _ = await front.post("/v1/messages", {**body, "thinking": thinking})
            assert (status, answer["content"]) == (200, [{"type": "text", "text": "yes"}])
        off, on = (
            text_model.decode(array("i", submit.prompt_token_ids)) for submit in front.fleet.submits
        )
        assert off.endswith("<think>\n\n</think>\n\n")
        assert on.endswith("assistant\n")
