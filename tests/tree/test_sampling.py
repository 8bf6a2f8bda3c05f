"""Sampling through a running daemon and the real engine: every field does what it says."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from tests.tree.daemon import Daemon

pytestmark = pytest.mark.tree
PROMPT = "the quick brown fox jumps over the lazy dog"
ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/messages")


class Client:
    """Asks the daemon for one model's answers."""

    def __init__(self, daemon: Daemon, model: Path) -> None:
        self.daemon = daemon
        self.model = str(model)
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def ask(self, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
        """Return the whole answer."""
        prompt = fields.pop("prompt", PROMPT)
        body = {"model": self.model, "max_tokens": 12, "temperature": 0, **fields}
        if path == "/v1/completions":
            body["prompt"] = prompt
        else:
            body["messages"] = [{"role": "user", "content": prompt}]
        status, answer = self.daemon.post(path, body)
        assert status == 200, answer
        return dict(answer)

    def texts(self, path: str = "/v1/completions", **fields: Any) -> list[str]:
        """Return the texts of all choices."""
        answer = self.ask(path, **fields)
        if path == "/v1/messages":
            return ["".join(block["text"] for block in answer["content"])]
        return [
            choice["text"] if path == "/v1/completions" else choice["message"]["content"]
            for choice in answer["choices"]
        ]

    def text(self, path: str = "/v1/completions", **fields: Any) -> str:
        """Return the only choice's text."""
        (text,) = self.texts(path, **fields)
        return text

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="module")
def client(daemon: Daemon, tiny_model: Path) -> Client:
    """The tiny model behind a daemon."""
    return Client(daemon, tiny_model)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_logit_bias_and_allowed_tokens_choose(client: Client, path: str) -> None:
    """A bias of 100 forces a letter; only allowed ones are said otherwise."""
    (x,), (y,) = client.ids("x"), client.ids("y")
    assert client.text(path, logit_bias={str(x): 100}) == "x" * 12
    text = client.text(path, allowed_token_ids=[x, y], temperature=1.0, max_tokens=40)
    assert set(text) == {"x", "y"}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_bad_words_are_not_completed(client: Client, path: str) -> None:
    """One token is banned outright, the last of several where the others stand before it."""
    (x,), (y,) = client.ids("x"), client.ids("y")
    fields = {"allowed_token_ids": [x, y], "logit_bias": {str(x): 100}}
    assert client.text(path, **fields) == "x" * 12
    assert client.text(path, bad_words=["x"], **fields) == "y" * 12
    assert client.text(path, bad_words=["xx"], **fields) == "xy" * 6
    assert client.text(path, bad_words=["xxx"], **fields) == "xxy" * 4


@pytest.mark.parametrize("path", ENDPOINTS)
def test_end_tokens_are_named_held_off_and_ignored(client: Client, path: str) -> None:
    """stop_token_ids, min_tokens and ignore_eos, the last for the model's own end tokens only."""
    (x,), (end,) = client.ids("x"), client.ids("<|im_end|>")

    def num_tokens(**fields: Any) -> int:
        usage = client.ask(path, **fields)["usage"]
        return int(usage.get("completion_tokens", usage.get("output_tokens")))

    ends = {"logit_bias": {str(end): 100}}
    assert [num_tokens(**ends), num_tokens(min_tokens=5, **ends)] == [0, 5]
    assert num_tokens(ignore_eos=True, **ends) == 12
    stops = {"logit_bias": {str(x): 100}, "stop_token_ids": [x], "ignore_eos": True}
    assert [num_tokens(**stops), num_tokens(min_tokens=5, **stops)] == [0, 5]


def test_conditions_that_exclude_each_other_are_the_requests_fault(client: Client) -> None:
    """A 400 that names them; the engine lives on."""
    (x,) = client.ids("x")
    body = {"model": client.model, "prompt": "a", "allowed_token_ids": [x], "bad_words": ["x"]}
    status, answer = client.daemon.post("/v1/completions", body)
    assert (status, answer["error"]["code"]) == (400, "invalid_value")
    assert "bad_words" in answer["error"]["message"]
    assert client.text()
    assert all(actor["restarts"] == 0 for actor in client.daemon.actors().values())


def test_seeds_decide_whatever_else_runs(client: Client) -> None:
    """Alone, in a crowd, and as one of n answers: the same seed draws the same text."""
    drawn = {"temperature": 1.0, "ignore_eos": True, "max_tokens": 16}
    alone = [client.text(seed=seed, **drawn) for seed in (5, 6, 7)]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(8) as pool:
        crowd = [
            pool.submit(client.text, seed=seed, prompt=PROMPT[seed:], **drawn) for seed in range(7)
        ]
        again = [pool.submit(client.text, seed=seed, **drawn) for seed in (5, 6, 7)]
        assert [each.result() for each in again] == alone
        assert len({each.result() for each in crowd}) == 7
    assert client.texts(seed=5, n=3, **drawn) == alone


