"""One incarnation's connections: its inbox, its peers, the root, and its view of who runs.

Shared by the two actor loops, which differ only in how they wait. Owned by one thread.
"""

from __future__ import annotations

import contextlib
import resource
import time
from typing import Final

from actors.actor import ActorContext
from actors.mailbox import DeadLetters, Intake
from actors.registry import Registry, RegistryEvent
from actors.transport.codec import encode_message
from actors.transport.sockets import ControlLink, Frames, Inbox, Outbox, Transport, inbox_endpoint
from cortexd.errors import ActorDown as ActorDownError
from cortexd.errors import CortexError, ErrorInfo, Internal
from cortexd.messages.control import ActorDown, Beat, Hello, Message
from cortexd.messages.envelope import ROOT, Address, Envelope, Header

_PAGE_BYTES: Final = resource.getpagesize()


class Link:
    """Sends, receives and addresses for one incarnation."""

    def __init__(self, context: ActorContext) -> None:
        self.own = context.address
        self.epoch = context.epoch
        self.peers = Registry()
        self.dead_letters = DeadLetters()
        self.transport = Transport()
        self.endpoint = inbox_endpoint(context.runtime_dir, self.own)
        self.inbox = Inbox(self.transport, self.endpoint)
        self.outbox = Outbox(self.transport, context.runtime_dir, self.own)
        self.control = ControlLink(self.transport, context.runtime_dir, str(self.own))
        self._last_id = 0
        self._intake = Intake(
            self.own,
            self.epoch,
            self.dead_letters,
            now_ns=time.monotonic_ns,
            is_gone=self.peers.is_gone,
            on_undecodable=self._refuse_undecodable,
        )

    def __repr__(self) -> str:
        return f"Link({self.own}, {self.peers}, {self.dead_letters})"

    def next_id(self) -> int:
        """Return a fresh message id."""
        self._last_id += 1
        return self._last_id

    def hello(self, pid: int) -> None:
        """Tell the root that the inbox is bound."""
        self.tell_root(Hello(pid, self.endpoint))

    def address_of(self, name: str) -> tuple[Address, int]:
        """Return address and epoch of a peer that runs. Raises: ActorDown."""
        if name == ROOT.name:
            return ROOT, 0
        peer = self.peers.get(name)
        if peer is None:
            raise ActorDownError(f'actor "{name}" is not running')
        return Address(name, peer.incarnation), peer.epoch

    def send(
        self,
        dst: Address,
        body: Message | ErrorInfo,
        *,
        message_id: int = 0,
        re: int = 0,
        epoch: int = 0,
        deadline_ns: int = 0,
    ) -> None:
        """Send one message. Raises: MailboxFull, RequestTooLarge."""
        header = Header(
            message_id or self.next_id(), re, self.own, dst, epoch or self.epoch, deadline_ns
        )
        frames = encode_message(header, body)
        if dst == ROOT:
            self.control.send(frames)
        else:
            self.outbox.send(dst, frames)

    def tell(self, name: str, body: Message) -> None:
        """Send to whoever is `name` now. Raises: ActorDown, MailboxFull, RequestTooLarge."""
        address, epoch = self.address_of(name)
        self.send(address, body, epoch=epoch)

    def tell_root(self, body: Message | ErrorInfo) -> None:
        """Send to the root."""
        self.send(ROOT, body)

    def reply(self, envelope: Envelope, body: Message | ErrorInfo) -> None:
        """Answer an ask; an answer that cannot be delivered is a dead letter."""
        src = envelope.src
        if self.peers.is_gone(src):
            self._dead("stale_incarnation", envelope)
            return
        try:
            self.send(src, body, re=envelope.id)
        except CortexError as error:
            if not isinstance(body, ErrorInfo) and error.code == "request_too_large":
                self.send(src, error.to_info(), re=envelope.id)
            else:
                self._dead("full", envelope)

    def refuse(self, envelope: Envelope, error: CortexError) -> None:
        """Answer an ask with an error; a message that awaits no answer is a dead letter."""
        if envelope.wants_reply:
            self.reply(envelope, error.to_info())
        self._dead("full" if error.code == "mailbox_full" else "no_such_actor", envelope)

    def late_answer(self, envelope: Envelope) -> None:
        """Count an answer that nobody awaits any more."""
        self._dead("expired", envelope)

    def receive_inbox(self) -> tuple[bool, Envelope | None]:
        """Return whether a message was there, and the message unless it was a dead letter."""
        frames = self.inbox.receive()
        return frames is not None, self._admit(frames and frames[1:])

    def receive_control(self) -> tuple[bool, Envelope | None]:
        """Return the same for the control link."""
        frames = self.control.receive()
        return frames is not None, self._admit(frames)

    def apply(self, event: RegistryEvent) -> None:
        """Take in a registry event; a dead peer's connection is dropped."""
        self.peers.apply(event)
        if isinstance(event, ActorDown):
            self.outbox.forget(Address(event.name, event.incarnation))

    def beat(self, lag_ms: float, depth: int) -> Beat:
        """Return a heartbeat."""
        counts = self.dead_letters.snapshot()
        return Beat(lag_ms, depth, resident_bytes(), dead_letters=counts)

    def close(self) -> None:
        """Close all sockets; the last messages get a moment to leave."""
        self.inbox.close()
        self.outbox.close()
        self.control.close()
        self.transport.close()

    def _refuse_undecodable(self, header: Header) -> None:
        """Answer a request that is none of ours: its sender would wait until its deadline."""
        error = Internal(f'actor "{self.own.name}" cannot read this message; unknown kind')
        with contextlib.suppress(CortexError):  # a full outbox: the deadline must do
            self.send(header.src, error.to_info(), re=header.id)

    def _admit(self, frames: Frames | None) -> Envelope | None:
        return self._intake.admit(frames) if frames is not None else None

    def _dead(self, reason: str, envelope: Envelope) -> None:
        header = Header(
            envelope.id,
            envelope.re,
            envelope.src,
            envelope.dst,
            envelope.epoch,
            envelope.deadline_ns,
        )
        self.dead_letters.add(reason, header)  # type: ignore[arg-type]


def resident_bytes() -> int:
    """Return this process's resident memory."""
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * _PAGE_BYTES
