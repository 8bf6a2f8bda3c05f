"""Requests for the models of this host: who waits for a load or a seat, who holds a lease.

Part of the router actor (same loop). A model in use is never unloaded: each running request holds a
lease until its end, or the death of the front that asked for it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from actors.router.load_errors import load_failed, loading_error, may_retry
from actors.router.managed_model import Lease, ManagedModel
from actors.router.open_waits import OpenWaits
from actors.router.seat_queue import SeatQueue
from cortexd.errors import DeadlineExceeded, NodeDraining, QueueTimeout
from cortexd.messages import Route, Routed
from cortexd.messages.envelope import Envelope

if TYPE_CHECKING:
    from actors.router.router import Router

_DRAINING_RETRY_AFTER_S: Final = 5.0
# More than the engine runs at once, so that it has the next request at hand when one ends.
_SPARE_SEATS_SHARE: Final = 8


class LocalRequests:
    """Give leases, in turn when there are more requests than seats."""

    def __init__(self, router: Router) -> None:
        settings = router.context.settings
        self._router = router
        most = settings.engine.max_num_seqs
        self._num_seats = most + max(1, most // _SPARE_SEATS_SHARE)
        self._seats: SeatQueue[Route, Routed] = SeatQueue(
            "engine.max_queue_depth", settings.engine.max_queue_depth, settings.gateway.queue_wait_s
        )
        self._waits = OpenWaits()  # for a load

    async def route(self, message: Route, envelope: Envelope) -> Routed:
        """Lease a loaded model, loading it first when it is cold.

        Raises: ModelNotFound, WrongModality, ModelLoading, ModelLoadFailed, NodeDraining,
        Overloaded, QueueTimeout, DeadlineExceeded, Cancelled.
        """
        if self._router.is_draining:
            raise NodeDraining(
                "this host takes no new requests (cortexd drain on); try another",
                retry_after_s=_DRAINING_RETRY_AFTER_S,
            )
        model = self._router.local.find(message.model)
        self._router.local.catalogue.check_generates(message.model)
        was_cold = model.state != "loaded"
        while model.state != "loaded":
            await self._bring_up(model, message, envelope)
        front = f"{envelope.src.name}.{envelope.src.incarnation}"
        model_id = model.options.model_id
        if len(model.leases) < self._num_seats and not self._seats.depth(model_id):
            return self._lease(model, message, front, was_cold=was_cold)
        if not message.wait:
            raise QueueTimeout(f'model "{model_id}" has no free seat; retry later', retry_after_s=2)
        return await self._seats.wait(model_id, message, front, envelope.deadline_ns / 1e9)

    async def _bring_up(self, model: ManagedModel, message: Route, envelope: Envelope) -> None:
        """Begin a load when none runs, and return at the model's next change."""
        if model.state == "failed" and (model.cooldown_left_s > 0 or not may_retry(model.error)):
            raise load_failed(model)
        self._router.loader.bring_up(model)
        if not message.wait:
            raise loading_error(model.options.model_id, model.state, model.loading)
        await self._wait(model, message, envelope)
        if model.options.model_id not in self._router.models and not model.error:
            raise self._router.local.not_found(message.model)

    async def _wait(self, model: ManagedModel, message: Route, envelope: Envelope) -> None:
        """Return at the model's next change.

        Raises: DeadlineExceeded, Cancelled when the request ended meanwhile. Without both, a lease
        would be opened that nobody closes.
        """
        left_s = (envelope.deadline_ns - time.monotonic_ns()) / 1e9
        with self._waits.of(message.request_id):
            try:
                await asyncio.wait_for(model.wait_changed(), left_s)
            except TimeoutError:
                raise DeadlineExceeded(
                    f'model "{model.options.model_id}" is still {model.state}'
                ) from None

    def _lease(self, model: ManagedModel, message: Route, front: str, *, was_cold: bool) -> Routed:
        model_id = model.options.model_id
        model.leases[message.request_id] = Lease(model_id, front, message.account)
        model.last_used = time.monotonic()
        assert model.files is not None, "a loaded model is described"
        assert model.spec is not None, "a loaded model is described"
        assert model.limits is not None, "a loaded model is described"
        return Routed(
            model_id,
            model.leader,
            model.leader_incarnation,
            model.epoch,
            model.files,
            model.spec,
            model.limits,
            was_cold,
            model.policy.defaults,
        )

    def take_over(self, request_id: str, lease: Lease) -> None:
        """Hold a lease that was granted before this router was started."""
        model = self._router.models.get(lease.model_id)
        if model is not None:
            model.leases[request_id] = lease

    def end(self, request_id: str) -> None:
        """Close a lease, or the wait for one; the next in the queue gets its seat."""
        self._waits.end(request_id)
        self._seats.cancel(request_id)
        for model in self._router.models.values():
            if model.leases.pop(request_id, None) is not None:
                model.last_used = time.monotonic()
                if not model.leases:
                    model.wake()
                self.serve(model)

    def front_down(self, front: str) -> None:
        """Close the leases of a dead front ("name.incarnation")."""
        for model in self._router.models.values():
            gone = [request for request, lease in model.leases.items() if lease.front == front]
            for request in gone:
                del model.leases[request]
            if gone:
                model.wake()
                self.serve(model)

    def serve(self, model: ManagedModel) -> None:
        """Give a model's free seats to those who wait; they ask again when it runs no more."""

        def lease(message: Route, front: str) -> Routed | None:
            if model.state != "loaded":
                raise loading_error(model.options.model_id, model.state, model.loading)
            if len(model.leases) >= self._num_seats:
                return None
            return self._lease(model, message, front, was_cold=False)

        def running() -> Counter[str]:
            return Counter(lease.account for lease in model.leases.values())

        self._seats.serve(model.options.model_id, running, lease)

    def queue_depths(self) -> dict[str, int]:
        """Return how many requests wait for a seat, by model."""
        return self._seats.depths()
