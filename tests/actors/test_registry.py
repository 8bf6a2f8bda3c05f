"""The view of who runs: snapshot, then every event in order."""

from __future__ import annotations

import pytest

from actors.registry import Registry
from cortexd.messages import ActorDown, ActorInfo, ActorUp, GroupUp, Welcome
from cortexd.messages.envelope import Address


def _up(sequence: int, incarnation: int) -> ActorUp:
    return ActorUp(sequence, ActorInfo("a", incarnation, "ready"))


def _down(sequence: int, incarnation: int) -> ActorDown:
    return ActorDown(sequence, "a", incarnation, "", 0, "killed")


def test_registry_follows_the_incarnations() -> None:
    """Up, down, up again: one live incarnation at most, and the dead stay dead."""
    registry = Registry()
    registry.welcome(Welcome(4, [ActorInfo("b", 1, "ready")]))
    registry.apply(_up(5, 1))
    registry.apply(_down(6, 1))
    assert registry.get("a") is None
    assert registry.is_gone(Address("a", 1))
    assert not registry.is_gone(Address("a", 2))
    registry.apply(_up(7, 2))
    found = registry.get("a")
    assert found is not None
    assert found.incarnation == 2
    assert [actor.name for actor in registry.all()] == ["b", "a"]


def test_registry_down_of_an_older_incarnation_leaves_the_newer() -> None:
    """Order of names does not matter, order of incarnations does."""
    registry = Registry()
    registry.welcome(Welcome(1, [ActorInfo("a", 3, "ready")]))
    registry.apply(_down(2, 2))
    assert registry.get("a") is not None


@pytest.mark.parametrize("sequence", [1, 3])
def test_registry_gap_or_repetition_is_an_error(sequence: int) -> None:
    """A stale view would send messages to the dead."""
    registry = Registry()
    registry.welcome(Welcome(1, []))
    with pytest.raises(RuntimeError, match="lost"):
        registry.apply(GroupUp(sequence, "g", 1, "g/0"))
