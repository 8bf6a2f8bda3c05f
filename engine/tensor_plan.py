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

Shape = tuple[int, ...]

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

    def is_ignored(self, name: str) -> bool:
        """Tell whether an additional tensor of this name is harmless."""
        return name in self.ignored or _LEFTOVER.search(name) is not None


def dense_decoder_plan(spec: ModelSpec, *, has_qk_norm: bool) -> TensorPlan:
    """Return the plan of a dense pre-norm decoder: llama, and qwen3 with per-head q/k norms."""
    shapes: dict[str, Shape] = {EMBEDDING: (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name, shape in _layer_shapes(spec, has_qk_norm).items():
            shapes[prefix + name] = shape
    shapes[FINAL_NORM] = (spec.hidden_size,)
    if spec.tie_word_embeddings:
        return TensorPlan(shapes, frozenset({HEAD}))
    shapes[HEAD] = (spec.vocab_size, spec.hidden_size)
    return TensorPlan(shapes)


def _layer_shapes(spec: ModelSpec, has_qk_norm: bool) -> dict[str, Shape]:
    hidden, intermediate = spec.hidden_size, spec.intermediate_size
    query_rows = spec.num_attention_heads * spec.head_dim
    kv_rows = spec.num_key_value_heads * spec.head_dim
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query_rows, hidden),
        "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.weight": (kv_rows, hidden),
        "self_attn.o_proj.weight": (hidden, query_rows),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
    }
    biased = [name for name in shapes if "self_attn" in name] if spec.attention_bias else []
    biased += [name for name in shapes if "mlp." in name] if spec.mlp_bias else []
    for name in biased:
        shapes[name.removesuffix("weight") + "bias"] = shapes[name][:1]
    if has_qk_norm:
        shapes["self_attn.q_norm.weight"] = (spec.head_dim,)
        shapes["self_attn.k_norm.weight"] = (spec.head_dim,)
    return shapes
