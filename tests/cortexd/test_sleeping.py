"""Who sleeps instead of being unloaded, and for how long."""

from __future__ import annotations

import pytest

from cortexd.models import ModelState, ModelStatus
from cortexd.sleeping import HOST_RESERVE_BYTES, Overslept, choose_sleepers, overslept

GIB = 2**30


def model(
    name: str, *, sleep_gib: int = 10, state: ModelState = "loaded", state_s: float = 0.0
) -> ModelStatus:
    """Return a model whose weights take so much host memory."""
    return ModelStatus(
        model_id=name, state=state, sleep_bytes=sleep_gib * GIB, state_s=state_s, memory_bytes=1
    )


@pytest.mark.parametrize(
    ("free_bytes", "ttl_s", "sleepers"),
    [
        (HOST_RESERVE_BYTES + 20 * GIB, 60, ["a", "b"]),
        (HOST_RESERVE_BYTES + 20 * GIB - 1, 60, ["a"]),
        (HOST_RESERVE_BYTES + 10 * GIB - 1, 60, []),
        (10 * GIB, 60, []),
        (None, 60, []),
        (1000 * GIB, 0, []),
    ],
)
def test_victims_sleep_as_far_as_the_host_has_room(
    free_bytes: int | None, ttl_s: float, sleepers: list[str]
) -> None:
    """In order, leaving the reserve; not when unknown, nor when switched off."""
    victims = [model("a"), model("b")]
    assert choose_sleepers(victims, host_free_bytes=free_bytes, ttl_s=ttl_s) == sleepers


def test_model_that_cannot_sleep_or_sleeps_already_is_unloaded() -> None:
    """One on a CPU takes nobody else's place."""
    victims = [model("cpu", sleep_gib=0), model("asleep", state="sleeping"), model("gpu")]
    assert choose_sleepers(victims, host_free_bytes=20 * GIB, ttl_s=60) == ["gpu"]


def test_models_asleep_for_too_long_are_named_longest_first() -> None:
    """Only sleeping ones; without a time to live, none."""
    models = [
        model("young", state="sleeping", state_s=59),
        model("old", state="sleeping", state_s=60),
        model("older", state="sleeping", state_s=61),
        model("awake", state_s=999),
    ]
    found = overslept(models, host_free_bytes=100 * GIB, ttl_s=60)
    assert found == [Overslept("older", "asleep"), Overslept("old", "asleep")]
    assert overslept(models, host_free_bytes=100 * GIB, ttl_s=0) == []


def test_short_host_ends_the_longest_sleeper_alone() -> None:
    """The next look tells whether that was enough."""
    models = [model(name, state="sleeping", state_s=age) for name, age in (("a", 1), ("b", 2))]
    short = HOST_RESERVE_BYTES - 1
    assert overslept(models, host_free_bytes=short, ttl_s=0) == [Overslept("b", "host_memory")]
    assert overslept(models, host_free_bytes=HOST_RESERVE_BYTES, ttl_s=60) == []
    assert overslept([model("awake")], host_free_bytes=0, ttl_s=60) == []
