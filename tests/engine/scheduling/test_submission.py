"""What the engine checks of a submission."""

from __future__ import annotations

from typing import Any

import pytest

from cortexd import errors
from cortexd.messages.inference import Submit
from cortexd.models import ModelLimits
from engine.scheduling.submission import make_sequence
from tests.engine.doubles import TINY, make_submit

LIMITS = ModelLimits(context=64, output=63)


def test_prompt_that_fills_the_context_is_refused_with_both_numbers() -> None:
    """The message and the details name the limit and the prompt's length."""
    with pytest.raises(errors.ContextLengthExceeded) as caught:
        make_sequence("front.0", make_submit([1] * 64), TINY, LIMITS)
    assert "maximum context length is 64 tokens" in caught.value.message
    assert "64 tokens" in caught.value.message
    assert caught.value.details == {"prompt_len": 64, "max": 64}
    assert make_sequence("front.0", make_submit([1] * 63), TINY, LIMITS).max_tokens == 1


def test_max_tokens_is_clamped_to_the_context() -> None:
    """Prompt and output together never exceed the context."""
    assert make_sequence("f", make_submit([1] * 60, max_tokens=99), TINY, LIMITS).max_tokens == 4
    assert make_sequence("f", make_submit([1] * 60, max_tokens=3), TINY, LIMITS).max_tokens == 3


def test_end_tokens_are_those_of_the_model_and_of_the_request() -> None:
    """The union counts, without ids the model does not have; ignore_eos leaves the request's."""
    sequence = make_sequence("f", make_submit([1], stop_token_ids=[7]), TINY, LIMITS)
    assert sequence.stop_token_ids == {2, 5, 7}
    ignoring = make_submit([1], stop_token_ids=[7], ignore_eos=True)
    assert make_sequence("f", ignoring, TINY, LIMITS).stop_token_ids == {7}


def test_seed_is_kept_or_drawn() -> None:
    """A given seed is used as it is, negative ones too; without one, each sequence has its own."""
    assert make_sequence("f", make_submit([1], seed=42), TINY, LIMITS).seed == 42
    assert make_sequence("f", make_submit([1], seed=-1), TINY, LIMITS).seed == 2**64 - 1
    drawn = {make_sequence("f", make_submit([1]), TINY, LIMITS).seed for _ in range(5)}
    assert len(drawn) == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", float("-inf")),
        ("top_k", -2),
        ("max_tokens", -1),
        ("num_prompt_logprobs", -2),
        ("allowed_token_ids", [100]),
        ("min_tokens", -1),
        ("num_logprobs", -2),
        ("logit_bias", {100: 1.0}),
        ("logit_bias", {1: float("nan")}),
        ("stop_token_ids", [100]),
        ("stop_token_ids", [-1]),
    ],
)
def test_value_out_of_range_is_refused_naming_the_field(field: str, value: Any) -> None:
    """The error's parameter is the field, its text holds the value."""
    with pytest.raises(errors.InvalidValue, match=field) as caught:
        make_sequence("front.0", make_submit([1], **{field: value}), TINY, LIMITS)
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"", "no tokens"),
        (b"\x01\x00\x00", "3 bytes"),
        (b"\x64\x00\x00\x00", "token id 100; this model's ids are 0 to 99"),
        (b"\xff\xff\xff\xff", "token id -1"),
    ],
)
def test_malformed_prompt_is_refused(packed: bytes, message: str) -> None:
    """Empty, cut and unknown token ids have their own messages."""
    submit = Submit(request_id="r", sequence_id=1, prompt_token_ids=packed, max_tokens=1)
    with pytest.raises(errors.InvalidValue, match=message):
        make_sequence("front.0", submit, TINY, LIMITS)


def test_bad_words_are_checked() -> None:
    """A word has tokens, and the model has them."""
    limits = ModelLimits(context=16, output=15)
    sequence = make_sequence("f", make_submit([1], bad_words=[[3, 4], [5]]), TINY, limits)
    assert sequence.bad_words == [[3, 4], [5]]
    with pytest.raises(errors.InvalidValue, match="empty word"):
        make_sequence("f", make_submit([1], bad_words=[[]]), TINY, limits)
    with pytest.raises(errors.InvalidValue, match="bad_words holds token id 100"):
        make_sequence("f", make_submit([1], bad_words=[[100]]), TINY, limits)


def test_stable_length_ends_with_the_last_end_token() -> None:
    """What follows a chat's last message is not counted on; plain text is, but for one token."""
    limits = ModelLimits(context=16, output=15)
    end = TINY.eos_token_ids[0]
    for prompt, length in (([1, end, 3, end, 3, 4], 4), ([1, 3, 4], 2), ([end], 1)):
        assert make_sequence("f", make_submit(prompt), TINY, limits).stable_length == length
    marked = make_submit([1, 7, 3], stop_token_ids=[7])
    assert make_sequence("f", marked, TINY, limits).stable_length == 2
