"""Asks the router where a model runs, and waits while it loads, within the request's patience."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from actors.front.bus import Bus
from cortexd.errors import (
    ActorDown,
    CortexError,
    DeadlineExceeded,
    EngineRestarting,
    MailboxFull,
    ModelLoading,
)
from cortexd.messages import Place, Route, Routed, RoutedHere, RoutedRemote
from cortexd.messages.control import Message

# One ask at most; a longer wait is made of several, so that an answer lost with a router that was
# replaced costs no more than this.
_ROUTE_SLICE_S = 30.0
_QUICK_ANSWER_S = 5.0
# A killed router is back within tens of milliseconds, on a busy machine within seconds; longer than
# this is an outage.
_ROUTER_GRACE_S = 10.0
_ROUTER_PAUSE_S = 0.02
_LOADING_PAUSE_S = 0.25


async def route(bus: Bus, model: str, lease_id: str, *, wait_s: float, account: str) -> Routed:
    """Return where `model` runs on this host, waiting up to `wait_s` while it loads.

    Raises: ModelNotFound, ModelLoading (patience is over), ModelLoadFailed, ActorDown (no router).
    """
    since = time.monotonic()
    answer = await _ask(bus, lambda wait: Route(model, lease_id, wait, account, since), wait_s)
    assert isinstance(answer, Routed), "the router answers Route with Routed or an error"
    return answer


async def place(bus: Bus, wanted: Place, *, wait_s: float) -> RoutedHere | RoutedRemote:
    """Return which node serves a request, waiting up to `wait_s` while one loads the model.

    Raises: as `route`, and ModelNotFeasible, NoHealthyNode, Overloaded, QueueTimeout.
    """
    answer = await _ask(bus, lambda wait: msgspec.structs.replace(wanted, wait=wait), wait_s)
    assert isinstance(answer, RoutedHere | RoutedRemote), "the router answers Place with a node"
    return answer


async def _ask(bus: Bus, question: Callable[[bool], Message], wait_s: float) -> Message:
    """Return the router's answer; `question` is given whether the router may take its time."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    router_missing_since: float | None = None
    while True:
        remaining_s = deadline - loop.time()
        is_patient = remaining_s > 0
        deadline_s = min(remaining_s, _ROUTE_SLICE_S) if is_patient else _QUICK_ANSWER_S
        try:
            return await bus.ask("router", question(is_patient), deadline_s=deadline_s)
        except DeadlineExceeded:
            if not is_patient:
                raise
            router_missing_since = None
        except (ModelLoading, EngineRestarting):
            if not is_patient:
                raise
            router_missing_since = None
            await asyncio.sleep(min(_LOADING_PAUSE_S, remaining_s))
        except (ActorDown, MailboxFull) as error:
            router_missing_since = router_missing_since or loop.time()
            if loop.time() - router_missing_since > _ROUTER_GRACE_S:
                raise _router_unavailable(error) from None
            await asyncio.sleep(_ROUTER_PAUSE_S)


def _router_unavailable(error: CortexError) -> CortexError:
    return ActorDown(f"the router is not available: {error.message}", retry_after_s=2)
