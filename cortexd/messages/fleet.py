"""Router, store, poller, evictor and metrics: what runs where, and who may be unloaded."""

from __future__ import annotations

import msgspec

from cortexd.messages.control import Message
from cortexd.messages.neurons import CatalogueCard, NodeStatus
from cortexd.models import (
    LoadOptions,
    ModelFiles,
    ModelLimits,
    ModelPolicy,
    ModelSpec,
    ModelStatus,
    WeightBytes,
)


class Route(Message, frozen=True, tag="Route"):
    """Front → router: where does this model run? Answer `Routed` or an error.

    `request_id` opens a lease that `EndRequest` (or the front's death) closes; a leased model is
    never evicted. With `wait`, the answer comes when the model is loaded (within the deadline);
    without, a cold model starts loading and the answer is `ModelLoading`. `account` is whose
    request it is, "" for anonymous ones: places are shared fairly between accounts.
    """

    model: str
    request_id: str
    wait: bool = False
    account: str = ""
    since: float = 0.0  # when it first asked, monotonic seconds


class Routed(Message, frozen=True, tag="Routed"):
    """A loaded local model: its leader actor and all the front needs to tokenise for it."""

    model_id: str
    leader: str
    incarnation: int
    epoch: int
    files: ModelFiles
    spec: ModelSpec
    limits: ModelLimits
    cold_start: bool = False
    defaults: dict[str, float] = {}  # of the catalogue, for fields that the request lacks


class EndRequest(Message, frozen=True, tag="EndRequest"):
    """Front → router: the lease is over, whatever the ending.

    `is_answered`: the node that served it began a proper answer.
    """

    request_id: str
    is_answered: bool = False


class HeldLease(msgspec.Struct, frozen=True, array_like=True):
    """One request that runs: on which model, at which node ("": this host), for whom.

    `prefix`: as of `Place`, in a `LeaseReport`.
    """

    request_id: str
    model_id: str
    node: str = ""
    account: str = ""
    prefix: list[int] = []


class HeldLeases(Message, frozen=True, tag="HeldLeases"):
    """Front → a router that was restarted: what this front has running."""

    leases: list[HeldLease]


class LeaseReport(Message, frozen=True, tag="LeaseReport"):
    """Front → router: what it has begun without asking, as it may, and what has ended since."""

    begun: list[HeldLease]
    ended: list[EndRequest]


class ListModels(Message, frozen=True, tag="ListModels"):
    """Ask the router for all models it knows. Answer `ModelList`."""


class ModelList(Message, frozen=True, tag="ModelList"):
    """Answer to ListModels. `aliases` maps alias → model id; `models` are this host's own.

    `nodes` are the remote neurons with their models, `catalogue` says where models could run;
    both are empty on a host without neurons.
    """

    models: list[ModelStatus]
    aliases: dict[str, str] = {}
    nodes: list[NodeStatus] = []
    catalogue: list[CatalogueCard] = []
    is_draining: bool = False


class LoadModel(Message, frozen=True, tag="LoadModel"):
    """Load (single flight); `Ok` when loaded. A second caller with the same options joins.

    `policy` replaces what this host's own catalogue says of the model.
    """

    options: LoadOptions
    policy: ModelPolicy | None = None


class UnloadModelNow(Message, frozen=True, tag="UnloadModelNow"):
    """Drain, then end the model's group; `Ok` when its memory is free."""

    model_id: str
    force: bool = False


class DescribeModel(Message, frozen=True, tag="DescribeModel"):
    """Router → leader (once its group is up, or after a router restart). Answer `ModelLoaded`."""


class SleepModel(Message, frozen=True, tag="SleepModel"):
    """Front → router → leader: move the weights to host memory. Answer `Ok`: the device is free.

    A leader has one model; to it the id says nothing.
    """

    model_id: str


class WakeModel(Message, frozen=True, tag="WakeModel"):
    """Front → router → leader: move the weights back. Answer `Ok`."""

    model_id: str


class ModelLoaded(Message, frozen=True, tag="ModelLoaded"):
    """Leader → router: what this engine runs and what it derived."""

    options: LoadOptions
    files: ModelFiles
    spec: ModelSpec
    limits: ModelLimits
    memory_bytes: int
    device: str
    dtype: str
    backend: str
    load_s: float
    sleep_bytes: int = 0  # of host memory that its weights take asleep; 0: it cannot sleep
    is_asleep: bool = False


class LoadProgress(Message, frozen=True, tag="LoadProgress"):
    """Leader → router while it loads: 0..1 of the weight bytes."""

    model_id: str
    fraction: float
    stage: str


class ReadText(Message, frozen=True, tag="ReadText"):
    """Router → fronts: a model of these files is loading; its tokenizer will be wanted soon."""

    files: ModelFiles


