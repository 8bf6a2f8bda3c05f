"""Tiny random checkpoints, made by transformers on the spot, and its answers as the oracle.

Nothing is downloaded. Weights are drawn wide enough that logits differ clearly between tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from cortexd.models import ModelFiles
from cortexd.settings import Engine as EngineSettings
from engine.engine import Engine
from engine.preflight import inspect

VOCAB_SIZE = 97
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
Oracle = PreTrainedModel
EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
# Two V heads per K head; one full-attention layer of four; a quarter of a head is rotated.
HYBRID = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
# Sizes that the native kernels take, for whole steps in one native call.
NATIVE_HYBRID = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 32,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 48,
}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 24}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
}
# Kind → classes of configuration and model, and fields beside the common ones.
KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"head_dim": 16, **EXPERTS}),
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM, {**HYBRID, **SHARED_EXPERT}),
    "qwen3_5_text": (Qwen3_5TextConfig, Qwen3_5ForCausalLM, HYBRID),
    "qwen3_5_moe_text": (
        Qwen3_5MoeTextConfig,
        Qwen3_5MoeForCausalLM,
        {**HYBRID, **SHARED_EXPERT},
    ),
    "qwen3_5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration, HYBRID),
    "qwen3_5_moe": (
        Qwen3_5MoeConfig,
        Qwen3_5MoeForConditionalGeneration,
        {**HYBRID, **SHARED_EXPERT},
    ),
}
MULTIMODAL = ("qwen3_5", "qwen3_5_moe")


def make_oracle(kind: str, *, seed: int = 0, **fields: Any) -> Oracle:
    """Return a tiny float32 model; three query heads share a KV head, as in SmolLM2."""
    config_class, model_class, own_fields = KINDS[kind]
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "eos_token_id": VOCAB_SIZE - 1,
        "bos_token_id": 1,
        "attn_implementation": "eager",
        **own_fields,
        **fields,
    }
    if kind in MULTIMODAL:
        tied = {"tie_word_embeddings": fields.get("tie_word_embeddings", False)}
        config = config_class(text_config=fields, vision_config=dict(VISION), **tied)
    else:
        config = config_class(**fields)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model: Oracle = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread(name, parameter)
    return model.eval()


def make_sharp_oracle(**fields: Any) -> Oracle:
    """Return a hybrid whose beta is 0 or 1 and which hardly forgets: the worst for a delta rule."""
    oracle = make_oracle("qwen3_5", seed=40, **fields)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "in_proj_b" in name:
                parameter.mul_(40)
            elif "A_log" in name:
                parameter.fill_(-7)
    return oracle


def spread(name: str, parameter: torch.nn.Parameter) -> None:
    """Give a parameter values that a fault would show in; all ones would hide a missing norm."""
    if "norm" in name:
        parameter.add_(torch.randn_like(parameter) * 0.2)
    elif "A_log" in name:
        parameter.copy_(torch.rand_like(parameter) * 4 - 3)  # from slow to fast forgetting
    elif "dt_bias" in name or "conv1d" in name:
        parameter.normal_(std=0.5)
    elif name.endswith("bias"):
        parameter.normal_(std=0.3)
    elif "experts" in name or name.endswith("mlp.gate.weight"):
        parameter.normal_(std=0.15)


def save_oracle(model: Oracle, directory: Path, *, max_shard_size: str = "1GB") -> ModelFiles:
    """Write the checkpoint; return its files as a model source would."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return ModelFiles(
        model_id=f"test/{directory.name}",
        source="path",
        revision="local",
        format="safetensors",
        weights=tuple(str(directory / name) for name in names),
        config=str(directory / "config.json"),
    )


def load_engine(files: ModelFiles, **fields: Any) -> Engine:
    """Load an engine with small limits unless `fields` say otherwise."""
    fields = {
        "device": "cpu",
        "dtype": "float32",
        "num_threads": 1,
        "block_size": 8,
        "kv_cache_mib": 1,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "max_prefill_chunk": 32,
        **fields,
    }
    settings = EngineSettings(**fields)
    return Engine.load(files, inspect(files), settings, lambda fraction, stage: None)


@torch.inference_mode()
def oracle_logits(model: Oracle, token_ids: list[int]) -> torch.Tensor:
    """Return transformers' float32 logits after the last token (vocab_size,)."""
    return model(torch.tensor([token_ids])).logits[0, -1].float()


@torch.inference_mode()
def oracle_greedy(model: Oracle, prompt: list[int], answer: list[int], count: int) -> list[int]:
    """Return what transformers chooses at the place of each token of an answer to a prompt.

    That equals the answer just when it is the greedy continuation, of `count` tokens; one pass.
    """
    ids = [*prompt, *answer[: count - 1]]
    choices: list[int] = model(torch.tensor([ids])).logits[0, len(prompt) - 1 :].argmax(-1).tolist()
    return choices


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Return random token ids without the end token."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, VOCAB_SIZE - 1, (length,), generator=generator).tolist()
