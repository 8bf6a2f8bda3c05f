"""Brings up what should run when the router starts: adopts what runs already, loads the rest.

Part of the router actor, in the background. Models are loaded one after another; one that fails
does not stop the next; one whose registry did not answer is tried again at growing intervals, and
is "unloaded" in between, not failed.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from actors.router.managed_model import ManagedModel
from cortexd.errors import CortexError, DeadlineExceeded, RegistryUnreachable
from cortexd.log import event
from cortexd.messages import ActorInfo, DescribeModel, ModelLoaded

if TYPE_CHECKING:
    from actors.router.router import Router

_DESCRIBE_DEADLINE_S: Final = 10.0
_REGISTRY_RETRIES: Final = 6
_FIRST_DELAY_S: Final = 10.0
_MAX_DELAY_S: Final = 300.0


def activate(router: Router) -> None:
    """Begin to bring up what the last router ran, else the models of the start."""
    to_load = [router.models[options.model_id] for options in router.default_models]
    desired = router.local.remembered()
    if desired is not None:
        to_load = []
        for entry in desired:
            is_known = entry.options.model_id in router.models
            model = router.local.add(entry.options, is_known=is_known)
            model.given_policy = entry.policy
            to_load.append(model)
    leaders = {peer.group: peer for peer in router.peers.all() if peer.group and peer.rank == 0}
    missing = []
    for model in to_load:
        leader = leaders.get(model.group)
        if leader is None:
            model.is_due = True
            missing.append(model)
            continue
        model.become("recovering", stage="adopting")
        if leader.state == "ready":
            router.spawn(adopt(router, model, leader, leader.epoch))
    router.spawn(_load_in_order(router, missing))


async def adopt(router: Router, model: ManagedModel, leader: ActorInfo, epoch: int) -> None:
    """Route to a leader that is ready; a busy one is asked until it answers or is gone."""
    while True:
        try:
            loaded = await router.ask(leader.name, DescribeModel(), deadline_s=_DESCRIBE_DEADLINE_S)
            break
        except DeadlineExceeded:
            peer = router.peers.get(leader.name)
            if peer is None or peer.incarnation != leader.incarnation:
                return
    assert isinstance(loaded, ModelLoaded), "DescribeModel is answered by ModelLoaded"
    if model.is_in("loading", "recovering", "failed"):
        model.set_loaded(loaded, leader.name, leader.incarnation, epoch)
        router.loader.metrics.loaded(model, loaded.load_s)


async def _load_in_order(router: Router, models: list[ManagedModel]) -> None:
    """Load models one after another; return when each has been tried once."""
    for model in models:
        try:
            await _load(router, model)
        except RegistryUnreachable:
            router.spawn(_retry_later(router, model))


async def _load(router: Router, model: ManagedModel) -> None:
    """Load a model whose turn it is, or log why it cannot be. Raises: RegistryUnreachable."""
    try:
        await router.loader.ensure_loaded(model)
    except RegistryUnreachable:
        raise
    except CortexError as error:
        event(
            router.log, "model.load_failed", 40, model=model.options.model_id, error=error.message
        )
    _note_tried(router, model)


def _note_tried(router: Router, model: ManagedModel) -> None:
    model.is_due = False
    router.local.remember()


async def _retry_later(router: Router, model: ManagedModel) -> None:
    for number in range(_REGISTRY_RETRIES):
        delay_s = min(_FIRST_DELAY_S * 2.0**number, _MAX_DELAY_S)
        model.become("unloaded", stage=f"its registry did not answer; again in {delay_s:g} s")
        await asyncio.sleep(delay_s)
        with contextlib.suppress(RegistryUnreachable):
            return await _load(router, model)
    _note_tried(router, model)
