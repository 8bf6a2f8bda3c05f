"""Makes a tiny random chat model on disk: weights, tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 32768
# Tokens of a stream that is still running when a test has done something to it, however late a
# busy machine gives the test its turn: about a minute's.
LONG = 15_000
HYBRIDS = ("qwen3_5", "qwen3_next")
HYBRID_SIZES = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tiny_model(
    directory: Path, *, architecture: str = "llama", seed: int = 0, **sizes: Any
) -> Path:
    """Write a byte-level model that transformers and cortexd both load; return its directory.

    `sizes` replace those of its configuration.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 4], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"})
    )
    vocabulary = tokenizer.get_vocab()
    torch.manual_seed(seed)
    config_class = {
        "llama": transformers.LlamaConfig,
        "qwen3": transformers.Qwen3Config,
        "qwen3_5": transformers.Qwen3_5TextConfig,
        "qwen3_next": transformers.Qwen3NextConfig,
    }
    fields = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        **(HYBRID_SIZES if architecture in HYBRIDS else {}),
        **sizes,
    }
    config = config_class[architecture](
        **fields,
        vocab_size=tokenizer.get_vocab_size(),
        eos_token_id=vocabulary["<|im_end|>"],
        bos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    return directory
