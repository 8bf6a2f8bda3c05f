"""Real-process fixtures: a tiny model made once, and a daemon that serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tree.daemon import Daemon
from tests.tree.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama chat model's directory."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def daemon(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that has the tiny model loaded, shared by a module's tests."""
    with Daemon(tmp_path_factory.mktemp("daemon"), "--model", str(tiny_model)) as running:
        running.wait_loaded(str(tiny_model))
        yield running
