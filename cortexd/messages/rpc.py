"""Leader ↔ worker: the ranks of one tensor-parallel group.

The leader asks, every worker answers each request once: with its reply, or with `Error`. Nothing is
optional and nothing unknown is accepted, since ranks that differ hang in a collective. The epoch
travels in the envelope. Lists of numbers are packed little-endian int32.
"""

from __future__ import annotations

from typing import Literal

from cortexd.messages.control import Message

ErrorKind = Literal[
    "bad_request",
    "already_loaded",
    "model_not_loaded",
    "nccl_not_initialised",
    "nccl_init_failed",
    "nccl_sanity_failed",
    "cuda_unavailable",
    "load_failed",
    "unsupported_arch",
    "forward_failed",
    "snapshot_not_found",
    "snapshot_failed",
    "restore_failed",
    "vram_query_failed",
]


class RpcMessage(Message, frozen=True, forbid_unknown_fields=True):
    """Base of the requests and replies; the tag is the operation's name."""


class Ping(RpcMessage, frozen=True, tag="ping"):
    """Are you there? Answer `Pong`."""


class Pong(RpcMessage, frozen=True, tag="pong"):
    """Which rank this is, of how many, and on which device."""

    rank: int
    world_size: int
    device: str


class Init(RpcMessage, frozen=True, tag="init"):
    """Join the group that meets at `comm_id`, an address that the leader minted."""

    comm_id: str


class InitOk(RpcMessage, frozen=True, tag="init_ok"):
    """All ranks have met."""


class NcclSanityCheck(RpcMessage, frozen=True, tag="nccl_sanity_check"):
    """Add up a one from every rank."""


class NcclSanityResult(RpcMessage, frozen=True, tag="nccl_sanity_result"):
    """The sum, which must be the world size."""

    observed_sum: int


class LoadDenseShard(RpcMessage, frozen=True, tag="load_dense_shard"):
    """Load your part of a model. `config_json` is the leader's ModelSpec."""

    model_id: str
    config_json: bytes
    weight_paths: tuple[str, ...]
    quant: str | None


class LoadDenseShardOk(RpcMessage, frozen=True, tag="load_dense_shard_ok"):
    """Loaded: bytes read from the files, and memory that is left for the cache."""

    read_bytes: int
    free_bytes: int


class GenerateStep(RpcMessage, frozen=True, tag="generate_step"):
    """Run one step of the whole batch; every data-dependent decision is in here.

    Row i computes `lengths[i]` of `tokens` from position `starts[i]` on, with its KV in the blocks
    of table `tables[i]` and a hybrid's state in `state_slots[i]`; of its last `num_logits[i]`
    tokens the logits are wanted. Of a table only changes travel: its first `num_kept_blocks[i]` are
    as the worker knows them, followed by `num_new_blocks[i]` of `blocks`. A row that starts at 0 is
    fresh: it begins from a state of zero. Before anything is computed, states are copied by
    `state_copies`, pairs of slots (from, to) in order: a snapshot is kept or taken up again by one.
    """

    model_id: str
    step: int
    starts: bytes
    lengths: bytes
    tokens: bytes
    dropped_tables: bytes
    tables: bytes
    num_kept_blocks: bytes
    num_new_blocks: bytes
    blocks: bytes
    state_slots: bytes
    state_copies: bytes
    num_logits: bytes


class GenerateStepOk(RpcMessage, frozen=True, tag="generate_step_ok"):
    """The step of this number is done; it is also the worker's heartbeat."""

    step: int


class ClearKvCache(RpcMessage, frozen=True, tag="clear_kv_cache"):
    """Make the KV cache anew, of this many blocks and, for a hybrid, slots for states."""

    model_id: str
    num_blocks: int
    num_state_slots: int


class KvCacheCleared(RpcMessage, frozen=True, tag="kv_cache_cleared"):
    """Done; bytes that weights and cache take on this rank."""

    memory_bytes: int


class SnapshotKvCache(RpcMessage, frozen=True, tag="snapshot_kv_cache"):
    """Keep a copy of a sequence's KV blocks, and of a hybrid's state slot, under a new id.

    The slot is 0 for a model without recurrent state.
    """

    model_id: str
    snapshot_id: int
    blocks: bytes
    state_slot: int


class KvSnapshotStored(RpcMessage, frozen=True, tag="kv_snapshot_stored"):
    """Done; bytes it takes."""

    num_bytes: int


class RestoreKvCache(RpcMessage, frozen=True, tag="restore_kv_cache"):
    """Put what was kept under an id into as many blocks, and into a slot. It stays kept."""

    model_id: str
    snapshot_id: int
    blocks: bytes
    state_slot: int


class KvCacheRestored(RpcMessage, frozen=True, tag="kv_cache_restored"):
    """Done."""


class DropKvSnapshot(RpcMessage, frozen=True, tag="drop_kv_snapshot"):
    """Forget a kept state; an id that is not known is none to forget."""

    model_id: str
    snapshot_id: int


class KvSnapshotDropped(RpcMessage, frozen=True, tag="kv_snapshot_dropped"):
    """Done."""


class QueryVram(RpcMessage, frozen=True, tag="query_vram"):
    """How much memory has your device?"""


class VramInfo(RpcMessage, frozen=True, tag="vram_info"):
    """Free and total memory of the device, in MiB."""

    free_mb: int
    total_mb: int


class UnloadModel(RpcMessage, frozen=True, tag="unload_model"):
    """Drop the model."""

    model_id: str


class Unloaded(RpcMessage, frozen=True, tag="unloaded"):
    """Done."""


class Shutdown(RpcMessage, frozen=True, tag="shutdown"):
    """End the process once this is answered."""


class Bye(RpcMessage, frozen=True, tag="bye"):
    """The last message of a worker."""


class Error(RpcMessage, frozen=True, tag="error"):
    """In place of any reply."""

    kind: ErrorKind
    message: str


Request = (
    Ping
    | Init
    | NcclSanityCheck
    | LoadDenseShard
    | GenerateStep
    | ClearKvCache
    | SnapshotKvCache
    | RestoreKvCache
    | DropKvSnapshot
    | QueryVram
    | UnloadModel
    | Shutdown
)
Reply = (
    Pong
    | InitOk
    | NcclSanityResult
    | LoadDenseShardOk
    | GenerateStepOk
    | KvCacheCleared
    | KvSnapshotStored
    | KvCacheRestored
    | KvSnapshotDropped
    | VramInfo
    | Unloaded
    | Bye
    | Error
)
