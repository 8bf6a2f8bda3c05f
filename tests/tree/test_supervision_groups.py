"""Engine groups under a real root: one failure unit, epochs, restart policy, time limits."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import psutil
import pytest

from cortexd.errors import DeadlineExceeded
from tests.tree.test_supervision import FAST, log_texts
from tests.tree.toy_daemon import ToyDaemon, toys
from tests.waiting import DEADLINE_S, wait_for

pytestmark = pytest.mark.tree

# Toy ranks need no torch, which a fork server for engines would import first.
SPAWN = {"start_method": "spawn"}


def test_killed_rank_takes_its_group_down_and_a_new_epoch_comes() -> None:
    """Both ranks die, everybody hears of it, the next epoch serves; a stop is commanded."""
    with ToyDaemon(toys("router", "peer")) as daemon:
        assert daemon.command("start_group") == ["GroupStarting", "g", 1]
        assert daemon.wait_seen("group_up", name="g")["n"] == 1
        assert daemon.relay("g/1", "pid") == daemon.actor("g/1")["pid"]
        pids = [daemon.actor(name)["pid"] for name in ("g/0", "g/1")]
        daemon.kill("g/1")
        down = daemon.wait_seen("group_down", name="g", n=1)
        assert down["will_restart"]
        assert not down["commanded"]
        assert "killed by SIGKILL" in down["message"]
        daemon.wait_seen("group_up", name="g", n=2)
        assert _gone(daemon, "g/0", 1)
        assert _gone(daemon, "g/1", 1)
        assert daemon.relay("peer", "seen")  # others hear of it too
        new = [daemon.actor(name) for name in ("g/0", "g/1")]
        assert [one["epoch"] for one in new] == [2, 2]
        assert not {one["pid"] for one in new} & set(pids)
        assert daemon.command("stop_group") == ["Ok"]
        stopped = daemon.wait_seen("group_down", name="g", n=2)
        assert stopped["commanded"]
        assert not stopped["will_restart"]
        assert daemon.actor("g/0")["state"] == "absent"
        assert daemon.command("start_group") == ["GroupStarting", "g", 3]


def test_ranks_run_at_the_priority_of_the_root() -> None:
    """Their fork server imports at a lower one, which nobody may raise again."""
    with ToyDaemon(toys("router")) as daemon:
        daemon.command("start_group")
        daemon.wait_seen("group_up", name="g")
        root = psutil.Process(daemon.pid)
        assert {one.nice() for one in root.children(recursive=True)} == {root.nice()}


def _gone(daemon: ToyDaemon, name: str, incarnation: int) -> bool:
    return any(one["name"] == name and one["n"] == incarnation for one in daemon.seen("down"))


def test_structural_error_of_a_rank_is_told_and_not_retried() -> None:
    """A model that does not fit will not fit the next time."""
    with ToyDaemon(toys("router"), supervision=SPAWN) as daemon:
        daemon.command("start_group", mode="no memory")
        down = daemon.wait_seen("group_down", name="g")
        assert down["code"] == "insufficient_memory"
        assert down["message"] == "needs 9 bytes, has 1"
        assert not down["will_restart"]
        wait_for(lambda: daemon.actor("g/0")["state"] == "failed", "the group failing")
        assert daemon.admin("status")["state"] == "impaired"
        assert daemon.command("start_group")[1:] == ["g", 2]
        daemon.wait_seen("group_up", n=2)


def test_retriable_error_is_retried_until_the_bound() -> None:
    """After the allowed restarts the group is given up, with the rank's own error."""
    with ToyDaemon(toys("router"), supervision={**SPAWN, "max_group_restarts": 1}) as daemon:
        daemon.command("start_group", mode="retriable", world_size=1)
        last = daemon.wait_seen("group_down", name="g", n=2)
        assert last["code"] == "engine_restarting"
        assert [one["will_restart"] for one in daemon.seen("group_down")] == [True, False]
        wait_for(lambda: daemon.actor("g/0")["state"] == "failed", "the group failing")
        assert daemon.seen("group_up") == []


