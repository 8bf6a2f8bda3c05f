"""Proposes which models to unload: for room, after idle time, and to start long-lived engines anew.

The router decides. State: none but the configuration; every proposal is a pure function
(`cortexd.eviction`) of the model list it is given.
"""

from __future__ import annotations

import asyncio

from actors.actor import AsyncActor, handles
from cortexd.errors import CortexError
from cortexd.eviction import choose_victims, fragmented_models, idle_models
from cortexd.log import event
from cortexd.messages import (
    EvictionProposal,
    ListModels,
    ModelList,
    ProposeEviction,
    RecycleModel,
    UnloadIdle,
)
from cortexd.messages.envelope import Envelope

_CHECK_PERIOD_S = 1.0


class Evictor(AsyncActor):
    """Answer eviction proposals and watch idle models."""

    async def on_start(self) -> None:
        """Watch the models of this host; a gateway has none."""
        self._watching: asyncio.Task[None] | None = None
        if self.context.settings.role != "gateway":
            self._watching = asyncio.create_task(self._watch_forever())

    async def on_stop(self) -> None:
        """Stop watching."""
        if self._watching:
            self._watching.cancel()

    @handles(ProposeEviction)
    async def on_propose(self, message: ProposeEviction, envelope: Envelope) -> EvictionProposal:
        """Return victims whose memory covers what is needed, or none when it cannot."""
        strategy = self.context.settings.eviction.strategy
        priorities = {model.model_id: model.priority for model in message.models}
        priorities[message.incoming] = message.priority
        victims = choose_victims(
            message.models,
            needed_bytes=message.needed_bytes,
            free_bytes=message.free_bytes,
            incoming=message.incoming,
            strategy=strategy,
            priorities=priorities,
        )
        return EvictionProposal(victims, strategy)

    async def _watch_forever(self) -> None:
        ttl_s = self.context.settings.eviction.idle_ttl_s
        while True:
            await asyncio.sleep(min(_CHECK_PERIOD_S, ttl_s or _CHECK_PERIOD_S))
            try:
                await self._look()
            except CortexError as error:
                event(self.log, "evictor.router_unreachable", 30, error=error.message)

    async def _look(self) -> None:
        eviction = self.context.settings.eviction
        answer = await self.ask("router", ListModels(), deadline_s=1.0)
        assert isinstance(answer, ModelList), "ListModels is answered by ModelList"
        idle_s = {model.model_id: model.last_used_s or 0.0 for model in answer.models}
        idle = idle_models(answer.models, eviction.idle_ttl_s)
        for model_id in idle:
            self.tell("router", UnloadIdle(model_id, idle_s[model_id]))
        for model_id in fragmented_models(answer.models, eviction.defrag_after_cycles):
            if model_id not in idle:
                self.tell("router", RecycleModel(model_id))
