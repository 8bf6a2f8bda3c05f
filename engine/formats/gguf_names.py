"""GGUF tensor names ↔ the canonical (Hugging Face) names the models use. Pure.

Adding an architecture with new tensors means adding its suffixes here.
"""

from __future__ import annotations

import re
from typing import Final

ROPE_FACTORS: Final = "rope_freqs.weight"

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
}
_LAYER_NAME: Final = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def gguf_name(name: str) -> str:
    """Return the GGUF name of the tensor whose canonical name is `name`.

    Raises KeyError for a name that no registered architecture has.
    """
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        raise KeyError(name)
    return f"blk.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
