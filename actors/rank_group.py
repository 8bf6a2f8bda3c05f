"""The leader's end of the RPC with its workers: one request to all of them, one answer from each.

Owned by the leader (and by the probe of `cortexd doctor`), which lends its asks. Every request is
drained from every worker even when one has failed; then the first failure is raised. Knows no
torch: what rank 0 itself has to do meanwhile is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from actors.mailbox import Outcome
from actors.sync_asks import SyncAsk
from cortexd.errors import CortexError, Internal, ModelLoadFailed, UnsupportedArchitecture
from cortexd.messages import rpc
from cortexd.messages.control import Message
from cortexd.messages.envelope import Address

if TYPE_CHECKING:
    from engine.scheduling.step_plan import StepPlan
    from engine.tp.step_codec import CacheBounds

_Reply = TypeVar("_Reply", bound=rpc.RpcMessage)
_Joined = TypeVar("_Joined")

# Meeting takes no longer, or never happens: some rank has another idea of the group.
INIT_DEADLINE_S: Final = 60.0
_LOAD_KINDS: Final = frozenset(
    {"load_failed", "nccl_init_failed", "nccl_sanity_failed", "cuda_unavailable"}
)
MEETING_SUFFIX: Final = ".meet"


class Asker(Protocol):
    """What a `SyncActor` lends."""

    def begin_ask(self, dst: Address, body: Message, *, deadline_s: float) -> SyncAsk:
        """Send a request."""

    def collect(self, asks: Sequence[SyncAsk]) -> list[Outcome]:
        """Wait until all have ended."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that a worker may take."""

    start_s: float
    load_s: float
    step_s: float


