"""The Anthropic dialect of a running daemon, through the official SDK."""

from __future__ import annotations

from pathlib import Path

import anthropic
import pytest
from anthropic.types import MessageParam

from tests.tree.daemon import Daemon
from tests.tree.tiny_model import CONTEXT

pytestmark = pytest.mark.tree

HELLO: list[MessageParam] = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0}


def test_messages_agree_with_each_other_and_with_chat(daemon: Daemon, tiny_model: Path) -> None:
    """Unary, streamed and OpenAI's answers hold the same words; the prompt's count is exact."""
    model = str(tiny_model)
    with anthropic.Anthropic(base_url=daemon.url(), api_key="none", max_retries=0) as client:
        unary = client.messages.create(
            model=model, max_tokens=16, messages=HELLO, extra_body=GREEDY
        )
        with client.messages.stream(
            model=model, max_tokens=16, messages=HELLO, extra_body=GREEDY
        ) as stream:
            streamed = stream.get_final_message()
        counted = client.messages.count_tokens(model=model, messages=HELLO)
    assert streamed.content[0].to_dict()["text"] == unary.content[0].to_dict()["text"]
    assert (streamed.stop_reason, unary.stop_reason) == ("max_tokens", "max_tokens")
    status, chat = daemon.chat(model, "hello")
    assert status == 200
    assert unary.content[0].to_dict()["text"] == chat["choices"][0]["message"]["content"]
    usage = unary.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens
    assert counted.input_tokens == chat["usage"]["prompt_tokens"]


def test_messages_refuse_what_the_model_cannot_do(daemon: Daemon, tiny_model: Path) -> None:
    """A template without tools, and a prompt over the context, in this dialect's errors."""
    model = str(tiny_model)
    with anthropic.Anthropic(base_url=daemon.url(), api_key="none", max_retries=0) as client:
        with pytest.raises(anthropic.BadRequestError, match="does not render tools"):
            client.messages.create(
                model=model,
                max_tokens=16,
                messages=HELLO,
                tools=[{"name": "look_up", "input_schema": {"type": "object"}}],
            )
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long: "):
            client.messages.create(
                model=model,
                max_tokens=16,
                messages=[{"role": "user", "content": "word " * CONTEXT}],
            )
