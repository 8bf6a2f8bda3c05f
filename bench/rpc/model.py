"""Writes the random model that the step times are taken of."""

from __future__ import annotations

import os
from pathlib import Path


def write_model(folder: Path) -> int:
    """Write a bfloat16 qwen3 that four ranks can share; return how many weights it has."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # read at the import
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen3ForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    return int(sum(parameter.numel() for parameter in model.parameters()))
