"""The leader when a step fails: what cannot be trusted any more ends with its own exit code."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NoReturn

import pytest

from actors.actor import ActorContext
from actors.leader import Leader
from cortexd.errors import ErrorInfo, Internal
from cortexd.messages.inference import SequenceDelta
from cortexd.settings import Settings


class FaultyEngine:
    """An engine whose next step raises."""

    has_work = True

    def __init__(self, error: Exception) -> None:
        self.error = error

    def step(self) -> dict[str, list[SequenceDelta]]:
        """Fail."""
        raise self.error


class TestLeader(Leader):
    """A leader that keeps what it would tell the root."""

    __test__ = False
    last_words: ErrorInfo

    def _report_fatal(self, error: ErrorInfo) -> None:
        self.last_words = error


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), 71),
        (RuntimeError("NCCL error: unhandled system error"), 71),
        (KeyError("a bug that recurs"), 70),
        (Internal("rank 1: forward_failed"), 70),
    ],
)
def test_poll_that_raises_exits_with_the_code_of_its_kind_and_says_why(
    error: Exception, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine raises it cannot survive: the group has to start anew."""

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    log = logging.getLogger("test.leader")
    leader = TestLeader(ActorContext("g/0", 1, Settings(), b"", {}, log, tmp_path))
    leader.engine = FaultyEngine(error)  # type: ignore[assignment]
    with pytest.raises(SystemExit) as caught:
        leader.poll()
    assert caught.value.code == exit_code
    assert repr(error) in leader.last_words.message
