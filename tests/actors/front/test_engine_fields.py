"""Fields that open engines share reach the engine from every endpoint, under the same names."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from tests.doubles.fleet import MODEL
from tests.doubles.front import async_test, served_front

MESSAGES = [{"role": "user", "content": "Hi"}]
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 50},
    "/v1/responses": {"input": "Hi"},
}
FIELDS: dict[str, Any] = {
    "min_p": 0.25,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.5,
    "seed": 7,
    "logit_bias": {"65": -100},
    "min_tokens": 2,
    "ignore_eos": True,
    "stop_token_ids": [10],
    "bad_words": ["ab", " c"],
    "allowed_token_ids": [66, 67],
    "cache_salt": "mine",
}


def packed(text: str) -> bytes:
    """Return a text of byte tokens as the engine gets it."""
    return array("i", list(text.encode())).tobytes()


@pytest.mark.parametrize("path", ENDPOINTS)
@async_test
async def test_fields_reach_the_engine(path: str) -> None:
    """A bad word is sent as it is and with a space before it, each spelling once."""
    async with served_front() as front:
        status, answer, _ = await front.post(path, {"model": MODEL, **ENDPOINTS[path], **FIELDS})
        assert status == 200, answer
        (submit,) = front.fleet.submits
        for name in ("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            assert getattr(submit, name) == FIELDS[name], name
        assert (submit.seed, submit.min_tokens, submit.ignore_eos) == (7, 2, True)
        assert submit.logit_bias == {65: -100.0}
        assert submit.stop_token_ids == array("i", [10]).tobytes()
        assert submit.bad_words == [packed("ab"), packed(" ab"), packed(" c")]
        assert submit.allowed_token_ids == array("i", [66, 67]).tobytes()
        assert submit.cache_salt == "client mine"


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": "ab"}, "bad_words"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [9999]}, "allowed_token_ids"),
        ({"stop_token_ids": [9999]}, "stop_token_ids"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"seed": 2**70}, "seed"),
    ],
)
@async_test
async def test_bad_value_is_refused_by_name(path: str, fields: dict[str, Any], param: str) -> None:
    """In the dialect of the endpoint; nothing is run."""
    async with served_front() as front:
        status, answer, _ = await front.post(path, {"model": MODEL, **ENDPOINTS[path], **fields})
        assert status == 400
        assert param.partition("[")[0] in answer["error"]["message"]
        if path != "/v1/messages":
            assert answer["error"]["param"] == param
        assert front.fleet.submits == []


@async_test
async def test_stop_string_counts_from_min_tokens_on() -> None:
    """As with end tokens: what comes before may hold it."""
    async with served_front() as front:
        front.fleet.reply = b"a.b.c.d"
        for min_tokens, text in ((None, "a"), (1, "a"), (2, "a.b"), (3, "a.b"), (5, "a.b.c")):
            _, answer, _ = await front.chat(stop=["."], min_tokens=min_tokens)
            assert answer["choices"][0]["message"]["content"] == text
            assert answer["choices"][0]["finish_reason"] == "stop"
