"""`cortexd keys add|list|revoke`."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.main import main
from cortexd.errors import ActorDown
from cortexd.keys import key_digest, load_keys
from tests.cli.fake_daemon import FakeDaemon


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configured keys file, which does not exist yet."""
    monkeypatch.setenv("CORTEXD_ENTITLEMENTS__KEYS_FILE", str(tmp_path / "keys.toml"))
    return tmp_path / "keys.toml"


def add(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Add a key; return it."""
    assert main(["keys", "add", *arguments]) == 0
    return capsys.readouterr().out.strip()


def test_added_key_is_shown_once_and_kept_as_a_digest(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is private and holds what the options said."""
    secret = add(
        capsys, "alice", "--account", "team", "--model", "tier/*", "--cap", "1000", "--window", "60"
    )
    other = add(capsys, "beast", "--gateway")
    assert secret != other
    assert path.stat().st_mode & 0o777 == 0o600
    assert secret not in path.read_text()
    alice, beast = load_keys(str(path)).keys
    assert alice.key_sha256 == key_digest(secret)
    assert (alice.account, alice.models, alice.hard_cap) == ("team", ["tier/*"], 1000)
    assert alice.window is not None
    assert (alice.window.kind, alice.window.seconds) == ("rolling", 60)
    assert (beast.gateway, beast.account, beast.hard_cap) == (True, "beast", None)


def test_missing_file_is_said_to_be_made_by_adding_a_key(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it is noticed."""
    for command in (["keys", "list"], ["keys", "revoke", "a"], ["config", "check"], ["start"]):
        assert main(command) == 2
        told = f"{path}: does not exist; make it with: cortexd keys add ID"
        assert told in capsys.readouterr().err, command


def test_revoking_leaves_the_rest_of_the_file_alone(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Comments and other keys stay, as does the file's mode; inner tables go with their key."""
    digests = [key_digest(name) for name in "abc"]
    path.write_text(
        f'# ours\n[[keys]]\nkey_id = "a"\nkey_sha256 = "{digests[0]}"\n'
        f'[[keys]]\nkey_id = "b"\nkey_sha256 = "{digests[1]}"\nhard_cap = 5\n'
        '[keys.window]\nkind = "balance"\n'
        f'[[keys]]  # the last\nkey_id = "c"\nkey_sha256 = "{digests[2]}"\n'
    )
    path.chmod(0o640)
    assert main(["keys", "revoke", "b"]) == 0
    assert [key.key_id for key in load_keys(str(path)).keys] == ["a", "c"]
    assert path.read_text().startswith("# ours\n[[keys]]\n")
    assert "[[keys]]  # the last" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o640
    assert main(["keys", "revoke", "b"]) == 4
    assert 'there is no key "b"' in capsys.readouterr().err


def test_file_that_cannot_be_edited_stays_as_it_is(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written that would not mean what was asked for."""
    digest = key_digest("a")
    text = f'keys = [{{key_id = "a", key_sha256 = "{digest}"}}]\n'
    path.write_text(text)
    path.chmod(0o600)
    assert main(["keys", "add", "b"]) == 2
    assert main(["keys", "add", "a"]) == 2
    assert 'there is a key "a" already' in capsys.readouterr().err
    assert path.read_text() == text
    assert [one.name for one in path.parent.glob("keys*")] == ["keys.toml"]


def test_list_shows_what_the_daemon_knows(
    path: Path, capsys: pytest.CaptureFixture[str], daemon: FakeDaemon
) -> None:
    """Spent tokens come from the running daemon; without it the file alone is shown."""
    add(capsys, "alice", "--cap", "1000")
    daemon.answers["keys"] = {"keys": [{"key_id": "alice", "spent": 42, "reserved": 7}]}
    assert main(["keys", "list"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row == ["alice", "alice", "all", "1000", "-", "42", "7"]
    daemon.answers["keys"] = ActorDown("gone")
    assert main(["keys", "list"]) == 0
    out, err = capsys.readouterr()
    assert "alice" in out
    assert "is not known" in err


def test_without_a_configured_file_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    """The option that is missing is named."""
    assert main(["keys", "list"]) == 2
    assert "keys_file" in capsys.readouterr().err
