"""Serves a real front (its HTTP server, minus the actor runtime) on a free port for a test."""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import uvloop

from actors.front.sequences import SequenceTable
from actors.front.server import Server
from actors.front.services import Services
from actors.front.text_models import TextModels
from actors.open_requests import OpenRequests, open_requests_path
from cortexd.errors import CortexError
from cortexd.keys import Key
from cortexd.settings import Entitlements, Gateway, NeuronEntry, Settings
from engine.text.text_model import TextModel
from tests.doubles.fleet import LEADER, MODEL, Fleet
from tests.doubles.text import ByteTextModel
from tests.waiting import DEADLINE_S


def async_test(function: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test on uvloop, as production does, within a deadline."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        async def within_limit() -> None:
            async with asyncio.timeout(DEADLINE_S):
                await function(*args, **kwargs)

        uvloop.run(within_limit())

    return run


@dataclass(slots=True)
class ServedFront:
    """A front under test: where it listens, the fleet behind it, a client."""

    fleet: Fleet
    services: Services
    server: Server
    text_model: ByteTextModel
    port: int
    neuron_port: int
    http: aiohttp.ClientSession

    @property
    def url(self) -> str:
        """Return the API listener's base URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def neuron_url(self) -> str:
        """Return the neuron listener's base URL."""
        return f"http://127.0.0.1:{self.neuron_port}"

    def kill_leader(self) -> None:
        """Kill the leader and tell the front, as the root does."""
        incarnation = self.fleet.incarnation_of(LEADER)
        assert incarnation is not None, "the leader lives"
        error: CortexError = self.fleet.kill_leader()
        self.services.sequences.fail_leader(LEADER, incarnation, error)

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, Any, Any]:
        """Return status, decoded JSON body and headers."""
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        async with self.http.post(self.url + path, data=data, **kwargs) as response:
            return response.status, msgspec.json.decode(await response.read()), response.headers

    async def get(self, path: str, *, neuron: bool = False) -> tuple[int, Any]:
        """Return status and decoded JSON body."""
        base = self.neuron_url if neuron else self.url
        async with self.http.get(base + path) as response:
            return response.status, msgspec.json.decode(await response.read())

    async def chat(self, content: str = "Hi", **fields: Any) -> tuple[int, Any, Any]:
        """Ask for a chat completion."""
        return await self.post("/v1/chat/completions", chat_body(content, **fields))

    async def stream(self, path: str, body: Any) -> list[Any]:
        """Return the events of a stream; "[DONE]" and ": ping" comments stand as strings."""
        data = msgspec.json.encode(body)
        async with self.http.post(self.url + path, data=data) as response:
            assert response.status == 200, await response.text()
            return parse_events(await response.read())


# A refusal keeps its status, however long a busy machine stops the test before it comes. Tests of
# what a stream is told while it waits set a short one.
PATIENT_HOLD_MS: Final = int(1000 * DEADLINE_S)


def chat_body(content: str = "Hi", **fields: Any) -> dict[str, Any]:
    """Return a chat request's body."""
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def parse_events(data: bytes) -> list[Any]:
    """Return what a stream said, line by line."""
    events: list[Any] = []
    for line in data.decode().splitlines():
        if line.startswith(":"):
            events.append(line)
        elif line.startswith("data: "):
            text = line.removeprefix("data: ")
            events.append(text if text == "[DONE]" else msgspec.json.decode(text))
        else:
            assert line == "", f"not a line of a stream: {line!r}"
    return events


def _listener(send_buffer_bytes: int | None) -> socket.socket:
    listener = socket.socket()
    if send_buffer_bytes is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    listener.setblocking(False)
    return listener


@asynccontextmanager
async def served_front(
    *,
    send_buffer_bytes: int | None = None,
    neurons: Sequence[NeuronEntry] = (),
    real_text_model: TextModel | None = None,
    keys: Sequence[Key] | None = None,
    require_auth: bool = True,
    **gateway: Any,
) -> AsyncIterator[ServedFront]:
    """Serve until the block ends; then nothing of any request may be left.

    `keys`: those in force; None where none are configured.
    """
    fleet = Fleet()
    text_model = ByteTextModel()
    folder = tempfile.TemporaryDirectory()
    services = Services(
        settings=Settings(
            gateway=Gateway(**{"first_byte_hold_ms": PATIENT_HOLD_MS, **gateway}),
            neurons=list(neurons),
            entitlements=Entitlements(
                keys_file=None if keys is None else "keys.toml", require_auth=require_auth
            ),
        ),
        bus=fleet,
        log=logging.getLogger("front"),
        sequences=SequenceTable(),
        text_models=TextModels(loader=lambda files: real_text_model or text_model),  # type: ignore[arg-type,return-value]
        open_requests=OpenRequests(open_requests_path(Path(folder.name), "front.0", 1)),
    )
    if keys:
        services.keys.set_keys(list(keys))
        fleet.ledger.set_keys(keys)
    fleet.on_batch = services.sequences.dispatch
    listeners = {name: _listener(send_buffer_bytes) for name in ("api", "neuron")}
    api_port, neuron_port = (listener.getsockname()[1] for listener in listeners.values())
    server = Server(services)
    await server.start(listeners)
    async with aiohttp.ClientSession() as http:
        front = ServedFront(fleet, services, server, text_model, api_port, neuron_port, http)
        try:
            yield front
        finally:
            await server.close()
            await services.spending.close(1.0)
            services.leases.flush()
            services.reports.close()
            folder.cleanup()
    assert len(services.sequences) == 0, "sequences are left"
    assert fleet.open_leases() == set(), "leases are left"
    assert services.num_active == 0, "requests are left"
    assert not fleet.ledger.reservations, "reservations are left"
