"""Requests that wait in the router because all seats of their model are taken.

Part of the router actor (same loop). A request waits on a future; whoever frees a seat calls
`serve`, which leases the seat in the waiter's name at once, so that no newcomer takes it in
between. A request that ends leaves its place within the same message.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Final, Generic, Protocol, TypeVar

from cortexd.errors import Cancelled, CortexError, DeadlineExceeded, Overloaded, QueueTimeout
from cortexd.fair_queue import FairQueue, Ticket


class Waits(Protocol):
    """A request that may wait; `since`: when it first asked, monotonic seconds, 0: now."""

    @property
    def request_id(self) -> str:
        """Its lease."""

    @property
    def account(self) -> str:
        """Whose it is."""

    @property
    def since(self) -> float:
        """When it first asked."""


Wanted = TypeVar("Wanted", bound=Waits)
Answer = TypeVar("Answer")
_SECONDS_PER_PLACE: Final = 0.25
_MAX_RETRY_AFTER_S: Final = 60.0


class SeatQueue(Generic[Wanted, Answer]):
    """One bounded queue for each model; `option` is the setting that bounds it."""

    def __init__(self, option: str, max_depth: int, max_wait_s: float) -> None:
        self._option = option
        self._max_depth = max_depth
        self._max_wait_s = max_wait_s
        self._queues: dict[str, FairQueue[tuple[Wanted, str, asyncio.Future[Answer]]]] = {}

    def depth(self, model_id: str) -> int:
        """Return how many requests wait for a model."""
        return len(self._queues.get(model_id, ()))

    def depths(self) -> dict[str, int]:
        """Return how many requests wait, by model."""
        return {model_id: len(queue) for model_id, queue in self._queues.items()}

    async def wait(self, model_id: str, message: Wanted, front: str, deadline: float) -> Answer:
        """Return the answer as soon as a seat is free and it is this request's turn.

        `deadline` is that of the asker, monotonic seconds; asking again keeps the place, since
        places are ordered by `message.since`. Raises: Overloaded when the queue is full,
        QueueTimeout, DeadlineExceeded, Cancelled.
        """
        since = message.since or time.monotonic()
        last = since + self._max_wait_s
        if time.monotonic() >= last:
            raise self._timeout(model_id)
        queue = self._queues.setdefault(model_id, FairQueue(self._max_depth))
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        ticket = Ticket(message.request_id, message.account, since, (message, front, future))
        loser = queue.join(ticket)
        if loser is not None and not loser.waiter[2].done():
            loser.waiter[2].set_exception(self._full(model_id))
        try:
            async with asyncio.timeout(min(deadline, last) - time.monotonic()):
                return await future
        except TimeoutError:
            if deadline < last:
                raise DeadlineExceeded(f'model "{model_id}" has no free seat yet') from None
            raise self._timeout(model_id) from None
        finally:
            # Asked again meanwhile, the request has a new ticket, which is not ours to give up.
            if queue.find(message.request_id) is ticket:
                queue.leave(message.request_id)
            if not len(queue) and self._queues.get(model_id) is queue:
                del self._queues[model_id]

    def serve(
        self,
        model_id: str,
        running: Callable[[], Mapping[str, int]],
        lease: Callable[[Wanted, str], Answer | None],
    ) -> None:
        """Give free seats to those whose turn it is.

        `running` counts the running requests of each principal; `lease` returns None when there is
        no free seat, and raises what the request is to be told.
        """
        queue = self._queues.get(model_id)
        while queue is not None and (ticket := queue.next(running())) is not None:
            message, front, future = ticket.waiter
            if future.done():  # its time is over, it only has not run yet
                queue.leave(ticket.request_id)
                continue
            try:
                answer = lease(message, front)
            except CortexError as error:
                queue.leave(ticket.request_id)
                future.set_exception(error)
                continue
            if answer is None:
                return
            queue.leave(ticket.request_id)
            future.set_result(answer)

    def cancel(self, request_id: str) -> None:
        """Let a request that ended give its place up."""
        for queue in self._queues.values():
            ticket = queue.find(request_id)
            if ticket is not None:
                queue.leave(request_id)
                if not ticket.waiter[2].done():
                    ticket.waiter[2].set_exception(
                        Cancelled(f"request {request_id} ended while it waited")
                    )
                return

    def models(self) -> list[str]:
        """Return the models that requests wait for."""
        return list(self._queues)

    def _full(self, model_id: str) -> Overloaded:
        return Overloaded(
            f'model "{model_id}" has {self._max_depth} requests waiting already '
            f"({self._option}); retry later",
            retry_after_s=min(1 + self._max_depth * _SECONDS_PER_PLACE, _MAX_RETRY_AFTER_S),
        )

    def _timeout(self, model_id: str) -> QueueTimeout:
        return QueueTimeout(
            f'no seat of model "{model_id}" became free within {self._max_wait_s:g} s '
            "(gateway.queue_wait_s); retry later",
            retry_after_s=min(1 + self.depth(model_id) * _SECONDS_PER_PLACE, _MAX_RETRY_AFTER_S),
        )
