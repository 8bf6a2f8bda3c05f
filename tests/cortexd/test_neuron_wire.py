"""What neurons of any version say, and which configured neurons are remote."""

from __future__ import annotations

import msgspec
import pytest

from cortexd.errors import InsufficientMemory, UpstreamError
from cortexd.neuron_list import base_url, local_node_name, remote_neurons
from cortexd.neuron_wire import (
    BadAnswer,
    answered_error,
    read_devices,
    read_models,
    read_openai_models,
    with_load,
)
from cortexd.settings import Neuron, NeuronEntry, Settings


def test_models_of_other_versions_are_read() -> None:
    """Unknown fields and states, missing fields and senseless entries do not spoil the rest."""
    body = msgspec.json.encode(
        [
            {"id": "a", "status": "loaded", "limit": {"context": 100, "output": 50}, "new": 1},
            {"id": "b"},
            {"id": "c", "status": "hibernating"},
            {"id": "d", "status": "hibernating", "servable": {"ok": False, "detail": "asleep"}},
            {"id": "e", "status": "poisoned"},
            {"status": "loaded"},
            "nonsense",
            {"id": "f", "status": "loaded", "servable": {"ok": False}},
            {"id": "g", "status": "sleeping", "servable": {"ok": True}},
        ]
    )
    models = {model.model_id: model for model in read_models(body)}
    assert {name: model.state for name, model in models.items()} == {
        "a": "loaded",
        "b": "loaded",
        "c": "loaded",
        "d": "recovering",
        "e": "recovering",
        "f": "recovering",
        "g": "sleeping",
    }
    assert models["a"].limits is not None
    assert (models["a"].limits.context, models["b"].limits) == (100, None)
    assert models["d"].detail == "asleep"


def test_load_figures_join_devices_and_models() -> None:
    """Free memory and queues come from /health; what it does not name stays unknown."""
    devices = read_devices(b'{"devices":[{"index":0,"vram_total_mb":8},{"index":1}]}')
    models = read_models(b'[{"id":"a"},{"id":"b"}]')
    health = (
        b'{"devices":[{"index":0,"vram_free_mb":5}],'
        b'"models":[{"id":"a","in_flight":3,"queue_depth":2}]}'
    )
    devices, models = with_load(health, devices, models)
    assert [(device.total_mib, device.free_mib) for device in devices] == [(8, 5), (0, None)]
    assert [(model.in_flight, model.queue_depth) for model in models] == [(3, 2), (0, 0)]


def test_openai_server_that_is_not_ready_is_loading() -> None:
    """Its models are listed and not routed to yet."""
    body = b'{"object":"list","data":[{"id":"m","max_model_len":4096,"owned_by":"vllm"}]}'
    (ready,), (loading,) = (read_openai_models(body, is_ready=flag) for flag in (True, False))
    assert (ready.state, loading.state) == ("loaded", "loading")
    assert ready.limits is not None
    assert ready.limits.context == 4096


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"a":1}', b"[" * 100_000, b"\xff"])
def test_answers_that_are_none_are_refused(body: bytes) -> None:
    """A wrong document is a missed poll, never a crash."""
    with pytest.raises(BadAnswer):
        read_models(body)


def test_error_of_a_neuron_keeps_its_class() -> None:
    """The code names the class here too; anything else is an upstream error."""
    body = b'{"error":{"message":"too big","code":"insufficient_memory"}}'
    error = answered_error("n", 507, body)
    assert isinstance(error, InsufficientMemory)
    assert error.message == 'node "n": too big'
    for odd in (b"<html>", b'{"error":"flat"}', b"{}"):
        assert isinstance(answered_error("n", 500, odd), UpstreamError)


@pytest.mark.parametrize(
    ("listen", "endpoint", "is_local"),
    [
        ("127.0.0.1:13131", "http://127.0.0.1:13131", True),
        ("127.0.0.1:13131", "http://localhost:13131/", True),
        ("0.0.0.0:13131", "http://127.0.0.1:13131", True),
        ("127.0.0.1:13131", "http://127.0.0.1:13132", False),
        ("127.0.0.1:13131", "http://192.168.1.10:13131", False),
        ("192.168.1.10:13131", "http://192.168.1.10:13131", True),
        ("127.0.0.1:80", "http://127.0.0.1", True),
    ],
)
def test_entry_of_the_own_listener_is_the_host_itself(
    listen: str, endpoint: str, is_local: bool
) -> None:
    """It is not polled; it gives this host its name."""
    entry = NeuronEntry(name="me", endpoint=endpoint)
    settings = Settings(neuron=Neuron(listen=listen), neurons=[entry])
    assert remote_neurons(settings) == ([] if is_local else [entry])
    assert local_node_name(settings, "host") == ("me" if is_local else "host")
    gateway = Settings(role="gateway", neuron=Neuron(listen=listen), neurons=[entry])
    assert remote_neurons(gateway) == [entry]
    assert remote_neurons(Settings(role="neuron", neurons=[entry])) == []


def test_names_stay_apart_and_paths_are_not_doubled() -> None:
    """A remote neuron with the host's name does not take it away; "/v1" is not sent twice."""
    entry = NeuronEntry(name="host", endpoint="http://other:1/v1/", kind="openai")
    assert local_node_name(Settings(neurons=[entry]), "host") == "localhost"
    assert base_url(entry) == "http://other:1"
