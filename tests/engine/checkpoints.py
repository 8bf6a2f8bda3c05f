"""Tiny random checkpoints, made by transformers on the spot, and its answers as the oracle.

Nothing is downloaded. Weights are drawn wide enough that logits differ clearly between tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

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
Oracle = LlamaForCausalLM | Qwen3ForCausalLM


def make_oracle(kind: str, *, seed: int = 0, **fields: Any) -> Oracle:
    """Return a tiny float32 model; three query heads share a KV head, as in SmolLM2."""
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
        **fields,
    }
    torch.manual_seed(seed)
    if kind == "llama":
        model: Oracle = LlamaForCausalLM(LlamaConfig(**fields))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=16, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones would hide a norm that is missing
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.eval()


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
def oracle_greedy(model: Oracle, token_ids: list[int], count: int) -> list[int]:
    """Return transformers' greedy continuation, end tokens included as ordinary ones."""
    ids = list(token_ids)
    for _ in range(count):
        ids.append(int(oracle_logits(model, ids).argmax()))
    return ids[len(token_ids) :]


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Return random token ids without the end token."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, VOCAB_SIZE - 1, (length,), generator=generator).tolist()
