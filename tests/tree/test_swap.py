"""A host with an engine of its own and a neuron whose memory holds one model: swaps, classes, idle.

Both are real processes with tiny models. The order of the tests matters to their cost only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tree.daemon import Daemon, NeuronDaemon
from tests.waiting import wait_for

pytestmark = pytest.mark.tree

# An engine's process counts with 256 MiB besides its weights and cache.
ONE_MODEL_MIB = "400"


@dataclass(slots=True)
class Pair:
    """The host, its neuron, and the models by what they are for."""

    host: Daemon
    neuron: NeuronDaemon
    models: dict[str, str]

    def ask(self, name: str, **fields: object) -> tuple[int, Any]:
        """Ask the host for one of the models."""
        return self.host.chat(self.models[name], "hello", max_tokens=4, **fields)

    def states(self) -> dict[str, str]:
        """Return the state of each of the neuron's models, by what it is for."""
        found = self.neuron.models()
        return {
            name: found[model_id]["state"]
            for name, model_id in self.models.items()
            if model_id in found
        }

    def evictions(self, daemon: Daemon, reason: str) -> int:
        """Return how many models a daemon has unloaded for a reason."""
        _, text = daemon.get("/metrics", port=daemon.metrics_port)
        lines = [line for line in text.splitlines() if line.startswith("cortex_evictions_total{")]
        return sum(int(float(line.split()[-1])) for line in lines if f'"{reason}"' in line)


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The host has its own model loaded, the neuron none."""
    folder, of_neuron = tmp_path_factory.mktemp("host"), tmp_path_factory.mktemp("neuron")
    names = ("left", "right", "high", "short", "spare")
    models = {name: str(shutil.copytree(tiny_model, folder / name)) for name in names}
    models["own"] = str(tiny_model)
    catalogue = folder / "models.toml"
    extra = {"high": "residency_priority = 200\n", "short": "idle_ttl_s = 1.0\n"}
    catalogue.write_text(
        "".join(
            f'[[models]]\nid = "{models[name]}"\npinned_on = ["n"]\n'
            + extra.get(name, "residency_priority = 100\n")
            for name in names[:4]
        )
    )
    neuron = NeuronDaemon(
        of_neuron,
        "--role",
        "neuron",
        CORTEXD_ENGINE__MEMORY_LIMIT_MIB=ONE_MODEL_MIB,
        CORTEXD_ENGINE__KV_CACHE_MIB="24",
    )
    host = Daemon(
        folder,
        "--model",
        models["own"],
        CORTEXD_NEURONS=f'[{{name = "n", endpoint = "http://127.0.0.1:{neuron.neuron_port}"}}]',
        CORTEXD_MODELS_CONFIG=str(catalogue),
        CORTEXD_EVICTION__DEFRAG_AFTER_CYCLES="2",
    )
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Daemon.start, (host, neuron)))
        host.wait_loaded(models["own"])
        wait_for(lambda: host.has_healthy("n"), "seeing the neuron")
        yield Pair(host, neuron, models)
    finally:
        with ThreadPoolExecutor(2) as pool:
            leftovers = list(pool.map(Daemon.stop, [one for one in (host, neuron) if one.process]))
    assert leftovers == [[], []], f"processes outlived a daemon: {leftovers}"


def test_own_and_remote_models_are_one_list_and_both_serve(pair: Pair) -> None:
    """A host of role "all" merges what it runs with what its neuron could."""
    status, answer = pair.ask("own")
    assert status == 200, answer
    status, answer = pair.ask("left")
    assert status == 200, answer
    cards = {card["id"]: card for card in json.loads(pair.host.get("/v1/models")[1])["data"]}
    own, left = cards[pair.models["own"]], cards[pair.models["left"]]
    assert (own["loaded"], left["loaded"]) == (True, True)
    assert [place["node"] for place in left["locations"] if place["status"] == "loaded"] == ["n"]
    assert left["feasible_on"] == ["n"]
    assert cards[pair.models["high"]]["loaded"] is False
    assert own["locations"][0]["status"] == "loaded"


def test_equal_models_swap_both_ways(pair: Pair) -> None:
    """Memory for one: each request brings its model in and the other out, and metrics tell."""
    before = pair.evictions(pair.neuron, "lru")
    for name, other in (("right", "left"), ("left", "right")):
        status, answer = pair.ask(name)
        assert status == 200, answer
        states = pair.states()
        assert (states[name], states.get(other, "unloaded")) == ("loaded", "unloaded"), states
    wait_for(lambda: pair.evictions(pair.neuron, "lru") == before + 2, "counting the evictions")


def test_model_in_use_is_not_displaced_but_waited_for(pair: Pair) -> None:
    """The stream ends whole; the other model's request waits for it and is served."""
    events = pair.host.stream(pair.models["left"], "x", max_tokens=600, ignore_eos=True)
    first = next(events)
    assert isinstance(first, dict)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(pair.ask, "right")
        rest = list(events)
        assert rest[-1] == "[DONE]"
        assert not any(isinstance(event, dict) and "error" in event for event in rest)
        status, answer = other.result()
    assert status == 200, answer


