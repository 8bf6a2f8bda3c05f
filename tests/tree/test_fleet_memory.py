"""A gateway, two neurons whose memory holds one model each, and an external server: all together.

Streamed messages bring each neuron's models in and out; the external server's are translated.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import anthropic
import pytest

from tests.tree.daemon import Daemon, NeuronDaemon
from tests.tree.fleet_stub import MODEL, Stub
from tests.waiting import DEADLINE_S, wait_for

pytestmark = pytest.mark.tree

# An engine's process counts with 256 MiB besides its weights and cache.
ONE_MODEL_MIB = "400"
NEURONS = ("one", "two")


@dataclass(slots=True)
class Trio:
    """The gateway, its neurons, and each neuron's two models."""

    gateway: Daemon
    neurons: dict[str, NeuronDaemon]
    models: dict[str, tuple[str, str]]

    def say(self, model: str) -> tuple[str, str | None]:
        """Return text and stop reason of a streamed message."""
        with (
            anthropic.Anthropic(
                base_url=self.gateway.url(), api_key="none", max_retries=0, timeout=DEADLINE_S
            ) as client,
            client.messages.stream(
                model=model,
                max_tokens=8,
                messages=[{"role": "user", "content": "hello"}],
                extra_body={"temperature": 0},
            ) as stream,
        ):
            message = stream.get_final_message()
        return str(message.content[0].to_dict()["text"]), message.stop_reason

    def loaded(self, node: str) -> list[str]:
        """Return the models that a neuron has loaded."""
        found = self.neurons[node].models()
        return [model_id for model_id, model in found.items() if model["state"] == "loaded"]

    def evictions(self, node: str) -> int:
        """Return how many models a neuron has unloaded for another."""
        daemon = self.neurons[node]
        _, text = daemon.get("/metrics", port=daemon.metrics_port)
        lines = [line for line in text.splitlines() if line.startswith("cortex_evictions_total{")]
        return sum(int(float(line.split()[-1])) for line in lines if '"lru"' in line)


@pytest.fixture
def trio(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    """No neuron has a model loaded; each may load two, one at a time."""
    folder = tmp_path_factory.mktemp("gateway")
    models = {
        node: tuple(str(shutil.copytree(tiny_model, folder / f"{node}-{n}")) for n in (1, 2))
        for node in NEURONS
    }
    catalogue = folder / "models.toml"
    catalogue.write_text(
        "".join(
            f'[[models]]\nid = "{model}"\npinned_on = ["{node}"]\n'
            for node in NEURONS
            for model in models[node]
        )
    )
    neurons = {
        node: NeuronDaemon(
            tmp_path_factory.mktemp(node),
            "--role",
            "neuron",
            CORTEXD_ENGINE__MEMORY_LIMIT_MIB=ONE_MODEL_MIB,
            CORTEXD_ENGINE__KV_CACHE_MIB="8",
        )
        for node in NEURONS
    }
    with Stub() as stub:
        entries = [
            f'{{name = "{name}", endpoint = "http://127.0.0.1:{daemon.neuron_port}"}}'
            for name, daemon in neurons.items()
        ]
        entries.append(f'{{name = "stub", endpoint = "{stub.url}/v1", kind = "openai"}}')
        gateway = Daemon(
            folder,
            "--role",
            "gateway",
            CORTEXD_NEURONS=f"[{', '.join(entries)}]",
            CORTEXD_MODELS_CONFIG=str(catalogue),
        )
        daemons = (gateway, *neurons.values())
        try:
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(Daemon.start, daemons))
            gateway.wait_ready()
            for name in (*NEURONS, "stub"):
                wait_for(lambda name=name: gateway.has_healthy(name), f"hearing of {name}")
            yield Trio(gateway, neurons, {node: (one, two) for node, (one, two) in models.items()})
        finally:
            with ThreadPoolExecutor(3) as pool:
                leftovers = list(pool.map(Daemon.stop, [one for one in daemons if one.process]))
        assert leftovers == [[], [], []], f"processes outlived a daemon: {leftovers}"


def test_three_nodes_serve_messages_and_swap_both_ways(trio: Trio) -> None:
    """Memory for one: each message brings its model in and the other out, on both neurons."""
    for turn, index in enumerate((0, 1, 0)):
        with ThreadPoolExecutor(3) as pool:
            wanted = {node: trio.models[node][index] for node in NEURONS}
            answers = {node: pool.submit(trio.say, model) for node, model in wanted.items()}
            foreign = pool.submit(trio.say, MODEL)
        assert foreign.result() == ("from the stub", "end_turn")
        # The four are copies of one model.
        assert len({answer.result() for answer in answers.values()}) == 1
        for node, model in wanted.items():
            assert trio.loaded(node) == [model]
            wait_for(lambda node=node, n=turn: trio.evictions(node) == n, "counting it")
