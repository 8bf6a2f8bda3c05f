"""`cortexd models`, `load`, `unload` and `pull` through a daemon."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cli.main import main
from cortexd.errors import ModelNotFound
from tests.cli.fake_daemon import FakeDaemon

ACCEPTED: dict[str, object] = {"op_id": "op-7", "accepted": True}


def test_models_lists_models_and_aliases(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both tables, or the JSON."""
    answer: dict[str, object] = {
        "models": [{"model_id": "a/b", "state": "loaded"}],
        "aliases": {"x/y": "a/b"},
    }
    daemon.answers["models"] = answer
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "a/b    loaded" in out
    assert "x/y    a/b" in out
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == answer
    daemon.answers["models"] = {"models": [], "aliases": {}}
    assert main(["models"]) == 0
    assert capsys.readouterr().out == "no models; load one with: cortexd load ID\n"


def test_models_of_a_gateway_tell_their_node_and_what_is_wrong(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error comes with the node it is of; without models, nodes that are away are named."""
    failed = {"model_id": "a/b", "state": "failed", "node": "beast", "error": "no such file"}
    daemon.answers["models"] = {"models": [failed], "aliases": {}, "nodes_down": ["x"]}
    main(["models"])
    assert "on beast: no such file" in capsys.readouterr().out
    daemon.answers["models"] = {"models": [], "aliases": {}, "nodes_down": ["x", "y"]}
    main(["models"])
    told = "no models; these neurons do not answer: x, y; see: cortexd status\n"
    assert capsys.readouterr().out == told


def test_load_waits_for_its_own_operation(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options are handed on, progress is shown once per change, other operations are ignored."""
    daemon.answers["model.load"] = ACCEPTED
    progress = {"stage": "loading weights", "progress": 0.5}
    daemon.event_list = [
        {"event": "failed", "op_id": "op-6", "data": {"code": "internal_error"}},
        {"event": "progress", "op_id": "op-7", "data": progress},
        {"event": "progress", "op_id": "op-7", "data": progress},
        {
            "event": "done",
            "op_id": "op-7",
            "data": {"device": "NVIDIA X", "tensor_parallel": 2, "devices": [0, 1]},
        },
    ]
    arguments = ["load", "a/b", "--quant", "Q8_0", "--tp", "2", "--devices", "0,1"]
    assert main(arguments) == 0
    assert daemon.requests == [
        (
            "model.load",
            {"model_id": "a/b", "quant": "Q8_0", "tensor_parallel": 2, "devices": [0, 1]},
        )
    ]
    out, err = capsys.readouterr()
    assert re.fullmatch(r"loaded a/b in \d+\.\d s on NVIDIA X \(tp 2, devices 0,1\)\n", out)
    assert err == "a/b: loading weights 50 %\n"


def test_load_that_fails_tells_why(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """A failure ends the command with the cause, its exit code and when to retry."""
    daemon.answers["model.load"] = ACCEPTED
    error = {"code": "insufficient_memory", "message": "needs 9 GiB", "retry_after_s": 30}
    daemon.event_list = [{"event": "failed", "op_id": "op-7", "data": error}]
    assert main(["load", "a/b"]) == 5
    assert capsys.readouterr().err == "cortexd: needs 9 GiB (retry in 30s)\n"


def test_daemon_that_ends_during_a_load_is_an_error(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stream's end is no success."""
    daemon.answers["model.load"] = ACCEPTED
    assert main(["load", "a/b"]) == 1
    assert "the daemon ended before the operation did" in capsys.readouterr().err


def test_load_refuses_bad_ids_and_devices_itself(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """What can be told at once never reaches the daemon."""
    assert main(["load", "a/b/c"]) == 2
    assert main(["load", "a/b", "--devices", "0,1"]) == 2
    assert "--devices names 2 devices and --tp is 1" in capsys.readouterr().err
    assert daemon.requests == []


def test_local_path_is_made_absolute(daemon: FakeDaemon, tmp_path: Path) -> None:
    """The daemon's current folder is another one."""
    daemon.answers["model.unload"] = ACCEPTED
    daemon.event_list = [{"event": "done", "op_id": "op-7", "data": {}}]
    assert main(["unload", "./m.gguf"]) == 0
    assert daemon.requests == [("model.unload", {"model_id": str(tmp_path / "m.gguf")})]


def test_unload_of_unknown_model_exits_4(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """An alias-like word is handed on; the daemon knows what it knows."""
    daemon.answers["model.unload"] = ModelNotFound('model "nope" is not known')
    assert main(["unload", "nope"]) == 4
    assert capsys.readouterr().err == 'cortexd: model "nope" is not known\n'


def test_reload_shows_changes_and_refuses_errors(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """What changed is printed; an error is one of the configuration."""
    changed = {"file": "/m.toml", "status": "reloaded", "changes": ['+ model "a/b"'], "error": None}
    daemon.answers["reload"] = {"files": [changed]}
    assert main(["reload"]) == 0
    assert capsys.readouterr().out == '/m.toml: reloaded\n  + model "a/b"\n'
    bad = {"file": "/m.toml", "status": "rejected", "changes": [], "error": "/m.toml:3: no"}
    daemon.answers["reload"] = {"files": [bad]}
    assert main(["reload"]) == 2
    assert "/m.toml:3: no" in capsys.readouterr().err
    daemon.answers["reload"] = {"files": []}
    assert main(["reload"]) == 0
    assert "nothing to reload" in capsys.readouterr().out


def test_drain_tells_what_still_runs(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """On and off."""
    daemon.answers["drain"] = {"draining": True, "in_flight": 2}
    assert main(["drain", "on"]) == 0
    assert "2 still run" in capsys.readouterr().out
    assert main(["drain", "off"]) == 0
    assert daemon.requests == [("drain", {"on": True}), ("drain", {"on": False})]