class RankGroup:
    """The workers of one epoch. Its step methods are the engine's `Lockstep`."""

    def __init__(
        self,
        asker: Asker,
        leader: Address,
        world_size: int,
        deadlines: Deadlines,
        *,
        model_id: str = "",
    ) -> None:
        """Take the leader's address; the workers' are those of the next ranks, same epoch."""
        from engine.tp.step_codec import StepEncoder

        group = leader.name.rpartition("/")[0]
        self.world_size = world_size
        self.devices: list[str] = []
        self.read_bytes: list[int] = []
        self._asker = asker
        self._workers = [
            Address(f"{group}/{rank}", leader.incarnation) for rank in range(1, world_size)
        ]
        self._deadlines = deadlines
        self._model_id = model_id
        self._open: list[SyncAsk] = []
        self._steps = StepEncoder(model_id)

    @property
    def step(self) -> int:
        """The number of the last step that was sent."""
        return self._steps.num_steps

    def __repr__(self) -> str:
        return f"RankGroup({self.world_size} ranks, step {self.step})"

    def ping(self) -> None:
        """Wait until all workers are there and agree on who they are. Raises: CortexError."""
        pongs = self._ask(rpc.Ping(), rpc.Pong, self._deadlines.start_s)
        for rank, pong in enumerate(pongs, start=1):
            if (pong.rank, pong.world_size) != (rank, self.world_size):
                raise Internal(
                    f"rank {rank} of {self.world_size} says it is {pong.rank} of {pong.world_size}"
                )
        self.devices = [pong.device for pong in pongs]

    def join(self, address: str, join: Callable[[str], _Joined]) -> _Joined:
        """Send the meeting place to all workers, then go there with `join`. Raises: CortexError."""
        asks = self._begin(rpc.Init(address), INIT_DEADLINE_S)
        error: CortexError | None = None
        joined: _Joined | None = None
        try:
            joined = join(address)
        except CortexError as failure:
            error = failure
        self._end(asks, rpc.InitOk, error)
        assert joined is not None, "a failure to join was raised"
        return joined

    def check_sanity(self, add_up: Callable[[], int]) -> None:
        """Let all ranks add up a one from each. Raises: ModelLoadFailed when a sum is wrong."""
        asks = self._begin(rpc.NcclSanityCheck(), INIT_DEADLINE_S)
        own = add_up()
        replies = self._end(asks, rpc.NcclSanityResult)
        sums = [own, *(reply.observed_sum for reply in replies)]
        if any(observed != self.world_size for observed in sums):
            raise ModelLoadFailed(
                f"the collectives are wrong: {self.world_size} ranks added up a one from each and "
                f"got {sums}; allowed: {self.world_size} on every rank"
            )

    def begin_load(
        self, config_json: bytes, weight_paths: tuple[str, ...], quant: str | None
    ) -> None:
        """Let all workers load their shards; `shards_loaded` waits for them."""
        load = rpc.LoadDenseShard(self._model_id, config_json, weight_paths, quant)
        self._open = self._begin(load, self._deadlines.load_s)

    def shards_loaded(self, free_bytes: int) -> int:
        """Return the least free memory of any rank, rank 0's included. Raises: CortexError."""
        asks, self._open = self._open, []
        replies = self._end(asks, rpc.LoadDenseShardOk)
        self.read_bytes = [reply.read_bytes for reply in replies]
        return min([free_bytes, *(reply.free_bytes for reply in replies)])

    def make_cache(self, size: CacheBounds) -> int:
        """Let all workers make their cache; return the bytes they hold. Raises: CortexError."""
        from engine.tp.step_codec import StepEncoder

        clear = rpc.ClearKvCache(self._model_id, size.num_blocks, size.num_state_slots)
        replies = self._ask(clear, rpc.KvCacheCleared, self._deadlines.load_s)
        self._steps = StepEncoder(self._model_id)
        return sum(reply.memory_bytes for reply in replies)

    def begin_step(self, plan: StepPlan) -> None:
        """Send one step to all workers."""
        self._open = self._begin(self._steps.encode(plan), self._deadlines.step_s)

    def end_step(self) -> None:
        """Take every worker's ack. Raises: CortexError when one failed, is late or out of step."""
        asks, self._open = self._open, []
        for rank, ack in enumerate(self._end(asks, rpc.GenerateStepOk), start=1):
            if ack.step != self.step:
                raise Internal(f"rank {rank} acknowledged step {ack.step} instead of {self.step}")

    def vram(self) -> list[rpc.VramInfo]:
        """Return the workers' memory. Raises: CortexError."""
        return self._ask(rpc.QueryVram(), rpc.VramInfo, self._deadlines.start_s)

    def shutdown(self) -> None:
        """End all workers. Raises: CortexError."""
        self._ask(rpc.Shutdown(), rpc.Bye, self._deadlines.start_s)

    def _ask(self, body: Message, reply_type: type[_Reply], deadline_s: float) -> list[_Reply]:
        return self._end(self._begin(body, deadline_s), reply_type)

    def _begin(self, body: Message, deadline_s: float) -> list[SyncAsk]:
        return [
            self._asker.begin_ask(worker, body, deadline_s=deadline_s) for worker in self._workers
        ]

    def _end(
        self,
        asks: Sequence[SyncAsk],
        reply_type: type[_Reply],
        error: CortexError | None = None,
    ) -> list[_Reply]:
        """Return the replies in rank order, all of them drained. Raises: `error`, or the first."""
        replies: list[_Reply] = []
        for rank, outcome in enumerate(self._asker.collect(asks), start=1):
            if isinstance(outcome, reply_type):
                replies.append(outcome)
            else:
                error = error or _failure(rank, outcome, reply_type)
        if error is not None:
            raise error
        return replies


def _failure(rank: int, outcome: Outcome, expected: type[rpc.RpcMessage]) -> CortexError:
    match outcome:
        case rpc.Error():
            text = f"rank {rank}: {outcome.message}"
            if outcome.kind == "unsupported_arch":
                return UnsupportedArchitecture(text)
            return ModelLoadFailed(text) if outcome.kind in _LOAD_KINDS else Internal(text)
        case CortexError():
            return Internal(f"rank {rank}: {outcome.message}")
        case _:
            return Internal(
                f"rank {rank} answered {type(outcome).__name__} instead of {expected.__name__}"
            )


def meeting_address(runtime_dir: Path, leader: Address) -> str:
    """Return a new meeting place of this group and epoch; those of dead epochs are removed."""
    stem = "".join(c if c.isalnum() else "-" for c in leader.name)
    for old in runtime_dir.glob(f"{stem}.*{MEETING_SUFFIX}"):
        old.unlink(missing_ok=True)
    return f"file://{runtime_dir / f'{stem}.{leader.incarnation}{MEETING_SUFFIX}'}"


def leave_meeting_place(address: str) -> None:
    """Remove the file of a meeting place: all ranks are connected, none will come any more."""
    Path(address.removeprefix("file://")).unlink(missing_ok=True)
