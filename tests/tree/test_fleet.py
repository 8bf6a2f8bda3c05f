"""One gateway in front of two neurons of ours and one external server, all real processes.

The order of the tests matters to their cost only: each leaves the fleet as it found it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cortexd.errors import InvalidRequest
from tests.tree.daemon import Daemon, NeuronDaemon, streamed_text
from tests.tree.fleet_stub import ANSWER, EVENTS, MODEL, Stub
from tests.tree.tiny_model import CONTEXT, LONG
from tests.waiting import DEADLINE_S, wait_for

pytestmark = pytest.mark.tree


@dataclass(slots=True)
class Hosts:
    """The fleet under test."""

    gateway: Daemon
    one: NeuronDaemon
    two: NeuronDaemon
    stub: Stub
    model: str

    def nodes(self) -> dict[str, dict[str, Any]]:
        """Return the gateway's view of each node."""
        return self.gateway.nodes()

    def loaded_on(self, node: str) -> bool:
        """Tell whether the gateway sees the node answering with the model loaded."""
        seen = self.nodes().get(node, {"models": [], "is_healthy": False})
        states = {model["model_id"]: model["state"] for model in seen["models"]}
        return bool(seen["is_healthy"]) and states.get(self.model) == "loaded"

    def requests_by_node(self) -> Counter[str]:
        """Return how many requests each node has ended, from the gateway's metrics."""
        _, text = self.gateway.get("/metrics", port=self.gateway.metrics_port)
        counts: Counter[str] = Counter()
        for line in text.splitlines():
            if line.startswith("cortex_requests_total{"):
                node = line.split('node="', 1)[1].split('"', 1)[0]
                counts[node] += int(float(line.rsplit(" ", 1)[1]))
        return counts


