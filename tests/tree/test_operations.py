"""Every operation on a loaded model reaches actors that can read it, on one rank and on two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cortexd.errors import CortexError
from tests.tree.daemon import Daemon
from tests.waiting import wait_for

pytestmark = pytest.mark.tree

# What an actor answers to a message that it cannot decode, or has no handler for.
UNREADABLE = ("unknown kind", "no handler")


@pytest.fixture(scope="module", params=[1, 2])
def split(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Daemon, str]]:
    """A daemon with the tiny model on so many ranks."""
    model = str(tiny_model)
    with Daemon(tmp_path_factory.mktemp("daemon"), CORTEXD_ENGINE__DEVICE="cpu") as daemon:
        status, answer = daemon.post(
            "/models/load",
            {"model_id": model, "tensor_parallel": request.param},
            port=daemon.neuron_port,
        )
        assert status == 200, answer
        yield daemon, model


def _is_readable(text: str) -> None:
    assert not any(words in text for words in UNREADABLE), text


def test_model_on_a_cpu_refuses_to_sleep_with_the_reason(split: tuple[Daemon, str]) -> None:
    """There is no device memory to free; the refusal is the engine's own."""
    daemon, model = split
    status, answer = daemon.post("/models/sleep", {"model_id": model}, port=daemon.neuron_port)
    assert status == 400, answer
    assert "it runs on the cpu" in answer["error"]["message"]
    assert "unload it" in answer["error"]["message"]


def test_waking_a_model_that_is_awake_is_no_error(split: tuple[Daemon, str]) -> None:
    """On one rank and on two."""
    daemon, model = split
    answer = daemon.post("/models/wake", {"model_id": model}, port=daemon.neuron_port)
    assert answer == (200, {"status": "loaded"})


def test_no_http_operation_ends_in_a_message_that_nobody_reads(
    split: tuple[Daemon, str],
) -> None:
    """Reading and generating, on every listener."""
    daemon, model = split
    for port in (daemon.api_port, daemon.neuron_port, daemon.metrics_port):
        for path in ("/v1/models", "/health", "/models", "/discovery", "/metrics", "/version"):
            _is_readable(daemon.get(path, port=port)[1])
    assert daemon.get(f"/models/{model}/endpoint", port=daemon.neuron_port)[0] == 200
    messages = [{"role": "user", "content": "hello"}]
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": messages, "max_tokens": 2},
        "/v1/completions": {"prompt": "hello", "max_tokens": 2},
        "/v1/messages": {"messages": messages, "max_tokens": 2},
        "/v1/messages/count_tokens": {"messages": messages},
        "/tokenize": {"messages": messages},
        "/detokenize": {"tokens": [1, 2]},
    }
    for path, body in bodies.items():
        status, answer = daemon.post(path, {"model": model, **body})
        assert status == 200, answer


def test_no_admin_operation_ends_in_a_message_that_nobody_reads(
    split: tuple[Daemon, str],
) -> None:
    """Those of the daemon, of each rank, and of the model; the model is unloaded last."""
    daemon, model = split
    ranks = [name for name, actor in daemon.actors().items() if actor["group"]]
    calls: list[tuple[str, dict[str, object]]] = [
        *((op, {}) for op in ("status", "models", "requests", "host", "operations", "deadletters")),
        *((op, {}) for op in ("reload", "keys")),
        *(("drain", {"on": is_on}) for is_on in (True, False)),
        *(("actor.stack", {"name": name}) for name in ranks),
        *(("loglevel", {"name": name, "level": "debug"}) for name in ranks),
        ("model.load", {"model_id": model}),
        ("model.retry", {"model_id": model}),
        ("model.pull", {"model_id": model}),
        ("model.unload", {"model_id": model}),
    ]
    for op, arguments in calls:
        try:
            _is_readable(json.dumps(daemon.admin(op, **arguments)))
        except CortexError as error:
            _is_readable(error.message)
    wait_for(lambda: not any(a["group"] for a in daemon.actors().values()), "the unload")
    _is_readable(json.dumps(daemon.admin("operations")))
    _is_readable(daemon.log())
