"""The front actor: HTTP in, messages out, token batches back to the streams that wait for them."""

from __future__ import annotations

import asyncio
import contextlib

from actors.actor import ActorContext, AsyncActor, handles
from actors.connection_share import ConnectionShare
from actors.front.sequences import SequenceTable
from actors.front.server import Server
from actors.front.services import Services
from actors.front.text_models import TextModels
from actors.open_requests import OpenRequests, open_requests_path
from cortexd.errors import CortexError, EngineRestarting, ShuttingDown
from cortexd.log import event
from cortexd.log_batch import batch_log_lines
from cortexd.messages import ActorDown, ActorUp, GroupDown, KeysChanged, ReadText, TokenBatch
from cortexd.messages.envelope import Envelope

# What is kept of the drain deadline for error events to reach their clients, and to spare.
_LAST_WORDS_S = 0.5


class Front(AsyncActor):
    """Serve the OpenAI API and the neuron API on the listeners of this role."""

    def __init__(self, context: ActorContext) -> None:
        super().__init__(context)
        self._sequences = SequenceTable()
        self._services = Services(
            settings=context.settings,
            bus=self,
            log=context.log,
            sequences=self._sequences,
            text_models=TextModels(),
            open_requests=OpenRequests(
                open_requests_path(context.runtime_dir, context.name, context.incarnation)
            ),
        )
        self._server = Server(self._services, _share(context))

    def incarnation_of(self, name: str) -> int | None:
        """Return the incarnation of a ready actor, None when there is none."""
        peer = self.peers.get(name)
        return peer.incarnation if peer is not None and peer.state == "ready" else None

    async def on_start(self) -> None:
        """Accept connections."""
        batch_log_lines()
        await self._server.start(self.context.listeners)

    async def on_drain(self, deadline_s: float) -> None:
        """Take nothing new, let streams finish, tell those that did not in time."""
        self._services.is_draining = True
        self._server.stop_accepting()
        await self._wait_until_idle(max(deadline_s - 2 * _LAST_WORDS_S, 0.0))
        if self._services.num_active:
            event(self.log, "front.drain_incomplete", 30, active=self._services.num_active)
            self._services.end_all(_shutting_down())
            await self._wait_until_idle(_LAST_WORDS_S)

    async def on_stop(self) -> None:
        """Close every connection."""
        self._services.is_draining = True
        self._services.end_all(_shutting_down())
        await self._server.close()
        await self._services.spending.close(_LAST_WORDS_S)
        self._services.leases.flush()
        self._services.reports.close()

    async def _wait_until_idle(self, timeout_s: float) -> None:
        if self._services.num_active:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._services.idle.wait()

    @handles(TokenBatch)
    def on_token_batch(self, message: TokenBatch, envelope: Envelope) -> None:
        """Hand tokens to their requests; inline, so that batches keep their order."""
        self._sequences.dispatch(message)

    @handles(KeysChanged)
    def on_keys_changed(self, message: KeysChanged, envelope: Envelope) -> None:
        """Take over the API keys in force."""
        self._services.keys.set_keys(message.keys)

    @handles(ReadText)
    def on_read_text(self, message: ReadText, envelope: Envelope) -> None:
        """Read the tokenizer while the engine still loads the weights."""
        self._services.text_models.prepare(message.files)

    def on_actor_up(self, up: ActorUp) -> None:
        """Tell a router that was restarted what runs."""
        if up.actor.name == "router":
            self._services.leases.announce()

    def on_actor_down(self, down: ActorDown) -> None:
        """Fail what ran on a leader that died."""
        self._sequences.fail_leader(down.name, down.incarnation, _restarting(down.reason))

    def on_group_down(self, down: GroupDown) -> None:
        """Fail what ran on a group that ended."""
        self._sequences.fail_group(down.group, down.epoch, _restarting(down.reason))


def _share(context: ActorContext) -> ConnectionShare | None:
    """Return this front's share of the connections, None when it is alone."""
    num_fronts = context.settings.gateway.fronts
    if num_fronts == 1:
        return None
    index = int(context.name.rpartition(".")[2])
    return ConnectionShare(context.runtime_dir, num_fronts, index)


def _shutting_down() -> CortexError:
    return ShuttingDown("this server is shutting down; try again", retry_after_s=5)


def _restarting(reason: str) -> CortexError:
    return EngineRestarting(f"the engine of this model ended ({reason}); try again")
