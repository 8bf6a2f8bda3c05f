"""ZeroMQ as this project uses it: our socket options and non-blocking sends.

Every actor binds one `Inbox` and sends through an `Outbox`; a child speaks to the root over a
`ControlLink`, which ends at the root's `ControlHub`; the root's `AdminSocket` carries the
operators' JSON. Nothing here blocks but `LinkPoller.wait`, and a message that cannot be sent at
once is an error for its sender, never a queue in the dark.
"""

from __future__ import annotations

import os
import re
from hashlib import blake2s
from pathlib import Path
from typing import Final, Literal

import zmq

from actors.transport.codec import MAX_MESSAGE_BYTES
from cortexd.errors import MailboxFull
from cortexd.messages.envelope import Address
from cortexd.paths import ADMIN_SOCKET, ipc_path

Frames = list[bytes]
_Context = zmq.Context[zmq.Socket[bytes]]

_HIGH_WATER_MARK: Final = 1000
# Registry events go to every child; one that has not read this many is hung and will be killed.
_CONTROL_HIGH_WATER_MARK: Final = 10_000
_RECONNECT_MS: Final = 5
_RECONNECT_MAX_MS: Final = 200
# Time for the last message of a process (`Bye`, its final error) to leave the I/O thread.
_LAST_MESSAGE_LINGER_MS: Final = 200
_SHORT_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,22}")

CONTROL_SOCKET: Final = "control.s"

Sent = Literal["sent", "full", "gone"]


def inbox_endpoint(runtime_dir: Path, address: Address) -> str:
    """Return the endpoint of one incarnation's inbox; it is a function of the address alone.

    Raises: ConfigError when the runtime directory's path is too long.
    """
    name = address.name
    if not _SHORT_NAME.fullmatch(name):
        digest = blake2s(name.encode(), digest_size=4).hexdigest()
        name = f"{re.sub('[^a-z0-9.-]', '-', name.lower())[:14]}-{digest}"
    return f"ipc://{ipc_path(runtime_dir, f'{name}.{address.incarnation}.s')}"


class Transport:
    """The process's one ZeroMQ context; sockets are made here and die with it.

    A context must never cross a fork: the fork servers have none.
    """

    def __init__(self) -> None:
        self._context: _Context = zmq.Context()

    def socket(self, kind: int, *, high_water_mark: int = _HIGH_WATER_MARK) -> zmq.Socket[bytes]:
        """Return a socket with our options."""
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = high_water_mark
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES + 64)
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        if kind == zmq.ROUTER:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        return socket

    def close(self) -> None:
        """Close every socket, giving the last messages their linger time."""
        self._context.term()


