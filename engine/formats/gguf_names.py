"""Canonical (Hugging Face) tensor names → GGUF's. Pure.

Adding an architecture with new tensors means adding its stems here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Final

ROPE_FACTORS: Final = "rope_freqs.weight"
# In these the norm before the feed-forward block has a name of its own.
_HYBRIDS: Final = frozenset({"qwen35", "qwen35moe", "qwen3next"})
_HYBRID_STEMS: Final = {"post_attention_layernorm": "post_attention_norm"}

_TOP: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "linear_attn.in_proj_qkvz": "ssm_in",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
# Names without ".weight" or ".bias" at their end.
_WHOLE: Final = {
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "mlp.experts.gate_proj": "ffn_gate_exps.weight",
    "mlp.experts.up_proj": "ffn_up_exps.weight",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}
_LAYER_NAME: Final = re.compile(r"model\.layers\.(\d+)\.(.+)")


def gguf_name(name: str, architecture: str = "") -> str:
    """Return the name of the canonical tensor `name` in a GGUF of this general.architecture.

    Raises KeyError for a name that no registered architecture has.
    """
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        stem, _, kind = name.rpartition(".")
        return f"{_TOP[stem]}.{kind}"
    block, rest = f"blk.{match[1]}.", match[2]
    if rest in _WHOLE:
        return block + _WHOLE[rest]
    stem, _, kind = rest.rpartition(".")
    if architecture in _HYBRIDS and stem in _HYBRID_STEMS:
        return f"{block}{_HYBRID_STEMS[stem]}.{kind}"
    return f"{block}{_LAYER[stem]}.{kind}"


def gguf_names(architecture: str) -> Callable[[str], str]:
    """Return the naming of all GGUF files of one general.architecture."""
    return partial(gguf_name, architecture=architecture)
