"""A gateway joined to its neurons by links that are cut without a word, and mended.

Most are relays, which need no privileges; one is a network of its own that really loses packets.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import pytest

from tests.tree.daemon import Daemon
from tests.tree.far_host import FarHost, FarNeuron
from tests.tree.relay import Relay
from tests.tree.scripted_neuron import ScriptedNeuron
from tests.waiting import DEADLINE_S, wait_for

pytestmark = pytest.mark.tree

MODEL, FAR_MODEL = "org/warm", "org/far"
# More than sockets hold back, less than a neuron keeps for a client that does not read.
TOKENS: Final = 3000


@dataclass(slots=True)
class Links:
    """A gateway, a neuron behind a link that can be cut, and one that is near."""

    gateway: Daemon
    relay: Relay
    far: ScriptedNeuron
    near: ScriptedNeuron

    def is_healthy(self, name: str) -> bool:
        """Tell how the gateway sees a node."""
        return self.gateway.has_healthy(name)

    def ask(self, model: str, text: str = "hello") -> str:
        """Return the name of the node that answered, or the error's code."""
        _, answer = self.gateway.chat(model, text)
        if "error" in answer:
            return str(answer["error"]["code"])
        return str(answer["choices"][0]["message"]["content"])

    def num_sockets(self) -> int:
        """Return how many connections the gateway's front has open."""
        front = psutil.Process(int(self.gateway.actors()["front.0"]["pid"]))
        return len(front.net_connections(kind="tcp"))


@pytest.fixture
def links(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Links]:
    """Both neurons have one model, the far one another that it alone has."""
    with ExitStack() as stack:
        models = {MODEL: "loaded", FAR_MODEL: "loaded"}
        far = stack.enter_context(ScriptedNeuron("far", models))
        near = stack.enter_context(ScriptedNeuron("near", {MODEL: "loaded"}))
        relay = stack.enter_context(Relay(int(far.url.rsplit(":", 1)[1])))
        gateway = stack.enter_context(
            Daemon(
                tmp_path_factory.mktemp("gateway"),
                "--role",
                "gateway",
                CORTEXD_NEURONS=f'[{{name = "far", endpoint = "{relay.url}"}}, '
                f'{{name = "near", endpoint = "{near.url}"}}]',
            )
        )
        links = Links(gateway, relay, far, near)
        for name in ("far", "near"):
            wait_for(lambda name=name: links.is_healthy(name), f"seeing {name}")
        yield links


def test_cut_link_costs_no_request_that_another_node_can_serve(links: Links) -> None:
    """Three misses make the node unhealthy, the first success healthy; nothing is left behind."""
    assert links.ask(FAR_MODEL) == "far"
    before = links.num_sockets()
    links.relay.cut()
    with ThreadPoolExecutor(8) as pool:
        shared = [pool.submit(links.ask, MODEL, f"question {n}") for n in range(6)]
        alone = [pool.submit(links.ask, FAR_MODEL, f"question {n}") for n in range(2)]
        assert {one.result(timeout=DEADLINE_S) for one in shared} == {"near"}
        assert {one.result(timeout=DEADLINE_S) for one in alone} <= {
            "no_healthy_node",
            "upstream_unavailable",
        }
    wait_for(lambda: not links.is_healthy("far"), "the third miss")
    assert links.ask(FAR_MODEL) == "no_healthy_node"
    wait_for(lambda: not links.gateway.admin("requests")["requests"], "the leases' end")
    links.relay.mend()
    wait_for(lambda: links.is_healthy("far"), "the node's return")
    assert links.ask(FAR_MODEL) == "far"

    def lines(event: str) -> list[str]:
        found = [line for line in links.gateway.log().splitlines() if '"node":"far"' in line]
        return [line for line in found if f'"{event}"' in line]

    wait_for(lambda: len(lines("node.healthy")) == 2, "the line of its return")
    assert len(lines("node.unhealthy")) == 1
    wait_for(lambda: links.num_sockets() <= before + 4, "the sockets' end")


def test_restarted_gateway_serves_from_what_is_loaded(links: Links) -> None:
    """All its state comes from polls: the first request loads nothing. The time is printed."""
    links.gateway.stop()
    links.gateway.start()
    since = time.monotonic()
    assert links.ask(FAR_MODEL) == "far"
    print(f"\nfirst answer {time.monotonic() - since:.3f} s after the gateway listened")
    assert links.far.num_loads == links.near.num_loads == 0
    assert '"model.loading"' not in links.gateway.log()


@pytest.fixture
def far_host() -> Iterator[FarHost]:
    """Another host, where this user may make one."""
    with FarHost() as far:
        yield far


def _long_request(gateway: Daemon, model: str) -> urllib.request.Request:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return urllib.request.Request(
        gateway.url("/v1/chat/completions"),
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )


def test_stream_outlives_a_cable_that_was_pulled(
    far_host: FarHost, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Packets are lost in its middle and during polls; new requests go elsewhere meanwhile."""
    model = str(tiny_model)
    far = FarNeuron(tmp_path_factory.mktemp("far"), far_host, "--model", model)
    with far, ScriptedNeuron("near") as near:
        far.wait_loaded(model)
        with Daemon(
            tmp_path_factory.mktemp("gateway"),
            "--role",
            "gateway",
            CORTEXD_NEURONS=f'[{{name = "far", endpoint = "{far.neuron_url}"}}, '
            f'{{name = "near", endpoint = "{near.url}"}}]',
            # Its 200 is the neuron's.
            CORTEXD_GATEWAY__FIRST_BYTE_HOLD_MS=str(int(1000 * DEADLINE_S)),
        ) as gateway:
            for name in ("far", "near"):
                wait_for(lambda name=name: gateway.has_healthy(name), f"seeing {name}")
            with far.paused(far.leader(model)):
                stream = urllib.request.urlopen(_long_request(gateway, model), timeout=DEADLINE_S)
                far_host.cut()
            wait_for(lambda: not gateway.has_healthy("far"), "the third miss")
            status, answer = gateway.chat(model, "who else?")
            assert (status, answer["error"]["code"]) == (503, "no_healthy_node")
            near.states[model] = "loaded"
            wait_for(lambda: gateway.chat(model, "who else?")[0] == 200, "the other node's answer")
            far_host.mend()
            wait_for(lambda: gateway.has_healthy("far"), "the node's return")
            with stream:
                events = [line[6:] for line in stream if line.startswith(b"data: ")]
            last, counts = (json.loads(event) for event in events[-3:-1])
            assert last["choices"][0]["finish_reason"] == "length"
            assert counts["usage"]["completion_tokens"] == TOKENS
            assert events[-1].strip() == b"[DONE]"
            wait_for(lambda: not gateway.admin("requests")["requests"], "the leases' end")
