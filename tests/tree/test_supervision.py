"""Light actors under a real root: death, hang, crash loop, stop, orphans, logs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from actors.root.spec import ChildSpec
from actors.transport.admin_channel import AdminChannel
from cortexd.errors import CortexError, DeadlineExceeded, NotRunning
from tests.tree.toy_daemon import REPOSITORY, ToyDaemon, toys
from tests.waiting import DEADLINE_S, wait_for

pytestmark = pytest.mark.tree

# Short, but not so short that a busy machine's healthy processes miss them.
FAST = {
    "heartbeat_ms": 50,
    "suspect_after_s": 1.0,
    "kill_after_s": 4.0,
    "stop_timeout_s": 1.0,
    "load_stall_timeout_s": 5.0,
    "step_timeout_s": 2.5,
}


@pytest.fixture(scope="module")
def daemon() -> Iterator[ToyDaemon]:
    """A tree that the gentle tests share."""
    with ToyDaemon(toys("router", "peer"), num_listeners=1) as running:
        yield running


@pytest.mark.parametrize("victim", ["router", "peer"])
def test_killed_actor_under_asks_every_ask_ends_and_service_returns(
    daemon: ToyDaemon, victim: str
) -> None:
    """Asks to a dying actor end in actor_down, later ones in a reply; none stays open."""
    asker = "peer" if victim == "router" else "router"
    daemon.wait_ready("router")
    _do(daemon, asker, "storm", target=victim, tasks=8)
    wait_for(lambda: _do(daemon, asker, "outcomes").get("reply", 0) > 50, "asks being answered")
    for _ in range(3):
        before = daemon.kill(victim)
        daemon.wait_ready(victim, after=before)
    replies = _do(daemon, asker, "outcomes")["reply"]
    wait_for(lambda: _do(daemon, asker, "outcomes")["reply"] > replies, "service returning")
    outcomes = _do(daemon, asker, "end_storm")
    assert outcomes.pop("open") == 0
    assert set(outcomes) <= {"reply", "actor_down"}, outcomes


def _do(daemon: ToyDaemon, name: str, do: str, **args: object) -> Any:
    if name == "router":
        return daemon.command(do, **args)
    return daemon.relay(name, do, **args)


def test_ask_ends_in_reply_error_deadline_or_actor_down(daemon: ToyDaemon) -> None:
    """Each ending reaches the asker as its own error."""
    assert daemon.relay("peer", "pid") == daemon.actor("peer")["pid"]
    assert daemon.relay("peer", "fail")["error"] == "model_not_found"
    assert daemon.relay("peer", "fail", foreign=True)["error"] == "internal_error"
    assert daemon.relay("nobody", "pid")["error"] == "actor_down"
    late = daemon.relay("peer", "sleep", deadline_s=0.05, seconds=DEADLINE_S)
    assert late["error"] == "deadline_exceeded"


def test_foreign_error_in_handler_is_logged_once_with_traceback(daemon: ToyDaemon) -> None:
    """The asker sees no traceback, the log has one."""
    daemon.relay("peer", "fail", foreign=True)

    def failures() -> list[str]:
        lines = daemon.admin("actor.logs", name="peer", lines=100)["lines"]
        return [line["traceback"] for line in lines if line["event"] == "actor.handler_failed"]

    assert "ZeroDivisionError: told to" in wait_for(failures, "the traceback")[-1]


def test_listener_reaches_the_actor_named_in_its_spec() -> None:
    """Sockets bound by the caller are usable in the child, under both start methods."""
    spec = ChildSpec("router", "tests.tree.toys:Toy", listeners=("l0",))
    for method in ("forkserver", "spawn"):
        with ToyDaemon([spec], num_listeners=1, supervision={"start_method": method}) as daemon:
            (listener,) = daemon.command("listener")
            connections = psutil.Process(daemon.pid).net_connections("tcp")
            assert listener == f"l0:{connections[0].laddr.port}"
            before = daemon.kill("router")
            daemon.wait_ready("router", after=before)
            assert daemon.command("listener") == [listener]


def test_actor_that_falls_silent_during_the_start_does_not_hold_it_up() -> None:
    """As on a busy machine: it was ready, and the others need not wait for it to be so again."""
    children = [*toys("router"), *toys("late", args=b"waits")]
    daemon = ToyDaemon(children, supervision={"heartbeat_ms": 50, "suspect_after_s": 0.5})
    daemon.start()
    try:
        wait_for((daemon.folder / "run/admin.s").exists, "the admin socket")
        daemon.wait_ready("router")
        daemon.kill("router", signal.SIGSTOP)
        wait_for(lambda: daemon.actor("router")["state"] == "suspect", "the suspicion")
        (daemon.folder / "run/go").touch()
        daemon.wait_ready("late")
        daemon.kill("router", signal.SIGCONT)
        wait_for(lambda: daemon.admin("status")["state"] == "ok", "the end of the start")
    finally:
        daemon.__exit__()


def test_stopped_actor_is_dumped_killed_and_replaced() -> None:
    """Silence makes a suspect, then a stack dump and a kill; the service returns."""
    with ToyDaemon(toys("router", "peer"), supervision=FAST) as daemon:
        before = daemon.kill("peer", signal.SIGSTOP)
        daemon.wait_event("actor.suspect", actor="peer")
        daemon.wait_event("actor.hung", actor="peer")
        daemon.wait_ready("peer", after=before)
        wait_for(lambda: "Current thread" in log_texts(daemon, "peer"), "the stack dump")

        def answers() -> bool:
            try:
                return bool(daemon.relay("peer", "pid") == daemon.actor("peer")["pid"])
            except CortexError:  # the router's turn came so late that it was replaced, too
                return False

        wait_for(answers, "the service's return")


def test_blocked_loop_is_dumped_with_the_line_that_blocks() -> None:
    """A live process whose loop hangs is a hung actor."""
    with ToyDaemon(toys("router", "peer"), supervision=FAST) as daemon:
        with suppress(DeadlineExceeded):  # of the operation itself, on a busy machine
            assert daemon.relay("peer", "block", seconds=600)["error"] == "actor_down"
        daemon.wait_event("actor.hung", actor="peer")
        daemon.wait_ready("peer", after=1)
        wait_for(lambda: "do_block" in log_texts(daemon, "peer"), "the stack dump")


def log_texts(daemon: ToyDaemon, name: str) -> str:
    """Return what an actor has printed."""
    lines = daemon.admin("actor.logs", name=name, lines=512)["lines"]
    return "\n".join(line.get("text", "") for line in lines)


def test_crash_loop_ends_in_failed_and_a_non_zero_exit() -> None:
    """An actor that never starts is given up; the daemon stops in order and says why."""
    children = [*toys("router"), ChildSpec("bad", "tests.tree.toys:Toy", args=b"crash", order=1)]
    daemon = ToyDaemon(children, supervision={"max_restarts": 2})
    daemon.start()
    try:
        assert daemon.wait() == 1
        log = daemon.log()
        assert log.count("last words of a crashing actor") == 3
        assert "told to crash in on_start" in log
        assert '"event":"actor.failed"' in log
        assert "actor.failed" in daemon.errors()
    finally:
        daemon.__exit__()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_killed_root_takes_everything_with_it(method: str) -> None:
    """SIGKILL of the root: no actor, rank, fork server, tracker or grandchild is left."""
    with ToyDaemon(toys("router", "peer"), supervision={"start_method": method}) as daemon:
        daemon.command("start_group")
        daemon.wait_seen("group_up")
        daemon.command("grandchild")
        family = daemon.family()
        assert len(family) >= 5
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.wait()
        _, alive = psutil.wait_procs(family, timeout=DEADLINE_S)
        assert not alive


def test_killed_fork_server_harms_nobody_and_is_replaced() -> None:
    """Its children go on, can be killed and reaped, and are restarted from a new server."""
    with ToyDaemon(toys("router", "peer")) as daemon:
        server = next(one for one in daemon.family() if "forkserver.light" in str(one.cmdline()))
        pids = {name: daemon.actor(name)["pid"] for name in ("router", "peer")}
        server.kill()
        wait_for(lambda: psutil.Process(pids["peer"]).ppid() == daemon.pid, "the adoption")
        assert daemon.relay("peer", "pid") == pids["peer"]
        daemon.kill("peer")
        exited = daemon.wait_event("actor.exited", actor="peer")
        assert exited["exit"] == "killed by SIGKILL"
        daemon.wait_ready("peer", after=1)
        assert daemon.actor("router")["pid"] == pids["router"]


def test_exit_code_is_known_though_the_fork_server_gets_its_turn_late() -> None:
    """As on a busy machine: the server, whose child it was, is who can tell it."""
    with ToyDaemon(toys("router", "peer")) as daemon:
        server = next(one for one in daemon.family() if "forkserver.light" in str(one.cmdline()))
        server.suspend()
        daemon.kill("peer")
        time.sleep(0.5)  # its turn comes late: that is the subject
        server.resume()
        exited = daemon.wait_event("actor.exited", actor="peer")
        assert exited["exit"] == "killed by SIGKILL"
        daemon.wait_ready("peer", after=1)


def test_what_a_dead_actor_leaves_behind_is_killed() -> None:
    """Its process group dies with it, and so does a child that left the group."""
    with ToyDaemon(toys("router", "peer")) as daemon:
        attached = psutil.Process(daemon.relay("peer", "grandchild"))
        detached = psutil.Process(daemon.relay("peer", "grandchild", detached=True))
        daemon.kill("peer")
        _, alive = psutil.wait_procs([attached, detached], timeout=DEADLINE_S)
        assert not alive
        daemon.wait_event("root.orphans_killed", actor="peer")


def test_second_start_names_the_running_pid(daemon: ToyDaemon) -> None:
    """Two roots do not share a runtime directory, and the first is not disturbed."""
    second = subprocess.run(
        [sys.executable, "-m", "tests.tree.toy_daemon", msgspec.json.encode(daemon.order)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert second.returncode == 1
    assert f"already_running: cortexd is already running (pid {daemon.pid})" in second.stderr
    assert daemon.admin("ping") == {"pong": True}


@pytest.mark.parametrize("args", [b"never drains", b"never stops"])
def test_actor_that_will_not_end_is_stopped_within_bounds(args: bytes) -> None:
    """Drain and stop have deadlines; the stop as a whole succeeds."""
    children = [*toys("router"), *toys("stubborn", args=args)]
    with ToyDaemon(children, supervision={"stop_timeout_s": 0.3}) as daemon:
        daemon.admin("shutdown")
        assert daemon.wait() == 0


def test_second_signal_kills_and_exits_130() -> None:
    """An operator in a hurry need not wait for a drain."""
    children = [
        *toys("router"),
        ChildSpec("slow", "tests.tree.toys:Toy", args=b"never drains", drain_s=600.0),
    ]
    with ToyDaemon(children) as daemon:
        os.kill(daemon.pid, signal.SIGTERM)
        wait_for(lambda: daemon.admin("status")["state"] == "stopping", "the stop")
        os.kill(daemon.pid, signal.SIGINT)
        assert daemon.wait() == 130


def test_children_start_by_order_and_stop_by_stop_order() -> None:
    """A later order waits for the earlier; the highest stop order goes first."""
    children = [
        ChildSpec("router", "tests.tree.toys:Toy", order=1),
        ChildSpec("first", "tests.tree.toys:Toy", order=0, stop_order=9),
        ChildSpec("last", "tests.tree.toys:Toy", order=2),
    ]
    daemon = ToyDaemon(children)
    with daemon:
        path = daemon.folder / "state/logs/cortexd.log"
        daemon.admin("shutdown")
        assert daemon.wait() == 0
        lines = [msgspec.json.decode(line) for line in path.read_text().splitlines()]
    by_event = {
        event: [line["actor"] for line in lines if line["event"] == event]
        for event in ("actor.ready", "actor.exited")
    }
    assert by_event["actor.ready"] == ["first", "router", "last"]
    assert by_event["actor.exited"] == ["first", "last", "router"]


def test_fifty_restarts_leak_no_descriptor_and_no_file() -> None:
    """The root looks the same before and after."""
    supervision = {"max_restarts": 1000}
    with ToyDaemon(toys("router", "peer"), supervision=supervision) as daemon:
        root = psutil.Process(daemon.pid)
        daemon.kill("peer")
        incarnation = daemon.wait_ready("peer", after=1)["incarnation"]
        before = (root.num_fds(), root.num_threads(), _files(daemon))
        for _ in range(50):
            # Through the operator's restart: no back-off, since it is no failure.
            daemon.admin("actor.restart", name="peer")
            incarnation = daemon.wait_ready("peer", after=incarnation)["incarnation"]
        wait_for(lambda: root.num_fds() <= before[0], "descriptors being closed")
        wait_for(lambda: (root.num_threads(), _files(daemon)) == before[1:], "nothing being left")
        assert daemon.actor("peer")["restarts"] == 1


def _files(daemon: ToyDaemon) -> list[str]:
    names = sorted(path.name for path in (daemon.folder / "run").iterdir())
    return [name for name in names if not name.startswith("peer.")]


def test_unwritable_log_folder_is_an_event_and_the_service_goes_on() -> None:
    """Logs stay in the rings."""
    daemon = ToyDaemon(toys("router"))
    (daemon.folder / "state").mkdir()
    (daemon.folder / "state/logs").write_text("a file where the folder should be")
    with daemon:
        assert daemon.wait_event("root.log_file_failed")["error"] in {
            "Not a directory",
            "File exists",
        }
        daemon.command("print", text="still heard\n")
        wait_for(lambda: "still heard" in log_texts(daemon, "router"), "the ring")


def test_output_flood_is_cut_with_a_note(daemon: ToyDaemon) -> None:
    """Thousands of lines at once do not push everything else out."""
    daemon.command("print", text="x\n" * 20000)
    wait_for(lambda: "suppressed" in log_texts(daemon, "router"), "the note")


def test_status_answers_while_the_router_is_stopped(daemon: ToyDaemon) -> None:
    """A hung router costs `status` its models, not its answer."""
    before = daemon.kill("router", signal.SIGSTOP)
    try:
        status = daemon.admin("status")
    finally:
        daemon.kill("router", signal.SIGCONT)
    assert status["models"] is None
    assert "router" in status["models_error"]
    assert {actor["name"] for actor in status["actors"]} == {"router", "peer"}
    assert daemon.wait_ready("router")["incarnation"] == before


def test_admin_channel_without_a_daemon_says_so(tmp_path: Path) -> None:
    """Nothing listening is not a time-out."""
    with pytest.raises(NotRunning, match="cortexd is not running"):
        AdminChannel(tmp_path / "admin.s", timeout_s=DEADLINE_S)
