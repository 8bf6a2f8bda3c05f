"""Fixtures of command tests: an isolated home, and a daemon that answers as told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cli import control
from tests.cli.fake_daemon import FakeDaemon


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration, no daemon and no folder of the real user is ever touched."""
    for name in [*os.environ]:
        if name.startswith(("CORTEXD_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CORTEXD_PATHS__RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDaemon:
    """A running daemon that answers as told."""
    fake = FakeDaemon()
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setattr(control, "is_running", lambda settings: True)
    monkeypatch.setattr(control, "open_channel", lambda path: fake)
    return fake
