"""`/tokenize` and `/detokenize` over a real socket: vLLM's shapes, and the prompt's very tokens."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import pytest
from aiohttp import web

from cortexd.messages import Route
from engine.text.chat_template import ChatTemplate
from engine.text.text_model import TextModel
from tests.actors.front.test_keys import bearer, key
from tests.actors.front.test_proxy import MODEL as REMOTE
from tests.actors.front.test_proxy import NEURONS, replica, upstream
from tests.doubles.fleet import ALIAS, CONTEXT, MODEL
from tests.doubles.front import async_test, chat_body, served_front
from tests.engine.text.chat_templates import THINKING_WITH_TOOLS
from tests.engine.text.gguf_metadata import train_byte_level

TOKENIZE = "/tokenize"
DETOKENIZE = "/detokenize"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
BEGIN = 3
TEXT = "Grüße an alle"


@pytest.fixture(scope="module")
def text_model() -> TextModel:
    """A real tokenizer that puts a begin token before a prompt, with a template for tools."""
    template = ChatTemplate({"default": THINKING_WITH_TOOLS}, {}, "test/model")
    return TextModel(train_byte_level("qwen2"), template, prefix_ids=[BEGIN])


@async_test
async def test_prompt_becomes_the_tokens_that_a_completion_gets(text_model: TextModel) -> None:
    """With and without special tokens; the strings are those of the vocabulary; nothing loads."""
    async with served_front(real_text_model=text_model) as front:
        plain = text_model.encode(TEXT, add_special_tokens=False)
        status, answer, headers = await front.post(TOKENIZE, {"model": MODEL, "prompt": TEXT})
        assert status == 200
        assert answer == {
            "count": len(plain) + 1,
            "max_model_len": CONTEXT,
            "tokens": [BEGIN, *plain],
            "token_strs": None,
        }
        assert headers["x-request-id"]
        body = {"model": ALIAS, "prompt": TEXT, "add_special_tokens": False}
        _, answer, _ = await front.post(TOKENIZE, body | {"return_token_strs": True})
        assert answer["tokens"] == plain
        assert answer["token_strs"] == [text_model.token_text(token) for token in plain]
        assert "".join(answer["token_strs"]).endswith("Ġalle")
        assert (await front.post(TOKENIZE, {"model": MODEL, "prompt": ""}))[1]["tokens"] == [BEGIN]
        assert front.fleet.all_sent(Route) == []
        records = await front.fleet.wait_for_finished(3)
        assert {(one.route, one.model, one.status) for one in records} == {(TOKENIZE, MODEL, 200)}


@async_test
async def test_conversation_becomes_the_prompt_of_that_chat(text_model: TextModel) -> None:
    """Tools count, and the opening of the answer unless it is not wanted."""
    async with served_front(real_text_model=text_model) as front:
        front.fleet.context = 2000
        front.fleet.spec = msgspec.structs.replace(
            front.fleet.spec, vocab_size=text_model.vocab_size
        )
        front.fleet.reply = text_model.encode("yes", add_special_tokens=False)
        for wanted in ({}, {"tools": TOOLS}, {"tools": TOOLS, "add_generation_prompt": False}):
            body = chat_body(TEXT, **wanted)
            status, answer, _ = await front.post(TOKENIZE, body)
            assert status == 200, answer
            assert (await front.post(CHAT, body))[0] == 200
            assert answer["tokens"] == list(array("i", front.fleet.submits[-1].prompt_token_ids))
        assert "assistant" not in text_model.decode(answer["tokens"])
        body |= {"add_special_tokens": True}
        _, begun, _ = await front.post(TOKENIZE, body)
        assert begun["tokens"] == [BEGIN, *answer["tokens"]]
        assert (await front.post(CHAT, body))[0] == 200
        assert begun["tokens"] == list(array("i", front.fleet.submits[-1].prompt_token_ids))
        body = {"model": MODEL, "prompt": TEXT, "add_special_tokens": False}
        _, plain, _ = await front.post(TOKENIZE, body)
        assert (await front.post(COMPLETIONS, body))[0] == 200
        assert plain["tokens"] == list(array("i", front.fleet.submits[-1].prompt_token_ids))


@async_test
async def test_tokens_become_the_text_that_they_came_from(text_model: TextModel) -> None:
    """Control tokens are spelled out; a token that the model lacks is refused by its id."""
    async with served_front(real_text_model=text_model) as front:
        text = "<|im_start|>user\n" + TEXT
        _, answer, _ = await front.post(
            TOKENIZE, {"model": MODEL, "prompt": text, "add_special_tokens": False}
        )
        body = {"model": MODEL, "tokens": answer["tokens"]}
        status, answer, _ = await front.post(DETOKENIZE, body)
        assert (status, answer) == (200, {"prompt": text})
        assert (await front.post(DETOKENIZE, body | {"tokens": []}))[1] == {"prompt": ""}
        unknown = text_model.vocab_size + 7
        status, answer, _ = await front.post(DETOKENIZE, body | {"tokens": [1, unknown]})
        assert (status, answer["error"]["param"]) == (400, "tokens")
        assert str(unknown) in answer["error"]["message"]


# path, fields, the field that is named, a piece of the message
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (TOKENIZE, {}, "prompt", "prompt is missing, and so is messages"),
    (TOKENIZE, {"prompt": "x", "model": None}, "model", "model is missing"),
    (TOKENIZE, {"prompt": ["x"]}, "prompt", 'prompt is ["x"]; allowed: a string'),
    (TOKENIZE, {"prompt": "x", **chat_body()}, "messages", "send one"),
    (TOKENIZE, {"messages": []}, "messages", "messages is empty"),
    (TOKENIZE, chat_body("refuse"), "messages", "the chat template refused"),
    (TOKENIZE, {"prompt": "x", "add_special_tokens": 1}, "add_special_tokens", "true or false"),
    (TOKENIZE, chat_body(stream=True), "stream", "leave it out"),
    (TOKENIZE, {"content": "x"}, "content", "send the text as prompt"),
    (TOKENIZE, {"prompt": "x", "with_pieces": True}, "with_pieces", "return_token_strs"),
    (TOKENIZE, chat_body(chat_template="{{ x }}"), "chat_template", "not supported"),
    (TOKENIZE, chat_body(continue_final_message=True), "continue_final_message", "to end with"),
    (DETOKENIZE, {}, "tokens", "tokens is missing"),
    (DETOKENIZE, {"tokens": [1], "model": None}, "model", "model is missing"),
    (DETOKENIZE, {"tokens": [-1]}, "tokens[0]", "tokens may be a list"),
    (DETOKENIZE, {"tokens": "x"}, "tokens", "allowed: a list"),
]


@async_test
async def test_each_bad_field_is_refused_by_name() -> None:
    """In OpenAI's envelope."""
    async with served_front() as front:
        for path, fields, param, told in REFUSED:
            status, answer, _ = await front.post(path, {"model": MODEL, **fields})
            assert (status, answer["error"]["param"]) == (400, param), answer
            assert told in answer["error"]["message"]


