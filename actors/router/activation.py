"""Loads the models that should run when the daemon starts, one after another, in the background.

Part of the router actor. One that fails does not stop the next; one whose registry did not answer
is tried again at growing intervals, and is "unloaded" in between, not failed.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from actors.router.managed_model import ManagedModel
from cortexd.errors import CortexError, RegistryUnreachable
from cortexd.log import event

if TYPE_CHECKING:
    from actors.router.router import Router

_REGISTRY_RETRIES: Final = 6
_FIRST_DELAY_S: Final = 10.0
_MAX_DELAY_S: Final = 300.0


async def load_in_order(router: Router, models: list[ManagedModel]) -> None:
    """Load models one after another; return when each has been tried once."""
    for model in models:
        try:
            await router.loader.ensure_loaded(model)
        except RegistryUnreachable:
            router.spawn(_retry_later(router, model))
        except CortexError as error:
            event(
                router.log,
                "model.load_failed",
                40,
                model=model.options.model_id,
                error=error.message,
            )


async def _retry_later(router: Router, model: ManagedModel) -> None:
    for number in range(_REGISTRY_RETRIES):
        delay_s = min(_FIRST_DELAY_S * 2.0**number, _MAX_DELAY_S)
        model.become("unloaded", stage=f"its registry did not answer; again in {delay_s:g} s")
        await asyncio.sleep(delay_s)
        try:
            await router.loader.ensure_loaded(model)
            return
        except RegistryUnreachable:
            continue