def test_answers_to_one_prompt_share_it(client: Client) -> None:
    """The prompt is counted once; both endpoints number the choices."""
    for path in ENDPOINTS[:2]:
        answer = client.ask(path, prompt=PROMPT * 3, n=4, seed=1, temperature=1.0)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        single = client.ask(path, prompt=PROMPT * 3, max_tokens=1)["usage"]["prompt_tokens"]
        assert answer["usage"]["prompt_tokens"] == single


def test_top_logprobs_streamed_equal_those_of_the_whole_answer(client: Client) -> None:
    """Chat: the chosen token of a greedy answer leads its rivals; the sum stays below one."""
    sdk = openai.OpenAI(base_url=client.daemon.url("/v1"), api_key="none")
    fields: dict[str, Any] = {
        "model": client.model,
        "messages": [{"role": "user", "content": PROMPT}],
        "logprobs": True,
        "top_logprobs": 4,
        "temperature": 0,
        "max_tokens": 12,
    }
    whole = sdk.chat.completions.create(**fields).choices[0].logprobs.content
    chunks = sdk.chat.completions.create(stream=True, **fields)
    streamed = [
        token
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content
    ]
    assert [token.model_dump() for token in streamed] == [token.model_dump() for token in whole]
    for token in whole:
        assert token.top_logprobs[0].logprob == token.logprob
        assert len(token.top_logprobs) == 4
        assert sum(math.exp(rival.logprob) for rival in token.top_logprobs) < 1.0001


def test_completion_logprobs_streamed_equal_those_of_the_whole_answer(client: Client) -> None:
    """The legacy lists, with an echoed prompt in front of them."""
    sdk = openai.OpenAI(base_url=client.daemon.url("/v1"), api_key="none")
    fields: dict[str, Any] = {
        "model": client.model,
        "prompt": PROMPT,
        "logprobs": 3,
        "temperature": 0,
        "max_tokens": 6,
        "echo": True,
    }
    whole = sdk.completions.create(**fields).choices[0]
    joined: dict[str, list[Any]] = {}
    text = ""
    for chunk in sdk.completions.create(stream=True, **fields):
        for choice in chunk.choices:
            text += choice.text
            for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                joined.setdefault(name, []).extend(values)
    assert text == whole.text
    assert text.startswith(PROMPT)
    assert joined == whole.logprobs.model_dump()
    assert joined["token_logprobs"][0] is None
    assert len(joined["tokens"]) == len(client.ids(PROMPT)) + 6


def test_prompt_scores_are_those_of_the_generation(client: Client) -> None:
    """What an answer said of its tokens, an echo of prompt and answer says too, cached or not."""
    letters = [client.ids(letter)[0] for letter in "xyz"]
    prompt = client.ids(PROMPT * 3)
    fields = {"prompt": prompt, "allowed_token_ids": letters, "logprobs": 0, "temperature": 1.0}
    answer = client.ask(seed=3, **fields)["choices"][0]
    said = [client.ids(token)[0] for token in answer["logprobs"]["tokens"]]
    assert len(said) == 12
    scoring = {"prompt": prompt + said, "max_tokens": 0, "echo": True, "logprobs": 2}
    for _ in range(2):
        scored = client.ask(prompt_logprobs=2, **scoring)
        choice = scored["choices"][0]
        lists = choice["logprobs"]["token_logprobs"]
        assert lists[-12:] == pytest.approx(answer["logprobs"]["token_logprobs"], abs=1e-4)
        maps = choice["prompt_logprobs"]
        own = [
            entry[str(token)] for entry, token in zip(maps[1:], (prompt + said)[1:], strict=True)
        ]
        assert [each["logprob"] for each in own] == lists[1:]
        assert all(each["rank"] >= 1 for each in own)
        assert scored["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    chat = client.ask("/v1/chat/completions", prompt_logprobs=0)
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


@pytest.mark.parametrize("path", ENDPOINTS)
def test_cache_salt_keeps_prefixes_apart(client: Client, path: str) -> None:
    """Equal salts share what is cached, others do not see it."""

    def cached(**fields: Any) -> int:
        usage = client.ask(path, prompt=f"{path} " + PROMPT * 4, **fields)["usage"]
        if path == "/v1/messages":
            return int(usage["cache_read_input_tokens"])
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    found = [cached(cache_salt=salt) > 0 for salt in ("one", "one", "two", "two")]
    assert found == [False, True, False, True]
    assert [cached() > 0, cached() > 0] == [False, True]