@async_test
async def test_model_that_is_not_there_is_fetched_or_unknown_and_keys_count() -> None:
    """As a message's tokens are counted: no lease is left."""
    body = {"model": MODEL, "prompt": "Hi"}
    async with served_front(unary_load_wait_s=0.01) as front:
        front.fleet.begin_loading()
        status, answer, headers = await front.post(TOKENIZE, body)
        assert (status, answer["error"]["code"]) == (503, "model_loading")
        assert headers["Retry-After"] == "8"
        status, answer, _ = await front.post(TOKENIZE, body | {"model": "none"})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        front.fleet.finish_loading()
        assert (await front.post(TOKENIZE, body))[0] == 200
    async with served_front(keys=[key("k", models=["other"])]) as front:
        status, answer, _ = await front.post(TOKENIZE, body, headers=bearer("k"))
        assert (status, answer["error"]["code"]) == (403, "model_not_allowed")
        status, _, _ = await front.post(DETOKENIZE, {"model": MODEL, "tokens": [1]})
        assert status == 401


@async_test
async def test_node_that_serves_the_model_answers_byte_for_byte() -> None:
    """A gateway hands the body on; one of another server with a tokenizer of its own too."""
    seen: list[tuple[str, bytes]] = []

    async def node(request: web.Request) -> web.Response:
        seen.append((request.path, await request.read()))
        return web.json_response({"count": 1, "max_model_len": 9, "tokens": [5], "extra": "e"})

    sent = b'{"prompt": "Hi",  "model": "org/remote"}'
    async with upstream(node) as url, served_front(neurons=NEURONS) as front:
        for kind in ("cortex", "openai"):
            front.fleet.replicas = [replica("a", url, kind)]
            status, answer, _ = await front.post(TOKENIZE, sent)
            assert (status, answer["extra"]) == (200, "e")
        assert seen == [(TOKENIZE, sent)] * 2
        records = await front.fleet.wait_for_finished(2)
        assert {(one.route, one.node, one.completion_tokens) for one in records} == {
            (TOKENIZE, "a", 0)
        }


@pytest.mark.parametrize(
    ("answered", "status", "told"),
    [
        (b'{"detail": "Not Found"}', 404, "HTTP 404"),
        (b"<html>no</html>", 405, "HTTP 405"),
        (b'{"tokens": []}', 200, 'HTTP 200 without "count"'),
        (b"<html>hello</html>", 200, 'HTTP 200 without "count"'),
    ],
)
@async_test
async def test_external_server_without_these_paths_is_named(
    answered: bytes, status: int, told: str
) -> None:
    """One that has no such path, or llama-server, which does not see the prompt at all."""

    async def node(request: web.Request) -> web.Response:
        return web.Response(status=status, body=answered)

    async with upstream(node) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url, "openai")]
        got, answer, _ = await front.post(TOKENIZE, {"model": REMOTE, "prompt": "Hi"})
        assert (got, answer["error"]["param"]) == (400, "model")
        assert f'"a", an external server that has no {TOKENIZE}' in answer["error"]["message"]
        assert told in answer["error"]["message"]


@async_test
async def test_refusals_of_an_external_server_pass() -> None:
    """It is not told that the path is missing when the request is what is wrong."""

    async def node(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "too long for us"}}, status=400)

    async with upstream(node) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url, "openai")]
        status, answer, _ = await front.post(TOKENIZE, {"model": REMOTE, "prompt": "Hi"})
        assert (status, answer["error"]["message"]) == (400, "too long for us")
