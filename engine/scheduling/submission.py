"""From a `Submit` message to a sequence: every number is checked, limits are applied.

The front validates for its clients' sake; the engine checks again because a bad id or a NaN here
would harm other sequences of the same step.
"""

from __future__ import annotations

import math
import secrets
from typing import Final

from cortexd import errors
from cortexd.messages.inference import Submit
from cortexd.models import ModelLimits, ModelSpec
from engine.scheduling.sequence import Sequence
from engine.token_ids import unpack_token_ids

_INFINITY: Final = math.inf
# Field, lowest and highest value, whether the lowest itself is allowed.
_RANGES: Final = (
    ("temperature", 0.0, _INFINITY, True),
    ("top_p", 0.0, 1.0, False),
    ("min_p", 0.0, 1.0, True),
    ("repetition_penalty", 0.0, _INFINITY, False),
    ("presence_penalty", -_INFINITY, _INFINITY, False),
    ("frequency_penalty", -_INFINITY, _INFINITY, False),
    ("top_k", -1, _INFINITY, True),
    ("max_tokens", 0, _INFINITY, True),
    ("min_tokens", 0, _INFINITY, True),
    ("num_logprobs", -1, _INFINITY, True),
    ("num_prompt_logprobs", -1, _INFINITY, True),
)


def make_sequence(owner: str, submit: Submit, spec: ModelSpec, limits: ModelLimits) -> Sequence:
    """Return a new sequence. Raises: InvalidValue, ContextLengthExceeded."""
    prompt = unpack_token_ids(submit.prompt_token_ids, "prompt")
    if not prompt:
        raise errors.InvalidValue("the prompt has no tokens; send at least one", param="prompt")
    _check_ids(prompt, spec.vocab_size, "prompt")
    _check_sampling(submit, spec.vocab_size)
    # One token must be left for the answer, if there is to be one.
    needed = 1 if submit.max_tokens else 0
    if len(prompt) + needed > limits.context:
        raise errors.ContextLengthExceeded(
            f"this model's maximum context length is {limits.context} tokens, but the prompt has "
            f"{len(prompt)} tokens and {needed} must be left for the answer; shorten the prompt",
            param="prompt",
            prompt_len=len(prompt),
            max=limits.context,
        )
    named = unpack_token_ids(submit.stop_token_ids, "stop")
    _check_ids(named, spec.vocab_size, "stop_token_ids")
    allowed = unpack_token_ids(submit.allowed_token_ids, "allowed_token_ids")
    _check_ids(allowed, spec.vocab_size, "allowed_token_ids")
    bad_words = [unpack_token_ids(word, "bad_words") for word in submit.bad_words]
    for word in bad_words:
        _check_ids(word, spec.vocab_size, "bad_words")
        if not word:
            raise errors.InvalidValue(
                "bad_words holds an empty word; leave it out", param="bad_words"
            )
    end_token_ids = frozenset(named).union(
        token_id for token_id in spec.eos_token_ids if 0 <= token_id < spec.vocab_size
    )
    return Sequence(
        owner=owner,
        submit=submit,
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        max_tokens=min(submit.max_tokens, limits.output, limits.context - len(prompt)),
        stop_token_ids=frozenset(named) if submit.ignore_eos else end_token_ids,
        bad_words=bad_words,
        allowed_token_ids=allowed,
        stable_length=_stable_length(prompt, end_token_ids),
        seed=secrets.randbits(64) if submit.seed is None else submit.seed % 2**64,
    )


def _stable_length(prompt: list[int], end_token_ids: frozenset[int]) -> int:
    """Return the length of the prompt up to its last end token, that one included.

    In a chat that is where the last message ends. What follows, the header of the answer, merges
    with the answer when it is tokenised again, or loses the opening of a reasoning that clients
    strip. A prompt without any end token is plain text: all but its last token.
    """
    for index in range(len(prompt) - 1, -1, -1):
        if prompt[index] in end_token_ids:
            return index + 1
    return len(prompt) - 1


def _check_sampling(submit: Submit, vocab_size: int) -> None:
    for name, low, high, is_low_allowed in _RANGES:
        value = getattr(submit, name)
        is_in_range = low < value <= high or (is_low_allowed and value == low)
        if not is_in_range or math.isinf(value):
            least = "at least" if is_low_allowed else "above"
            most = "finite" if high == _INFINITY else f"at most {high}"
            bounds = most if low == -_INFINITY else f"{least} {low} and {most}"
            raise errors.InvalidValue(f"{name} is {value}; it must be {bounds}", param=name)
    _check_ids(list(submit.logit_bias), vocab_size, "logit_bias")
    for token_id, bias in submit.logit_bias.items():
        if not math.isfinite(bias):
            raise errors.InvalidValue(
                f"logit_bias of token {token_id} is {bias}; it must be finite", param="logit_bias"
            )


def _check_ids(token_ids: list[int], vocab_size: int, name: str) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise errors.InvalidValue(
                f"{name} holds token id {token_id}; this model's ids are 0 to {vocab_size - 1}",
                param=name,
            )
