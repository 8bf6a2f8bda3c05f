"""Turns a request's sampling fields into `Submit` messages.

Order of precedence: the request, the catalogue's defaults for the model, the model's own
(generation_config.json), the API's.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Any

import msgspec

from actors.front.request import InferenceRequest
from cortexd.errors import ContextLengthExceeded, InvalidValue
from cortexd.messages import Submit
from cortexd.models import ModelLimits
from cortexd.openai import GenerationFields, SamplingFields

if TYPE_CHECKING:
    from engine.text.text_model import TextModel

_SEED_RANGE = 2**64
_SEED_MAX = 2**63 - 1


def pack_ids(ids: list[int]) -> bytes:
    """Return token ids as packed little-endian int32."""
    packed = array("i", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def model_defaults(declared: dict[str, Any]) -> SamplingFields:
    """Return a model's own sampling defaults; raises msgspec.ValidationError when out of range."""
    known = {name: declared[name] for name in SamplingFields.__struct_fields__ if name in declared}
    return msgspec.convert(known, SamplingFields, strict=False)


def check_token_ids(fields: GenerationFields, vocab_size: int) -> None:
    """Refuse token ids the model does not have. Raises: InvalidValue."""
    for token_id in fields.logit_bias or {}:
        if token_id >= vocab_size:
            raise _no_such_token("logit_bias", token_id, vocab_size)
    for name in ("stop_token_ids", "allowed_token_ids"):
        for token_id in getattr(fields, name) or []:
            if token_id >= vocab_size:
                raise _no_such_token(name, token_id, vocab_size)


def bad_word_ids(fields: GenerationFields, text_model: TextModel) -> list[bytes]:
    """Return the token sequences, packed, that the output must not hold. Raises: InvalidValue.

    A word is banned as it is and with a space before it, since most vocabularies tell the two
    apart. Other ways to spell it with tokens are not found.
    """
    sequences: dict[bytes, None] = {}
    for word in fields.bad_words or []:
        for spelling in (word, " " + word.lstrip(" ")):
            ids = text_model.encode(spelling, add_special_tokens=False)
            if not ids:
                raise InvalidValue(
                    f'bad_words holds "{word}", of which the tokenizer makes no token; leave it '
                    "out",
                    param="bad_words",
                )
            sequences[pack_ids(ids)] = None
    return list(sequences)


def check_prompt_ids(ids: list[int], vocab_size: int) -> None:
    """Refuse a prompt of tokens the model does not have. Raises: InvalidValue."""
    if not ids:
        raise InvalidValue("prompt has no tokens; at least one is needed", param="prompt")
    for token_id in (min(ids), max(ids)):
        if not 0 <= token_id < vocab_size:
            raise _no_such_token("prompt", token_id, vocab_size)


def tokens_to_generate(
    request: InferenceRequest, prompt_len: int, limits: ModelLimits, default: float | None
) -> int:
    """Return how many tokens to generate at most; `default` is the catalogue's for the model.

    A request for more than fits is cut to what fits (its `finish_reason` is then "length").
    Raises: ContextLengthExceeded when not even one token fits.
    """
    room = limits.context - prompt_len
    if request.max_tokens == 0 and room == 0:
        return 0
    if room < 1:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {limits.context} tokens; the prompt has "
            f"{prompt_len} tokens and at least one must be generated; shorten the prompt",
            param="messages" if request.kind == "chat" else "prompt",
            max=limits.context,
            prompt_len=prompt_len,
        )
    if limits.output > 0:
        room = min(room, limits.output)
    wanted = default if request.max_tokens is None else request.max_tokens
    return room if wanted is None else min(int(wanted), room)


def build_submit(
    request: InferenceRequest,
    defaults: SamplingFields,
    *,
    request_id: str,
    sequence_id: int,
    answer_index: int,
    prompt: bytes,
    max_tokens: int,
    eos_token_ids: tuple[int, ...],
    bad_words: list[bytes],
    grammar: str = "",
) -> Submit:
    """Return the message that starts one sequence; `answer_index` counts a prompt's `n` answers.

    The first of them has the prompt scored for all.
    """
    fields = request.fields

    def pick(name: str, fallback: float) -> Any:
        value = getattr(fields, name)
        if value is None:
            value = getattr(defaults, name)
        return fallback if value is None else value

    stop_token_ids = set(fields.stop_token_ids or [])
    if not fields.ignore_eos:
        stop_token_ids.update(eos_token_ids)
    return Submit(
        request_id=request_id,
        sequence_id=sequence_id,
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        temperature=pick("temperature", 1.0),
        top_k=max(pick("top_k", 0), 0),
        top_p=pick("top_p", 1.0),
        min_p=pick("min_p", 0.0),
        repetition_penalty=pick("repetition_penalty", 1.0),
        presence_penalty=pick("presence_penalty", 0.0),
        frequency_penalty=pick("frequency_penalty", 0.0),
        seed=_seed(fields.seed, answer_index),
        num_logprobs=request.num_logprobs,
        ignore_eos=fields.ignore_eos is True,
        min_tokens=min(fields.min_tokens or 0, max_tokens),
        stop_token_ids=pack_ids(sorted(stop_token_ids)),
        logit_bias=fields.logit_bias or {},
        grammar=grammar,
        bad_words=bad_words,
        cache_salt=fields.cache_salt or "",
        num_prompt_logprobs=(
            max(request.echo_top, request.num_prompt_logprobs) if answer_index == 0 else -1
        ),
        allowed_token_ids=pack_ids(fields.allowed_token_ids or []),
    )


def _seed(seed: int | None, answer_index: int) -> int | None:
    """Return the seed of one answer: each of `n` answers has its own, the first the given one."""
    if seed is None:
        return None
    shifted = seed + answer_index
    return shifted if shifted <= _SEED_MAX else shifted - _SEED_RANGE


def _no_such_token(param: str, token_id: int, vocab_size: int) -> InvalidValue:
    return InvalidValue(
        f"{param} holds token id {token_id}; this model's are 0 to {vocab_size - 1}", param=param
    )
