"""The typed settings of one daemon: what `cortex.toml` may say, with defaults and ranges.

Built only by `cortexd.config` (file + environment); every process receives the same frozen value.
`conf/default.toml` documents each option; a test holds the two together.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
Role = Literal["all", "gateway", "neuron"]
NeuronKind = Literal["cortex", "openai"]
Harness = Literal["torch", "candle"]  # "candle" is the reference's name for the in-process engine


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all configuration tables."""


class Gateway(Section, frozen=True):
    """The client-facing API and its metrics listener."""

    listen: str = "127.0.0.1:31313"
    metrics_listen: str = "127.0.0.1:31314"
    allowed_origins: list[str] | None = None
    fronts: Annotated[int, Meta(ge=1, le=64)] = 1
    max_body_mib: Annotated[int, Meta(ge=1, le=1024)] = 64
    first_byte_hold_ms: NonNegativeInt = 750
    keepalive_s: PositiveFloat = 1.0
    event_keepalive_s: PositiveFloat = 15.0
    unary_load_wait_s: NonNegativeFloat = 600.0
    max_queue_depth: NonNegativeInt = 256
    queue_wait_s: NonNegativeFloat = 60.0
    request_timeout_s: PositiveFloat = 3600.0
    drain_s: NonNegativeFloat = 30.0


class Eviction(Section, frozen=True):
    """When the evictor proposes to unload a model."""

    strategy: Literal["lru", "priority"] = "lru"
    defrag_after_cycles: NonNegativeInt = 0
    idle_ttl_s: NonNegativeFloat = 0.0
    sleep_ttl_s: NonNegativeFloat = 1800.0


class Entitlements(Section, frozen=True):
    """Who may use the API; without a keys file everybody who reaches it."""

    keys_file: str | None = None
    require_auth: bool = True


class NeuronEntry(Section, frozen=True):
    """One `[[neurons]]` table: a host whose models the gateway offers.

    `kind`: "cortex" is a neuron (polled, loaded), "openai" any other OpenAI-compatible server.
    """

    name: str
    endpoint: str
    kind: NeuronKind = "cortex"
    max_in_flight: NonNegativeInt = 0
    key_file: str | None = None


class Neuron(Section, frozen=True):
    """This host's own neuron API."""

    listen: str = "127.0.0.1:13131"


class DefaultModel(Section, frozen=True):
    """One `[[default_models]]` table: loaded when the daemon starts, in file order."""

    model_id: str
    harness: Harness = "torch"
    quant: str | None = None
    tensor_parallel: PositiveInt = 1
    devices: list[NonNegativeInt] | None = None


class Engine(Section, frozen=True):
    """How models run on this host."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    num_threads: NonNegativeInt = 0
    block_size: Annotated[int, Meta(ge=8, le=256)] = 32
    kv_cache_mib: NonNegativeInt = 0
    memory_limit_mib: NonNegativeInt = 0
    max_num_seqs: Annotated[int, Meta(ge=1, le=1024)] = 64
    max_num_batched_tokens: Annotated[int, Meta(ge=16, le=65536)] = 2048
    max_prefill_chunk: Annotated[int, Meta(ge=16, le=65536)] = 512
    max_model_len: NonNegativeInt = 0
    target_prefill_s: NonNegativeFloat = 120.0
    bootstrap_prefill_tok_s: PositiveFloat = 800.0
    max_queue_depth: PositiveInt = 256
    kv_wait_s: PositiveFloat = 240.0
    prefix_cache: bool = True
    backend: Literal["auto", "triton", "reference"] = "auto"
    activations: Literal["auto", "rounded", "exact"] = "auto"


class Store(Section, frozen=True):
    """Where model files come from and go to."""

    cache_dir: str | None = None
    hub_cache_dir: str | None = None
    offline: bool = False
    download_timeout_s: PositiveFloat = 3600.0
    pip: list[str] | None = None


class Supervision(Section, frozen=True):
    """Process start, liveness and restart bounds."""

    start_method: Literal["forkserver", "spawn"] = "forkserver"
    heartbeat_ms: Annotated[int, Meta(ge=50, le=10000)] = 500
    suspect_after_s: PositiveFloat = 2.0
    kill_after_s: PositiveFloat = 5.0
    start_timeout_s: PositiveFloat = 30.0
    stop_timeout_s: PositiveFloat = 10.0
    load_stall_timeout_s: PositiveFloat = 120.0
    step_timeout_s: PositiveFloat = 120.0
    max_restarts: PositiveInt = 10
    max_restarts_window_s: PositiveFloat = 60.0
    max_group_restarts: PositiveInt = 3
    max_group_restarts_window_s: PositiveFloat = 300.0


class Paths(Section, frozen=True):
    """Directories; unset means the XDG default."""

    runtime_dir: str | None = None
    state_dir: str | None = None


class Logging(Section, frozen=True):
    """What is written where."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    max_file_mib: PositiveInt = 16
    max_files: PositiveInt = 3


class Settings(Section, frozen=True):
    """The whole of `cortex.toml`."""

    role: Role = "all"
    models_config: str | None = None
    gateway: Gateway = Gateway()
    entitlements: Entitlements = Entitlements()
    eviction: Eviction = Eviction()
    neuron: Neuron = Neuron()
    engine: Engine = Engine()
    store: Store = Store()
    supervision: Supervision = Supervision()
    paths: Paths = Paths()
    logging: Logging = Logging()
    neurons: list[NeuronEntry] = []
    default_models: list[DefaultModel] = []
