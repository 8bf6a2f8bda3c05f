"""Random SIGKILLs under constant traffic. The oracle: no request hangs, no answer is mixed up.

`make chaos` runs it; CHAOS_KILLS and CHAOS_SEED set how long and which. Times are
printed, never asserted.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import threading
import time
import urllib.error
from collections import Counter, defaultdict
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from tests.tree.daemon import Daemon
from tests.tree.tiny_model import make_tiny_model
from tests.waiting import wait_for

pytestmark = pytest.mark.chaos

LIGHT_ACTORS = ("router", "store", "poller", "evictor", "reloader", "metrics", "front.0")
NUM_PROMPTS = 8
NUM_CLIENTS = 3
# The leader costs a model load each time, so it is one victim among many.
LEADER_SHARE = 0.1


class Traffic:
    """Clients that ask known questions and compare the answers with those of a quiet daemon."""

    def __init__(self, daemon: Daemon, model: str) -> None:
        self.daemon, self.model = daemon, model
        self.expected = [self._ask(number) for number in range(NUM_PROMPTS)]
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(seed,)) for seed in range(NUM_CLIENTS)
        ]

    def start(self) -> None:
        """Begin asking."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End; a client that hangs fails the test."""
        self.is_over.set()
        for thread in self._threads:
            thread.join(timeout=120)
            assert not thread.is_alive(), "a request never ended"

    def _ask(self, number: int) -> str:
        status, answer = self.daemon.chat(self.model, f"question {number}", max_tokens=12)
        if status != 200:
            return str(answer["error"]["code"])
        return "text:" + answer["choices"][0]["message"]["content"]

    def _run(self, seed: int) -> None:
        choose = random.Random(seed)
        while not self.is_over.is_set():
            number = choose.randrange(NUM_PROMPTS)
            try:
                answer = self._ask(number)
            except (urllib.error.URLError, ConnectionError) as error:
                reason = getattr(error, "reason", error)
                self.outcomes[type(reason).__name__] += 1
                continue
            if answer.startswith("text:") and answer != self.expected[number]:
                self.wrong.append(f"{number}: {answer!r}, not {self.expected[number]!r}")
            self.outcomes["text" if answer.startswith("text:") else answer] += 1


@pytest.mark.timeout(1800)
def test_random_kills_leave_no_hang_no_mix_no_leftover(tmp_path: Path) -> None:
    """Every request ends; what ends in text has the right text; the daemon is whole afterwards."""
    num_kills = int(os.environ.get("CHAOS_KILLS", "100"))
    seed = int(os.environ.get("CHAOS_SEED", str(random.randrange(10**6))))
    print(f"\nseed {seed}, {num_kills} kills")
    choose = random.Random(seed)
    model = str(make_tiny_model(tmp_path / "model"))
    settings = {
        "CORTEXD_SUPERVISION__MAX_RESTARTS": str(10 * num_kills),
        "CORTEXD_SUPERVISION__MAX_GROUP_RESTARTS": str(10 * num_kills),
    }
    with Daemon(tmp_path, "--model", model, **settings) as daemon:
        daemon.wait_loaded(model)
        traffic = Traffic(daemon, model)
        assert daemon.process is not None
        root = psutil.Process(daemon.process.pid)
        num_fds, num_threads = root.num_fds(), root.num_threads()
        leader = next(name for name, actor in daemon.actors().items() if actor["group"])
        traffic.start()
        for _ in range(num_kills):
            victim = leader if choose.random() < LEADER_SHARE else choose.choice(LIGHT_ACTORS)
            _kill_and_wait(daemon, victim)
            time.sleep(choose.random() * 0.05)
        traffic.stop()
        daemon.wait_loaded(model)
        print(f"outcomes: {dict(traffic.outcomes)}")
        for victim, times_ms in sorted(_recoveries_ms(daemon).items()):
            print(
                f"{victim}: {len(times_ms)} kills, ready again after median "
                f"{statistics.median(times_ms):.0f} ms, max {max(times_ms):.0f} ms"
            )
        assert not traffic.wrong
        allowed = {"text", "engine_restarting", "model_loading", "actor_down", "mailbox_full"}
        connection = {"ConnectionResetError", "RemoteDisconnected", "ConnectionRefusedError"}
        assert set(traffic.outcomes) <= allowed | connection, traffic.outcomes
        assert traffic.outcomes["ConnectionRefusedError"] == 0, "the root holds the listener"
        assert traffic.outcomes["text"] > 0
        assert [traffic._ask(number) for number in range(NUM_PROMPTS)] == traffic.expected
        wait_for(lambda: root.num_fds() <= num_fds + 2, "the root's descriptors closing")
        assert root.num_threads() <= num_threads
        assert len(daemon.actors()) == len(LIGHT_ACTORS) + 1


def _kill_and_wait(daemon: Daemon, victim: str) -> None:
    """SIGKILL a ready actor and return when its next incarnation is ready."""

    def ready_pid() -> int:
        actor = daemon.actors().get(victim)
        return int(actor["pid"]) if actor and actor["state"] == "ready" else 0

    pid = wait_for(ready_pid, f"{victim} being ready")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: ready_pid() not in {0, pid}, f"{victim} coming back")


def _recoveries_ms(daemon: Daemon) -> dict[str, list[float]]:
    """Return, by actor, the times from a kill to READY, as the root's own log has them."""
    killed_at: dict[str, float] = {}
    times_ms: dict[str, list[float]] = defaultdict(list)
    lines = {line for line in daemon.log().splitlines() if '"event":"actor.' in line}
    # Rotated files are read by name, which is not the order of their writing.
    for entry in sorted(map(json.loads, lines), key=lambda entry: str(entry["time"])):
        at = datetime.fromisoformat(entry["time"]).timestamp()
        if entry["event"] == "actor.exited":
            killed_at[entry["actor"]] = at
        elif entry["event"] == "actor.ready" and entry["actor"] in killed_at:
            times_ms[entry["actor"]].append(1000 * (at - killed_at.pop(entry["actor"])))
    return times_ms
