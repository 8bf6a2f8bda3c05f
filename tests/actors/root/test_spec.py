"""Life cycle, back-off, intensity and restart rules with a clock of our own."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.root.spec import (
    TRANSITIONS,
    Backoff,
    ChildSpec,
    Exit,
    GroupBackoff,
    Intensity,
    Lifecycle,
    RestartAfter,
    RestartPolicy,
    RestartRule,
)
from cortexd.messages.control import ActorState


def _rule(policy: RestartPolicy = "permanent", max_restarts: int = 3) -> RestartRule:
    return RestartRule(policy, Backoff(random=lambda: 0.5), Intensity(max_restarts, 60.0))


def test_backoff_first_restart_is_at_once_then_doubles_to_the_cap() -> None:
    """The first crash costs nothing, a crash loop costs more and more."""
    backoff = Backoff(random=lambda: 0.5)
    delays = [round(backoff.next_delay_s(0.0), 3) for _ in range(10)]
    assert delays == [0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_backoff_long_ready_actor_starts_anew() -> None:
    """A crash after a stable half minute is a first crash."""
    backoff = Backoff(random=lambda: 0.5)
    for _ in range(5):
        backoff.next_delay_s(0.0)
    assert backoff.next_delay_s(30.0) == 0.0


@given(st.floats(0.0, 1.0), st.integers(2, 40))
def test_backoff_jitter_stays_within_a_fifth(jitter: float, failures: int) -> None:
    """Two actors that die together do not return together, and never much late."""
    backoff = Backoff(random=lambda: jitter)
    delay_s = [backoff.next_delay_s(0.0) for _ in range(failures)][-1]
    plain_s = min(5.0, 0.05 * 2 ** (failures - 2))
    assert plain_s * 0.8 <= delay_s <= plain_s * 1.2 + 1e-9


def test_group_backoff_is_zero_half_then_five_seconds() -> None:
    """A reload is costly, so the third try waits."""
    backoff = GroupBackoff()
    assert [backoff.next_delay_s(0.0) for _ in range(4)] == [0.0, 0.5, 5.0, 5.0]
    assert backoff.next_delay_s(300.0) == 0.0


@given(st.lists(st.floats(0.0, 1000.0), min_size=1, max_size=50))
def test_intensity_is_a_sliding_window(times: list[float]) -> None:
    """Exceeded exactly when more than the bound lie within the window."""
    intensity = Intensity(3, 60.0)
    seen: list[float] = []
    for now_s in sorted(times):
        seen.append(now_s)
        in_window = sum(time_s > now_s - 60.0 for time_s in seen)
        assert intensity.exceeded_by_failure_at(now_s) == (in_window > 3)


@pytest.mark.parametrize(
    ("policy", "clean", "verdict"),
    [
        ("permanent", True, RestartAfter(0.0)),
        ("permanent", False, RestartAfter(0.0)),
        ("transient", True, "exited"),
        ("transient", False, RestartAfter(0.0)),
        ("temporary", True, "exited"),
        ("temporary", False, "exited"),
    ],
)
def test_restart_rule_follows_the_policy(
    policy: RestartPolicy, clean: bool, verdict: object
) -> None:
    """OTP's table of restart types."""
    unasked = Exit(commanded=False, clean=clean, ready_for_s=1.0)
    assert _rule(policy).after(unasked, 0.0) == verdict


@given(
    st.sampled_from(get_args(RestartPolicy)),
    st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0.0, 100.0)), max_size=30),
)
def test_restart_rule_commanded_stop_never_restarts(
    policy: RestartPolicy, exits: list[tuple[bool, bool, float]]
) -> None:
    """Whatever came before, what we asked for is no failure."""
    rule = _rule(policy)
    for number, (commanded, clean, ready_for_s) in enumerate(exits):
        verdict = rule.after(Exit(commanded, clean, ready_for_s), float(number))
        if commanded:
            assert verdict == "exited"


def test_restart_rule_crash_loop_fails() -> None:
    """One more than allowed within the window, and it is given up."""
    rule = _rule(max_restarts=2)
    crash = Exit(commanded=False, clean=False, ready_for_s=0.0)
    verdicts = [rule.after(crash, float(second)) for second in range(3)]
    assert verdicts[-1] == "failed"
    assert all(isinstance(verdict, RestartAfter) for verdict in verdicts[:2])


@given(st.lists(st.sampled_from(get_args(ActorState)), max_size=30))
def test_lifecycle_takes_only_listed_transitions(states: list[ActorState]) -> None:
    """Any other is a fault of ours, and loud."""
    lifecycle = Lifecycle()
    for number, state in enumerate(states):
        if state in TRANSITIONS[lifecycle.state]:
            lifecycle.to(state, "test", float(number))
            assert (lifecycle.state, lifecycle.since_s) == (state, float(number))
        else:
            with pytest.raises(RuntimeError, match="no transition"):
                lifecycle.to(state, "test", float(number))


def test_lifecycle_knows_every_state() -> None:
    """A state that nothing leads out of, or into, would be a trap."""
    states = set(get_args(ActorState))
    assert set(TRANSITIONS) == states
    assert frozenset.union(*TRANSITIONS.values()) == states - {"idle"}


@pytest.mark.parametrize(
    ("name", "target"), [("root", "a:B"), ("", "a:B"), ("a b", "a:B"), ("a", "a.B"), ("a", ":B")]
)
def test_child_spec_bad_name_or_target_is_refused(name: str, target: str) -> None:
    """A name becomes a path and a title, a target an import."""
    with pytest.raises(ValueError, match="allowed"):
        ChildSpec(name, target)
