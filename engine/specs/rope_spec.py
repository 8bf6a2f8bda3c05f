"""Rotary embedding parameters as config.json or a GGUF header spell them. Pure.

`rope_parameters` (transformers 5) and the flat `rope_theta` + `rope_scaling` (before) are both
read; a type that the engine does not compute is refused by name.
"""

from __future__ import annotations

import math
from typing import Final

from cortexd.errors import BadModelFile, UnsupportedArchitecture
from cortexd.models import RopeSpec
from engine.specs.fields import Fields

ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn")
_MAX_THETA: Final = 1e12
_MAX_FACTOR: Final = 1e6
_MAX_POSITIONS: Final = 1 << 30


def rope_from_config(
    fields: Fields, max_position_embeddings: int, *, default_partial: float = 1.0
) -> RopeSpec:
    """Return the rope of a Hugging Face configuration (theta defaults to 10000 there)."""
    nested = fields.mapping("rope_parameters") or fields.mapping("rope_scaling")
    if any(isinstance(value, dict) for value in nested.values()):
        raise UnsupportedArchitecture(
            f"{fields.file}: rope_parameters differ by layer type "
            f"({', '.join(list(nested)[:8])}); only one set for all layers is supported"
        )
    rope = Fields(nested, f"{fields.file} rope parameters")
    flat_theta = fields.number("rope_theta", minimum=0.0, maximum=_MAX_THETA, default=10000.0)
    theta = rope.number("rope_theta", minimum=0.0, maximum=_MAX_THETA, default=flat_theta)
    flat_partial = fields.number(
        "partial_rotary_factor", minimum=0.0, maximum=1.0, default=default_partial
    )
    partial = rope.number("partial_rotary_factor", minimum=0.0, maximum=1.0, default=flat_partial)
    rope_type = nested.get("rope_type", nested.get("type", "default"))
    check_rope_type(fields.file, rope_type)
    if rope_type == "default":
        return RopeSpec(theta=theta, partial_rotary_factor=partial)
    if rope_type == "yarn":
        _refuse_yarn_variants(rope)
    original = rope.integer(
        "original_max_position_embeddings", maximum=_MAX_POSITIONS, default=max_position_embeddings
    )
    return _check_bands(
        fields.file,
        RopeSpec(
            rope_type=rope_type,
            theta=theta,
            partial_rotary_factor=partial,
            factor=_factor(rope, "factor"),
            low_freq_factor=_factor(rope, "low_freq_factor", 1.0),
            high_freq_factor=_factor(rope, "high_freq_factor", 4.0),
            original_max_position_embeddings=original,
            beta_fast=_factor(rope, "beta_fast", 32.0),
            beta_slow=_factor(rope, "beta_slow", 1.0),
            attention_factor=_optional_factor(rope, "attention_factor"),
        ),
    )


def _refuse_yarn_variants(rope: Fields) -> None:
    """Refuse what other families than ours add to yarn: it would be computed without."""
    for key in ("mscale", "mscale_all_dim"):
        if rope.values.get(key) is not None:
            raise UnsupportedArchitecture(f"{rope.file}: {key} is not supported for yarn")
    if not rope.boolean("truncate", default=True):
        raise UnsupportedArchitecture(f"{rope.file}: truncate = false is not supported for yarn")


def rope_from_gguf(
    fields: Fields, prefix: str, head_dim: int, *, default_theta: float | None
) -> RopeSpec:
    """Return the rope of a GGUF header.

    llama3 scaling is not described there but carried as the tensor rope_freqs.weight.
    """
    theta = fields.number(
        f"{prefix}rope.freq_base", minimum=0.0, maximum=_MAX_THETA, default=default_theta
    )
    rotary_dim = fields.integer(f"{prefix}rope.dimension_count", maximum=head_dim, default=head_dim)
    partial = rotary_dim / head_dim
    scaling = f"{prefix}rope.scaling."
    rope_type = fields.values.get(f"{scaling}type", "none")
    rope_type = "default" if rope_type == "none" else rope_type
    legacy = f"{prefix}rope.scale_linear"
    if rope_type == "default" and fields.values.get(legacy) is not None:
        factor = _factor(fields, legacy)
        return RopeSpec(
            rope_type="linear", theta=theta, partial_rotary_factor=partial, factor=factor
        )
    check_rope_type(fields.file, rope_type)
    if rope_type == "default":
        return RopeSpec(theta=theta, partial_rotary_factor=partial)
    context = fields.integer(f"{prefix}context_length", maximum=_MAX_POSITIONS)
    return RopeSpec(
        rope_type=rope_type,
        theta=theta,
        partial_rotary_factor=partial,
        factor=_factor(fields, f"{scaling}factor"),
        original_max_position_embeddings=fields.integer(
            f"{scaling}original_context_length", maximum=_MAX_POSITIONS, default=context
        ),
        beta_fast=_factor(fields, f"{scaling}yarn_beta_fast", 32.0),
        beta_slow=_factor(fields, f"{scaling}yarn_beta_slow", 1.0),
        attention_factor=_gguf_attention_factor(fields, scaling),
    )


def _gguf_attention_factor(fields: Fields, scaling: str) -> float | None:
    """Return the whole factor on cos and sin; GGUF's attn_factor only multiplies yarn's own."""
    key = f"{scaling}attn_factor"
    if fields.values.get(key) is None:
        return None
    return _factor(fields, key) * (0.1 * math.log(_factor(fields, f"{scaling}factor")) + 1.0)


def check_rope_type(file: str, rope_type: object) -> None:
    """Raise UnsupportedArchitecture for a scaling the engine does not compute."""
    if rope_type not in ROPE_TYPES:
        raise UnsupportedArchitecture(
            f"{file}: rope type {Fields.shown(rope_type)} is not supported; supported: "
            f"{', '.join(ROPE_TYPES)}"
        )


def check_rotary_dim(file: str, head_dim: int, rope: RopeSpec) -> None:
    """Check that the rotated part of a head is a whole, even, positive number of elements."""
    rotary_dim = int(head_dim * rope.partial_rotary_factor)
    if rotary_dim < 2 or rotary_dim % 2:
        raise BadModelFile(
            f"{file}: partial_rotary_factor {rope.partial_rotary_factor:g} of head size {head_dim} "
            f"rotates {rotary_dim} elements; it must be a positive even number"
        )


def _check_bands(file: str, rope: RopeSpec) -> RopeSpec:
    if rope.rope_type == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise BadModelFile(
            f"{file}: rope low_freq_factor {rope.low_freq_factor:g} must be below high_freq_factor "
            f"{rope.high_freq_factor:g}"
        )
    return rope


def _factor(fields: Fields, key: str, default: float | None = None) -> float:
    return fields.number(key, minimum=0.0, maximum=_MAX_FACTOR, default=default)


def _optional_factor(fields: Fields, key: str) -> float | None:
    return None if fields.values.get(key) is None else _factor(fields, key)
