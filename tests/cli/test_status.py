"""`cortexd status`: the screen, the JSON, the exit code."""

from __future__ import annotations

import json

import pytest

from cli.main import main
from cli.status import render
from cortexd.errors import DeadlineExceeded
from tests.cli.fake_daemon import Document, FakeDaemon

STATUS: Document = {
    "v": 1,
    "pid": 4711,
    "version": "0.1.0",
    "uptime_s": 192.4,
    "role": "all",
    "state": "ok",
    "listen": {"api": "0.0.0.0:31313", "metrics": "127.0.0.1:31314", "neuron": None},
    "actors": [
        {
            "name": "router",
            "pid": 4712,
            "state": "ready",
            "incarnation": 1,
            "restarts": 0,
            "since_s": 190.0,
            "rss_bytes": 40 << 20,
            "lag_ms": 0.25,
            "reason": "started",
        },
        {
            "name": "front.0",
            "pid": 0,
            "state": "backoff",
            "restarts": 3,
            "since_s": 0.2,
            "rss_bytes": 0,
            "lag_ms": 0.0,
            "reason": "exit code 1",
        },
    ],
    "models": [
        {
            "model_id": "org/loaded",
            "state": "loaded",
            "memory_bytes": 100 << 20,
            "limits": {"context": 8192, "output": 8192},
            "in_flight": 2,
            "last_used_s": 4.2,
            "quant": "Q8_0",
            "tensor_parallel": 2,
            "devices": [0, 1],
        },
        {
            "model_id": "org/loading",
            "state": "loading",
            "stage": "loading weights",
            "progress": 0.42,
            "eta_s": 17.0,
        },
        {"model_id": "org/bad", "state": "failed", "error": "no such\x1b[2J repository"},
    ],
}


def test_status_shows_one_screen(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Daemon, addresses, actors with the reason of trouble, models with their progress."""
    daemon.answers["status"] = STATUS
    assert main(["status"]) == 0
    assert capsys.readouterr().out == (
        """\
cortexd 0.1.0  ok  role all  up 3m12s  pid 4711
  api      http://127.0.0.1:31313
  metrics  http://127.0.0.1:31314

ACTOR    STATE     PID  SINCE  RESTARTS    MEMORY     LAG  REASON
router   ready    4712  3m10s         0  40.0 MiB  0.2 ms
front.0  backoff     -   0.2s         3         -       -  exit code 1

MODEL        STATE       MEMORY  CONTEXT  IN FLIGHT  LAST USED  DETAIL
org/loaded   loaded   100.0 MiB     8192          2   4.2s ago  Q8_0, tp 2, devices 0,1
org/loading  loading          -        -          0          -  loading weights 42 %, 17s left
org/bad      failed           -        -          0          -  no such[2J repository
"""
    )
    assert daemon.is_closed


def test_status_json_is_the_daemons_answer(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """Machine output on standard output, nothing else."""
    daemon.answers["status"] = STATUS
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ("ok", 0),
        ("starting", 6),
        ("impaired", 6),
        ("degraded", 6),
        ("draining", 6),
        ("stopping", 6),
    ],
)
def test_exit_code_tells_health(daemon: FakeDaemon, state: str, code: int) -> None:
    """Only a daemon that is well gives 0."""
    daemon.answers["status"] = {**STATUS, "state": state}
    assert main(["status"]) == code


def test_unknown_models_are_said_to_be_unknown(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """A router that did not answer is not an empty list of models."""
    daemon.answers["status"] = {**STATUS, "models": None, "models_error": "router: no answer"}
    main(["status"])
    assert "models: unknown (router: no answer)" in capsys.readouterr().out
    daemon.answers["status"] = {**STATUS, "models": []}
    main(["status"])
    assert "no models; load one with: cortexd load ID" in capsys.readouterr().out


def test_daemon_that_does_not_answer_exits_124(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hung daemon is told from one that does not run."""
    daemon.answers["status"] = DeadlineExceeded("status: no answer within 10 s")
    assert main(["status"]) == 124
    assert capsys.readouterr().err == "cortexd: status: no answer within 10 s\n"


def test_status_shows_remote_neurons() -> None:
    """One line for each, with what is wrong with it."""
    node = {"name": "beast", "kind": "cortex", "endpoint": "http://h:1", "is_healthy": False}
    node |= {"models": [{"state": "loaded"}, {"state": "unloaded"}], "dispatched": 3, "error": "no"}
    line = render({**STATUS, "nodes": [node]}, colour=False).splitlines()[-1].split()
    assert line == ["beast", "cortex", "down", "http://h:1", "1", "2", "3", "no"]
    node |= {"is_healthy": True, "is_draining": True}
    lines = render({**STATUS, "role": "gateway", "models": [], "nodes": [node]}, colour=False)
    assert lines.splitlines()[-1].split()[2] == "draining"
    assert "\n\n\n" not in lines
