"""Loads at remote neurons on behalf of the router: one at a time per model, failures cool down.

Part of the router actor (same loop), no state on disk. A node where a load failed is the last
choice for that model until its cool-down is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cortexd.errors import ActorDown, CortexError, ModelLoadFailed, NoHealthyNode
from cortexd.log import event
from cortexd.messages import LoadOnNode
from cortexd.models import LoadOptions, ModelPolicy

if TYPE_CHECKING:
    from actors.router.router import Router

_LOAD_DEADLINE_S: Final = 24 * 3600.0
_FIRST_COOLDOWN_S: Final = 10.0
_MAX_COOLDOWN_S: Final = 600.0
_MAX_RETRY_AFTER_S: Final = 60.0
_MAX_POLLERS: Final = 3


@dataclass(slots=True)
class RemoteLoad:
    """A load that runs at a node, or has ended; `error`: how it failed."""

    node: str
    is_done: bool = False
    error: CortexError | None = None


@dataclass(slots=True)
class LoadFailure:
    """The last failures to load one model at one node."""

    error: CortexError
    failed_at: float
    num_failures: int

    @property
    def cooldown_left_s(self) -> float:
        """Seconds until it is tried again."""
        cooldown_s = _FIRST_COOLDOWN_S * 2.0 ** min(self.num_failures - 1, 10)
        return max(0.0, self.failed_at + min(cooldown_s, _MAX_COOLDOWN_S) - time.monotonic())


class RemoteLoads:
    """The loads that run, and the failures of those that did not work."""

    def __init__(self, router: Router, on_change: Callable[[], None]) -> None:
        self._router = router
        self._on_change = on_change
        self._running: dict[str, RemoteLoad] = {}
        self._failures: dict[tuple[str, str], LoadFailure] = {}

    def running(self, model_id: str) -> RemoteLoad | None:
        """Return the load of a model that runs, if there is one."""
        return self._running.get(model_id)

    def failed_nodes(self, model_id: str) -> set[str]:
        """Return the nodes where loading the model is not tried at present."""
        return {
            node
            for (failed_id, node), failure in self._failures.items()
            if failed_id == model_id and failure.cooldown_left_s > 0
        }

    def check(self, model_id: str, node: str) -> None:
        """Raise what made the last load there fail while it cools down.

        A fault of the model's files would be the same at every other node.
        """
        for (failed_id, _), failure in self._failures.items():
            is_structural = failure.error.http_status < 500
            if failed_id == model_id and is_structural and failure.cooldown_left_s > 0:
                raise failure.error
        failure_here = self._failures.get((model_id, node))
        if failure_here is None or failure_here.cooldown_left_s <= 0:
            return
        failure, cause = failure_here, failure_here.error
        error_class = NoHealthyNode if isinstance(cause, NoHealthyNode) else ModelLoadFailed
        raise error_class(
            f'model "{model_id}" could not be loaded: {cause.message}',
            retry_after_s=min(failure.cooldown_left_s, _MAX_RETRY_AFTER_S),
        )

    def begin(
        self, model_id: str, node: str, options: LoadOptions, policy: ModelPolicy | None
    ) -> RemoteLoad:
        """Start a load and return it; `on_change` is called at its end."""
        load = RemoteLoad(node)
        self._running[model_id] = load
        self._router.spawn(self._run(model_id, load, LoadOnNode(node, options, policy)))
        return load

    async def _run(self, model_id: str, load: RemoteLoad, order: LoadOnNode) -> None:
        log, key = self._router.log, (model_id, load.node)
        event(log, "model.loading", model=model_id, node=load.node)
        try:
            await self._ask(order)
        except CortexError as error:
            load.error = error
            before = self._failures.get(key)
            num_failures = 1 + (before.num_failures if before is not None else 0)
            self._failures[key] = LoadFailure(error, time.monotonic(), num_failures)
            event(log, "model.load_failed", 40, model=model_id, node=load.node, error=error.message)
        else:
            self._failures.pop(key, None)
            event(log, "model.loaded", model=model_id, node=load.node)
        finally:
            load.is_done = True
            del self._running[model_id]
            self._on_change()

    async def _ask(self, order: LoadOnNode) -> None:
        """Return when the model is loaded at its node, and seen there by a poll."""
        patience_s = self._router.context.settings.supervision.start_timeout_s
        for attempt in range(_MAX_POLLERS):
            try:
                await self._router.ask("poller", order, deadline_s=_LOAD_DEADLINE_S)
                return
            except ActorDown:
                # The load goes on at the node, which lets another poller's question join it.
                if attempt == _MAX_POLLERS - 1:
                    raise
                await self._router.wait_for("poller", deadline_s=patience_s)
