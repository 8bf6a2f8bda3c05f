"""The root's side of all control links: who may speak, asks to children, registry events to all.

Only live incarnations that the root itself launched are heard. Registry events carry a sequence
without gaps: a child that connects gets a snapshot and then every event; one that does not read
them is reported to its owner and killed, since it would act on a stale view.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from actors.asks import AsyncAsks
from actors.beat_thread import BEAT_SUFFIX
from actors.mailbox import DeadLetters, Intake
from actors.registry import RegistryEvent
from actors.transport.codec import encode_message
from actors.transport.sockets import ControlHub, Sent, Transport
from cortexd.errors import ErrorInfo, MailboxFull
from cortexd.messages.control import ActorInfo, Message, Welcome
from cortexd.messages.envelope import ROOT, Address, Envelope, Header


class ControlPeer(Protocol):
    """A live incarnation, as the bus sees it."""

    address: Address
    wants_events: bool

    def on_message(self, envelope: Envelope) -> None:
        """Take in a message of this child."""

    def kill(self, reason: str) -> None:
        """End it: it does not read its control link."""


class ControlBus:
    """Sends to and receives from the children. Owned by the root's loop."""

    def __init__(self, transport: Transport, runtime_dir: Path) -> None:
        self._hub = ControlHub(transport, runtime_dir)
        self._peers: dict[str, ControlPeer] = {}
        self._last_id = 0
        self._asks = AsyncAsks(self._next_id)
        self.dead_letters = DeadLetters()
        self.sequence = 0
        self._intake = Intake(
            ROOT,
            0,
            self.dead_letters,
            now_ns=time.monotonic_ns,
            is_gone=lambda address: str(address) not in self._peers,
        )
        asyncio.get_running_loop().add_reader(self._hub.fd, self.drain)

    def __repr__(self) -> str:
        return f"ControlBus({len(self._peers)} children, {self.dead_letters})"

    def register(self, peer: ControlPeer) -> None:
        """Listen to an incarnation from now on."""
        self._peers[str(peer.address)] = peer

    def unregister(self, peer: ControlPeer, reason: str) -> None:
        """It is gone; what still comes from it is a dead letter, asks to it end."""
        self._peers.pop(str(peer.address), None)
        self._asks.fail_peer(peer.address, reason)

    def welcome(self, peer: ControlPeer, actors: list[ActorInfo]) -> None:
        """Send the snapshot; every later event follows."""
        peer.wants_events = True
        self.tell(peer.address, Welcome(self.sequence, actors))

    def publish(self, make_event: Callable[[int], RegistryEvent]) -> None:
        """Send the next registry event to all welcomed children."""
        self.sequence += 1
        registry_event = make_event(self.sequence)
        for peer in list(self._peers.values()):
            # A closed link is an exit on its way: the pidfd, or silence, tells how it ends. One
            # that came back without this event would see the gap in the sequence.
            if peer.wants_events and self.tell(peer.address, registry_event) == "full":
                peer.kill("does not read its control link")

    def tell(self, dst: Address, body: Message | ErrorInfo, re: int = 0) -> Sent:
        """Send one message; return what became of it."""
        header = Header(self._next_id(), re, ROOT, dst)
        sent = self._hub.send(str(dst), encode_message(header, body))
        self._recheck()
        return sent

    def reply(self, envelope: Envelope, body: Message | ErrorInfo) -> None:
        """Answer an ask of a child; that it is gone meanwhile is no concern of ours."""
        self.tell(envelope.src, body, re=envelope.id)

    async def ask(self, dst: Address, body: Message, *, deadline_s: float) -> Message:
        """Return a child's answer. Raises: its CortexError, DeadlineExceeded, ActorDown."""

        def send(ask_id: int, deadline_ns: int) -> None:
            header = Header(ask_id, 0, ROOT, dst, deadline_ns=deadline_ns)
            if self._hub.send(str(dst), encode_message(header, body)) != "sent":
                raise MailboxFull(f'actor "{dst.name}" does not read its control link')
            self._recheck()

        return await self._asks.ask(dst, deadline_s, send)

    def drain(self) -> None:
        """Take in every waiting message."""
        while (frames := self._hub.receive()) is not None:
            identity, *message = frames
            envelope = self._intake.admit(message)
            if envelope is None:
                continue
            sender = identity.decode(errors="replace").removesuffix(BEAT_SUFFIX)
            peer = self._peers.get(sender)
            if peer is None or sender != str(envelope.src):
                self.dead_letters.add("stale_incarnation", None)
            elif envelope.re:
                self._asks.resolve(envelope)
            else:
                peer.on_message(envelope)

    def close(self) -> None:
        """Stop listening."""
        asyncio.get_running_loop().remove_reader(self._hub.fd)
        self._hub.close()

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _recheck(self) -> None:
        """Look again after a send: the send may have eaten the descriptor's edge."""
        if self._hub.is_readable:
            asyncio.get_running_loop().call_soon(self.drain)
