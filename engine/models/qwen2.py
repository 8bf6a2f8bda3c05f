"""Qwen2 and Qwen2.5: the plain decoder with biases on the query, key and value projections.

Source: transformers 5.23 models/qwen2/modeling_qwen2.py.
"""

from __future__ import annotations

from engine.models.decoder import Decoder


class Qwen2ForCausalLM(Decoder):
    """The plain decoder; the spec says `qkv_bias`."""

    has_qk_norm = False
