"""Which tensors a checkpoint must hold: the names and shapes of every architecture we run.

Pure and torch-free, so the pre-flight check can refuse a checkpoint before any process is started
and the loader can refuse it before any byte is copied. Names are the canonical Hugging Face ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cortexd.models import ModelSpec
from engine.specs.layer_shapes import (
    Shape,
    attention_shapes,
    linear_attention_shapes,
    mlp_shapes,
    moe_shapes,
)

EMBEDDING: Final = "model.embed_tokens.weight"
FINAL_NORM: Final = "model.norm.weight"
HEAD: Final = "lm_head.weight"

# Buffers that old exports saved; the engine computes them itself.
_LEFTOVER = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Required names with their shapes, and names that may be there and are not read."""

    required: Mapping[str, Shape]
    ignored: frozenset[str] = frozenset()
    ignored_prefixes: tuple[str, ...] = ()  # parts of the model that are not run

    def is_ignored(self, name: str) -> bool:
        """Tell whether an additional tensor of this name is harmless."""
        return (
            name in self.ignored
            or name.startswith(self.ignored_prefixes)
            or _LEFTOVER.search(name) is not None
        )


def decoder_plan(
    spec: ModelSpec,
    *,
    has_qk_norm: bool,
    has_output_gate: bool = False,
    ignored_prefixes: tuple[str, ...] = (),
) -> TensorPlan:
    """Return the plan of a pre-norm decoder, whatever attention and feed-forward its layers have.

    `has_output_gate`: q_proj also makes one gate per query head.
    """
    shapes: dict[str, Shape] = {EMBEDDING: (spec.vocab_size, spec.hidden_size)}
    linear_layers = frozenset(spec.linear_layers)
    full_attention = attention_shapes(spec, has_qk_norm, has_output_gate)
    for layer in range(spec.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        parts = {
            "input_layernorm.weight": (spec.hidden_size,),
            **(linear_attention_shapes(spec) if layer in linear_layers else full_attention),
            "post_attention_layernorm.weight": (spec.hidden_size,),
            **(moe_shapes(spec) if spec.is_sparse(layer) else mlp_shapes(spec)),
        }
        shapes.update({prefix + name: shape for name, shape in parts.items()})
    shapes[FINAL_NORM] = (spec.hidden_size,)
    drafts = range(spec.num_hidden_layers, spec.num_hidden_layers + spec.num_draft_layers)
    skipped = (*ignored_prefixes, *(f"blk.{block}." for block in drafts))
    if spec.tie_word_embeddings:
        return TensorPlan(shapes, frozenset({HEAD}), skipped)
    shapes[HEAD] = (spec.vocab_size, spec.hidden_size)
    return TensorPlan(shapes, ignored_prefixes=skipped)
