"""What a client of a running daemon sees: answers, equality, errors, disconnects."""

from __future__ import annotations

import http.client
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.tree.daemon import Daemon, streamed_text
from tests.tree.tiny_model import CONTEXT, LONG
from tests.waiting import DEADLINE_S, wait_for

pytestmark = pytest.mark.tree


def test_chat_streamed_and_not_give_the_same_text(daemon: Daemon, tiny_model: Path) -> None:
    """Greedy text does not depend on how it is delivered."""
    status, answer = daemon.chat(str(tiny_model), "hello")
    assert status == 200, answer
    text = answer["choices"][0]["message"]["content"]
    events = list(daemon.stream(str(tiny_model), "hello"))
    assert streamed_text(events) == text
    assert events[-1] == "[DONE]"


def test_chat_alone_and_among_sixteen_gives_the_same_text(daemon: Daemon, tiny_model: Path) -> None:
    """Greedy text does not depend on what else runs."""

    def ask(text: str) -> str:
        status, answer = daemon.chat(str(tiny_model), text, max_tokens=24)
        assert status == 200, answer
        return str(answer["choices"][0]["message"]["content"])

    prompts = [f"question {number} " + "word " * number for number in range(16)]
    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, prompts))
    assert together == alone


def test_official_sdk_streams_and_counts(daemon: Daemon, tiny_model: Path) -> None:
    """The OpenAI SDK works unchanged, usage included."""
    client = openai.OpenAI(base_url=daemon.url("/v1"), api_key="none")
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [
        {"role": "user", "content": "hello"}
    ]
    whole = client.chat.completions.create(
        model=str(tiny_model), messages=messages, temperature=0, max_tokens=8
    )
    chunks = list(
        client.chat.completions.create(
            model=str(tiny_model),
            messages=messages,
            temperature=0,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert str(tiny_model) in [model.id for model in client.models.list()]


def test_next_turn_is_told_how_much_of_it_was_cached(daemon: Daemon, tiny_model: Path) -> None:
    """A conversation's second prompt reuses the first one's blocks; usage and metrics say so."""
    messages = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog " * 9}]
    body = {"model": str(tiny_model), "messages": messages, "temperature": 0, "max_tokens": 5}
    status, first = daemon.post("/v1/chat/completions", body)
    assert status == 200, first
    messages.append(first["choices"][0]["message"])
    messages.append({"role": "user", "content": "and then?"})
    status, second = daemon.post("/v1/chat/completions", body)
    assert status == 200, second
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    # All full blocks of 32 tokens, but for the few of the answer's header.
    assert first["usage"]["prompt_tokens"] - 40 < cached < second["usage"]["prompt_tokens"]
    assert cached % 32 == 0


def test_unknown_model_is_404_with_code(daemon: Daemon) -> None:
    """An unknown model is named, and nothing is loaded."""
    status, answer = daemon.chat("no/such-model", "hello")
    assert status == 404
    assert answer["error"]["code"] == "model_not_found"
    assert "no/such-model" in answer["error"]["message"]


def test_prompt_over_context_is_400_with_both_numbers(daemon: Daemon, tiny_model: Path) -> None:
    """The error says how long the prompt is and how long it may be."""
    status, answer = daemon.chat(str(tiny_model), "word " * CONTEXT)
    assert status == 400
    error = answer["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["max"] == CONTEXT
    assert error["prompt_len"] > CONTEXT


def test_client_that_vanishes_mid_stream_frees_its_sequence(
    daemon: Daemon, tiny_model: Path
) -> None:
    """A closed connection cancels the generation and closes the lease."""
    body = json.dumps(
        {
            "model": str(tiny_model),
            "messages": [{"role": "user", "content": "hello"}],
            "stream": True,
            "max_tokens": LONG,
            "ignore_eos": True,
        }
    )
    connection = http.client.HTTPConnection("127.0.0.1", daemon.api_port, timeout=DEADLINE_S)
    connection.request("POST", "/v1/chat/completions", body)
    response = connection.getresponse()
    response.readline()
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    wait_for(lambda: daemon.models()[str(tiny_model)]["in_flight"] == 0, "the lease being closed")


def test_metrics_count_requests(daemon: Daemon, tiny_model: Path) -> None:
    """The metrics listener renders this model's counters under the reference's names."""
    daemon.chat(str(tiny_model), "hello")

    def counted() -> bool:
        text = daemon.get("/metrics", port=daemon.metrics_port)[1]
        return "cortex_requests_total{" in text and f'model="{tiny_model}"' in text

    wait_for(counted, "the request being counted")


def test_neuron_api_lists_and_describes(daemon: Daemon, tiny_model: Path) -> None:
    """The neuron listener answers discovery, health, models and the endpoint of a model."""
    status, text = daemon.get("/discovery", port=daemon.neuron_port)
    assert status == 200
    assert json.loads(text)["devices"]
    status, text = daemon.get("/models", port=daemon.neuron_port)
    assert [model["id"] for model in json.loads(text)] == [str(tiny_model)]
    assert daemon.get("/health", port=daemon.neuron_port)[0] == 200


def test_neuron_unload_and_load_again(daemon: Daemon, tiny_model: Path) -> None:
    """A model is unloaded and loaded through the neuron API, and serves again."""
    body = {"model_id": str(tiny_model)}
    before = daemon.chat(str(tiny_model), "hello")[1]["choices"]
    assert daemon.post("/models/unload", body, port=daemon.neuron_port)[0] == 200
    status, answer = daemon.post(
        "/models/load", {**body, "harness": "candle"}, port=daemon.neuron_port
    )
    assert (status, answer) == (200, {"status": "loaded"})
    assert daemon.chat(str(tiny_model), "hello")[1]["choices"] == before


def test_health_and_status_say_the_same_word(daemon: Daemon) -> None:
    """Of a host that is well, and of one that drains."""

    def words() -> set[str]:
        return {daemon.admin("status")["state"], json.loads(daemon.get("/health")[1])["status"]}

    wait_for(lambda: words() == {"ok"}, "all being well")
    daemon.admin("drain", on=True)
    try:
        assert words() == {"draining"}
    finally:
        daemon.admin("drain", on=False)
    assert words() == {"ok"}
