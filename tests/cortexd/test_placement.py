"""Where a request goes, table by table."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortexd.catalogue import CatalogueModel
from cortexd.errors import ModelNotFeasible, ModelNotFound, NoHealthyNode
from cortexd.placement import Device, Node, Placement, load_options, place

MODEL = "org/model"


def node(
    name: str, state: Any = None, *, busy: int = 0, free_mib: int = 8000, **changes: Any
) -> Node:
    """A healthy node with one device of 10000 MiB."""
    return Node(
        **{
            "name": name,
            "is_healthy": True,
            "can_load": True,
            "devices": (Device(0, 10_000, free_mib),),
            "states": {} if state is None else {MODEL: state},
            "busy": {MODEL: busy},
            **changes,
        }
    )


def needs(**fields: Any) -> CatalogueModel:
    """A catalogue entry."""
    return CatalogueModel(id=MODEL, **fields)


@pytest.mark.parametrize(
    ("nodes", "entry", "expected"),
    [
        ([node("a", "loaded", busy=3), node("b", "loaded", busy=2)], None, ("run", "b")),
        ([node("b", "loaded", busy=2), node("a", "loaded", busy=2)], None, ("run", "a")),
        ([node("a", "unloaded"), node("b", "loaded", busy=99)], needs(), ("run", "b")),
        ([node("a", "loaded", is_healthy=False), node("b", "loaded", busy=9)], None, ("run", "b")),
        ([node("a", "unloaded"), node("b", "loading")], needs(), ("wait", "b")),
        ([node("a", "unloaded"), node("b", "recovering")], needs(), ("wait", "b")),
        ([node("a", "sleeping"), node("b", "loaded", busy=9)], None, ("run", "b")),
        ([node("a", "loading"), node("b", "sleeping")], needs(), ("run", "b")),
        ([node("a"), node("b", "unloaded", free_mib=1)], None, ("load", "b")),
        ([node("a"), node("b", "unloaded")], needs(), ("load", "b")),
        ([node("a", "failed"), node("b")], needs(), ("load", "b")),
        ([node("a", free_mib=10), node("b", free_mib=5000)], needs(vram_mb=4000), ("load", "b")),
        ([node("a", free_mib=7000), node("b", free_mib=9000)], needs(vram_mb=1), ("load", "b")),
        ([node("a", free_mib=9000), node("b")], needs(pinned_on=["b"]), ("load", "b")),
        ([node("a", can_load=False), node("b")], needs(), ("load", "b")),
        # Two devices with half the room each are not one device with all of it.
        (
            [
                node("a", devices=(Device(0, 9000, 3000), Device(1, 9000, 3000))),
                node("b", devices=(Device(0, 9000, 5000),)),
            ],
            needs(vram_mb=5000),
            ("load", "b"),
        ),
        (
            [
                node("a", devices=(Device(0, 9000, 4000), Device(1, 9000, 4000))),
                node("b", devices=(Device(0, 9000, 9000),)),
            ],
            needs(vram_mb=8000, min_devices=2),
            ("load", "a"),
        ),
    ],
)
def test_place_chooses(
    nodes: list[Node], entry: CatalogueModel | None, expected: tuple[str, str]
) -> None:
    """Loaded before coming up before known before possible; least busy, most room, by name."""
    decision = place(MODEL, nodes, entry)
    assert (decision.action, decision.node) == expected


@pytest.mark.parametrize(
    ("nodes", "entry", "error"),
    [
        ([node("a")], None, ModelNotFound),
        ([node("a"), node("b", is_healthy=False, is_seen=False)], None, ModelNotFound),
        ([node("a", is_healthy=False)], None, NoHealthyNode),
        ([node("a"), node("b", "loaded", is_healthy=False)], None, NoHealthyNode),
        ([node("a")], needs(min_device_vram_mb=20_000), ModelNotFeasible),
        ([node("a")], needs(min_devices=2), ModelNotFeasible),
        ([node("a")], needs(pinned_on=["b"]), ModelNotFeasible),
        ([node("a"), node("b", is_healthy=False)], needs(pinned_on=["b"]), NoHealthyNode),
        (
            [node("a"), node("b", is_healthy=False, is_seen=False, devices=())],
            needs(min_device_vram_mb=20_000),
            NoHealthyNode,
        ),
        ([node("a", is_seen=False, devices=())], needs(), NoHealthyNode),
        ([node("a", can_load=False)], needs(), ModelNotFeasible),
    ],
)
def test_place_refuses(
    nodes: list[Node], entry: CatalogueModel | None, error: type[Exception]
) -> None:
    """Only what a node's return can mend is retriable; the rest is 404, with a reason."""
    with pytest.raises(error) as caught:
        place(MODEL, nodes, entry)
    assert (getattr(caught.value, "retry_after_s", None) is not None) == (error is NoHealthyNode)


def test_place_says_that_external_servers_load_nothing() -> None:
    """Their memory is not what is missing."""
    with pytest.raises(ModelNotFeasible, match='no node loads models; external servers: "a"'):
        place(MODEL, [node("a", can_load=False)], needs())


def test_unknown_model_is_answered_with_close_names() -> None:
    """A typo is told what was meant."""
    with pytest.raises(ModelNotFound, match='did you mean "org/model"'):
        place("org/modle", [node("a")], None, lambda: [MODEL, "other"])


def test_load_options_take_the_first_devices_that_fit() -> None:
    """Tensor parallel ranks go where each device has the memory asked for."""
    devices = (Device(0, 100), Device(1, 9000), Device(2, 9000), Device(3, 9000))
    entry = needs(min_devices=2, min_device_vram_mb=5000, quant="Q8_0")
    options = load_options(MODEL, entry, node("a", devices=devices))
    assert (options.devices, options.tensor_parallel, options.quant) == ((1, 2), 2, "Q8_0")
    assert load_options(MODEL, None, node("a")).devices is None


@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, "loaded", "loading", "unloaded", "failed", "recovering"]),
            st.integers(0, 3),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_a_loaded_healthy_node_always_wins(world: list[tuple[Any, int, bool]]) -> None:
    """Nothing is loaded or awaited while a healthy node serves the model, in any order of nodes."""
    nodes = [
        node(f"n{index}", state, busy=busy, is_healthy=is_healthy)
        for index, (state, busy, is_healthy) in enumerate(world)
    ]
    serving = [item for item in nodes if item.is_healthy and item.states.get(MODEL) == "loaded"]
    if not any(item.is_healthy for item in nodes):
        with pytest.raises(NoHealthyNode):
            place(MODEL, nodes, needs())
        return
    decision = place(MODEL, nodes, needs())
    assert decision == place(MODEL, nodes[::-1], needs())
    assert isinstance(decision, Placement)
    if serving:
        assert decision.action == "run"
        least = min(item.busy[MODEL] for item in serving)
        chosen = next(item for item in serving if item.name == decision.node)
        assert chosen.busy[MODEL] == least
