"""The front as an actor: registry events, token batches, drain and stop."""

from __future__ import annotations

import asyncio
import logging
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from actors.actor import ActorContext
from actors.front import front as front_module
from actors.front.front import Front
from actors.front.text_models import TextModels
from actors.registry import Registry
from cortexd.messages import ActorDown, ActorInfo, GroupDown, TokenBatch, Welcome
from cortexd.messages.control import Message
from cortexd.messages.envelope import Address, Envelope
from cortexd.settings import Gateway, Settings
from tests.doubles.fleet import LEADER, Fleet
from tests.doubles.front import async_test, chat_body, parse_events
from tests.doubles.text import ByteTextModel


class FleetRuntime:
    """The runtime of one actor, with a double of the fleet behind it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.peers = Registry()
        names = {"router": 1, LEADER: 1}
        actors = [ActorInfo(name, incarnation, "ready") for name, incarnation in names.items()]
        self.peers.welcome(Welcome(0, actors))

    def tell(self, name: str, body: Message) -> None:
        """Pass on."""
        self._fleet.tell(name, body)

    async def ask(self, name: str, body: Message, *, deadline_s: float) -> Message:
        """Pass on."""
        return await self._fleet.ask(name, body, deadline_s=deadline_s)

    async def wait_for(self, name: str, *, deadline_s: float) -> ActorInfo:
        """Not used by the front."""
        raise NotImplementedError

    def report_progress(self, fraction: float, stage: str) -> None:
        """Not used by the front."""
        raise NotImplementedError


@asynccontextmanager
async def running_front(
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[Front, Fleet, str, aiohttp.ClientSession]]:
    """Run a front actor on one listener; give it, its fleet, its URL and a client."""
    monkeypatch.setattr(
        front_module,
        "TextModels",
        lambda: TextModels(loader=lambda files: ByteTextModel()),  # type: ignore[arg-type,return-value]
    )
    folder = tempfile.TemporaryDirectory()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    context = ActorContext(
        name="front.0",
        incarnation=1,
        settings=Settings(gateway=Gateway()),
        args=b"",
        listeners={"api": listener},
        log=logging.getLogger("front.0"),
        runtime_dir=Path(folder.name),
    )
    fleet = Fleet()
    front = Front(context)
    front.attach(FleetRuntime(fleet))
    sender, receiver = Address(LEADER, 1), Address("front.0", 1)

    def deliver(batch: TokenBatch) -> None:
        front.on_token_batch(batch, Envelope(1, 0, sender, receiver, 1, 0, batch))

    fleet.on_batch = deliver
    await front.on_start()
    async with aiohttp.ClientSession() as http:
        try:
            yield front, fleet, url, http
        finally:
            await front.on_stop()
            folder.cleanup()


async def open_stream(url: str, http: aiohttp.ClientSession) -> aiohttp.ClientResponse:
    """Start a chat stream."""
    return await http.post(url + "/v1/chat/completions", json=chat_body(stream=True))


@async_test
async def test_front_serves_until_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request runs end to end through the actor's own methods; after stop, nobody listens."""
    async with running_front(monkeypatch) as (_, _, url, http):
        async with http.post(url + "/v1/chat/completions", json=chat_body()) as response:
            assert response.status == 200
        async with http.get(url + "/readyz") as response:
            assert response.status == 200
    async with aiohttp.ClientSession() as other:
        with pytest.raises(aiohttp.ClientConnectionError):
            await other.get(url + "/livez")


@pytest.mark.parametrize("by_group", [False, True])
@async_test
async def test_front_death_notice_fails_the_streams_of_that_incarnation(
    monkeypatch: pytest.MonkeyPatch, by_group: bool
) -> None:
    """Either notice, of the leader or of its group, ends the stream with an error event."""
    async with running_front(monkeypatch) as (front, fleet, url, http):
        fleet.pause_after = 2
        response = await open_stream(url, http)
        await fleet.paused.wait()
        fleet.kill_leader()
        if by_group:
            front.on_group_down(GroupDown(1, "tiny", 1, "killed", True, False))
        else:
            front.on_actor_down(ActorDown(1, LEADER, 1, "tiny", 1, "killed"))
        events = parse_events(await response.read())
        assert events[-1]["error"]["code"] == "engine_restarting"


@async_test
async def test_front_drain_lets_streams_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that runs when the drain begins comes to its end; new connections are refused."""
    async with running_front(monkeypatch) as (front, fleet, url, http):
        fleet.pause_after = 2
        response = await open_stream(url, http)
        await fleet.paused.wait()
        drain = asyncio.create_task(front.on_drain(10))
        await asyncio.sleep(0)
        fleet.resume()
        await drain
        assert parse_events(await response.read())[-1] == "[DONE]"


@async_test
async def test_front_drain_deadline_ends_streams_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stream that outlives the drain is told so before the front goes."""
    async with running_front(monkeypatch) as (front, fleet, url, http):
        fleet.pause_after = 2
        response = await open_stream(url, http)
        await fleet.paused.wait()
        await front.on_drain(0.01)
        events = parse_events(await response.read())
        assert events[-1]["error"]["code"] == "server_shutting_down"