def test_higher_class_displaces_and_is_not_displaced(pair: Pair) -> None:
    """Protection is one-way: the lower one is refused with a hint until the higher one leaves."""
    assert pair.ask("right")[0] == 200
    assert pair.ask("high")[0] == 200
    assert pair.states()["high"] == "loaded"
    status, answer = pair.ask("left")
    assert (status, answer["error"]["code"]) == (503, "model_load_failed"), answer
    assert "does not fit" in answer["error"]["message"]
    assert pair.states()["high"] == "loaded"
    body = {"model_id": pair.models["high"]}
    assert pair.neuron.post("/models/unload", body, port=pair.neuron.neuron_port)[0] == 200


def test_time_to_live_of_the_catalogue_holds_at_the_neuron(pair: Pair) -> None:
    """The gateway hands it along with the load; the neuron unloads the idle model by itself."""
    assert pair.ask("short")[0] == 200
    wait_for(lambda: pair.states().get("short", "unloaded") == "unloaded", "the idle unload")
    wait_for(lambda: pair.evictions(pair.neuron, "idle") == 1, "counting it")


def test_draining_neuron_gets_nothing_new(pair: Pair) -> None:
    """What it alone serves is 503 while it drains, and served again after."""
    right = pair.models["right"]
    status, answer = pair.ask("right")
    assert status == 200, answer
    wait_for(lambda: pair.neuron.models()[right]["in_flight"] == 0, "the lease being closed")
    with ThreadPoolExecutor(1) as pool:
        with pair.neuron.paused(pair.neuron.leader(right)):
            stream = pool.submit(lambda: list(pair.host.stream(right, "x", max_tokens=50)))
            wait_for(lambda: pair.neuron.models()[right]["in_flight"] == 1, "the stream's start")
            assert pair.neuron.admin("drain", on=True) == {"draining": True, "in_flight": 1}
            status, answer = pair.ask("right")
            assert (status, answer["error"]["code"]) in {
                (503, "no_healthy_node"),
                (502, "upstream_unavailable"),
            }
        assert stream.result()[-1] == "[DONE]"

    def health() -> dict[str, Any]:
        return dict(json.loads(pair.host.get("/health")[1]))

    wait_for(lambda: health().get("draining") == ["n"], "the host's view")
    status, answer = pair.ask("right")
    assert (status, answer["error"]["code"]) == (503, "no_healthy_node")
    pair.neuron.admin("drain", on=False)
    wait_for(lambda: "draining" not in health(), "the end of the drain")
    assert pair.ask("right")[0] == 200


def test_engine_that_outlived_two_others_is_started_anew(pair: Pair) -> None:
    """When nothing uses it; a request that comes meanwhile is served."""
    own, spare = pair.models["own"], pair.models["spare"]
    epoch = pair.host.models()[own]["epoch"]
    for _ in range(2):
        body = {"model_id": spare}
        assert pair.host.post("/models/load", body, port=pair.host.neuron_port)[0] == 200
        assert pair.host.post("/models/unload", body, port=pair.host.neuron_port)[0] == 200
    wait_for(lambda: pair.host.models()[own]["epoch"] != epoch, "the recycling")
    assert pair.ask("own")[0] == 200
    assert pair.host.models()[own]["epoch"] > epoch
    wait_for(lambda: pair.evictions(pair.host, "defrag") == 1, "counting it")
