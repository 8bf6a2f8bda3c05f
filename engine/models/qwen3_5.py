"""Qwen3.5 and Qwen3.6: the dense hybrid decoder, text part of a multimodal model.

Interleaved multi-dimensional rotation is plain rotation for text: all three positions are equal.
Source: transformers 5.23 models/qwen3_5/modeling_qwen3_5.py.
"""

from __future__ import annotations

from engine.models.hybrid import HybridDecoder


class Qwen35ForCausalLM(HybridDecoder):
    """The hybrid decoder with plain feed-forward blocks."""
