"""The rank actors of the benchmark: they measure while they start, and then are ready."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import msgspec

from actors.actor import handles
from actors.leader import Leader, rank_group
from actors.sync_actor import SyncActor
from cortexd.messages import rpc
from cortexd.messages.envelope import Envelope
from cortexd.messages.inference import Submit
from cortexd.models import RankArgs
from engine.scheduling.sequence import Sequence, SequenceState
from engine.scheduling.step_plan import PlannedRow, StepPlan
from engine.token_ids import pack_token_ids
from engine.tp.step_codec import StepDecoder, StepEncoder

BLOCK_SIZE = 32
NUM_STEPS = 100
NUM_WARM_UP = 10
PROMPT_SIZE = 256
OWNER = "bench.1"


class Bounds(msgspec.Struct, frozen=True):
    """A cache that exists in numbers only."""

    num_blocks: int
    num_state_slots: int = 0


class RpcCost(msgspec.Struct, frozen=True):
    """One step's send and acks."""

    median_ms: float
    p90_ms: float
    num_bytes: int


class RpcTask(msgspec.Struct, frozen=True):
    """What `RpcLeader` measures; travels as the model id."""

    result_path: str
    num_rows: tuple[int, ...]
    context: int


class StepTask(msgspec.Struct, frozen=True):
    """Where `StepLeader` leaves its times; travels as the model id."""

    result_path: str


class RpcLeader(SyncActor):
    """Rank 0 without a model: sends steps and takes the acks."""

    def on_start(self) -> None:
        """Measure each number of rows, in a cache of its own."""
        args = msgspec.msgpack.decode(self.context.args, type=RankArgs)
        task = msgspec.json.decode(args.options.model_id, type=RpcTask)
        ranks = rank_group(self, args)
        ranks.ping()
        found = []
        for num_rows in task.num_rows:
            plan = _decode_plan(num_rows, task.context)
            ranks.make_cache(Bounds(num_rows * (task.context // BLOCK_SIZE + 1)))
            times_ms = []
            for _ in range(NUM_WARM_UP + NUM_STEPS):
                started = time.perf_counter()
                ranks.begin_step(plan)
                ranks.end_step()
                times_ms.append(1000 * (time.perf_counter() - started))
            encoder = StepEncoder(args.options.model_id)
            encoder.encode(plan)
            num_bytes = len(msgspec.msgpack.encode(encoder.encode(plan)))
            times_ms = sorted(times_ms[NUM_WARM_UP:])
            p90_ms = times_ms[len(times_ms) * 9 // 10]
            found.append(RpcCost(statistics.median(times_ms), p90_ms, num_bytes))
        Path(task.result_path).write_bytes(msgspec.json.encode(found))
        ranks.shutdown()


class RpcWorker(SyncActor):
    """Reads and checks each step, as a worker does, and runs nothing."""

    _steps: StepDecoder
    _is_done = False

    def on_start(self) -> None:
        """Obey until the goodbye."""
        self.serve_until(lambda: self._is_done)

    @handles(rpc.Shutdown)
    def on_shutdown(self, message: rpc.Shutdown, envelope: Envelope) -> rpc.Bye:
        """End."""
        self._is_done = True
        self.request_stop()
        return rpc.Bye()

    @handles(rpc.Ping)
    def on_ping(self, message: rpc.Ping, envelope: Envelope) -> rpc.Pong:
        """Say who this is."""
        return rpc.Pong(self.context.rank, self.context.world_size, "none")

    @handles(rpc.ClearKvCache)
    def on_clear(self, message: rpc.ClearKvCache, envelope: Envelope) -> rpc.KvCacheCleared:
        """Begin anew."""
        self._steps = StepDecoder(Bounds(message.num_blocks), BLOCK_SIZE)
        return rpc.KvCacheCleared(0)

    @handles(rpc.GenerateStep)
    def on_step(self, message: rpc.GenerateStep, envelope: Envelope) -> rpc.GenerateStepOk:
        """Read it."""
        self._steps.decode(message)
        return rpc.GenerateStepOk(message.step)


class StepLeader(Leader):
    """The leader that serves; it measures its engine's steps once the model is loaded."""

    def on_start(self) -> None:
        """Load, prefill and decode."""
        super().on_start()
        task = msgspec.json.decode(self.args.options.model_id, type=StepTask)
        self._number = 0
        times = {
            f"prefill of {PROMPT_SIZE}": self._median_ms(1, is_prefill=True),
            "decode of 1": self._median_ms(1),
            "decode of 8": self._median_ms(8),
        }
        Path(task.result_path).write_bytes(msgspec.json.encode(times))

    def _median_ms(self, num_sequences: int, *, is_prefill: bool = False) -> float:
        """Return the time of one step, of the first kind or of the second."""
        times_ms = []
        for _ in range(6 if is_prefill else 2):
            for _ in range(num_sequences):
                self._submit()
            while self._is_prefilling:
                started = time.perf_counter()
                self.engine.step()
                if is_prefill:
                    times_ms.append(1000 * (time.perf_counter() - started))
            for _ in range(0 if is_prefill else 24):
                started = time.perf_counter()
                self.engine.step()
                times_ms.append(1000 * (time.perf_counter() - started))
            self.engine.cancel_owner(OWNER)
            self.engine.step()
        return statistics.median(times_ms)

    @property
    def _is_prefilling(self) -> bool:
        scheduler = self.engine.scheduler
        return bool(scheduler.waiting) or any(s.num_uncomputed > 1 for s in scheduler.running)

    def _submit(self) -> None:
        self._number += 1
        prompt = [(7 * index + self._number) % 4000 for index in range(PROMPT_SIZE)]
        fields: dict[str, Any] = {"max_tokens": 64, "temperature": 0.0, "ignore_eos": True}
        packed = pack_token_ids(prompt)
        name = f"bench-{self._number}"
        self.engine.submit(OWNER, Submit(name, self._number, packed, **fields))


def _decode_plan(num_rows: int, context: int) -> StepPlan:
    """Return a step in which all rows decode."""
    num_blocks = context // BLOCK_SIZE
    rows = []
    for number in range(num_rows):
        submit = Submit(f"bench-{number}", number, b"", max_tokens=1)
        sequence = Sequence("bench", submit, [5] * context, context, 1, frozenset(), 0)
        sequence.state = SequenceState.RUNNING
        sequence.block_table = list(range(number * num_blocks, (number + 1) * num_blocks))
        rows.append(PlannedRow(sequence, context - 1, 1, samples=True))
    return StepPlan(rows, num_rows)
