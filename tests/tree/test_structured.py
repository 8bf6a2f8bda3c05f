"""Structured output and forced tools of a running daemon, through both official SDKs.

The model is random, so whatever it says in form comes from the grammar.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

from tests.engine.text.chat_templates import THINKING_WITH_TOOLS
from tests.tree.daemon import Daemon
from tests.tree.tiny_model import SPECIAL_TOKENS, make_tiny_model

pytestmark = pytest.mark.tree

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
}
RESET: dict[str, Any] = {"type": "object", "properties": {}}
SCHEMAS = {"weather": WEATHER, "reset": RESET}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
ANTHROPIC_TOOLS: Any = [{"name": name, "input_schema": schema} for name, schema in SCHEMAS.items()]
END = {str(SPECIAL_TOKENS.index("<|im_end|>")): 100}
ASK: Any = [{"role": "user", "content": "What is the weather?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose template renders tools."""
    directory = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-tools", seed=5)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": THINKING_WITH_TOOLS}))
    return directory


@pytest.fixture(scope="module")
def daemon(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that serves it."""
    with Daemon(tmp_path_factory.mktemp("daemon"), "--model", str(model)) as running:
        running.wait_loaded(str(model))
        yield running


def test_openai_sdk_structured_output_and_forced_tools(daemon: Daemon, model: Path) -> None:
    """Schemas hold for each of n seeded answers, forced calls are valid, streamed or not."""
    with openai.OpenAI(base_url=daemon.url("/v1"), api_key="none", max_retries=0) as client:
        common: dict[str, Any] = {"model": str(model), "messages": ASK, "max_tokens": 600}
        answer = client.chat.completions.create(
            **common,
            n=3,
            seed=11,
            logprobs=True,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "person", "strict": True, "schema": PERSON},
            },
        )
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content or ""), PERSON)
        for wanted, ending in (
            ("required", "tool_calls"),
            ({"type": "function", "function": {"name": "weather"}}, "stop"),
        ):
            # A random model seldom ends by itself: it gets a strong wish to, once it may.
            forced = {**common, "tools": TOOLS, "tool_choice": wanted, "seed": 4, "logit_bias": END}
            unary = client.chat.completions.create(**forced).choices[0]
            assert unary.finish_reason == ending
            assert unary.message.content is None
            calls = [call.function for call in unary.message.tool_calls or []]
            assert calls
            for call in calls:
                jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
            streamed = []
            for chunk in client.chat.completions.create(**forced, stream=True):
                for delta in chunk.choices[0].delta.tool_calls or []:
                    streamed.append((delta.function.name, delta.function.arguments))
            assert streamed == [(call.name, call.arguments) for call in calls]
        single = client.chat.completions.create(
            **common, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
        )
        assert len(single.choices[0].message.tool_calls or []) == 1
        with pytest.raises(openai.BadRequestError, match=r"schema\.not"):
            client.chat.completions.create(
                **common,
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"not": {"type": "null"}}},
                },
            )


def test_anthropic_sdk_forced_tools_and_output_format(daemon: Daemon, model: Path) -> None:
    """any and tool give tool_use blocks whose input is valid; the stream has the same ones."""
    with anthropic.Anthropic(base_url=daemon.url(), api_key="none", max_retries=0) as client:
        common: dict[str, Any] = {"model": str(model), "messages": ASK, "max_tokens": 600}
        single = {"disable_parallel_tool_use": True}
        for choice in ({"type": "any", **single}, {"type": "tool", "name": "weather"}):
            forced = {**common, "tools": ANTHROPIC_TOOLS, "tool_choice": choice}
            forced["extra_body"] = {"temperature": 0}
            unary = client.messages.create(**forced)
            assert (unary.stop_reason, len(unary.content)) == ("tool_use", 1)
            for block in unary.content:
                assert block.type == "tool_use"
                jsonschema.validate(block.input, SCHEMAS[block.name])
            with client.messages.stream(**forced) as stream:
                streamed = stream.get_final_message()
            assert [(block.name, block.input) for block in streamed.content] == [
                (block.name, block.input) for block in unary.content
            ]
        answer = client.messages.create(
            **common,
            extra_body={"output_config": {"format": {"type": "json_schema", "schema": PERSON}}},
        )
        jsonschema.validate(json.loads(answer.content[0].text), PERSON)
        assert answer.stop_reason == "end_turn"