class ResolveFiles(Message, frozen=True, tag="ResolveFiles"):
    """Router or admin → store: bring this model's files to disk. Answer `ResolvedFiles`.

    While it runs, `ResolveProgress` messages go to the asking actor.
    """

    model_id: str
    quant: str | None = None


class ResolvedFiles(Message, frozen=True, tag="ResolvedFiles"):
    """Answer to ResolveFiles: the files, and what the pre-flight check read from them."""

    files: ModelFiles
    spec: ModelSpec
    weights: WeightBytes


class ResolveProgress(Message, frozen=True, tag="ResolveProgress"):
    """Store → asker: bytes so far of a running download."""

    model_id: str
    stage: str
    done_bytes: int
    total_bytes: int  # 0 = unknown


class QueryLoad(Message, frozen=True, tag="QueryLoad"):
    """Poller → leader: answer `LoadReport`."""


class LoadReport(Message, frozen=True, tag="LoadReport"):
    """One engine's load figures; also forwarded poller → router and metrics."""

    model_id: str
    num_running: int
    num_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    tok_s_prefill: float  # exponential moving average, tokens per second
    tok_s_decode: float
    num_preemptions: int
    num_prompt_tokens: int
    num_generated_tokens: int
    steps: int
    num_cached_tokens: int = 0  # of the prompt tokens, those that were not computed again
    kv_blocks_cached: int = 0  # free blocks whose content is kept for prompts to come
    # Bytes on the leader's device, recurrent states included; waiting: what the queue will take.
    kv_bytes_total: int = 0
    kv_bytes_used: int = 0
    kv_bytes_waiting: int = 0
    context: int = 0  # the longest sequence to offer at the present speed; 0: as loaded
    is_asleep: bool = False  # its weights wait in host memory; a request wakes it


class DeviceReport(msgspec.Struct, frozen=True, array_like=True):
    """One device: index, memory in bytes, utilisation in percent, temperature in °C."""

    index: int
    name: str
    kind: str  # cuda | cpu
    memory_total_bytes: int
    memory_used_bytes: int
    utilization_pct: float | None = None
    temperature_c: float | None = None
    compute_capability: str | None = None


class QueryHost(Message, frozen=True, tag="QueryHost"):
    """Anyone → poller: answer the last `HostReport` at once."""


class HostReport(Message, frozen=True, tag="HostReport"):
    """Poller's last look at this host; also told to router and metrics at each poll."""

    hostname: str
    os: str
    kernel: str
    driver_version: str | None
    devices: list[DeviceReport]
    loads: list[LoadReport]
    age_s: float = 0.0
    host_free_bytes: int | None = None  # of memory that processes may still take
    cuda_version: str | None = None
    gpu_fault: str | None = None  # why GPUs that are here cannot be used


class ProposeEviction(Message, frozen=True, tag="ProposeEviction"):
    """Router → evictor: `incoming` wants `needed_bytes`, of which `free_bytes` are free now."""

    incoming: str
    needed_bytes: int
    free_bytes: int
    models: list[ModelStatus]
    priority: int = 100  # the residency class of `incoming`
    host_free_bytes: int | None = None


class EvictionProposal(Message, frozen=True, tag="EvictionProposal"):
    """Evictor → router: models to unload, first victim first. The router decides.

    Those of them that are in `sleepers` too are to sleep instead.
    """

    victims: list[str]
    reason: str
    sleepers: list[str] = []


class UnloadIdle(Message, frozen=True, tag="UnloadIdle"):
    """Evictor → router: this model has been idle past its time-to-live, or asleep for too long.

    `may_sleep`: the host has room for its weights, so that it need not be unloaded.
    """

    model_id: str
    idle_s: float
    reason: str = "idle"
    may_sleep: bool = False


class RecycleModel(Message, frozen=True, tag="RecycleModel"):
    """Evictor → router: start this model's engine anew, in memory that is not fragmented."""

    model_id: str


class RequestFinished(msgspec.Struct, frozen=True, array_like=True):
    """One record per request, whatever the ending. Times in seconds."""

    request_id: str
    model: str
    node: str
    route: str
    status: int
    error_code: str | None
    finish_reason: str | None
    stream: bool
    cold_start: bool
    duration_s: float
    ttft_s: float | None
    decode_s: float | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    account: str = ""  # "": anonymous
    key_id: str = ""
    wait_s: float | None = None  # until it was handed to an engine or node; None: it never was
    num_retries: int = 0
    num_comments: int = 0  # keep-alives sent, of both kinds
    num_keepalive_events: int = 0


class RequestsFinished(Message, frozen=True, tag="RequestsFinished"):
    """Front → metrics: the requests that ended within a moment."""

    requests: list[RequestFinished]
