"""A tiny model's spec, sequences and submissions as the engine's tests want them."""

from __future__ import annotations

from typing import Any

from cortexd.messages.inference import Submit
from cortexd.models import ModelSpec, RopeSpec
from engine.scheduling.sequence import Sequence
from engine.token_ids import pack_token_ids, unpack_token_ids

TINY = ModelSpec(
    model_type="llama",
    architecture="LlamaForCausalLM",
    vocab_size=100,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    rope=RopeSpec(),
    eos_token_ids=(2, 5, 1000),
)


def make_submit(prompt: list[int], sequence_id: int = 1, **fields: Any) -> Submit:
    """Return a greedy submission of 8 tokens unless `fields` say otherwise."""
    fields = {"max_tokens": 8, "temperature": 0.0, **fields}
    for name in ("stop_token_ids", "allowed_token_ids"):
        if isinstance(ids := fields.get(name), list):
            fields[name] = pack_token_ids(ids)
    if "bad_words" in fields:
        fields["bad_words"] = [pack_token_ids(word) for word in fields["bad_words"]]
    return Submit(
        request_id=f"request-{sequence_id}",
        sequence_id=sequence_id,
        prompt_token_ids=pack_token_ids(prompt),
        **fields,
    )


def make_sequence(
    prompt: list[int],
    output: list[int] | None = None,
    *,
    seed: int = 0,
    stable_length: int = 0,
    **fields: Any,
) -> Sequence:
    """Return a sequence that has generated `output` so far."""
    submit = make_submit(prompt, **fields)
    return Sequence(
        owner="front.0",
        submit=submit,
        token_ids=prompt + (output or []),
        num_prompt_tokens=len(prompt),
        max_tokens=submit.max_tokens,
        stop_token_ids=frozenset(),
        seed=seed,
        stable_length=stable_length,
        allowed_token_ids=unpack_token_ids(submit.allowed_token_ids, "allowed"),
        bad_words=[unpack_token_ids(word, "word") for word in submit.bad_words],
    )
