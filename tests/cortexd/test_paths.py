"""XDG folders, their verification, and the length limit of socket paths."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from actors.transport.sockets import inbox_endpoint
from cortexd import paths
from cortexd.errors import ConfigError
from cortexd.messages.envelope import Address
from cortexd.settings import Paths, Settings, Store

HOME = {"HOME": "/home/me"}


def test_folders_follow_xdg_and_ignore_what_it_ignores() -> None:
    """Set variables count; unset, empty and relative ones do not."""
    settings = Settings()
    xdg = {"XDG_RUNTIME_DIR": "/run/x", "XDG_STATE_HOME": "/s", "XDG_CACHE_HOME": "/c"}
    assert paths.runtime_dir(settings, xdg) == Path("/run/x/cortexd")
    assert paths.state_dir(settings, xdg) == Path("/s/cortexd")
    assert paths.cache_dir(settings.store, xdg) == Path("/c/cortexd")
    relative = {**HOME, "XDG_STATE_HOME": "s", "XDG_CACHE_HOME": ""}
    assert paths.state_dir(settings, relative) == Path("/home/me/.local/state/cortexd")
    assert paths.cache_dir(settings.store, relative) == Path("/home/me/.cache/cortexd")
    assert paths.config_home(HOME) == Path("/home/me/.config/cortexd")


def test_settings_win_over_xdg() -> None:
    """A configured folder is used as it is."""
    settings = Settings(paths=Paths(runtime_dir="/r", state_dir="/t"), store=Store(cache_dir="/k"))
    xdg = {"XDG_RUNTIME_DIR": "/run/x", "XDG_STATE_HOME": "/s", "XDG_CACHE_HOME": "/c"}
    assert paths.runtime_dir(settings, xdg) == Path("/r")
    assert paths.state_dir(settings, xdg) == Path("/t")
    assert paths.cache_dir(settings.store, xdg) == Path("/k")


def test_runtime_dir_without_session_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a session folder the fallback is one in /tmp that names the user."""
    monkeypatch.setattr(os, "getuid", lambda: 4242424)
    assert paths.runtime_dir(Settings(), HOME) == Path("/tmp/cortexd-4242424")


def test_private_dir_is_created_closed(tmp_path: Path) -> None:
    """Parents are made, the folder itself has mode 0700, and a second call is content."""
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        assert paths.prepare_private_dir(folder) == folder
        assert folder.stat().st_mode & 0o777 == 0o700


def test_open_dir_is_refused(tmp_path: Path) -> None:
    """A folder that others may enter is refused with the command that closes it."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o750)
    with pytest.raises(ConfigError, match=r"mode 0750.*chmod 700"):
        paths.prepare_private_dir(folder)


def test_foreign_dir_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder somebody else prepared is refused, whatever its mode."""
    folder = tmp_path / "foreign"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="belongs to user id"):
        paths.prepare_private_dir(folder)


def test_link_and_file_are_refused(tmp_path: Path) -> None:
    """A link could be turned elsewhere later; a file cannot hold sockets."""
    (tmp_path / "real").mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    file = tmp_path / "file"
    file.touch(mode=0o600)
    with pytest.raises(ConfigError, match="not a folder"):
        paths.prepare_private_dir(link)
    with pytest.raises(ConfigError, match="cannot be created"):
        paths.prepare_private_dir(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        paths.verify_private_dir(tmp_path / "absent")


def test_folder_whose_longest_socket_would_not_fit_is_refused() -> None:
    """At the start, not when a model with a long name is loaded."""
    paths.check_room_for_sockets(Path("/" + "a" * 73))
    with pytest.raises(ConfigError, match=r"75 bytes.*at most 74.*paths\.runtime_dir"):
        paths.check_room_for_sockets(Path("/" + "a" * 74))
    long_name = Address("a-model-with-a-name-that-is-cut/0", 999_999)
    endpoint = inbox_endpoint(Path("/" + "a" * 73), long_name)
    assert len(endpoint.removeprefix("ipc://")) == paths.IPC_PATH_LIMIT


def test_socket_path_limit_is_107_bytes(tmp_path: Path) -> None:
    """The limit counts bytes, and the message says how long the path is and what to set."""
    short = Path("/" + "a" * 98)
    assert len(str(paths.ipc_path(short, "admin.s"))) == 107
    with pytest.raises(ConfigError, match=r"108 bytes.*at most 107.*paths\.runtime_dir"):
        paths.ipc_path(Path("/" + "a" * 99), "admin.s")
    with pytest.raises(ConfigError, match="at most 107"):
        paths.admin_socket(Settings(paths=Paths(runtime_dir="/" + "ä" * 50)), {})
