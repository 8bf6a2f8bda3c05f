"""Llama: SmolLM2, Llama 2 and 3, and whatever else was exported as LlamaForCausalLM.

Source: transformers 5.23 models/llama/modeling_llama.py.
"""

from __future__ import annotations

from engine.models.decoder import Decoder


class LlamaForCausalLM(Decoder):
    """The plain decoder."""

    has_qk_norm = False
