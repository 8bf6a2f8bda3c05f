"""The sequences that run for this front: token batches in, one bounded queue per request out.

All calls are made on the event loop; `dispatch` runs inline in the message handler, so deltas keep
their order. A leader's death, or the front's own end, fails the queues it concerns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from cortexd.errors import Cancelled, CortexError
from cortexd.messages import TokenBatch
from cortexd.messages.inference import SequenceDelta

MAX_PENDING_TOKENS = 4096
# An engine answers each cancellation at its next step; of more than this only the latest are timed.
_MAX_CANCELLED = 4096


class DeltaQueue:
    """Deltas of one request, in order, as (choice index, delta).

    Bounded: a request whose consumer is too far behind fails and `on_overflow` is called at once,
    so that the engine does not work for a client that does not read.
    """

    def __init__(self, max_pending_tokens: int, on_overflow: Callable[[], None]) -> None:
        self._items: list[tuple[int, SequenceDelta]] = []
        self._num_pending_tokens = 0
        self._max_pending_tokens = max_pending_tokens
        self._on_overflow = on_overflow
        self._error: CortexError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, choice_index: int, delta: SequenceDelta) -> None:
        """Add one delta; dropped when the queue has failed."""
        if self._error is not None:
            return
        self._items.append((choice_index, delta))
        self._num_pending_tokens += len(delta.token_ids)
        if self._num_pending_tokens > self._max_pending_tokens:
            self.fail(Cancelled(f"the client is {self._num_pending_tokens} tokens behind"))
            self._on_overflow()
        else:
            self._wake()

    def fail(self, error: CortexError) -> None:
        """End the queue with an error; what is queued before it is still delivered."""
        if self._error is None:
            self._error = error
            self._wake()

    async def get(self, timeout_s: float) -> list[tuple[int, SequenceDelta]]:
        """Return everything queued, waiting up to `timeout_s`; [] when nothing came."""
        if not self._items and self._error is None and timeout_s > 0:
            await self._wait(timeout_s)
        if self._items:
            items, self._items = self._items, []
            self._num_pending_tokens = 0
            return items
        if self._error is not None:
            raise self._error
        return []

    async def _wait(self, timeout_s: float) -> None:
        # A plain future and a timer: asyncio.wait_for costs several times as much per token.
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(timeout_s, self._wake)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class RunningSequence:
    """Where one sequence runs and who reads its tokens."""

    __slots__ = ("choice_index", "epoch", "group", "incarnation", "leader", "queue")

    def __init__(
        self, queue: DeltaQueue, choice_index: int, leader: str, incarnation: int, epoch: int
    ) -> None:
        self.queue = queue
        self.choice_index = choice_index
        self.leader = leader
        self.group = leader.rpartition("/")[0]
        self.incarnation = incarnation
        self.epoch = epoch


class SequenceTable:
    """All running sequences of one front, by the id their leader knows."""

    def __init__(self) -> None:
        self._running: dict[int, RunningSequence] = {}
        self._cancelled: dict[int, tuple[float, Callable[[float], None]]] = {}
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._running)

    def open(self, sequence: RunningSequence) -> int:
        """Add a sequence and return its id, unique in this front's life."""
        self._last_id += 1
        self._running[self._last_id] = sequence
        return self._last_id

    def close(self, sequence_id: int) -> None:
        """Forget a sequence; later deltas for it are dropped."""
        self._running.pop(sequence_id, None)

    def cancel(self, sequence_id: int, on_freed: Callable[[float], None]) -> None:
        """Forget a sequence; `on_freed` gets the seconds until the engine says that it ended."""
        self.close(sequence_id)
        if len(self._cancelled) >= _MAX_CANCELLED:
            del self._cancelled[next(iter(self._cancelled))]
        self._cancelled[sequence_id] = (time.monotonic(), on_freed)

    def dispatch(self, batch: TokenBatch) -> None:
        """Hand each delta to its request; deltas of cancelled sequences find nobody."""
        for delta in batch.deltas:
            sequence = self._running.get(delta.sequence_id)
            if sequence is not None:
                sequence.queue.put(sequence.choice_index, delta)
            elif delta.finish_reason is not None and delta.sequence_id in self._cancelled:
                cancelled_at, on_freed = self._cancelled.pop(delta.sequence_id)
                on_freed(time.monotonic() - cancelled_at)

    def fail_leader(self, name: str, incarnation: int, error: CortexError) -> None:
        """Fail what ran on this incarnation of a leader."""
        for sequence in list(self._running.values()):
            if sequence.leader == name and sequence.incarnation == incarnation:
                sequence.queue.fail(error)

    def fail_group(self, group: str, epoch: int, error: CortexError) -> None:
        """Fail what ran on this epoch of a group."""
        for sequence in list(self._running.values()):
            if sequence.group == group and sequence.epoch == epoch:
                sequence.queue.fail(error)

    def fail_all(self, error: CortexError) -> None:
        """Fail everything that runs."""
        for sequence in list(self._running.values()):
            sequence.queue.fail(error)
