"""`cortexd stop`: it returns when the process has ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest

from cli import stop as stop_module
from cli.main import main
from tests.cli.fake_daemon import Document, FakeDaemon
from tests.waiting import DEADLINE_S


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    """A process that ends when its standard input does."""
    script = "import sys; sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, text=True
    ) as child:
        yield child
        child.kill()


def test_stop_waits_for_the_end_of_the_process(
    daemon: FakeDaemon,
    process: subprocess.Popen[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Shutdown is asked for once, and the command ends after the daemon."""
    daemon.answers = {"status": {"pid": process.pid}, "shutdown": {}}
    request = daemon.request

    def request_and_end(op: str, args: Mapping[str, object]) -> Document:
        if op == "shutdown":
            assert process.stdin is not None
            process.stdin.close()
        return request(op, args)

    monkeypatch.setattr(daemon, "request", request_and_end)
    assert main(["stop", "--now"]) == 0
    assert daemon.requests[-1] == ("shutdown", {"now": True})
    assert capsys.readouterr().out.startswith(f"stopped (process {process.pid}, ")
    assert process.wait(DEADLINE_S) == 0


def test_daemon_that_does_not_end_exits_124(
    daemon: FakeDaemon,
    process: subprocess.Popen[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A daemon that outlives its own bounds is reported with its process id."""
    daemon.answers = {"status": {"pid": process.pid}, "shutdown": {}}
    monkeypatch.setattr(stop_module, "_STOP_MARGIN_S", 0.0)
    monkeypatch.setenv("CORTEXD_SUPERVISION__STOP_TIMEOUT_S", "0.01")
    assert main(["stop", "--now"]) == 124
    assert f"process {process.pid} still runs" in capsys.readouterr().err
