"""The clients of the admin socket: answers, and the streams that they follow.

Owned by `actors.root.admin`, in the root's loop. A stream ends when its client is gone, does not
read, or cancels it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from actors.root.admin_request import PROTOCOL_VERSION
from actors.root.operations import Document, EventKind, Operation, error_document
from actors.transport.sockets import AdminSocket
from cortexd.errors import CortexError, Overloaded

_MAX_STREAMS: Final = 64


@dataclass(slots=True, frozen=True)
class Client:
    """Who asked: the socket's identity and the client's own request id."""

    identity: bytes
    request_id: str


class AdminClients:
    """See the module's text. `on_sent` is called after each message: it may have hidden others."""

    def __init__(self, socket: AdminSocket, on_sent: Callable[[], None]) -> None:
        self._socket = socket
        self._on_sent = on_sent
        self._streams: dict[Client, Callable[[], None]] = {}

    def __repr__(self) -> str:
        return f"AdminClients({len(self._streams)} streams)"

    def answer(self, client: Client, result: object) -> None:
        """Answer a request."""
        self.send(client, {"ok": True, "result": result})

    def refuse(self, client: Client, error: CortexError) -> None:
        """Answer a request with an error."""
        self.send(client, {"ok": False, "error": error_document(error.to_info())})

    def follow(self, client: Client, operation: Operation) -> None:
        """Send the events of an operation."""

        def tell(kind: EventKind, one: Operation, data: object) -> None:
            self.send(client, {"event": kind, "op_id": one.op_id, "data": data})

        operation.listen(tell)

    def add_stream(self, client: Client, end: Callable[[], None]) -> None:
        """Note what ends a stream; a second one of the same request replaces the first.

        Raises: Overloaded.
        """
        if len(self._streams) >= _MAX_STREAMS:
            raise Overloaded(f"{_MAX_STREAMS} clients follow already; end one of them")
        self.end_stream(client)
        self._streams[client] = end

    def end_stream(self, client: Client) -> bool:
        """End a stream; return whether there was one."""
        end = self._streams.pop(client, None)
        if end is not None:
            end()
        return end is not None

    def announce_end(self) -> None:
        """Tell all followers that nothing more will come."""
        for client in list(self._streams):
            self.send(client, {"event": "end", "data": {}})

    def send(self, client: Client, document: Document) -> None:
        """Send one message; a client that does not take it follows nothing any more."""
        data = msgspec.json.encode({"v": PROTOCOL_VERSION, "id": client.request_id, **document})
        if not self._socket.send(client.identity, data):
            self.end_stream(client)  # gone, or does not read
        self._on_sent()
