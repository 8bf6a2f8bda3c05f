"""Killing what can be killed under traffic: every request ends, the service comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.tree.daemon import Daemon, streamed_text
from tests.tree.tiny_model import LONG
from tests.waiting import DEADLINE_S, wait_for

pytestmark = pytest.mark.tree

LIGHT_ACTORS = ("router", "store", "poller", "evictor", "reloader", "metrics", "front.0")


def _leader(daemon: Daemon) -> str:
    return next(name for name, actor in daemon.actors().items() if actor["group"])


@pytest.mark.parametrize("actor", LIGHT_ACTORS)
def test_killed_light_actor_comes_back_and_every_request_ends(
    daemon: Daemon, tiny_model: Path, actor: str
) -> None:
    """Requests in flight end in an answer or an error, and the next one works."""

    def ask(number: int) -> int | str:
        try:
            return daemon.chat(str(tiny_model), f"question {number}")[0]
        except (urllib.error.URLError, ConnectionError) as error:
            return type(error).__name__  # only a killed front may do this

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, number) for number in range(12)]
        pid = daemon.kill(actor)
        outcomes = [future.result(timeout=DEADLINE_S) for future in asked]
    if actor != "front.0":
        assert set(outcomes) <= {200, 503}, outcomes
    daemon.wait_back(actor, pid)
    assert daemon.chat(str(tiny_model), "hello")[0] == 200


def test_killed_leader_ends_streams_with_an_error_event_and_comes_back(
    daemon: Daemon, tiny_model: Path
) -> None:
    """A stream gets a retriable error event and no [DONE]; then the model serves again."""
    before = streamed_text(list(daemon.stream(str(tiny_model), "hello")))
    pid = int(daemon.actors()[_leader(daemon)]["pid"])
    stream = daemon.stream(str(tiny_model), "hello", max_tokens=LONG, ignore_eos=True)
    events: list[dict[str, Any] | str] = [next(stream), next(stream)]
    os.kill(pid, signal.SIGKILL)
    events += list(stream)
    assert isinstance(events[-1], dict), events[-1]
    assert events[-1]["error"]["code"] == "engine_restarting"
    daemon.wait_loaded(str(tiny_model))
    assert streamed_text(list(daemon.stream(str(tiny_model), "hello"))) == before


def test_stopped_front_is_dumped_killed_and_replaced(tmp_path: Path) -> None:
    """A hung actor is noticed by its missing heartbeat."""
    with Daemon(tmp_path, CORTEXD_SUPERVISION__KILL_AFTER_S="5") as daemon:
        pid = int(daemon.actors()["front.0"]["pid"])
        os.kill(pid, signal.SIGSTOP)
        daemon.wait_back("front.0", pid)
        assert daemon.get("/livez")[0] == 200


def test_second_start_names_the_running_pid(daemon: Daemon) -> None:
    """Two daemons do not share a runtime directory."""
    done = subprocess.run(
        [sys.executable, "-m", "cortexd", "start"],
        env={**daemon.environment, **_other_ports()},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode != 0
    assert daemon.process is not None
    assert str(daemon.process.pid) in done.stderr


def _other_ports() -> dict[str, str]:
    return {
        "CORTEXD_GATEWAY__LISTEN": "127.0.0.1:0",
        "CORTEXD_GATEWAY__METRICS_LISTEN": "127.0.0.1:0",
        "CORTEXD_NEURON__LISTEN": "127.0.0.1:0",
    }


def test_port_in_use_is_named_and_nothing_starts(daemon: Daemon) -> None:
    """The error names the address and the key to change."""
    with tempfile.TemporaryDirectory(prefix="cx-") as folder:  # pytest's are long for sockets
        done = subprocess.run(
            [sys.executable, "-m", "cortexd", "start"],
            env={**daemon.environment, "CORTEXD_PATHS__RUNTIME_DIR": folder},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    assert done.returncode != 0
    assert f"127.0.0.1:{daemon.api_port}" in done.stderr
    assert "gateway.listen" in done.stderr


def test_missing_model_fails_with_its_cause_and_the_daemon_stays(
    daemon: Daemon, tiny_model: Path, tmp_path: Path
) -> None:
    """Loading a path that is not there is an error of that load only."""
    status, answer = daemon.post(
        "/models/load", {"model_id": str(tmp_path / "nothing.gguf")}, port=daemon.neuron_port
    )
    assert status in {400, 404, 422}, answer
    assert "nothing.gguf" in answer["error"]["message"]
    assert list(daemon.models()) == [str(tiny_model)]
    assert daemon.get("/livez")[0] == 200


def test_truncated_model_is_refused_with_the_file_name(daemon: Daemon, tmp_path: Path) -> None:
    """A cut GGUF never reaches an engine process."""
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 16)
    status, answer = daemon.post("/models/load", {"model_id": str(path)}, port=daemon.neuron_port)
    assert status == 422, answer
    assert answer["error"]["code"] == "bad_model_file"
    assert "cut.gguf" in answer["error"]["message"]


def test_router_killed_while_a_model_loads_still_brings_it_up(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The load goes on without the router, and the new router adopts it."""
    with Daemon(tmp_path, "--model", str(tiny_model)) as daemon:
        wait_for(lambda: any(actor["group"] for actor in daemon.actors().values()), "the load")
        daemon.kill("router")
        wait_for(lambda: daemon.actors()["router"]["restarts"] == 1, "the router's restart")
        wait_for(daemon.models, "the router's answer")
        daemon.wait_loaded(str(tiny_model))
        assert daemon.chat(str(tiny_model), "hello")[0] == 200
        assert _leader_restarts(daemon) == 0


def _leader_restarts(daemon: Daemon) -> int:
    return int(daemon.actors()[_leader(daemon)]["restarts"])


def test_nothing_survives_a_killed_root(tiny_model: Path, tmp_path: Path) -> None:
    """SIGKILL of the root ends every descendant, fork servers included."""
    with Daemon(tmp_path, "--model", str(tiny_model)) as daemon:
        daemon.wait_loaded(str(tiny_model))
        family = daemon.family()
        assert len(family) >= len(LIGHT_ACTORS) + 1
        assert daemon.process is not None
        daemon.process.kill()
        daemon.process.wait()
        _, alive = psutil.wait_procs(family, timeout=DEADLINE_S)
        assert not alive


def test_stop_drains_and_leaves_no_file(tiny_model: Path, tmp_path: Path) -> None:
    """SIGTERM lets a running stream finish, exits 0, and removes the sockets."""
    patient = {"CORTEXD_SUPERVISION__STOP_TIMEOUT_S": str(DEADLINE_S)}
    with Daemon(tmp_path, "--model", str(tiny_model), **patient) as daemon:
        daemon.wait_loaded(str(tiny_model))
        stream = daemon.stream(str(tiny_model), "hello", max_tokens=200, ignore_eos=True)
        events: list[dict[str, Any] | str] = [next(stream)]
        assert daemon.process is not None
        daemon.process.terminate()
        events += list(stream)
        assert events[-1] == "[DONE]"
        assert daemon.process.wait(DEADLINE_S) == 0
        assert "killed by" not in daemon.log(), "an actor was not given the time to exit"
        assert not list(daemon.runtime_dir.glob("*.s"))
