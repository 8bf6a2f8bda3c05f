"""Sockets of one process against each other: bounds, sizes, names, gone peers."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.transport.admin_channel import AdminChannel
from actors.transport.codec import MAX_MESSAGE_BYTES, decode_body, decode_header, encode_message
from actors.transport.sockets import Inbox, Outbox, Transport, inbox_endpoint
from cortexd.errors import ConfigError, MailboxFull, NotRunning, RequestTooLarge
from cortexd.messages import AdminReply, Ping
from cortexd.messages.envelope import Address, Header
from tests.waiting import DEADLINE_S, wait_for

OWN = Address("own", 1)
PEER = Address("peer", 1)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: socket paths are limited."""
    with tempfile.TemporaryDirectory(prefix="ctx-") as name:
        yield Path(name)


@pytest.fixture
def transport() -> Iterator[Transport]:
    """A context that is closed again."""
    made = Transport()
    yield made
    made.close()


def _frames(number: int = 1) -> tuple[bytes, bytes]:
    return encode_message(Header(number, 0, OWN, PEER), Ping())


def test_outbox_to_inbox_keeps_the_order(transport: Transport, folder: Path) -> None:
    """Messages of one pair arrive as they were sent, though the inbox was bound later."""
    outbox = Outbox(transport, folder, OWN)
    for number in range(1, 101):
        outbox.send(PEER, _frames(number))
    inbox = Inbox(transport, inbox_endpoint(folder, PEER))
    received: list[int] = []
    deadline_s = time.monotonic() + DEADLINE_S
    while len(received) < 100 and time.monotonic() < deadline_s:
        frames = inbox.receive()
        if frames is not None:
            assert frames[0] == b"own.1"
            assert decode_body(frames[2]) == Ping()
            received.append(decode_header(frames[1]).id)
    assert received == list(range(1, 101))
    assert (folder / "peer.1.s").stat().st_mode & 0o077 == 0
    outbox.close()
    inbox.close()


def test_peer_that_is_stopped_while_it_connects_is_heard(
    transport: Transport, folder: Path
) -> None:
    """On a busy machine: given up too soon, what it sends next would be lost without a word."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
    kind = b"\x0bSocket-Type\0\0\0\x06DEALER"
    ready = b"\x05READY" + kind
    with (
        closing(Inbox(transport, inbox_endpoint(folder, PEER))) as inbox,
        socket.socket(socket.AF_UNIX) as peer,
    ):
        peer.connect(inbox_endpoint(folder, PEER).removeprefix("ipc://"))
        peer.sendall(greeting)
        assert peer.recv(len(greeting), socket.MSG_WAITALL)[:1] == b"\xff"
        time.sleep(2.5)  # its turn comes late: that is the subject
        peer.sendall(bytes((4, len(ready))) + ready + b"\0\5hello")
        frames = wait_for(inbox.receive, "its message")
    assert frames is not None
    assert frames[1:] == [b"hello"]


def test_outbox_to_a_peer_that_never_reads_is_full_and_never_blocks(
    transport: Transport, folder: Path
) -> None:
    """The bound is an error for the sender; a forgotten peer's queue is dropped."""
    outbox = Outbox(transport, folder, OWN)
    with pytest.raises(MailboxFull, match='"peer" does not keep up'):
        _send_many(outbox, 5000)
    outbox.forget(PEER)
    outbox.send(PEER, _frames())
    outbox.close()


def _send_many(outbox: Outbox, count: int) -> None:
    for number in range(count):
        outbox.send(PEER, _frames(number))


def test_oversize_message_is_refused_before_the_send() -> None:
    """The receiver would drop the whole connection without a word."""
    with pytest.raises(RequestTooLarge, match=r"AdminReply for peer\.1 has 16777\d+ bytes"):
        encode_message(Header(1, 0, OWN, PEER), AdminReply(bytes(MAX_MESSAGE_BYTES)))


@given(st.text(min_size=1, max_size=96), st.integers(1, 10**9))
def test_inbox_endpoint_fits_a_socket_path_for_any_name(name: str, incarnation: int) -> None:
    """Long and odd names are shortened, apart from each other."""
    folder = Path("/run/user/1000/cortexd")
    endpoint = inbox_endpoint(folder, Address(name, incarnation))
    assert endpoint != inbox_endpoint(folder, Address(name + "x", incarnation))
    assert len(endpoint.removeprefix("ipc://").encode()) <= 80
    assert "/" not in endpoint.removeprefix(f"ipc://{folder}/")


def test_inbox_endpoint_in_a_deep_folder_says_what_to_do() -> None:
    """The limit is the system's; the way out is named."""
    with pytest.raises(ConfigError, match=r"paths\.runtime_dir"):
        inbox_endpoint(Path("/" + "x" * 100), OWN)


def test_admin_channel_to_a_dead_socket_is_not_running(folder: Path) -> None:
    """A socket file that a killed daemon left behind is no daemon."""
    path = folder / "admin.s"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with pytest.raises(NotRunning, match="cortexd start"):
        AdminChannel(path, timeout_s=DEADLINE_S)
