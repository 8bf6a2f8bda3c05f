"""One word for how well the fleet is."""

from __future__ import annotations

from typing import Any

import pytest

from cortexd.fleet_state import Unservable, fleet_state, unservable
from cortexd.messages import ModelList
from cortexd.messages.neurons import NodeModel, NodeStatus
from cortexd.models import ModelState, ModelStatus


def node(name: str, *, is_healthy: bool = True, models: Any = ()) -> NodeStatus:
    """Return a node with these models, by id and state."""
    return NodeStatus(
        name=name,
        kind="cortex",
        endpoint=f"http://{name}",
        is_healthy=is_healthy,
        age_s=0.1,
        dispatched=0,
        models=[NodeModel(model_id, state, detail="why") for model_id, state in models],
    )


def own(state: ModelState) -> ModelStatus:
    """Return a model of this host."""
    return ModelStatus(model_id="m", state=state, error="no file")


@pytest.mark.parametrize(
    ("known", "serves_here", "state"),
    [
        (ModelList([]), True, "ok"),
        (ModelList([own("loaded"), own("sleeping")]), True, "ok"),
        (ModelList([own("failed")]), True, "impaired"),
        (ModelList([own("recovering")]), True, "impaired"),
        (ModelList([], nodes=[node("a", models=[("r", "failed")])]), True, "impaired"),
        (ModelList([], nodes=[node("a", is_healthy=False)]), True, "ok"),
        (ModelList([], nodes=[node("a", is_healthy=False)]), False, "degraded"),
        (ModelList([], nodes=[node("a", is_healthy=False), node("b")]), False, "ok"),
        (ModelList([own("failed")], is_draining=True), True, "draining"),
    ],
)
def test_state_is_the_worst_that_holds(known: ModelList, serves_here: bool, state: str) -> None:
    """Nothing can serve; a model cannot; all can."""
    assert fleet_state(known, serves_here=serves_here) == state


def test_unservable_models_are_told_with_their_node_and_reason() -> None:
    """Those of a node that is gone are not: nobody knows."""
    nodes = [
        node("a", models=[("r", "recovering"), ("l", "loaded")]),
        node("b", is_healthy=False, models=[("x", "failed")]),
    ]
    assert unservable(ModelList([own("failed")], nodes=nodes), "here") == [
        Unservable("here", "m", "failed", "no file"),
        Unservable("a", "r", "recovering", "why"),
    ]