@pytest.fixture(scope="module")
def hosts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """A gateway, two neurons (the first has the model loaded), an external server."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("gateway", "one", "two")}
    one = NeuronDaemon(folders["one"], "--role", "neuron", "--model", str(tiny_model))
    two = NeuronDaemon(folders["two"], "--role", "neuron")
    cold_model = shutil.copytree(tiny_model, folders["gateway"] / "cold")
    with Stub() as stub:
        catalogue = folders["gateway"] / "models.toml"
        catalogue.write_text(
            f'[[models]]\nid = "{tiny_model}"\n[[models]]\nid = "org/huge"\n'
            f'min_device_vram_mb = 99000000\n[aliases]\n"tier/small" = "{tiny_model}"\n'
            f'"tier/ext" = "{MODEL}"\n"tier/cold" = "{cold_model}"\n[[models]]\n'
            f'id = "{cold_model}"\npinned_on = ["two"]\n'
        )
        gateway = Daemon(
            folders["gateway"],
            "--role",
            "gateway",
            CORTEXD_NEURONS=f"""[
                {{name = "one", endpoint = "http://127.0.0.1:{one.neuron_port}"}},
                {{name = "two", endpoint = "http://127.0.0.1:{two.neuron_port}/"}},
                {{name = "stub", endpoint = "{stub.url}/v1", kind = "openai"}}]""",
            CORTEXD_MODELS_CONFIG=str(catalogue),
            CORTEXD_GATEWAY__FIRST_BYTE_HOLD_MS="20000",  # so late refusals keep their status
        )
        daemons = (gateway, one, two)
        try:
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(Daemon.start, daemons))
            fleet = Hosts(gateway, one, two, stub, str(tiny_model))
            wait_for(lambda: fleet.loaded_on("one"), "seeing the model on node one")
            for name in ("two", "stub"):
                wait_for(lambda name=name: gateway.has_healthy(name), f"seeing node {name}")
            yield fleet
        finally:
            with ThreadPoolExecutor(3) as pool:
                leftovers = list(pool.map(Daemon.stop, [one for one in daemons if one.process]))
        assert leftovers == [[], [], []], f"processes outlived a daemon: {leftovers}"


def open_request(
    hosts: Hosts, body: bytes, path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Post exact bytes to the gateway; return status, headers (lower case) and body."""
    request = urllib.request.Request(
        hosts.gateway.url(path), data=body, headers={"Content-Type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
            found = {name.lower(): value for name, value in response.headers.items()}
            return response.status, found, response.read()
    except urllib.error.HTTPError as error:
        found = {name.lower(): value for name, value in error.headers.items()}
        return error.code, found, error.read()


def test_request_goes_where_the_model_is_loaded(hosts: Hosts) -> None:
    """The gateway runs no engine; answers are the neuron's own, streamed or not, by alias too."""
    body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 8}
    direct = hosts.one.post(
        "/v1/chat/completions", {"model": hosts.model, **body}, port=hosts.one.neuron_port
    )[1]
    for name in (hosts.model, "tier/small"):
        status, answer = hosts.gateway.post("/v1/chat/completions", {"model": name, **body})
        assert status == 200, answer
        assert answer["choices"] == direct["choices"]
        events = list(hosts.gateway.stream(name, "hello", max_tokens=8))
        assert streamed_text(events) == direct["choices"][0]["message"]["content"]
        assert events[-1] == "[DONE]"
    status, message = hosts.gateway.post("/v1/messages", {"model": "tier/small", **body})
    assert (status, message["type"]) == (200, "message")
    wait_for(lambda: set(hosts.requests_by_node()) == {"one"}, "counting the requests")
    assert not any(actor.get("group") for actor in hosts.gateway.actors().values())


def test_models_and_health_are_those_of_the_fleet(hosts: Hosts) -> None:
    """Every node's models are listed with their places, limits and where they could run."""
    cards = {card["id"]: card for card in json.loads(hosts.gateway.get("/v1/models")[1])["data"]}
    card = cards[hosts.model]
    assert card["loaded"] is True
    assert [(place["node"], place["status"]) for place in card["locations"]] == [("one", "loaded")]
    assert sorted(card["feasible_on"]) == ["one", "two"]
    assert card["limit"]["context"] == CONTEXT
    assert cards["tier/small"]["alias_of"] == hosts.model
    assert cards["org/huge"]["feasible_on"] == []
    assert (cards[MODEL]["max_model_len"], cards[MODEL]["locations"][0]["node"]) == (2048, "stub")
    listed = hosts.gateway.admin("models")["models"]
    assert {model["node"] for model in listed} == {"one", "stub"}
    health = json.loads(hosts.gateway.get("/health")[1])
    assert (health["status"], health["nodes"]) == ("ok", {"healthy": 3, "total": 3})
    with pytest.raises(InvalidRequest, match="this gateway runs no models; pull"):
        hosts.gateway.admin("model.pull", model_id="org/any")

    def is_exported() -> bool:
        _, metrics = hosts.gateway.get("/metrics", port=hosts.gateway.metrics_port)
        return 'cortex_node_healthy{node="two"} 1.0' in metrics

    wait_for(is_exported, "the node's gauge")


def test_bytes_reach_the_server_as_the_client_sent_them(hosts: Hosts) -> None:
    """Nothing is added, removed or reordered; of an alias only the model's value changes."""
    body = (
        b'{ "messages" : [{"role":"user","content":"caf\\u00e9 \\"model\\": \xc3\xa9"}],\n'
        b'  "vendor_knob": {"model": "inner"}, "model":"%s", "temperature":1e0 }'
    )
    hosts.stub.received.clear()
    exact = body % MODEL.encode()
    headers = {"Authorization": "Bearer k", "x-request-id": "req-1"}
    status, answered, answer = open_request(hosts, exact, **headers)
    assert (status, answer) == (200, ANSWER)
    assert answered["x-request-id"] == "req-1"
    assert open_request(hosts, body % b"tier/ext")[0] == 200
    plain, renamed = hosts.stub.received
    assert (plain.path, plain.body) == ("/v1/chat/completions", exact)
    assert renamed.body == exact
    assert plain.headers["authorization"] == "Bearer k"
    assert plain.headers["x-request-id"] == "req-1"
    streamed = json.dumps({"model": MODEL, "stream": True}).encode()
    assert open_request(hosts, streamed)[2] == EVENTS
    assert hosts.stub.received[-1].body == streamed


def test_errors_of_a_server_keep_status_and_hint_in_our_envelope(hosts: Hosts) -> None:
    """HTML becomes an error object; a broken stream ends in an error event without [DONE]."""
    hosts.stub.status = 503
    body = json.dumps({"model": MODEL}).encode()
    status, headers, answer = open_request(hosts, body)
    hosts.stub.status = 200
    assert (status, headers["retry-after"]) == (503, "7")
    assert json.loads(answer)["error"]["code"] == "upstream_error"
    hosts.stub.breaks_off = True
    _, _, text = open_request(hosts, json.dumps({"model": MODEL, "stream": True}).encode())
    hosts.stub.breaks_off = False
    events = [line[6:] for line in text.decode().splitlines() if line.startswith("data: ")]
    assert json.loads(events[-1])["error"]["code"] == "upstream_interrupted"
    assert "[DONE]" not in events
    status, headers, answer = open_request(
        hosts, json.dumps({"model": MODEL, "max_tokens": 1}).encode(), "/v1/messages"
    )
    assert (status, json.loads(answer)["type"]) == (400, "error")


def test_models_that_no_node_serves(hosts: Hosts) -> None:
    """Unknown is 404 with close names; known and too large for all is 404 of its own."""
    status, answer = hosts.gateway.chat("ext/stubb", "hello")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert f'"{MODEL}"' in answer["error"]["message"]
    status, answer = hosts.gateway.chat("org/huge", "hello")
    assert (status, answer["error"]["code"]) == (404, "model_not_feasible")


def test_restarted_gateway_router_knows_the_fleet_again(hosts: Hosts) -> None:
    """A request right after the router's death is served: its view is rebuilt from polls."""
    hosts.gateway.kill("router")
    status, answer = hosts.gateway.chat(hosts.model, "hello")
    assert status == 200, answer


def test_cold_model_is_loaded_once_on_the_node_it_is_pinned_to(hosts: Hosts) -> None:
    """A model that only the gateway's catalogue knows is loaded there, however many ask."""
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: hosts.gateway.chat("tier/cold", f"hi {n}"), range(6)))
    assert [status for status, _ in answers] == [200] * 6, answers

    def loads() -> list[str]:
        return [line for line in hosts.two.log().splitlines() if '"model.loading"' in line]

    wait_for(loads, "the load's line")
    wait_for(lambda: hosts.requests_by_node()["two"] == 6, "counting the requests")
    assert len(loads()) == 1, loads()


