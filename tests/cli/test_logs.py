"""`cortexd logs`: lines for people, following, foreign text."""

from __future__ import annotations

import pytest

from cli.logs import log_line
from cli.main import main
from cortexd.errors import NotFound
from tests.cli.fake_daemon import FakeDaemon

LINE = {
    "event": "actor.restarted",
    "level": "warning",
    "time": "2026-01-02T03:04:05.678Z",
    "actor": "root",
    "name": "front.0",
    "reason": "exit code 1",
    "pid": 12,
}
SHOWN = '03:04:05.678 root warning actor.restarted name=front.0 reason="exit code 1" pid=12'


def test_logs_prints_old_lines_then_follows(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options are handed on; the ring comes first, then each new line."""
    daemon.answers["actor.logs"] = {"lines": [LINE]}
    daemon.event_list = [
        {"event": "line", "data": {**LINE, "level": "info"}},
        {"event": "end", "data": {}},
        {"event": "line", "data": LINE},
    ]
    assert main(["logs", "front.0", "-f", "-n", "5"]) == 0
    assert daemon.requests == [("actor.logs", {"name": "front.0", "lines": 5, "follow": True})]
    assert capsys.readouterr().out.splitlines() == [SHOWN, SHOWN.replace(" warning", "")]


def test_fields_without_a_value_are_left_out() -> None:
    """A request that went well is one short line."""
    line = {**LINE, "error": None, "cold": False, "wait_ms": 0}
    assert log_line(line) == f"{SHOWN} cold=false wait_ms=0"


def test_unknown_actor_exits_4(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The daemon knows its actors."""
    daemon.answers["actor.logs"] = NotFound('no actor "x"')
    assert main(["logs", "x"]) == 4
    assert capsys.readouterr().err == 'cortexd: no actor "x"\n'


def test_wrapped_text_and_strange_lines_are_shown() -> None:
    """What a library printed comes with its actor; nothing can control the terminal."""
    wrapped = {
        "event": "output",
        "level": "info",
        "time": "2026-01-02T03:04:05.678Z",
        "actor": "m/0",
        "pid": 7,
        "text": "warning: \x1b[31mred\x1b[0m",
    }
    assert log_line(wrapped) == "03:04:05.678 m/0 warning: [31mred[0m"
    assert log_line("plain") == "plain"
    assert log_line({"line": '{"event": "x", "actor": "a"}', "actor": "b"}) == "a x"