def _bind(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Bind with mode 0600: a chmod after the bind would leave a moment in which others connect."""
    previous = os.umask(0o177)
    try:
        socket.bind(endpoint)
    finally:
        os.umask(previous)


class _Receiver:
    """A socket that is read by draining it when its descriptor wakes the loop."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        # Edge-triggered: after a wake-up, read until `receive` returns None, and look again after
        # each send on the same socket.
        self.fd = int(socket.FD)

    @property
    def is_readable(self) -> bool:
        """Return whether a message waits."""
        return bool(int(self._socket.EVENTS) & zmq.POLLIN)

    def receive(self) -> Frames | None:
        """Return the next message's frames, or None when none waits."""
        try:
            return self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class Inbox(_Receiver):
    """Where one incarnation receives from all its peers: frames are [identity, header, body]."""

    def __init__(self, transport: Transport, endpoint: str) -> None:
        socket = transport.socket(zmq.ROUTER)
        _bind(socket, endpoint)
        super().__init__(socket)


class Outbox:
    """Send-only sockets, one for each peer incarnation, opened at the first message."""

    def __init__(self, transport: Transport, runtime_dir: Path, own: Address) -> None:
        self._transport = transport
        self._runtime_dir = runtime_dir
        self._identity = str(own).encode()
        self._sockets: dict[Address, zmq.Socket[bytes]] = {}

    def __repr__(self) -> str:
        return f"Outbox({len(self._sockets)} peers)"

    def send(self, address: Address, frames: tuple[bytes, bytes]) -> None:
        """Queue one message. Raises: MailboxFull when the peer does not keep up."""
        socket = self._sockets.get(address)
        if socket is None:
            socket = self._transport.socket(zmq.DEALER)
            socket.setsockopt(zmq.IDENTITY, self._identity)
            socket.connect(inbox_endpoint(self._runtime_dir, address))
            self._sockets[address] = socket
        try:
            socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            raise MailboxFull(
                f'actor "{address.name}" does not keep up: {_HIGH_WATER_MARK} messages wait'
            ) from None

    def forget(self, address: Address) -> None:
        """Drop what still waits for this incarnation: it is gone."""
        socket = self._sockets.pop(address, None)
        if socket is not None:
            socket.close(0)

    def close(self) -> None:
        """Close all sockets."""
        for dealer in self._sockets.values():
            dealer.close(_LAST_MESSAGE_LINGER_MS)
        self._sockets.clear()


class ControlLink(_Receiver):
    """A child's connection to the root: frames are [header, body] both ways."""

    def __init__(self, transport: Transport, runtime_dir: Path, identity: str) -> None:
        socket = transport.socket(zmq.DEALER, high_water_mark=_CONTROL_HIGH_WATER_MARK)
        socket.setsockopt(zmq.IDENTITY, identity.encode())
        socket.linger = _LAST_MESSAGE_LINGER_MS
        socket.connect(f"ipc://{ipc_path(runtime_dir, CONTROL_SOCKET)}")
        super().__init__(socket)

    def send(self, frames: tuple[bytes, bytes]) -> None:
        """Queue one message for the root. Raises: MailboxFull when it does not read."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            raise MailboxFull("the root supervisor does not keep up") from None


class ControlHub(_Receiver):
    """The root's end of all control links: frames are [identity, header, body]."""

    def __init__(self, transport: Transport, runtime_dir: Path) -> None:
        socket = transport.socket(zmq.ROUTER, high_water_mark=_CONTROL_HIGH_WATER_MARK)
        _bind(socket, f"ipc://{ipc_path(runtime_dir, CONTROL_SOCKET)}")
        super().__init__(socket)

    def send(self, identity: str, frames: tuple[bytes, bytes]) -> Sent:
        """Queue one message; "full": the child does not read, "gone": its link is closed."""
        try:
            self._socket.send_multipart((identity.encode(), *frames), zmq.NOBLOCK)
        except zmq.Again:
            return "full"
        except zmq.ZMQError:
            return "gone"
        return "sent"


class AdminSocket(_Receiver):
    """The root's end of the admin protocol: frames are [client, JSON document]."""

    def __init__(self, transport: Transport, runtime_dir: Path) -> None:
        socket = transport.socket(zmq.ROUTER)
        _bind(socket, f"ipc://{ipc_path(runtime_dir, ADMIN_SOCKET)}")
        super().__init__(socket)

    def send(self, client: bytes, document: bytes) -> bool:
        """Queue one document; return False when the client is gone or does not read."""
        try:
            self._socket.send_multipart((client, document), zmq.NOBLOCK)
        except (zmq.Again, zmq.ZMQError):
            return False
        return True


class LinkPoller:
    """Blocks a synchronous actor until one of its two sockets has a message."""

    def __init__(self, inbox: Inbox, control: ControlLink) -> None:
        self._poller = zmq.Poller()
        self._poller.register(inbox._socket, zmq.POLLIN)
        self._poller.register(control._socket, zmq.POLLIN)

    def wait(self, timeout_s: float) -> None:
        """Return when a message waits, or after the timeout."""
        self._poller.poll(int(timeout_s * 1000))
