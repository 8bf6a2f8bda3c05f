"""What `cortexd start` shows of its models after it is ready."""

from __future__ import annotations

import io
import threading

import pytest

from cli.control import Document
from cli.model_watch import ModelView, watch_models
from cortexd.settings import DefaultModel, Paths, Settings
from tests.cli.fake_daemon import FakeDaemon
from tests.waiting import DEADLINE_S


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


def loading(stage: str, progress: float) -> list[Document]:
    """Return one model on its way, among one nobody waits for."""
    other: Document = {"model_id": "x/other", "state": "loaded"}
    return [other, {"model_id": "a/b", "state": "loading", "stage": stage, "progress": progress}]


def test_lines_come_per_stage_and_period_until_loaded() -> None:
    """Without a terminal: a line for each stage, one every five seconds, one at the end."""
    now = [0.0]
    stream = io.StringIO()
    view = ModelView(["a/b"], stream, lambda: now[0])
    view.show([{"model_id": "a/b", "state": "unloaded"}])
    for time_s, stage, progress in [(0, "down", 0.1), (1, "down", 0.2), (6, "down", 0.5)]:
        now[0] = time_s
        view.show(loading(stage, progress))
    view.show(loading("weights", 0.0))
    assert not view.is_settled
    now[0] = 12.0
    view.show([{"model_id": "a/b", "state": "loaded"}])
    assert view.is_settled
    assert stream.getvalue().splitlines() == [
        "a/b: down 10 %",
        "a/b: down 50 %",
        "a/b: weights 0 %",
        "a/b: loaded after 12s",
    ]


def test_terminal_line_is_written_in_place() -> None:
    """On a terminal progress overwrites itself; the cause of a failure stays."""
    stream = Terminal()
    view = ModelView(["a/b"], stream, lambda: 0.0)
    view.show(loading("down", 0.25))
    view.show([{"model_id": "a/b", "state": "failed", "error": "disk\x07 full"}])
    assert stream.getvalue() == "\r\x1b[2Ka/b: down 25 %\r\x1b[2Ka/b: failed: disk full\n"
    assert view.is_settled


def test_closed_stream_ends_the_view() -> None:
    """When nobody can read any more, there is nothing left to show."""
    stream = io.StringIO()
    view = ModelView(["a/b"], stream, lambda: 0.0)
    stream.close()
    view.show(loading("down", 0.25))
    assert view.is_settled


def test_watch_asks_the_daemon_until_all_is_settled(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """The thread ends with the last model and closes its channel."""
    daemon.answers["status"] = {"models": [{"model_id": "a/b", "state": "loaded"}]}
    models = [DefaultModel(model_id="a/b")]
    watch_models(Settings(default_models=models, paths=Paths(runtime_dir="run")))
    for thread in threading.enumerate():
        if thread.name == "model-watch":
            thread.join(DEADLINE_S)
    assert daemon.is_closed
    assert "a/b: loaded after" in capsys.readouterr().err