def test_missing_library_is_named_in_the_groups_error() -> None:
    """A rank whose module cannot be imported says which module is missing."""
    with ToyDaemon(toys("router"), supervision={**SPAWN, "max_group_restarts": 1}) as daemon:
        daemon.command("start_group", target="tests.tree.needs_nothing_installed:Rank")
        down = daemon.wait_seen("group_down", name="g")
        assert "No module named 'tests.tree.needs_nothing_installed'" in down["message"]
        assert "install" in down["message"]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ({"group": "a/b"}, 'bad group name "a/b"'),
        ({"world_size": 0}, "world size 0; allowed: 1 to 64"),
    ],
)
def test_bad_group_order_is_refused(order: dict[str, Any], expected: str) -> None:
    """The root checks what it is asked, and refuses a group that runs."""
    with ToyDaemon(toys("router"), supervision=SPAWN) as daemon:
        refusal = daemon.command("start_group", **order)
        assert refusal["error"] == "invalid_value"
        assert expected in refusal["message"]
        daemon.command("start_group", world_size=1)
        assert "runs already" in daemon.command("start_group")["message"]
        assert daemon.command("stop_group", group="x")["error"] == "not_found"


def test_hung_step_is_dumped_and_the_group_restarted() -> None:
    """A busy rank whose step counter stands still is killed, after its stacks are in the log."""
    supervision = {**FAST, **SPAWN, "kill_after_s": DEADLINE_S}
    with ToyDaemon(toys("router"), supervision=supervision) as daemon:
        daemon.command("start_group")
        daemon.wait_seen("group_up", n=1)
        with suppress(DeadlineExceeded):  # of the operation itself, on a busy machine
            assert daemon.relay("g/0", "hang")["error"] == "actor_down"
        hung = daemon.wait_event("actor.hung", actor="g/0")
        assert hung["reason"] == "step 1 does not end"
        daemon.wait_seen("group_up", n=2)
        wait_for(lambda: "on_command" in log_texts(daemon, "g/0"), "the stack dump")


def test_load_that_stalls_is_killed_and_progress_extends_it() -> None:
    """The start deadline moves with progress, and only with progress."""
    supervision = {**FAST, **SPAWN, "max_group_restarts": 1, "kill_after_s": DEADLINE_S}
    with ToyDaemon(toys("router"), supervision=supervision) as daemon:
        daemon.command("start_group", group="s", mode="slow", world_size=1, start_timeout_s=4.0)
        daemon.wait_seen("group_up", name="s")
        daemon.command("start_group", mode="stall", world_size=1, start_timeout_s=0.1)
        down = daemon.wait_seen("group_down", name="g")
        assert "did not get ready in time" in down["message"]
        daemon.command("stop_group")


def test_poisoned_rank_says_why_and_exits_70() -> None:
    """A device error ends the process at once; the cause reaches everybody."""
    with ToyDaemon(toys("router"), supervision=SPAWN) as daemon:
        daemon.command("start_group", world_size=1)
        daemon.wait_seen("group_up")
        assert daemon.relay("g/0", "poison")["error"] == "actor_down"
        assert daemon.wait_seen("group_down")["message"] == "told to"
        assert daemon.wait_event("actor.exited", actor="g/0")["exit"] == "exit code 70"
        daemon.wait_seen("group_up", n=2)


def test_stop_drains_the_leader_and_asks_ranks_to_stop() -> None:
    """Work in progress ends before the ranks do, and they end by themselves."""
    with ToyDaemon(toys("router"), supervision=SPAWN) as daemon:
        daemon.command("start_group")
        daemon.wait_seen("group_up")
        daemon.relay("g/0", "work", steps=10)
        assert daemon.command("stop_group", drain_s=DEADLINE_S) == ["Ok"]
        for rank in ("g/0", "g/1"):
            wait_for(
                lambda rank=rank: "rank was asked to stop" in log_texts(daemon, rank),
                "the rank's last words",
            )
            exited = daemon.wait_event("actor.exited", actor=rank)
            assert exited["exit"] == "exit code 0"


def test_router_that_restarts_finds_the_running_groups() -> None:
    """The snapshot an actor starts with holds the ranks that serve."""
    with ToyDaemon(toys("router"), supervision=SPAWN) as daemon:
        daemon.command("start_group")
        daemon.wait_seen("group_up")
        before = daemon.kill("router")
        daemon.wait_ready("router", after=before)
        assert daemon.relay("g/0", "pid") == daemon.actor("g/0")["pid"]
