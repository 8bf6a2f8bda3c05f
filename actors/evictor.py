"""Proposes which models to unload: for room, after idle time, and to start long-lived engines anew.

The router decides. State: none but the configuration; every proposal is a pure function
(`cortexd.eviction`, `cortexd.sleeping`) of the model list it is given.
"""

from __future__ import annotations

import asyncio

from actors.actor import AsyncActor, handles
from cortexd.errors import CortexError
from cortexd.eviction import choose_victims, fragmented_models, idle_models
from cortexd.log import event
from cortexd.messages import (
    EvictionProposal,
    HostReport,
    ListModels,
    ModelList,
    ProposeEviction,
    QueryHost,
    RecycleModel,
    UnloadIdle,
)
from cortexd.messages.envelope import Envelope
from cortexd.models import ModelStatus
from cortexd.sleeping import choose_sleepers, overslept

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
        chosen = [model for name in victims for model in message.models if model.model_id == name]
        sleepers = choose_sleepers(
            chosen,
            host_free_bytes=message.host_free_bytes,
            ttl_s=self.context.settings.eviction.sleep_ttl_s,
        )
        return EvictionProposal(victims, strategy, sleepers)

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
        by_id = {model.model_id: model for model in answer.models}
        idle = idle_models(answer.models, eviction.idle_ttl_s)
        free = await self._host_free_bytes(answer.models)
        sleepers = choose_sleepers(
            [by_id[model_id] for model_id in idle],
            host_free_bytes=free,
            ttl_s=eviction.sleep_ttl_s,
        )
        late = overslept(answer.models, host_free_bytes=free, ttl_s=eviction.sleep_ttl_s)
        for model_id, reason in [*((name, "idle") for name in idle), *late]:
            idle_s = by_id[model_id].last_used_s or 0.0
            self.tell("router", UnloadIdle(model_id, idle_s, reason, model_id in sleepers))
        for model_id in fragmented_models(answer.models, eviction.defrag_after_cycles):
            if model_id not in idle:
                self.tell("router", RecycleModel(model_id))

    async def _host_free_bytes(self, models: list[ModelStatus]) -> int | None:
        """Return the host's free memory; None where no model sleeps or could."""
        if not any(model.sleep_bytes for model in models):
            return None
        answer = await self.ask("poller", QueryHost(), deadline_s=1.0)
        assert isinstance(answer, HostReport), "QueryHost is answered by HostReport"
        return answer.host_free_bytes
