"""Tiny models of every architecture in every stored format, each with its oracle.

The oracle is transformers with the very values that the file holds: rounded to bfloat16, or
quantised and dequantised again by the gguf package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import msgspec
import torch
from gguf import GGMLQuantizationType as Type

from cortexd.models import ModelFiles
from engine.engine import Engine
from tests.engine.checkpoints import MULTIMODAL, Oracle, load_engine, make_oracle, save_oracle
from tests.engine.gguf_export import HYBRIDS, Exporter
from tests.engine.llama_export import HIDDEN_SIZE, write_gguf

# Every width a multiple of 32, so that every matrix can be quantised; three V heads per K head.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 48,
}
HYBRID_ONLY = ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
MOE_ONLY = ("moe_intermediate_size", "shared_expert_intermediate_size")


def make_model(family: str, **fields: Any) -> Oracle:
    """Return an oracle whose matrices can be quantised."""
    wanted = {
        key: value
        for key, value in SIZES.items()
        if (key not in HYBRID_ONLY or family in HYBRIDS) and (key not in MOE_ONLY or "moe" in family
        or family == "qwen3_next")
    }  # fmt: skip
    if family == "qwen2":
        fields["num_attention_heads"] = 4
    return make_oracle(family, **wanted, **fields)


# Never quantised: looked-up rows, routers, gates of a row or two, and what is no matrix.
EXACT = ("embed_tokens", "norm", "conv1d", "A_log", "dt_bias", "bias", "in_proj_a", "in_proj_b.")
EXACT_TOO = ("mlp.gate.weight", "shared_expert_gate", "in_proj_ba")


def quantised(files: ModelFiles, quant: str) -> ModelFiles:
    """Return the files as a source resolves them with this quant."""
    return msgspec.structs.replace(files, quant=quant)


def round_weights(oracle: Oracle, kind: Type) -> None:
    """Put the values that the reference quantiser makes into the oracle."""
    tied = oracle.config.tie_word_embeddings
    for name, parameter in oracle.named_parameters():
        is_exact = any(part in name for part in EXACT + EXACT_TOO)
        if is_exact and not (tied and "embed_tokens" in name):
            continue
        packed = gguf.quants.quantize(parameter.detach().numpy(), kind)
        parameter.data = torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model on disk, what transformers makes of it, and settings of the engine for it."""

    files: ModelFiles
    oracle: Oracle
    settings: dict[str, Any]

    def load(self, **fields: Any) -> Engine:
        """Return a fresh engine."""
        return load_engine(self.files, **{**self.settings, **fields})


Store = Callable[[str, Path], tuple[ModelFiles, Oracle]]  # of an architecture, in a directory


def _safetensors(*, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB") -> Store:
    def store(architecture: str, directory: Path) -> tuple[ModelFiles, Oracle]:
        oracle = make_oracle(architecture, seed=90).to(dtype)
        files = save_oracle(oracle, directory, max_shard_size=max_shard_size)
        # Read again, since the conversion rounds the rope frequencies too, which are in no file.
        return files, type(oracle).from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )

    return store


def _quantised_at_load(quant: str, kind: Type) -> Store:
    def store(architecture: str, directory: Path) -> tuple[ModelFiles, Oracle]:
        oracle = _quantisable(architecture)
        files = save_oracle(oracle, directory)
        round_weights(oracle, kind)
        return quantised(files, quant), oracle

    return store


def _gguf(kind: Type) -> Store:
    def store(architecture: str, directory: Path) -> tuple[ModelFiles, Oracle]:
        oracle = _quantisable(architecture)
        path = directory / "m.gguf"
        if architecture == "llama":
            return write_gguf(oracle, path, kind), oracle
        return Exporter(oracle, kind).write(path), oracle

    return store


def _quantisable(architecture: str) -> Oracle:
    if architecture == "llama":
        return make_oracle("llama", seed=90, hidden_size=HIDDEN_SIZE, intermediate_size=64)
    family = f"{architecture}_text" if architecture in MULTIMODAL else architecture
    return make_model(family, seed=90)


# Exact up to summation order: the torch path, and the kernels on weights that stay float32.
FORMATS: dict[str, Store] = {
    "safetensors f32": _safetensors(),
    "safetensors f32, sharded": _safetensors(max_shard_size="60KB"),
    "safetensors bf16": _safetensors(dtype=torch.bfloat16),
    "in-situ q8_0": _quantised_at_load("q8_0", Type.Q8_0),
    "in-situ q4_0": _quantised_at_load("q4_0", Type.Q4_0),
    "GGUF f32": _gguf(Type.F32),
    "GGUF bf16": _gguf(Type.BF16),
    "GGUF q8_0": _gguf(Type.Q8_0),
    "GGUF q4_1": _gguf(Type.Q4_1),
}


def store_model(
    architecture: str, stored_as: str, directory: Path, *, backend: str = "reference"
) -> StoredModel:
    """Write the model of an architecture in a format of `FORMATS`."""
    directory.mkdir(parents=True)
    files, oracle = FORMATS[stored_as](architecture, directory)
    return StoredModel(files, oracle, {"backend": backend})
