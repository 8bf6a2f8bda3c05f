"""Finding the daemon: running, dead, absent, not ours."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cli import control
from cli.main import main
from cortexd.errors import ConfigError
from cortexd.settings import Paths, Settings


def settings_at(folder: Path) -> Settings:
    """Return settings whose sockets lie in `folder`."""
    return Settings(paths=Paths(runtime_dir=str(folder)))


def test_listening_socket_is_told_from_a_dead_one(tmp_path: Path) -> None:
    """The socket file of a killed daemon does not count, nor does any other file."""
    path = tmp_path / "admin.s"
    settings = settings_at(tmp_path)
    assert not control.is_running(settings)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert not control.is_running(settings)
        listener.listen()
        assert control.is_running(settings)
    assert not control.is_running(settings)
    path.unlink()
    path.touch()
    assert not control.is_running(settings)


def test_folder_open_to_others_is_not_trusted(tmp_path: Path) -> None:
    """A socket in a folder that others can write to could be anybody's."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "admin.s"))
        listener.listen()
        with (
            pytest.raises(ConfigError, match="mode 0777"),
            control.connected(settings_at(folder)),
        ):
            pass


def test_too_long_socket_path_is_an_error_not_absence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path no daemon could listen at is said to be too long."""
    monkeypatch.setenv("CORTEXD_PATHS__RUNTIME_DIR", "/tmp/" + "x" * 120)
    assert main(["status"]) == 2
    assert "allowed: at most 107" in capsys.readouterr().err


def test_error_document_without_words_still_is_an_error() -> None:
    """Whatever a failed operation sends, the user gets a sentence."""
    assert "see: cortexd logs" in str(control.error_of({}))
    assert "see: cortexd logs" in str(control.error_of({"code": 7, "message": None}))