def test_burst_on_two_replicas_is_balanced(hosts: Hosts) -> None:
    """Own dispatches count at once: a burst between two polls does not land on one node."""
    body = {"model_id": hosts.model}
    assert hosts.two.post("/models/load", body, port=hosts.two.neuron_port)[0] == 200
    wait_for(lambda: hosts.loaded_on("two"), "seeing the model on node two")
    assert hosts.loaded_on("one")
    before = hosts.requests_by_node()
    with ThreadPoolExecutor(64) as pool, ExitStack() as burst:
        for node in (hosts.one, hosts.two):
            # None ends before the last has begun.
            burst.enter_context(node.paused(node.leader(hosts.model)))
        asked = [pool.submit(hosts.gateway.chat, hosts.model, f"question {n}") for n in range(64)]
        wait_for(lambda: len(hosts.gateway.admin("requests")["requests"]) == 64, "the burst")
        burst.close()
        assert [one.result()[0] for one in asked] == [200] * 64
    total = before.total() + 64
    wait_for(lambda: hosts.requests_by_node().total() == total, "counting all requests")
    share = hosts.requests_by_node() - before
    assert abs(share["one"] - 32) <= 6, share
    assert share["one"] + share["two"] == 64


def test_node_that_dies_in_the_middle_of_a_stream_ends_it_with_an_error(hosts: Hosts) -> None:
    """The client gets an error event, no [DONE]; then 503 while nobody serves; then it is back."""
    body = json.dumps(
        {"model": hosts.model, "max_tokens": LONG, "ignore_eos": True}
        | {"messages": [{"role": "user", "content": "x"}], "stream": True}
    ).encode()
    hosts.two.stop(signal.SIGKILL)
    wait_for(lambda: not hosts.gateway.has_healthy("two"), "the gateway's missing it")
    request = urllib.request.Request(
        hosts.gateway.url("/v1/chat/completions"),
        data=body,
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
        lines = [response.readline() for _ in range(4)]
        for process in hosts.one.family():
            os.kill(process.pid, signal.SIGSTOP)  # nothing more comes, even of what is buffered
        hosts.one.stop(signal.SIGKILL)
        lines += response.readlines()
    events = [line[6:].strip() for line in lines if line.startswith(b"data: ")]
    assert json.loads(events[-1])["error"]["code"] == "upstream_interrupted"
    assert b"[DONE]" not in events
    status, headers, answer = open_request(hosts, body)
    assert (status, json.loads(answer)["error"]["code"]) == (503, "no_healthy_node")
    assert 1 <= int(headers["retry-after"]) <= 60
    hosts.one.start()
    wait_for(lambda: hosts.loaded_on("one"), "node one's return")
    status, answered = hosts.gateway.chat(hosts.model, "hello")
    assert status == 200, answered
