"""Proposes which models to unload: for room, and after idle time. The router decides.

State: none but the configuration; every proposal is a pure function (`cortexd.eviction`) of the
model list it is given.
"""

from __future__ import annotations

import asyncio

import msgspec

from actors.actor import AsyncActor, handles
from cortexd.catalogue import Catalogue
from cortexd.errors import CortexError
from cortexd.eviction import choose_victims, idle_models
from cortexd.log import event
from cortexd.messages import (
    CatalogueChanged,
    EvictionProposal,
    ListModels,
    ModelList,
    ProposeEviction,
    UnloadIdle,
)
from cortexd.messages.envelope import Envelope

_IDLE_CHECK_PERIOD_S = 1.0


class Evictor(AsyncActor):
    """Answer eviction proposals and watch idle models."""

    async def on_start(self) -> None:
        """Watch for idle models when a time-to-live is configured."""
        catalogue = msgspec.msgpack.decode(self.context.args, type=Catalogue)
        self._priorities = catalogue.priorities()
        self._idle_task: asyncio.Task[None] | None = None
        if self.context.settings.eviction.idle_ttl_s > 0:
            self._idle_task = asyncio.create_task(self._watch_idle())

    async def on_stop(self) -> None:
        """Stop watching."""
        if self._idle_task:
            self._idle_task.cancel()

    @handles(CatalogueChanged)
    def on_catalogue_changed(self, message: CatalogueChanged, envelope: Envelope) -> None:
        """Go by the new residency classes."""
        self._priorities = message.catalogue.priorities()

    @handles(ProposeEviction)
    async def on_propose(self, message: ProposeEviction, envelope: Envelope) -> EvictionProposal:
        """Return victims whose memory covers what is needed, or none when it cannot."""
        strategy = self.context.settings.eviction.strategy
        victims = choose_victims(
            message.models,
            needed_bytes=message.needed_bytes,
            free_bytes=message.free_bytes,
            incoming=message.incoming,
            strategy=strategy,
            priorities=self._priorities,
        )
        return EvictionProposal(victims, strategy)

    async def _watch_idle(self) -> None:
        ttl_s = self.context.settings.eviction.idle_ttl_s
        while True:
            await asyncio.sleep(min(_IDLE_CHECK_PERIOD_S, ttl_s))
            try:
                answer = await self.ask("router", ListModels(), deadline_s=1.0)
                assert isinstance(answer, ModelList), "ListModels is answered by ModelList"
                idle_s = {model.model_id: model.last_used_s or 0.0 for model in answer.models}
                for model_id in idle_models(answer.models, ttl_s):
                    self.tell("router", UnloadIdle(model_id, idle_s[model_id]))
            except CortexError as error:
                event(self.log, "evictor.router_unreachable", 30, error=error.message)
