"""Qwen3.5 with experts: the hybrid decoder with a shared expert, experts stored stacked.

Source: transformers 5.23 models/qwen3_5_moe/modeling_qwen3_5_moe.py.
"""

from __future__ import annotations

from engine.models.hybrid import HybridDecoder


class Qwen35MoeForCausalLM(HybridDecoder):
    """The hybrid decoder; the spec says how experts are stored."""
