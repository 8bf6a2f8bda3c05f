"""Long admin operations: order of events, one end, bounded memory."""

from __future__ import annotations

import pytest

from actors.root.operations import Operation, Operations
from cortexd.errors import ActorDown, NotFound


def test_operation_events_before_listening_come_first_and_in_order() -> None:
    """The client reads "accepted" before anything else."""
    operation = Operations().begin("model.load", "router")
    operation.add("progress", 1)
    operation.add("done", 2)
    heard: list[tuple[str, object]] = []
    operation.listen(lambda kind, one, data: heard.append((kind, data)))
    assert heard == [("progress", 1), ("done", 2)]


def test_operation_ends_once() -> None:
    """What comes after the end is not told."""
    operation = Operation("op-1", "model.load", "router")
    heard: list[str] = []
    operation.listen(lambda kind, one, data: heard.append(kind))
    for kind in ("done", "failed", "progress"):
        operation.add(kind, None)
    assert heard == ["done"]
    assert operation.describe()["state"] == "done"


def test_operations_of_a_dead_actor_fail_and_others_do_not() -> None:
    """By the actor that carries them."""
    operations = Operations()
    mine, other = operations.begin("model.load", "router"), operations.begin("model.pull", "store")
    operations.fail_target("router", ActorDown("gone"))
    assert (mine.state, other.state) == ("failed", "running")


def test_operations_keep_a_bounded_number_and_running_ones_longest() -> None:
    """Old ended ones are forgotten."""
    operations = Operations()
    running = operations.begin("model.load", "router")
    for _ in range(300):
        operations.begin("model.load", "router").add("done", None)
    assert len(operations.all()) == 256
    assert operations.get(running.op_id) is running
    with pytest.raises(NotFound, match='no operation "op-2"'):
        operations.get("op-2")
