"""Qwen3 with a mixture of experts in most layers; attention as in qwen3.

Source: transformers 5.23 models/qwen3_moe/modeling_qwen3_moe.py.
"""

from __future__ import annotations

from engine.models.decoder import Decoder


class Qwen3MoeForCausalLM(Decoder):
    """The decoder with head norms; the spec says which layers have experts."""

    has_qk_norm = True
