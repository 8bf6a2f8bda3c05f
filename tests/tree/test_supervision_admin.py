"""The admin socket of a real root: every operation, long ones, streams, and bad input."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
import zmq

from actors.transport.admin_channel import AdminChannel
from actors.transport.sockets import Transport
from cortexd.errors import CortexError, InvalidValue, NotFound
from tests.tree.toy_daemon import ToyDaemon, toys
from tests.waiting import DEADLINE_S, wait_for

pytestmark = pytest.mark.tree


@pytest.fixture(scope="module")
def daemon() -> Iterator[ToyDaemon]:
    """A tree that all of these tests share."""
    with ToyDaemon(toys("router", "peer")) as running:
        yield running


@pytest.fixture
def channel(daemon: ToyDaemon) -> Iterator[AdminChannel]:
    """A channel of its own, since streams belong to one."""
    with AdminChannel(daemon.folder / "run/admin.s", timeout_s=DEADLINE_S) as opened:
        yield opened


def test_status_tells_all_of_the_daemon(daemon: ToyDaemon) -> None:
    """Keys and values that the command line relies on."""

    def answered() -> dict[str, Any] | None:
        found: dict[str, Any] = daemon.admin("status")
        return None if found["models"] is None else found

    status = wait_for(answered, "an answer of the router in time")
    assert status is not None
    assert status["v"] == 1
    assert status["pid"] == daemon.pid
    assert status["state"] == "ok"
    assert status["role"] == "gateway"
    assert status["listen"] == {"api": "127.0.0.1:1"}
    assert status["models"] == []
    actor = status["actors"][0]
    assert actor["name"] == "router"
    assert actor["state"] == "ready"
    assert actor["pid"] > 0
    assert actor["incarnation"] == 1
    assert actor["restarts"] == 0
    assert actor["rss_bytes"] > 1_000_000


def test_version_and_ping_answer(daemon: ToyDaemon) -> None:
    """The two smallest operations."""
    assert daemon.admin("ping") == {"pong": True}
    assert daemon.admin("version")["protocol"] == 1


@pytest.mark.parametrize(
    ("op", "args", "kind", "text"),
    [
        ("nonsense", {}, NotFound, 'no operation "nonsense"; known: actor.kill'),
        ("actor.kill", {"name": "x"}, NotFound, 'no actor "x"; known: peer, router'),
        ("actor.kill", {}, InvalidValue, "missing required field"),
        ("actor.logs", {"lines": -1}, InvalidValue, "lines"),
        ("actor.logs", {"name": "x"}, NotFound, 'no actor "x"'),
        ("ping", {"extra": 1}, InvalidValue, "extra"),
        ("loglevel", {"name": "peer", "level": "loud"}, InvalidValue, "loud"),
        ("operation", {"op_id": "op-0"}, NotFound, 'no operation "op-0"'),
        ("actor.start", {"name": "nobody"}, NotFound, "nobody"),
    ],
)
def test_bad_operation_is_refused_by_name(
    daemon: ToyDaemon, op: str, args: dict[str, object], kind: type[CortexError], text: str
) -> None:
    """The error says what is wrong and what is allowed."""
    with pytest.raises(kind, match=text):
        daemon.channel.request(op, args)


@pytest.mark.parametrize(
    "frame",
    [b"", b"\xff\xfe", b"[1]", b'{"v":1}', b'{"v":2,"id":"1","op":"ping"}', b"[" * 5000],
)
def test_bad_frame_gets_an_error_and_the_daemon_lives(daemon: ToyDaemon, frame: bytes) -> None:
    """Not JSON, not a request, not our version, nested without end."""
    answer = _exchange(daemon, frame)
    assert answer["ok"] is False
    assert answer["error"]["code"] in {"invalid_json", "invalid_value"}
    assert daemon.admin("ping") == {"pong": True}


def test_oversize_request_gets_an_error(daemon: ToyDaemon) -> None:
    """Over the limit is told, not dropped."""
    answer = _exchange(daemon, b'{"v":1,"id":"1","op":"ping","x":"' + b"x" * 2**20 + b'"}')
    assert answer["error"]["code"] == "request_too_large"


def _exchange(daemon: ToyDaemon, frame: bytes) -> dict[str, dict[str, str]]:
    transport = Transport()
    socket = transport.socket(zmq.DEALER)
    socket.connect(f"ipc://{daemon.folder}/run/admin.s")
    socket.send(frame)
    assert socket.poll(int(DEADLINE_S * 1000))
    answer: dict[str, dict[str, str]] = msgspec.json.decode(socket.recv())
    socket.close()
    transport.close()
    return answer


def test_long_operation_is_accepted_first_and_then_told_to_its_end(
    daemon: ToyDaemon, channel: AdminChannel
) -> None:
    """Events that the owner sent before its answer still come after "accepted"."""
    accepted = channel.request("model.load", {"then": "done"})
    assert accepted["accepted"] is True
    assert accepted["model_id"] == "toy"
    events = channel.events()
    first, second = next(events), next(events)
    assert first["event"] == "progress"
    assert first["data"] == {"step": 1}
    assert second["event"] == "done"
    assert second["op_id"] == accepted["op_id"]
    assert channel.request("operation", {"op_id": accepted["op_id"]})["state"] == "done"


def test_failed_operation_carries_its_error(channel: AdminChannel) -> None:
    """The failure is an event with the error document."""
    channel.request("model.load", {"then": "failed"})
    failed = next(event for event in channel.events() if event["event"] == "failed")
    assert failed["data"]["message"] == "told to"


def test_operation_whose_actor_dies_fails(daemon: ToyDaemon, channel: AdminChannel) -> None:
    """Nobody waits for an end that cannot come."""
    channel.request("model.load", {"then": "nothing"})
    before = daemon.kill("router")
    failed = next(event for event in channel.events() if event["event"] == "failed")
    assert failed["data"]["code"] == "actor_down"
    daemon.wait_ready("router", after=before)


def test_operator_stops_starts_and_restarts_an_actor(
    daemon: ToyDaemon, channel: AdminChannel
) -> None:
    """Commanded ends are no crashes: nothing restarts by itself, no restart is counted."""
    restarts = daemon.actor("peer")["restarts"]
    for op, state in (("stop", "exited"), ("start", "starting"), ("restart", "starting")):
        if op == "restart":
            daemon.wait_ready("peer")
        channel.request(f"actor.{op}", {"name": "peer"})
        done = next(event for event in channel.events() if event["event"] != "progress")
        assert done["event"] == "done"
        assert daemon.actor("peer")["state"] in {state, "ready"}
    daemon.wait_ready("peer")
    assert daemon.actor("peer")["restarts"] == restarts
    channel.request("actor.start", {"name": "peer"})
    assert next(channel.events())["event"] == "failed"


def test_stack_of_a_running_actor_is_returned(daemon: ToyDaemon) -> None:
    """The dump comes with the answer and the actor goes on."""
    pid = daemon.actor("peer")["pid"]

    def is_dumped() -> bool:
        lines = daemon.admin("actor.stack", name="peer")["lines"]
        return any("most recent call first" in line["text"] for line in lines)

    wait_for(is_dumped, "a dump in time")
    assert daemon.actor("peer")["pid"] == pid


def test_stack_of_an_actor_that_gets_its_turn_late_is_returned(daemon: ToyDaemon) -> None:
    """As on a busy machine: the answer waits for the dump."""
    pid = int(daemon.actor("peer")["pid"])
    path = daemon.folder / "run/admin.s"
    with ThreadPoolExecutor(1) as pool, AdminChannel(path, timeout_s=DEADLINE_S) as channel:
        os.kill(pid, signal.SIGSTOP)
        try:
            asked = pool.submit(channel.request, "actor.stack", {"name": "peer"})
            time.sleep(0.5)  # its turn comes late: that is the subject
        finally:
            os.kill(pid, signal.SIGCONT)
        lines = asked.result()["lines"]
    assert any("most recent call first" in line["text"] for line in lines)


def test_followed_log_yields_each_new_line_until_cancelled(
    daemon: ToyDaemon, channel: AdminChannel
) -> None:
    """A stream belongs to its request; cancelling it ends it."""
    channel.request("actor.logs", {"name": "peer", "follow": True})
    daemon.relay("peer", "print", text="hello\n")
    line = next(event for event in channel.events() if event["event"] == "line")
    assert line["data"]["text"] == "hello"
    assert channel.request("cancel", {"id": line["id"]}) == {"cancelled": True}
    assert channel.request("cancel", {"id": line["id"]}) == {"cancelled": False}


def test_log_level_of_an_actor_changes_while_it_runs(daemon: ToyDaemon) -> None:
    """Errors only, and back."""
    assert daemon.admin("loglevel", name="peer", level="error")["level"] == "error"
    assert daemon.admin("loglevel", name="root", level="debug")["level"] == "debug"
    daemon.admin("loglevel", name="peer", level="info")


def test_events_since_a_sequence_are_the_later_ones(daemon: ToyDaemon) -> None:
    """Polling with the last sequence misses and repeats nothing."""
    events = daemon.admin("events")["events"]
    middle = events[len(events) // 2]["sequence"]
    later = daemon.admin("events", since=middle)["events"]
    assert later[0]["sequence"] == middle + 1


def test_dead_letters_are_counted_by_actor_and_reason(daemon: ToyDaemon) -> None:
    """A late answer is one."""
    daemon.relay("peer", "sleep", deadline_s=0.01, seconds=0.05)
    assert daemon.admin("deadletters")["counts"]["root"] is not None


def test_stream_ends_with_the_daemon() -> None:
    """A follower is told that nothing more will come."""
    with (
        ToyDaemon(toys("router")) as daemon,
        AdminChannel(daemon.folder / "run/admin.s", timeout_s=DEADLINE_S) as channel,
    ):
        channel.request("events", {"follow": True})
        daemon.admin("shutdown")
        names = [event["data"]["event"] for event in channel.events()]
        assert "root.stopping" in names
        assert daemon.wait() == 0
