"""Fronts that share a listener: who takes which connection."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path

import pytest
import uvloop

from actors.connection_share import ConnectionShare
from actors.front.acceptor import Acceptor
from tests.waiting import DEADLINE_S


class Front(asyncio.Protocol):
    """Counts its connections, and says which front it is."""

    def __init__(self, share: ConnectionShare, name: bytes) -> None:
        self._share = share
        self._name = name

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say who took the connection."""
        assert hasattr(transport, "write")
        transport.write(self._name)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Count it out."""
        self._share.closed()


class Fleet:
    """A listener and the fronts that share it, in one event loop."""

    def __init__(self, folder: Path, listener: socket.socket, num_fronts: int) -> None:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        self._address = listener.getsockname()
        self._clients = ExitStack()
        self._listeners = [self._clients.enter_context(listener.dup()) for _ in range(num_fronts)]
        self.shares = [ConnectionShare(folder, num_fronts, index) for index in range(num_fronts)]

    def accept(self, index: int) -> Acceptor:
        """Let one front accept, through a descriptor of its own, as in a process of its own."""
        share = self.shares[index]
        return Acceptor(self._listeners[index], lambda: Front(share, b"%d" % index), share)

    async def connect(self) -> int:
        """Return which front has taken a new connection, which stays open."""
        client = self._clients.enter_context(socket.socket())
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DEADLINE_S):
            await loop.sock_connect(client, self._address)
            return int(await loop.sock_recv(client, 1))

    def leave(self) -> None:
        """Close all sockets."""
        self._clients.close()


def run(test: Coroutine[None, None, None]) -> None:
    """Run on the loop that fronts have."""
    uvloop.run(test)


@pytest.mark.parametrize("ahead", [0, 1])
def test_front_that_is_ahead_leaves_connections_to_the_other(tmp_path: Path, ahead: int) -> None:
    """Of eight that come the front without connections gets most, whichever would wake first."""

    async def test() -> None:
        with socket.socket() as listener:
            fleet = Fleet(tmp_path, listener, 2)
            for _ in range(20):
                fleet.shares[ahead].opened()
            acceptors = [fleet.accept(0), fleet.accept(1)]
            takers = [await fleet.connect() for _ in range(8)]
            for acceptor in acceptors:
                acceptor.close()
            fleet.leave()
        assert takers.count(1 - ahead) > takers.count(ahead), takers

    run(test())


def test_front_that_is_ahead_takes_what_nobody_else_wants(tmp_path: Path) -> None:
    """The other fronts may be dead, or too busy: nobody waits for them for long."""

    async def test() -> None:
        with socket.socket() as listener:
            fleet = Fleet(tmp_path, listener, 2)
            acceptor = fleet.accept(0)
            assert [await fleet.connect() for _ in range(20)] == [0] * 20
            assert fleet.shares[0].is_ahead
            acceptor.close()
            fleet.leave()

    run(test())


def test_connections_that_end_are_counted_out(tmp_path: Path) -> None:
    """A front is ahead by what it has, not by what it had; one that stops is nobody's reason."""
    shares = [ConnectionShare(tmp_path, 2, index) for index in range(2)]
    for _ in range(5):
        shares[0].opened()
    assert [share.is_ahead for share in shares] == [True, False]
    for _ in range(5):
        shares[0].closed()
    assert not shares[0].is_ahead
    for _ in range(5):
        shares[0].opened()
    shares[1].leave()
    shares[1].closed()
    assert not shares[0].is_ahead
    assert ConnectionShare(tmp_path, 2, 1).is_ahead is False
    assert shares[0].is_ahead, "a front that comes back begins at nought"


def test_listener_without_descriptors_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that cannot be taken for lack of descriptors is taken when there are some."""

    class Exhausted(socket.socket):
        num_failures = 3

        def dup(self) -> Exhausted:
            return self

        def accept(self) -> tuple[socket.socket, object]:
            if self.num_failures:
                self.num_failures -= 1
                raise OSError(errno.EMFILE, "too many open files")
            return super().accept()

    monkeypatch.setattr("actors.front.acceptor._RETRY_S", 0.001)

    async def test() -> None:
        with Exhausted() as listener:
            fleet = Fleet(tmp_path, listener, 1)
            acceptor = fleet.accept(0)
            assert await fleet.connect() == 0
            assert listener.num_failures == 0
            acceptor.close()
            fleet.leave()

    run(test())
