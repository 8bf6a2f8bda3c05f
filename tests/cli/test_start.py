"""`cortexd start`: what reaches the root, and what the user reads first."""

from __future__ import annotations

import json
import shlex
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from cli import start as start_module
from cli.main import main
from cli.start import ready_block
from cortexd.demo import DEMO_ALIAS, DEMO_MODEL
from cortexd.settings import Settings

ADDRESSES = {"api": "0.0.0.0:31313", "metrics": "127.0.0.1:31314", "neuron": "127.0.0.1:13131"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Stand in for the root: record the settings, say ready, end with code 0."""
    seen: list[Settings] = []

    def run(settings: Settings, *, on_ready: Callable[[Mapping[str, str]], None]) -> int:
        seen.append(settings)
        on_ready(ADDRESSES)
        return 0

    monkeypatch.setattr(start_module, "watch_models", lambda settings: None)
    node = types.ModuleType("actors.node")
    node.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "actors.node", node)
    return seen


def test_demo_serves_the_demo_model_and_prints_a_line_to_try(
    started: list[Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    """--demo maps to a default model; the printed curl line is valid shell and JSON."""
    assert main(["start", "--demo"]) == 0
    assert [model.model_id for model in started[0].default_models] == [DEMO_MODEL]
    out = capsys.readouterr().out
    assert "  API      http://127.0.0.1:31313/v1\n" in out
    assert "  metrics  http://127.0.0.1:31314/metrics\n" in out
    assert "  neuron   http://127.0.0.1:13131\n" in out
    (curl,) = (line for line in out.splitlines() if line.strip().startswith("curl"))
    words = shlex.split(curl)
    assert words[1] == "http://127.0.0.1:31313/v1/chat/completions"
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == DEMO_ALIAS
    assert body["messages"][0]["role"] == "user"


def test_models_of_the_command_line_replace_those_of_the_file(
    started: list[Settings], tmp_path: Path
) -> None:
    """--model is repeatable, --quant applies to each, paths become absolute."""
    (tmp_path / "cortex.toml").write_text('[[default_models]]\nmodel_id = "a/file"')
    assert main(["start"]) == 0
    assert main(["start", "--model", "a/b", "--model", "./c", "--quant", "Q4_0"]) == 0
    assert [model.model_id for model in started[0].default_models] == ["a/file"]
    models = [(model.model_id, model.quant) for model in started[1].default_models]
    assert models == [("a/b", "Q4_0"), (str(tmp_path / "c"), "Q4_0")]


def test_role_and_listen_are_options(
    started: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--listen is the API's address, or the neuron API's on a neuron."""
    monkeypatch.setenv("CORTEXD_NEURONS", '[{name = "a", endpoint = "http://a"}]')
    assert main(["start", "--role", "gateway", "--listen", "127.0.0.1:1"]) == 0
    assert main(["start", "--role", "neuron", "--listen", "127.0.0.1:2"]) == 0
    assert (started[0].role, started[0].gateway.listen) == ("gateway", "127.0.0.1:1")
    assert (started[1].neuron.listen, started[1].gateway) == ("127.0.0.1:2", Settings().gateway)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--listen", "x"], '--listen: gateway.listen: "x" is not an address'),
        (["--model", "x"], '--model: default_models[0].model_id: model id "x" has no slash'),
        (["--quant", "Q4_0"], "--quant says how to load a --model; give one"),
        (["--model", "a/b", "--model", "a/b"], "--model: default_models[1].model_id"),
        (["--config", "absent"], "--config names"),
    ],
)
def test_bad_option_is_named_and_nothing_starts(
    started: list[Settings],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    """Errors of options say which, with exit code 2."""
    assert main(["start", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"cortexd: {message}")
    assert started == []


def test_open_listener_is_warned_about_once(
    started: list[Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    """Listening beyond this machine is said in one clear line."""
    assert main(["start", "--listen", "0.0.0.0:31313"]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "warning: gateway.listen = 0.0.0.0:31313 can be reached by other machines" in err


def test_ready_block_of_a_neuron_names_only_what_it_serves() -> None:
    """Without an API there is no API line and nothing to try."""
    text = ready_block({"neuron": "[::1]:13131"}, demo=True)
    assert "http://[::1]:13131" in text
    assert "API" not in text
    assert "curl" not in text
