"""Victim selection: enough room, nobody in use, nobody protected, nobody superfluous."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cortexd.catalogue import DEFAULT_PRIORITY
from cortexd.eviction import (
    Strategy,
    choose_victims,
    fragmented_models,
    idle_models,
    may_displace,
)
from cortexd.models import ModelState, ModelStatus


def model(
    name: str,
    size: int = 10,
    *,
    used_s: float | None = None,
    in_flight: int = 0,
    state: ModelState = "loaded",
    ttl_s: float | None = None,
    cycles: int = 0,
) -> ModelStatus:
    """Return a model of `size` bytes, last used `used_s` seconds ago."""
    return ModelStatus(
        model_id=name,
        state=state,
        memory_bytes=size,
        last_used_s=used_s,
        in_flight=in_flight,
        idle_ttl_s=ttl_s,
        num_cycles=cycles,
    )


def victims(
    models: list[ModelStatus],
    needed: int,
    *,
    incoming: str | None = "new",
    strategy: Strategy = "lru",
    priorities: dict[str, int] | None = None,
) -> list[str]:
    """Choose with nothing free."""
    return choose_victims(
        models,
        needed_bytes=needed,
        free_bytes=0,
        incoming=incoming,
        strategy=strategy,
        priorities=priorities or {},
    )


def test_longest_unused_goes_first_and_never_used_before_all() -> None:
    """LRU order, until there is room."""
    models = [model("a", used_s=5), model("b", used_s=50), model("c")]
    assert victims(models, 10) == ["c"]
    assert victims(models, 15) == ["c", "b"]
    assert victims(models, 30) == ["c", "b", "a"]


def test_lowest_class_goes_first_with_priority() -> None:
    """The strategy "priority" spares a higher class even when it is unused for longer."""
    models = [model("high", used_s=500), model("low", used_s=1)]
    priorities = {"high": 100, "low": 10}
    assert victims(models, 10, strategy="priority", priorities=priorities) == ["low"]
    assert victims(models, 10, strategy="lru", priorities=priorities) == ["high"]


def test_class_protects_from_below_and_equals_swap() -> None:
    """A model displaces its own class and lower ones, under both strategies."""
    models = [model("resident", used_s=9)]
    for strategy in ("lru", "priority"):
        for incoming_class, expected in ((199, []), (200, ["resident"]), (201, ["resident"])):
            priorities = {"resident": 200, "new": incoming_class}
            chosen = victims(models, 10, strategy=strategy, priorities=priorities)  # type: ignore[arg-type]
            assert chosen == expected
    assert may_displace(1, 1)


def test_without_incoming_only_default_class_goes() -> None:
    """Making room for nobody in particular touches the default class and below."""
    models = [model("kept", used_s=9), model("goes", used_s=1)]
    priorities = {"kept": DEFAULT_PRIORITY + 1}
    assert victims(models, 10, incoming=None, priorities=priorities) == ["goes"]


def test_used_and_unready_models_stay() -> None:
    """In flight, loading, draining and the incoming model itself are never victims."""
    models = [
        model("busy", in_flight=1),
        model("loading", state="loading"),
        model("draining", state="draining"),
        model("new"),
    ]
    assert victims(models, 5) == []


def test_nothing_is_unloaded_in_vain() -> None:
    """When all candidates together do not make room, nobody goes; when there is room, neither."""
    assert victims([model("a"), model("b")], 21) == []
    assert victims([model("a")], 0) == []


def test_small_models_are_spared_when_a_big_one_suffices() -> None:
    """A victim that a later, bigger one makes needless stays loaded."""
    models = [model("old", 1, used_s=9), model("mid", 2, used_s=8), model("big", 50, used_s=7)]
    assert victims(models, 50) == ["big"]
    assert victims(models, 51) == ["old", "big"]


_STATUSES = st.lists(
    st.builds(
        ModelStatus,
        model_id=st.sampled_from("abcdefgh"),
        state=st.sampled_from(["loaded", "loading", "failed", "draining"]),
        memory_bytes=st.integers(0, 50),
        in_flight=st.integers(0, 1),
        last_used_s=st.none() | st.floats(0, 1e6),
        loaded_at=st.none() | st.floats(0, 1e9),
    ),
    unique_by=lambda status: status.model_id,
)


@given(
    _STATUSES,
    st.integers(0, 200),
    st.integers(0, 100),
    st.sampled_from(["a", "z", None]),
    st.sampled_from(["lru", "priority"]),
    st.dictionaries(st.sampled_from("abcdefghz"), st.integers(98, 102)),
)
def test_choice_is_sound_sufficient_and_minimal(  # noqa: PLR0917
    models: list[ModelStatus],
    needed: int,
    free: int,
    incoming: str | None,
    strategy: Strategy,
    priorities: dict[str, int],
) -> None:
    """Whatever the fleet: only allowed victims, enough room or none, and none too many."""
    chosen = choose_victims(
        models,
        needed_bytes=needed,
        free_bytes=free,
        incoming=incoming,
        strategy=strategy,
        priorities=priorities,
    )
    by_id = {status.model_id: status for status in models}
    own = priorities.get(incoming, 100) if incoming else 100
    allowed = {
        name
        for name, status in by_id.items()
        if status.state == "loaded"
        and not status.in_flight
        and name != incoming
        and priorities.get(name, 100) <= own
    }
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= allowed
    freed = sum(by_id[name].memory_bytes for name in chosen)
    if chosen:
        assert free < needed <= free + freed
        assert all(free + freed - by_id[name].memory_bytes < needed for name in chosen)
    else:
        total = sum(by_id[name].memory_bytes for name in allowed)
        assert needed <= free or free + total < needed
    shuffled = choose_victims(
        models[::-1],
        needed_bytes=needed,
        free_bytes=free,
        incoming=incoming,
        strategy=strategy,
        priorities=priorities,
    )
    assert shuffled == chosen


def test_idle_models_are_those_past_their_time() -> None:
    """Loaded, unused for the time-to-live, longest first; 0 switches it off."""
    models = [
        model("young", used_s=9),
        model("old", used_s=11),
        model("older", used_s=12),
        model("busy", used_s=99, in_flight=1),
        model("fresh"),
        model("gone", used_s=99, state="unloaded"),
    ]
    assert idle_models(models, 10) == ["older", "old"]
    assert idle_models(models, 0) == []


def test_own_time_to_live_wins_over_the_hosts() -> None:
    """Shorter, longer, never; also where the host has none."""
    models = [
        model("short", used_s=6, ttl_s=5),
        model("long", used_s=50, ttl_s=100),
        model("never", used_s=999, ttl_s=0),
        model("plain", used_s=50),
    ]
    assert idle_models(models, 10) == ["plain", "short"]
    assert idle_models(models, 0) == ["short"]


def test_engines_that_outlived_many_others_are_started_anew_when_unused() -> None:
    """Not below the count, never one in use; 0 switches it off."""
    models = [
        model("old", cycles=3),
        model("older", cycles=5),
        model("busy", cycles=9, in_flight=1),
        model("young", cycles=2),
        model("gone", cycles=9, state="unloaded"),
    ]
    assert fragmented_models(models, 3) == ["older", "old"]
    assert fragmented_models(models, 0) == []
