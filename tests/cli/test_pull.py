"""`cortexd pull`: through the daemon when it runs, else directly; progress without a terminal."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import engine.sources
from cli.main import main
from cli.pull import progress_lines
from cortexd.errors import ModelSourceError
from cortexd.models import ModelFiles
from cortexd.settings import Store
from tests.cli.fake_daemon import FakeDaemon


def test_pull_goes_through_a_running_daemon(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """It joins the daemon's own download and shows its progress."""
    daemon.answers["model.pull"] = {"op_id": "op-1", "accepted": True}
    mebibyte = 1 << 20
    daemon.event_list = [
        {
            "event": "progress",
            "op_id": "op-1",
            "data": {"stage": "downloading", "done_bytes": mebibyte, "total_bytes": 4 * mebibyte},
        },
        {
            "event": "done",
            "op_id": "op-1",
            "data": {"size_bytes": 4 * mebibyte, "weights": ["/c/m.gguf"]},
        },
    ]
    assert main(["pull", "a/b", "--quant", "Q8_0"]) == 0
    assert daemon.requests == [("model.pull", {"model_id": "a/b", "quant": "Q8_0"})]
    out, err = capsys.readouterr()
    assert out == "a/b: 4.0 MiB, /c/m.gguf\n"
    assert err == "a/b: downloading 25 % of 4.0 MiB\n"


def test_pull_without_daemon_uses_the_source_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same cache and settings as the daemon's."""
    seen: list[object] = []

    def resolve(  # noqa: PLR0917
        model_id: str,
        quant: str | None,
        store: Store,
        cache_dir: Path,
        progress: Callable[[str, int, int], None],
        cancel: threading.Event,
    ) -> ModelFiles:
        seen.extend([model_id, quant, store.offline, cache_dir])
        progress("downloading", 10, 0)
        return ModelFiles(
            model_id=model_id,
            source="hub",
            revision="r",
            format="gguf",
            weights=("/c/w.gguf",),
            size_bytes=10,
        )

    monkeypatch.setattr(engine.sources, "resolve", resolve, raising=False)
    monkeypatch.setenv("CORTEXD_STORE__OFFLINE", "true")
    assert main(["pull", "a/b"]) == 0
    assert seen == ["a/b", None, True, tmp_path / "home/.cache/cortexd"]
    out, err = capsys.readouterr()
    assert out == "a/b: 10 B, /c/w.gguf\n"
    assert err == "a/b: downloading 10 B\n"


def test_failed_pull_tells_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The source's error ends the command, without a traceback."""

    def resolve(*arguments: object) -> ModelFiles:
        raise ModelSourceError("a/b: no such repository")

    monkeypatch.setattr(engine.sources, "resolve", resolve, raising=False)
    assert main(["pull", "a/b"]) == 1
    assert capsys.readouterr().err == "cortexd: a/b: no such repository\n"


def test_progress_lines_come_per_stage_and_period(capsys: pytest.CaptureFixture[str]) -> None:
    """A log is not flooded: a line for a new stage, then one every two seconds."""
    times = iter([0.0, 0.1, 0.2, 1.0, 3.1])
    report = progress_lines("m", lambda: next(times))
    report("downloading", 1, 10)
    report("downloading", 2, 10)
    report("verifying", 0, 10)
    report("verifying", 9, 10)
    assert capsys.readouterr().err.splitlines() == [
        "m: downloading 10 % of 10 B",
        "m: verifying 0 % of 10 B",
        "m: verifying 90 % of 10 B",
    ]


def test_progress_on_a_terminal_is_a_bar(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal the progress is drawn on standard error and gone at the end."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    daemon.answers["model.pull"] = {"op_id": "op-1", "accepted": True}
    data: dict[str, object] = {"stage": "downloading", "done_bytes": 1, "total_bytes": 2}
    daemon.event_list = [
        {"event": "progress", "op_id": "op-1", "data": data},
        {"event": "done", "op_id": "op-1", "data": {"size_bytes": 2, "weights": ["/c/m"]}},
    ]
    assert main(["pull", "a/b"]) == 0
    assert "a/b" in terminal.getvalue()
    assert capsys.readouterr().out == "a/b: 2 B, /c/m\n"
