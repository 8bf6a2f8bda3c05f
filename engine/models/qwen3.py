"""Qwen3 dense: Q and K heads are normed before the rotation, head_dim is set on its own.

Source: transformers 5.23 models/qwen3/modeling_qwen3.py.
"""

from __future__ import annotations

from engine.models.decoder import Decoder


class Qwen3ForCausalLM(Decoder):
    """The decoder with one norm for all Q heads and one for all K heads of a layer."""

    has_qk_norm = True
