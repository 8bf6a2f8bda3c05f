"""Who waits, who is next, and who is refused."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cortexd.fair_queue import FairQueue, Ticket


def ticket(request_id: str, principal: str, since: float = 0.0) -> Ticket[None]:
    """A request that waits."""
    return Ticket(request_id, principal, since, None)


def test_next_is_the_oldest_of_who_runs_least() -> None:
    """Turns between principals, first come first served within one."""
    queue: FairQueue[None] = FairQueue(10)
    for request_id, principal, since in (("b2", "b", 2), ("b1", "b", 1), ("a1", "a", 3)):
        assert queue.join(ticket(request_id, principal, since)) is None
    found = queue.next({"b": 1})
    assert found is not None
    assert found.request_id == "a1"
    found = queue.next({"a": 1, "b": 1})
    assert found is not None
    assert found.request_id == "b1"
    queue.leave("b1")
    queue.leave("never")
    assert len(queue) == 2
    assert FairQueue[None](1).next({}) is None


def test_full_queue_refuses_the_newcomer_or_the_greediest() -> None:
    """Nobody is put out for one who holds as much."""
    queue: FairQueue[None] = FairQueue(2)
    queue.join(ticket("a1", "a", 1))
    queue.join(ticket("a2", "a", 2))
    loser = queue.join(ticket("a3", "a", 3))
    assert loser is not None
    assert loser.request_id == "a3"
    loser = queue.join(ticket("b1", "b", 4))
    assert loser is not None
    assert loser.request_id == "a2"
    loser = queue.join(ticket("c1", "c", 5))
    assert loser is not None
    assert loser.request_id == "c1"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), max_size=30))
def test_queue_never_holds_more_than_its_depth(arrivals: list[tuple[str, int]]) -> None:
    """Each arrival beyond it costs exactly one place."""
    queue: FairQueue[None] = FairQueue(5)
    for number, (principal, since) in enumerate(arrivals):
        was_full = len(queue) == 5
        loser = queue.join(ticket(str(number), principal, since))
        assert (loser is not None) == was_full
        assert len(queue) <= 5
