"""Budgets: nothing is oversold, windows pass, everything that is reserved ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortexd.errors import InsufficientQuota, RateLimitExceeded
from cortexd.keys import Key, Window, key_digest
from cortexd.ledger import ABANDONED_AFTER_S, Ledger, Reservation

START = 1_000_000.0


def ledger(cap: int | None = 100, seconds: int | None = None) -> Ledger:
    """Return a ledger with one key, "k"."""
    window = None if seconds is None else Window(kind="rolling", seconds=seconds)
    made = Ledger()
    made.set_keys([Key(key_id="k", key_sha256=key_digest("k"), hard_cap=cap, window=window)])
    return made


def reserve(made: Ledger, name: str, tokens: int, now: float = START, holder: str = "f.1") -> None:
    """Reserve for key "k"."""
    made.reserve(name, Reservation("k", holder, tokens, now), now)


def spend(made: Ledger, name: str, tokens: int, now: float = START) -> None:
    """Reserve and settle at once."""
    reserve(made, name, tokens, now)
    made.report(name, tokens, 0, now)
    made.settle(name, now)


def test_reserved_tokens_are_not_there_for_others() -> None:
    """What a running request may use is taken; what it did not use comes back."""
    made = ledger(100)
    reserve(made, "a", 80)
    with pytest.raises(InsufficientQuota) as caught:
        reserve(made, "b", 21)
    assert caught.value.details == {"limit": 100, "remaining": 20, "requested": 21}
    assert caught.value.retry_after_s is None
    made.report("a", 5, 5, START)
    charge = made.settle("a", START)
    assert charge is not None
    assert (charge.prompt_tokens, charge.completion_tokens) == (5, 5)
    assert made.settle("a", START) is None
    reserve(made, "b", 90)


def test_amount_of_a_reservation_can_be_changed() -> None:
    """A second word on the same request replaces the first, or changes nothing."""
    made = ledger(100)
    reserve(made, "a", 40)
    reserve(made, "a", 100)
    with pytest.raises(InsufficientQuota):
        reserve(made, "a", 101)
    assert made.spending("k", START).reserved == 100


def test_rolling_window_gives_back_and_says_when() -> None:
    """Tokens come back when their window is over, at most a sixtieth of it late."""
    made = ledger(100, seconds=600)
    spend(made, "a", 60)
    spend(made, "b", 30, START + 300)
    with pytest.raises(RateLimitExceeded) as caught:
        reserve(made, "c", 50, START + 400)
    wait_s = caught.value.retry_after_s
    assert wait_s is not None
    assert 200 <= wait_s <= 210
    reserve(made, "c", 50, START + 400 + wait_s)
    with pytest.raises(InsufficientQuota):  # more than the cap: no waiting helps
        reserve(made, "d", 101, START + 400)


def test_what_is_only_reserved_is_worth_a_short_wait() -> None:
    """Running requests give back what they do not use: try again soon."""
    made = ledger(100, seconds=600)
    reserve(made, "a", 100)
    with pytest.raises(RateLimitExceeded) as caught:
        reserve(made, "b", 10)
    assert caught.value.retry_after_s == 1.0


def test_holder_and_silence_end_reservations() -> None:
    """A front's requests are found by its incarnation; unreported ones by their age."""
    made = ledger()
    reserve(made, "a", 10, holder="front.0.1")
    reserve(made, "b", 10, holder="front.0.2")
    assert made.held_by("front.0.1") == ["a"]
    later = START + ABANDONED_AFTER_S
    assert made.abandoned(later) == []
    made.report("b", 1, 1, later)
    assert made.abandoned(later + 1) == ["a"]


def test_spending_outlives_its_key_and_is_restored() -> None:
    """A key that comes back finds what it has spent; a new ledger is brought to the same."""
    made = ledger(100, seconds=600)
    spend(made, "a", 60)
    keys = made.keys
    made.set_keys([])
    made.set_keys(keys)
    assert made.spending("k", START).spent == 60
    copy = Ledger()
    for key_id, at, tokens in made.all_parts(START):
        copy.restore(key_id, at, tokens)
    copy.set_keys(keys)
    assert copy.spending("k", START).spent == 60
    assert copy.spending("k", START + 611).spent == 0


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.integers(1, 60), st.integers(0, 60), st.booleans()),
        max_size=60,
    ),
    st.sampled_from([None, 600]),
)
def test_sum_of_spent_and_reserved_never_exceeds_the_cap(
    steps: list[tuple[str, int, int, bool]], seconds: int | None
) -> None:
    """As long as nobody uses more than it has reserved, whatever the order."""
    made = ledger(100, seconds)
    now = START
    for name, tokens, used, is_end in steps:
        now += 7
        if is_end:
            held = made.reservations.get(name)
            if held is not None:
                made.report(name, 0, min(used, held.tokens), now)
            made.settle(name, now)
        else:
            try:
                reserve(made, name, tokens, now)
            except (InsufficientQuota, RateLimitExceeded):
                continue
        spending = made.spending("k", now)
        assert 0 <= spending.reserved == sum(one.tokens for one in made.reservations.values())
        assert spending.spent + spending.reserved <= 100
