"""Front ↔ leader: one `Submit` per sequence, one `TokenBatch` per engine step and front."""

from __future__ import annotations

import msgspec

from cortexd.errors import ErrorInfo
from cortexd.messages.control import Message


class Submit(Message, frozen=True, tag="Submit"):
    """Run one sequence. Numbers are validated by the front; the engine checks them again.

    `sequence_id` is unique per front incarnation; `prompt_token_ids`, `stop_token_ids` and each of
    `bad_words` (token sequences that the output must not hold) are packed little-endian int32.
    `max_tokens` is the number of tokens to generate at most; 0 ends with the prompt.
    `allowed_token_ids`, packed too, are all that may be generated; empty: every token.
    """

    request_id: str
    sequence_id: int
    prompt_token_ids: bytes
    max_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    num_logprobs: int = -1  # -1: none; 0: the chosen token's; n: also the n most likely
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: bytes = b""
    logit_bias: dict[int, float] = {}
    bad_words: list[bytes] = []
    grammar: str = ""  # what the output must be, in the words of engine.grammar.source
    cache_salt: str = ""  # only sequences with equal salts share cached prefixes
    num_prompt_logprobs: int = -1  # as num_logprobs, of the prompt's tokens
    allowed_token_ids: bytes = b""


class Cancel(Message, frozen=True, tag="Cancel"):
    """Drop this sequence at the next step boundary; no answer."""

    sequence_id: int


class PromptScores(msgspec.Struct, frozen=True, array_like=True):
    """Of consecutive prompt tokens: what the model thought of each, given those before it.

    `ranks` count from 1, the most likely token. `top_ids` are the most likely tokens in its place.
    """

    logprobs: list[float]
    ranks: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]


class SequenceDelta(msgspec.Struct, frozen=True, array_like=True):
    """What one step added to one sequence.

    `finish_reason`: None while it runs; "stop" (an end token; it is not in `token_ids`), "length",
    "cancelled" or "error" (then `error` is set). `top_ids`/`top_logprobs` run parallel to
    `token_ids`.
    """

    sequence_id: int
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[float] = []
    top_ids: list[list[int]] = []
    top_logprobs: list[list[float]] = []
    num_prompt_tokens: int = 0  # set with the first delta
    num_cached_tokens: int = 0
    error: ErrorInfo | None = None
    # Those of the prompt's tokens from the second on come in order, before the first token.
    prompt_scores: PromptScores | None = None


class TokenBatch(Message, frozen=True, tag="TokenBatch"):
    """Leader → front: all its sequences that this step touched."""

    epoch: int
    step: int
    deltas: list[SequenceDelta]
