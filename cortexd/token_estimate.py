"""How many tokens a request may use, guessed from its body without its model's tokenizer. Pure.

For budgets, where the exact numbers come too late or not at all: what runs on another node, and
answers that carry no usage. Only text counts: an image of a megabyte is no megabyte of prompt.
"""

from __future__ import annotations

import math
from typing import Any, Final

import msgspec

# Of English in most vocabularies; other scripts take about one token for each character.
_CHARACTERS_PER_TOKEN: Final = 4
_IMAGE_TOKENS: Final = 1000
# An answer's bound when the client gives none, as of the reference.
DEFAULT_OUTPUT_TOKENS: Final = 4096
# No model says more. A client may send any number, and sums of these must stay numbers of 64 bits.
_MAX_TOKENS: Final = 2**40
_PROMPT_FIELDS: Final = ("messages", "prompt", "system", "tools", "input", "instructions")
_BOUNDS: Final = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_ANSWER_FIELDS: Final = ("choices", "content", "output")
_IMAGE_TYPES: Final = frozenset({"image", "image_url", "input_image"})
# A body nested deeper than any that is accepted is not looked at any further.
_MAX_DEPTH: Final = 64


class TokenEstimate(msgspec.Struct, frozen=True):
    """Tokens of the prompt, and of each answer at most; None: the client set no bound."""

    prompt: int
    output: int | None
    num_answers: int = 1

    @property
    def total(self) -> int:
        """Return all of them, with the usual bound of an answer where the client set none."""
        output = DEFAULT_OUTPUT_TOKENS if self.output is None else self.output
        return self.prompt + min(output * self.num_answers, _MAX_TOKENS)

    @property
    def least(self) -> int:
        """Return what to hold before it is known where the request runs and what fits there."""
        output = 1 if self.output is None else self.output * self.num_answers
        return self.prompt + min(output, DEFAULT_OUTPUT_TOKENS)


def estimate_request(body: bytes) -> TokenEstimate:
    """Return the estimate of a request of either dialect; of what is no JSON object, nothing."""
    document = _object(body)
    prompt = sum(_tokens(document.get(name)) for name in _PROMPT_FIELDS)
    # A path reads one of them and passes over the others, so a small one there bounds nothing.
    bounds = [one for name in _BOUNDS if isinstance(one := document.get(name), int) and one > 0]
    answers = document.get("n")
    num_answers = answers if isinstance(answers, int) and answers > 0 else 1
    return TokenEstimate(
        prompt, max(bounds, default=None), num_answers * _num_prompts(document.get("prompt"))
    )


def _num_prompts(prompt: object) -> int:
    """Return how many prompts a legacy request holds: each has answers of its own."""
    if not isinstance(prompt, list):
        return 1
    return max(sum(isinstance(item, str | list) for item in prompt), 1)


def estimate_answer(body: bytes) -> int:
    """Return the tokens of a whole answer of either dialect that carries no usage."""
    document = _object(body)
    return sum(_tokens(document.get(name)) for name in _ANSWER_FIELDS)


def _object(body: bytes) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _tokens(value: object, depth: int = 0) -> int:
    if isinstance(value, str):
        num_ascii = len(value.encode("ascii", "ignore"))
        return math.ceil(num_ascii / _CHARACTERS_PER_TOKEN) + len(value) - num_ascii
    if depth > _MAX_DEPTH:
        return 0
    if isinstance(value, list):
        # A prompt may be token ids.
        return sum(1 if isinstance(item, int) else _tokens(item, depth + 1) for item in value)
    if isinstance(value, dict):
        if value.get("type") in _IMAGE_TYPES:
            return _IMAGE_TOKENS
        return sum(_tokens(item, depth + 1) for item in value.values())
    return 0
