"""Stop strings cut at the first completed stop, however the text is split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortexd.errors import InvalidValue
from engine.text.stop_strings import StopStrings

LETTERS = st.text(alphabet="ab\n", max_size=12)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=4)


def _cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """Say what naive search says: the first end wins, the longer stop of two."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(pushes=st.lists(LETTERS, max_size=6), stops=STOPS)
def test_push_any_split_agrees_with_naive_search(pushes: list[str], stops: list[str]) -> None:
    """The emitted text is that of one search over the whole; nothing follows a stop."""
    filter_ = StopStrings(stops)
    emitted, stopped = "", False
    for text in pushes:
        part, stopped = filter_.push(text)
        emitted += part
    expected, expected_stop = _cut("".join(pushes), stops)
    assert stopped == expected_stop
    assert emitted + filter_.flush() == expected
    assert (filter_.stop in stops) if stopped else filter_.stop is None


@given(pushes=st.lists(LETTERS, max_size=6), stops=STOPS)
def test_push_holds_back_only_what_may_become_a_stop(pushes: list[str], stops: list[str]) -> None:
    """What is held is the longest end of the text that begins a stop, never more."""
    filter_, seen, emitted = StopStrings(stops), "", ""
    for text in pushes:
        seen += text
        part, stopped = filter_.push(text)
        emitted += part
        if stopped:
            break
        held = seen[len(emitted) :]
        begins = [
            seen[len(seen) - n :]
            for stop in stops
            for n in range(1, len(stop))
            if seen.endswith(stop[:n])
        ]
        assert held == max(begins, key=len, default="")


def test_push_after_stop_emits_nothing() -> None:
    """Text that arrives after the stop is dropped."""
    filter_ = StopStrings(["END"])
    assert filter_.push("text EN") == ("text ", False)
    assert filter_.push("D more") == ("", True)
    assert filter_.push("again") == ("", True)
    assert filter_.flush() == ""


def test_empty_stop_is_refused() -> None:
    """An empty stop string would end every text."""
    with pytest.raises(InvalidValue, match="stop: an empty string"):
        StopStrings(["a", ""])
