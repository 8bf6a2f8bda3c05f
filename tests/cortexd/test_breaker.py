"""The breaker's life, with the clock handed in."""

from __future__ import annotations

from cortexd.breaker import Breaker


def fail(breaker: Breaker, now: float, *requests: str) -> None:
    """Let requests fail."""
    for request in requests:
        breaker.sent(request, now)
        breaker.failed(request, now)


def test_row_of_failures_opens_and_a_success_between_does_not() -> None:
    """Only failures without a success in between are the node's own."""
    breaker = Breaker()
    fail(breaker, 0, "a", "b")
    breaker.succeeded("c", 0)
    fail(breaker, 0, "d", "e")
    assert breaker.allows(0)
    fail(breaker, 0, "f")
    assert not breaker.allows(0)
    assert breaker.state(0) == "open"
    assert breaker.left_s(0) == 2


def test_half_open_lets_one_through_and_doubles_at_its_failure() -> None:
    """Late answers of earlier requests decide nothing."""
    breaker = Breaker()
    fail(breaker, 0, "a", "b", "c")
    assert breaker.state(2) == "half_open"
    breaker.sent("trial", 2)
    assert not breaker.allows(2)
    breaker.succeeded("early", 2)
    breaker.failed("early2", 2)
    assert not breaker.allows(2)
    breaker.failed("trial", 3)
    assert breaker.left_s(3) == 4
    breaker.sent("trial2", 7)
    breaker.succeeded("trial2", 8)
    assert breaker.state(8) == "closed"
    fail(breaker, 9, "x", "y", "z")
    assert breaker.left_s(9) == 2  # starts anew


def test_trial_that_tells_nothing_frees_its_place() -> None:
    """A client that leaves, or a trial that hangs, does not keep the node out."""
    breaker = Breaker()
    fail(breaker, 0, "a", "b", "c")
    breaker.sent("trial", 2)
    breaker.ended("trial")
    assert breaker.allows(2)
    breaker.sent("hangs", 2)
    assert not breaker.allows(31)
    assert breaker.allows(33)


def test_flapping_node_is_held_down() -> None:
    """Three times down within a minute; slower than that is no flapping."""
    slow = Breaker()
    for minute in range(5):
        slow.went_down(minute * 40.0)
    assert slow.allows(160)
    breaker = Breaker()
    for second in (0.0, 10.0, 20.0):
        breaker.went_down(second)
    assert not breaker.allows(29)
    assert breaker.allows(30)
    breaker.went_down(31)
    assert breaker.left_s(31) == 20
