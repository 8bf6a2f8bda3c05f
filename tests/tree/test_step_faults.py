"""A daemon whose engine's steps fail: what its clients are told, and what stays alive.

The faults come from `faulty/sitecustomize.py`, which this daemon's processes import.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.tree.daemon import Daemon
from tests.tree.faulty.sitecustomize import (
    BUG,
    DEVICE_FAULT,
    MAX_TOKENS,
    OUT_OF_MEMORY,
    SHORT_OF_MEMORY,
)
from tests.waiting import wait_for

pytestmark = pytest.mark.tree
TEXT = "the quick brown fox jumps over the lazy dog " * 3


@pytest.fixture(scope="module")
def daemon(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that serves the tiny model with an engine that can be told to fail."""
    arguments = ("--model", str(tiny_model))
    environment = {"PYTHONPATH": str(Path(__file__).parent / "faulty")}
    with Daemon(tmp_path_factory.mktemp("daemon"), *arguments, **environment) as running:
        running.wait_loaded(str(tiny_model))
        yield running


def leader_pid(daemon: Daemon) -> int:
    """Return the process that runs the engine."""
    (pid,) = [each["pid"] for name, each in daemon.actors().items() if name.endswith("/0")]
    return int(pid)


def ask(daemon: Daemon, model: Path, **fields: Any) -> tuple[int, Any]:
    """Return status and answer of a greedy question."""
    return daemon.chat(str(model), TEXT, **{"max_tokens": 8, **fields})


def test_step_that_runs_out_of_memory_is_made_smaller(daemon: Daemon, tiny_model: Path) -> None:
    """Its prompt is computed in smaller chunks and the answer is the same."""
    pid = leader_pid(daemon)
    _, expected = ask(daemon, tiny_model, cache_salt="roomy")
    assert expected["usage"]["prompt_tokens"] > 2 * MAX_TOKENS
    status, answer = ask(daemon, tiny_model, seed=SHORT_OF_MEMORY, cache_salt="short")
    assert (status, answer["choices"]) == (200, expected["choices"])
    assert leader_pid(daemon) == pid


@pytest.mark.parametrize(
    ("seed", "status", "code"),
    [(OUT_OF_MEMORY, 507, "insufficient_memory"), (BUG, 500, "internal_error")],
)
def test_request_that_fails_its_steps_does_not_end_the_engine(
    daemon: Daemon, tiny_model: Path, seed: int, status: int, code: str
) -> None:
    """It is answered with an error that names it; what is asked next is answered as before."""
    pid = leader_pid(daemon)
    _, expected = ask(daemon, tiny_model)
    found, answer = ask(daemon, tiny_model, seed=seed)
    assert (found, answer["error"]["code"]) == (status, code)
    assert "request " in answer["error"]["message"]
    assert "told to" not in answer["error"]["message"]
    _, again = ask(daemon, tiny_model)
    assert again["choices"] == expected["choices"]
    assert leader_pid(daemon) == pid
    if seed == BUG:
        wait_for(lambda: "told to fail" in daemon.log(), "the traceback in the log")
    wait_for(lambda: daemon.models()[str(tiny_model)]["in_flight"] == 0, "the lease being closed")


def test_requests_beside_one_that_runs_out_of_memory_are_answered(
    daemon: Daemon, tiny_model: Path
) -> None:
    """It is left alone in ever smaller steps, and given up; the others wait and go on."""
    _, expected = ask(daemon, tiny_model)
    with ThreadPoolExecutor(4) as pool:
        seeds = [None, OUT_OF_MEMORY, None, None]
        answers = list(pool.map(lambda seed: ask(daemon, tiny_model, seed=seed), seeds))
    assert [status for status, _ in answers].count(200) >= 1
    for seed, (status, answer) in zip(seeds, answers, strict=True):
        assert (status == 200) == (seed is None), answer
        if seed is None:
            assert answer["choices"] == expected["choices"]


def test_lost_device_ends_the_process_with_its_own_code(daemon: Daemon, tiny_model: Path) -> None:
    """The client may retry; the group is started anew and serves."""
    pid = leader_pid(daemon)
    status, answer = ask(daemon, tiny_model, seed=DEVICE_FAULT, stream=False)
    assert status == 503, answer

    def exits() -> list[str]:
        events = daemon.admin("events")["events"]
        return [each["fields"]["exit"] for each in events if each["event"] == "actor.exited"]

    wait_for(lambda: "exit code 71" in exits(), "the leader's exit")
    daemon.wait_loaded(str(tiny_model))
    wait_for(lambda: ask(daemon, tiny_model)[0] == 200, "an answer of the new process")
    assert leader_pid(daemon) != pid
