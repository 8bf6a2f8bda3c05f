"""Guessed token counts: text only, both dialects, and never a failure."""

from __future__ import annotations

import msgspec
import pytest

from cortexd.token_estimate import (
    DEFAULT_OUTPUT_TOKENS,
    estimate_answer,
    estimate_request,
)


def estimate(**body: object) -> tuple[int, int | None]:
    """Return prompt and output of a body."""
    found = estimate_request(msgspec.json.encode(body))
    return found.prompt, found.output


def test_text_counts_by_script() -> None:
    """Four letters a token; a character of other scripts is one."""
    assert estimate(prompt="a" * 400) == (100, None)
    assert estimate(prompt="語" * 100) == (100, None)
    assert estimate(prompt=[1, 2, 3]) == (3, None)
    assert estimate(instructions="a" * 40, input="a" * 40) == (20, None)
    content = [{"type": "text", "text": "a" * 40}]
    assert estimate(messages=[{"content": content}])[0] >= 10


def test_image_does_not_count_by_its_bytes() -> None:
    """Neither dialect's image inflates the prompt."""
    data = "A" * 1_000_000
    openai = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}]
    anthropic = [{"type": "image", "source": {"type": "base64", "data": data}}]
    for content in (openai, anthropic):
        assert estimate(messages=[{"role": "user", "content": content}])[0] < 2000


@pytest.mark.parametrize(
    ("fields", "output"),
    [
        ({"max_tokens": 7}, 7),
        ({"max_tokens": 7, "max_completion_tokens": 9}, 9),
        ({"max_tokens": 9, "max_completion_tokens": 7, "max_output_tokens": 1}, 9),
        ({"max_output_tokens": 7}, 7),
        ({"max_tokens": "7"}, None),
        ({"max_tokens": -1}, None),
        ({}, None),
    ],
)
def test_bound_of_the_answer_is_the_clients(fields: dict[str, object], output: int | None) -> None:
    """The greatest counts, since it may be the one that is read; nonsense is no bound."""
    assert estimate(**fields)[1] == output


@pytest.mark.parametrize(
    ("fields", "total"),
    [
        ({"prompt": "abcd", "max_tokens": 7, "n": 3}, 1 + 21),
        ({"prompt": "abcd", "n": 3}, 1 + 3 * DEFAULT_OUTPUT_TOKENS),
        ({"prompt": ["abcd"] * 5, "max_tokens": 7, "n": 2}, 5 + 70),
        ({"prompt": [[1, 2], [3]], "max_tokens": 7}, 3 + 14),
        ({"prompt": [1, 2, 3], "max_tokens": 7}, 3 + 7),
        ({"prompt": [], "n": 0, "max_tokens": 7}, 7),
        ({"max_tokens": 2**63}, 2**40),
        ({"n": 2**63, "max_tokens": 2**63}, 2**40),
    ],
)
def test_each_answer_to_each_prompt_counts(fields: dict[str, object], total: int) -> None:
    """A legacy request may hold many prompts, and any request ask for `n` answers."""
    assert estimate_request(msgspec.json.encode(fields)).total == total


def test_what_is_held_first_does_not_assume_a_long_answer() -> None:
    """Only when it is known where a request runs, an unbounded answer is taken for long."""
    found = estimate_request(b'{"prompt": "abcd"}')
    assert (found.least, found.total) == (2, 1 + DEFAULT_OUTPUT_TOKENS)
    found = estimate_request(b'{"prompt": "abcd", "max_tokens": 100000}')
    assert (found.least, found.total) == (1 + DEFAULT_OUTPUT_TOKENS, 100_001)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"x"', b"\xff", b"[" * 100_000])
def test_what_is_no_request_is_nothing(body: bytes) -> None:
    """The dialect's own checks say what is wrong."""
    assert estimate_request(body).prompt == 0
    assert estimate_answer(body) == 0


def test_answer_without_usage_is_counted_by_its_text() -> None:
    """Every dialect's answers."""
    openai = {"choices": [{"message": {"content": "a" * 40}}]}
    anthropic = {"content": [{"type": "text", "text": "a" * 40}]}
    responses = {"output": [{"content": [{"text": "a" * 40}]}]}
    for answer in (openai, anthropic, responses):
        assert 10 <= estimate_answer(msgspec.json.encode(answer)) <= 12
