"""A rank of a split hybrid that is killed, stopped or delayed, at every moment of its life.

    python -m pytest -m chaos -s tests/chaos/test_rank_faults.py

prints one line for each: how the request ended, and after what time the group answered again. The
oracle: every request ends in text or in a retriable error, the group is back, the same question has
the same answer, and nothing is left behind. Times are printed, never asserted. RANK_FAULTS_SEED
sets the moments within the phases.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.tree.daemon import Daemon
from tests.tree.tiny_model import make_tiny_model
from tests.waiting import wait_for

pytestmark = pytest.mark.chaos

WORLD_SIZE = 2
STEP_TIMEOUT_S = 3.0
START_TIMEOUT_S = 12.0
# Shorter than any deadline: a delay is no fault.
DELAY_S = 0.7
REQUEST_DEADLINE_S = 60.0
QUESTION = "the quick brown fox " * 3
LONG_PROMPT = "word " * 700  # 3500 tokens, which no cache holds: each begins with its own number
RETRIABLE = {"engine_restarting", "model_load_failed", "model_loading"}
MOMENTS = ("load", "prefill", "idle", "decode")
FAULTS = ("kill", "stop", "delay")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny qwen3_5, whose states must not be advanced twice."""
    folder = tmp_path_factory.mktemp("models") / "hybrid"
    return str(make_tiny_model(folder, architecture="qwen3_5"))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that restarts a group as often as it must."""
    with Daemon(
        tmp_path_factory.mktemp("daemon"),
        CORTEXD_SUPERVISION__STEP_TIMEOUT_S=str(STEP_TIMEOUT_S),
        # What ends a rank that is stopped before it serves; the default has room for slow disks.
        CORTEXD_SUPERVISION__START_TIMEOUT_S=str(START_TIMEOUT_S),
        CORTEXD_SUPERVISION__LOAD_STALL_TIMEOUT_S=str(START_TIMEOUT_S),
        CORTEXD_SUPERVISION__MAX_GROUP_RESTARTS="1000",
        CORTEXD_SUPERVISION__KILL_AFTER_S="5",
    ) as running:
        yield running


def _load(daemon: Daemon, model: str) -> tuple[int, Any]:
    body = {"model_id": model, "tensor_parallel": WORLD_SIZE}
    return daemon.post("/models/load", body, port=daemon.neuron_port)


def _answer(daemon: Daemon, model: str) -> str | None:
    status, answer = daemon.chat(model, QUESTION, max_tokens=8, ignore_eos=True)
    return str(answer["choices"][0]["message"]["content"]) if status == 200 else None


def _pid(daemon: Daemon, rank: int) -> int:
    def pid() -> int:
        ranks = [a for a in daemon.actors().values() if a["group"] and a["rank"] == rank]
        return int(ranks[0]["pid"] or 0) if ranks else 0

    return int(wait_for(pid, f"a process of rank {rank}"))


def _stream(daemon: Daemon, model: str, prompt: str, begun: threading.Event) -> tuple[int, Any]:
    """Return what a stream's last event says."""
    events = []
    for event in daemon.stream(model, prompt, max_tokens=300, ignore_eos=True):
        events.append(event)
        begun.set()
    return 200, events[-1]


def _begin(
    daemon: Daemon, model: str, moment: str, pool: ThreadPoolExecutor
) -> Future[tuple[int, Any]] | None:
    """Bring a new group to the moment; return what is under way then.

    New, since one that has failed before waits for seconds until it is started again.
    """
    daemon.post("/models/unload", {"model_id": model}, port=daemon.neuron_port)
    if moment == "load":
        return pool.submit(_load, daemon, model)
    assert _load(daemon, model)[0] == 200
    if moment == "idle":
        return None
    begun = threading.Event()
    if moment == "prefill":
        body = {"max_tokens": 4, "ignore_eos": True}
        prompt = f"{time.monotonic_ns()} {LONG_PROMPT}"
        return pool.submit(lambda: daemon.chat(model, prompt, **body))
    running = pool.submit(_stream, daemon, model, "hello", begun)
    assert begun.wait(REQUEST_DEADLINE_S), "the stream never began"
    return running


def _strike(fault: str, pid: int) -> None:
    os.kill(pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    if fault == "delay":
        time.sleep(DELAY_S)  # the delay is the fault
        os.kill(pid, signal.SIGCONT)


def _ending(outcome: tuple[int, Any] | None) -> str:
    """Return how a request ended. Fails on an error that may not be sent again."""
    if outcome is None:
        return "-"
    _, last = outcome
    if not isinstance(last, dict) or "error" not in last:
        return "done"
    code = str(last["error"]["code"])
    assert code in RETRIABLE, last
    return code


@pytest.mark.timeout(1200)
def test_group_survives_every_fault_of_every_rank(
    daemon: Daemon, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """See the module's text."""
    seed = int(os.environ.get("RANK_FAULTS_SEED", str(random.randrange(10**6))))
    choose = random.Random(seed)

    def say(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    say(
        f"\nseed {seed}; deadlines: start {START_TIMEOUT_S:g} s, step {STEP_TIMEOUT_S:g} s; "
        f"a delay is {DELAY_S:g} s"
    )
    say(f"{'moment':8} {'fault':6} {'rank':4} {'request ended':18} {'same ranks':10} answers again")
    assert _load(daemon, model)[0] == 200
    expected = _answer(daemon, model)
    assert expected is not None
    assert daemon.process is not None
    root = psutil.Process(daemon.process.pid)
    num_fds = root.num_fds()
    with ThreadPoolExecutor(1) as pool:
        for moment in MOMENTS:
            for fault in FAULTS:
                for rank in range(WORLD_SIZE):
                    under_way = _begin(daemon, model, moment, pool)
                    pid = _pid(daemon, rank)
                    time.sleep(choose.random() * 0.05)  # the moment is the test's subject
                    _strike(fault, pid)
                    struck = time.monotonic()
                    outcome = under_way and under_way.result(REQUEST_DEADLINE_S)
                    ending = _ending(outcome)
                    answer = wait_for(lambda: _answer(daemon, model), "an answer")
                    took_s = time.monotonic() - struck
                    assert answer == expected, (moment, fault, rank)
                    is_same = _pid(daemon, rank) == pid
                    kept = "yes" if is_same else "no"
                    say(f"{moment:8} {fault:6} {rank:4} {ending:18} {kept:10} {took_s:6.2f} s")
                    assert is_same == (fault == "delay"), (moment, fault, rank)
    wait_for(lambda: root.num_fds() <= num_fds + 2, "the root's descriptors closing")
    ranks = [actor for actor in daemon.actors().values() if actor["group"]]
    assert len(ranks) == WORLD_SIZE
    assert not list(Path(daemon.runtime_dir).glob("*.meet"))
