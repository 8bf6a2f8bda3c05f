"""Qwen3-Next: the hybrid decoder with experts and a shared expert; projections stored fused.

Source: transformers 5.23 models/qwen3_next/modeling_qwen3_next.py.
"""

from __future__ import annotations

from engine.models.hybrid import HybridDecoder


class Qwen3NextForCausalLM(HybridDecoder):
    """The hybrid decoder; the spec says how projections and experts are stored."""
