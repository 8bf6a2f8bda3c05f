"""A daemon that is given broken models: each gets its own error, and a good one serves on."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tree.daemon import Daemon
from tests.tree.tiny_model import make_tiny_model
from tests.waiting import wait_for

pytestmark = pytest.mark.tree

WEIGHTS = "model.safetensors"
Break = Callable[[Path], None]


def _config(**changes: object) -> Break:
    return _json("config.json", **changes)


def _json(name: str, **changes: object) -> Break:
    def break_it(model: Path) -> None:
        document = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**document, **changes}))

    return break_it


def _text(name: str, content: str) -> Break:
    return lambda model: (model / name).write_text(content) and None


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Break:
    def break_it(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})

    return break_it


def _truncated(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[: len(content) // 2])


def _twice_in_two_shards(model: Path) -> None:
    names = load_file(model / WEIGHTS)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for shard in shards:
        shutil.copy(model / WEIGHTS, model / shard)
    (model / WEIGHTS).unlink()
    weight_map = {name: shards[index % 2] for index, name in enumerate(names)}
    _text(f"{WEIGHTS}.index.json", json.dumps({"weight_map": weight_map}))(model)


def _shard_that_is_not_there(model: Path) -> None:
    weight_map = dict.fromkeys(load_file(model / WEIGHTS), "model-00009-of-00009.safetensors")
    _text(f"{WEIGHTS}.index.json", json.dumps({"weight_map": weight_map}))(model)


NORM = "model.norm.weight"
ENDLESS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
# What is wrong → how, and what the error of loading, or else of asking, must say.
CASES: dict[str, tuple[Break, str]] = {
    "negative size": (_config(hidden_size=-64), "config.json: hidden_size is -64"),
    "huge size": (_config(num_hidden_layers=10**9), "config.json: num_hidden_layers is 1000000000"),
    "huge vocabulary": (_config(vocab_size=16_000_000), "model.embed_tokens.weight"),
    "heads do not divide": (_config(num_key_value_heads=3), "num_attention_heads = 4"),
    "layer types": (_config(layer_types=["full_attention"]), "config.json: layer_types has 1"),
    "rope type": (
        _config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        "rope type 'spiral'",
    ),
    "no JSON": (_text("config.json", "{" * 99999), "config.json: not valid JSON"),
    "unknown type": (_config(model_type="mamba9"), 'model_type "mamba9"'),
    "duplicate tensor": (_twice_in_two_shards, "model-0000"),
    "absent shard": (_shard_that_is_not_there, "model-00009-of-00009.safetensors"),
    "truncated": (_truncated, WEIGHTS),
    "missing tensor": (_tensors(lambda tensors: tensors.__delitem__(NORM)), NORM),
    "wrong shape": (_tensors(lambda tensors: tensors.update({NORM: torch.ones(63)})), NORM),
    "wrong number type": (
        _tensors(lambda tensors: tensors.update({NORM: torch.ones(64, dtype=torch.int32)})),
        NORM,
    ),
    "tokenizer broken": (_text("tokenizer.json", "{}"), "tokenizer.json: not a tokenizer"),
    "no such end token": (
        _json("tokenizer_config.json", eos_token="<|nothing|>"),
        'tokenizer_config.json: eos_token "<|nothing|>" is no token',
    ),
    "template syntax": (
        _json("tokenizer_config.json", chat_template="{% for x in %}"),
        "tokenizer_config.json chat_template, line 1",
    ),
    "template endless": (
        _json("tokenizer_config.json", chat_template=ENDLESS),
        "ran for more than",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without fault."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "good", seed=4)


@pytest.fixture(scope="module")
def daemon(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that serves it."""
    with Daemon(tmp_path_factory.mktemp("daemon"), "--model", str(good)) as running:
        running.wait_loaded(str(good))
        yield running


def _ask(daemon: Daemon, model: Path) -> tuple[int, Any]:
    return daemon.chat(str(model), "the quick brown fox")


def _resident_bytes(daemon: Daemon) -> int:
    total = 0
    for process in daemon.family():
        with contextlib.suppress(psutil.NoSuchProcess):  # an engine's that is just ending
            total += process.memory_info().rss
    return total


def test_each_broken_model_is_told_and_the_good_one_serves_on(
    daemon: Daemon, good: Path, tmp_path: Path
) -> None:
    """The error names file and field; nothing restarts, nothing grows, answers stay the same."""
    answer = _ask(daemon, good)
    assert answer[0] == 200
    expected = answer[1]["choices"][0]["message"]["content"]
    before = _resident_bytes(daemon)
    for name, (break_it, cause) in CASES.items():
        model = tmp_path / name.replace(" ", "-")
        shutil.copytree(good, model)
        break_it(model)
        status, body = daemon.post(
            "/models/load", {"model_id": str(model)}, port=daemon.neuron_port
        )
        if status == 200:  # the text side is looked at when somebody asks
            status, body = _ask(daemon, model)
        assert 400 <= status < 600, (name, body)
        assert cause in body["error"]["message"], (name, body)
        if str(model) in daemon.models():
            daemon.post("/models/unload", {"model_id": str(model)}, port=daemon.neuron_port)
        status, body = _ask(daemon, good)
        assert (status, body["choices"][0]["message"]["content"]) == (200, expected), name
    wait_for(lambda: _resident_bytes(daemon) < before + 300 * 2**20, "memory given back")
    alive = daemon.actors()
    assert all(actor["restarts"] == 0 for actor in alive.values())
