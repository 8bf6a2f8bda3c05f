"""A scripted root and peer for one real actor loop, all on one event loop.

The actor under test runs as it would in its process; the script plays the root's side of the
control link and one peer's inbox, so every ending can be arranged message by message.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from actors.actor import ActorContext, AsyncActor
from actors.actor_loop import ActorLoop
from actors.mailbox import DeadLetters, Intake
from actors.transport.codec import encode_message
from actors.transport.sockets import ControlHub, Inbox, Outbox, Transport, inbox_endpoint
from cortexd.errors import ErrorInfo
from cortexd.messages import ActorInfo, Hello, Ready, Stop, Welcome
from cortexd.messages.control import Message
from cortexd.messages.envelope import ROOT, Address, Envelope, Header
from cortexd.settings import Settings
from tests.waiting import DEADLINE_S

ACTOR = Address("actor", 1)
PEER = Address("peer", 1)
_Body = TypeVar("_Body", bound=Message | ErrorInfo)


@dataclass(slots=True)
class ScriptedBus:
    """What the test plays."""

    hub: ControlHub
    inbox: Inbox
    outbox: Outbox
    loop: ActorLoop
    exit_code: asyncio.Task[int]
    sequence: int = 0
    last_id: int = 0

    def tell(self, body: Message) -> None:
        """Send as the root."""
        self.last_id += 1
        assert self.hub.send(str(ACTOR), encode_message(Header(self.last_id, 0, ROOT, ACTOR), body))

    def send(
        self,
        body: Message | ErrorInfo,
        *,
        re: int = 0,
        deadline_s: float = 0.0,
        src: Address = PEER,
    ) -> int:
        """Send as the peer; an ask when it has a deadline. Returns the message id."""
        self.last_id += 1
        deadline_ns = time.monotonic_ns() + int(deadline_s * 1e9) if deadline_s else 0
        header = Header(self.last_id, re, src, ACTOR, deadline_ns=deadline_ns)
        self.outbox.send(ACTOR, encode_message(header, body))
        return self.last_id

    async def root_hears(self, kind: type[_Body]) -> _Body:
        """Return the next message of this kind to the root; beats and others are passed over."""
        while True:
            frames = await self._next(self.hub)
            envelope = _open(frames, ROOT)
            if isinstance(envelope.body, kind):
                return envelope.body

    async def peer_hears(self) -> Envelope:
        """Return the next message to the peer."""
        return _open(await self._next(self.inbox), PEER)

    async def _next(self, receiver: ControlHub | Inbox) -> list[bytes]:
        running = asyncio.get_running_loop()
        async with asyncio.timeout(DEADLINE_S):
            while (frames := receiver.receive()) is None:
                readable = asyncio.Event()
                running.add_reader(receiver.fd, readable.set)
                if not receiver.is_readable:
                    await readable.wait()
                running.remove_reader(receiver.fd)
            return frames


def _open(frames: list[bytes], own: Address) -> Envelope:
    intake = Intake(own, 0, DeadLetters(), now_ns=lambda: 0, is_gone=lambda _: False)
    envelope = intake.admit(frames[1:])
    assert envelope is not None
    return envelope


@asynccontextmanager
async def scripted(
    actor_class: type[AsyncActor], *, is_welcome: bool = True, is_stopped: bool = True
) -> AsyncIterator[ScriptedBus]:
    """Run an actor against the script; by default welcomed at the start and stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="ctx-") as name:
        folder = Path(name)
        transport = Transport()
        hub = ControlHub(transport, folder)
        context = ActorContext(
            name=ACTOR.name,
            incarnation=ACTOR.incarnation,
            settings=Settings(),
            args=b"",
            listeners={},
            log=logging.getLogger("cortexd"),
            runtime_dir=folder,
        )
        loop = ActorLoop(actor_class, context)
        bus = ScriptedBus(
            hub,
            Inbox(transport, inbox_endpoint(folder, PEER)),
            Outbox(transport, folder, PEER),
            loop,
            asyncio.create_task(loop.run()),
        )
        await bus.root_hears(Hello)
        if is_welcome:
            bus.tell(Welcome(0, [ActorInfo(PEER.name, PEER.incarnation, "ready")]))
            await bus.root_hears(Ready)
        yield bus
        if is_stopped:
            bus.tell(Stop())
            async with asyncio.timeout(DEADLINE_S):
                assert await bus.exit_code == 0
        for socket in (hub, bus.inbox, bus.outbox):
            socket.close()
        transport.close()
