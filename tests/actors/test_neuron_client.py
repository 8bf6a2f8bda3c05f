"""Polls over real sockets: misses, recovery, hanging neurons, loads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiohttp import web

from actors import neuron_client
from actors.neuron_client import NeuronClient
from cortexd.errors import InsufficientMemory, NotFound
from cortexd.messages import NeuronReport
from cortexd.messages.neurons import NodeModel
from cortexd.models import LoadOptions, ModelPolicy
from cortexd.settings import NeuronEntry
from tests.doubles.front import async_test
from tests.waiting import DEADLINE_S


class FakeNeuron:
    """A neuron whose answers the test sets."""

    def __init__(self) -> None:
        self.url = ""
        self.models: Any = [{"id": "m", "status": "loaded"}]
        self.health: dict[str, Any] = {}
        self.status = 200
        self.hangs = False
        self.silent: set[str] = set()  # paths that are never answered
        self.garbled: set[str] = set()  # paths that are answered with something else
        self.devices: list[Any] = [{"index": 0, "vram_total_mb": 8}]
        self.loads: list[Any] = []

    async def answer(self, request: web.Request) -> web.Response:
        """Answer any path."""
        if self.hangs or request.path in self.silent:
            await asyncio.Event().wait()
        if request.path in self.garbled:
            return web.Response(text="fine, thanks")
        if request.method == "POST":
            self.loads.append(await request.json())
            error = {"error": {"message": "too big", "code": "insufficient_memory"}}
            return web.json_response(
                error if self.status != 200 else {"status": "loaded"}, status=self.status
            )
        documents = {
            "/models": self.models,
            "/health": {**self.health, "devices": [], "models": [{"id": "m", "in_flight": 2}]},
            "/discovery": {"devices": self.devices},
        }
        knows = request.path != "/discovery" or self.devices
        return web.json_response(documents[request.path], status=self.status if knows else 503)


class Reports:
    """What the client told, by node."""

    def __init__(self) -> None:
        self.last: dict[str, NeuronReport] = {}
        self._changed = asyncio.Event()

    def take(self, report: NeuronReport) -> None:
        """Keep a report."""
        self.last[report.name] = report
        self._changed.set()

    async def until(self, name: str, **wanted: Any) -> NeuronReport:
        """Wait for a report with these fields."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                report = self.last.get(name)
                if report and all(getattr(report, key) == value for key, value in wanted.items()):
                    return report
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No poll is missed because a busy machine has stopped the test."""
    for name in ("_ANSWER_TIMEOUT_S", "_CONNECT_TIMEOUT_S"):
        monkeypatch.setattr(neuron_client, name, DEADLINE_S)


@asynccontextmanager
async def fleet(*neurons: FakeNeuron) -> AsyncIterator[tuple[NeuronClient, Reports]]:
    """Serve the neurons ("n0", "n1", …) and poll them."""
    runners = []
    for neuron in neurons:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", neuron.answer)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        neuron.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        runners.append(runner)
    reports = Reports()
    entries = [
        NeuronEntry(name=f"n{index}", endpoint=neuron.url) for index, neuron in enumerate(neurons)
    ]
    client = NeuronClient(entries, reports.take)
    try:
        yield client, reports
    finally:
        await client.close()
        for runner in runners:
            await runner.cleanup()


@async_test
async def test_neuron_is_unhealthy_after_three_misses_and_back_at_the_first_success(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the two its last devices and models stand; what it reports no longer is gone."""
    monkeypatch.setattr(neuron_client, "_PERIOD_S", 0.01)
    neuron = FakeNeuron()
    async with fleet(neuron) as (_, reports):
        seen = await reports.until("n0", is_healthy=True)
        assert [(model.model_id, model.in_flight) for model in seen.models] == [("m", 2)]
        assert [device.total_mib for device in seen.devices] == [8]
        neuron.status = 500
        missed = await reports.until("n0", error="/models answered HTTP 500")
        assert missed.is_healthy
        gone = await reports.until("n0", is_healthy=False)
        assert gone.sequence == missed.sequence + 2
        assert (gone.models, gone.devices) == (seen.models, seen.devices)
        neuron.status, neuron.models = 200, []
        neuron.devices = [{"index": 0, "vram_total_mb": 16}]
        back = await reports.until("n0", is_healthy=True)
        assert (back.models, back.error) == ([], None)
        assert [device.total_mib for device in back.devices] == [16], "it may be another machine"
        neuron.status = 401
        hint = "set key_file in [[neurons]] to a key that it knows"
        await reports.until("n0", error=f"/models answered HTTP 401; {hint}")


@async_test
async def test_neuron_that_refuses_connections_is_said_to() -> None:
    """Without the HTTP library's words, which speak of TLS where there is none."""
    reports = Reports()
    client = NeuronClient([NeuronEntry(name="n0", endpoint="http://127.0.0.1:1")], reports.take)
    try:
        await reports.until("n0", error="cannot connect: Connection refused")
    finally:
        await client.close()


@async_test
async def test_neuron_that_starts_is_healthy_once_it_knows_its_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its front answers before its poller has looked."""
    monkeypatch.setattr(neuron_client, "_PERIOD_S", 0.01)
    monkeypatch.setattr(neuron_client, "_MAX_MISSES", 10**6)
    neuron = FakeNeuron()
    devices, neuron.devices = neuron.devices, []
    async with fleet(neuron) as (_, reports):
        early = await reports.until("n0", error="/discovery tells no devices yet")
        assert not early.is_healthy
        neuron.devices = devices
        seen = await reports.until("n0", is_healthy=True)
        assert [device.total_mib for device in seen.devices] == [8]


@async_test
async def test_neuron_that_never_tells_its_devices_is_healthy_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Later than others: what it has loaded can be used."""
    monkeypatch.setattr(neuron_client, "_PERIOD_S", 0.01)
    neuron = FakeNeuron()
    neuron.devices = []
    async with fleet(neuron) as (_, reports):
        seen = await reports.until("n0", is_healthy=True)
        assert seen.sequence >= 3
        assert (seen.devices, [model.model_id for model in seen.models]) == ([], ["m"])


@async_test
async def test_neuron_that_hangs_delays_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is polled on its own clock."""
    monkeypatch.setattr(neuron_client, "_PERIOD_S", 0.01)
    monkeypatch.setattr(neuron_client, "_ANSWER_TIMEOUT_S", 1.5)
    slow, quick = FakeNeuron(), FakeNeuron()
    slow.hangs = True
    async with fleet(slow, quick) as (_, reports):
        await reports.until("n1", is_healthy=True)
        assert "n0" not in reports.last
        down = await reports.until("n0", is_healthy=False)
        assert down.num_successes == 0
        assert down.error == "no answer within 1.5 s"
        assert reports.last["n1"].sequence > 3


@async_test
async def test_neuron_of_which_only_the_models_are_known_is_healthy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Figures that another version writes otherwise, or never, cost nothing but the figures."""
    monkeypatch.setattr(neuron_client, "_PERIOD_S", 0.01)
    monkeypatch.setattr(neuron_client, "_OPTIONAL_TIMEOUT_S", 0.05)
    odd, slow = FakeNeuron(), FakeNeuron()
    odd.garbled = slow.silent = {"/health", "/discovery"}
    async with fleet(odd, slow) as (_, reports):
        for name in ("n0", "n1"):
            seen = await reports.until(name, is_healthy=True)
            assert [(model.model_id, model.in_flight) for model in seen.models] == [("m", 0)]


@async_test
async def test_poll_that_cannot_be_told_is_a_miss_and_not_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A number that no message can carry: the node comes back when it writes another."""
    monkeypatch.setattr(neuron_client, "_PERIOD_S", 0.01)
    neuron = FakeNeuron()
    neuron.models = [{"id": "m", "status": "loaded", "vram_used_mb": 2**70}]
    async with fleet(neuron) as (_, reports):
        seen = await reports.until("n0", is_healthy=True)
        msgspec.msgpack.encode(seen)
        assert seen.models == []
        neuron.models = [{"id": "m", "status": "loaded"}]
        await reports.until("n0", models=[NodeModel("m", "loaded", in_flight=2)])


@async_test
async def test_load_polls_again_before_it_answers() -> None:
    """Who waited for the load sees the model at once; errors keep their class."""
    neuron = FakeNeuron()
    neuron.models = []
    async with fleet(neuron) as (client, reports):
        await reports.until("n0", is_healthy=True, models=[])
        neuron.models = [{"id": "m", "status": "loaded"}]
        policy = ModelPolicy(residency_priority=7, defaults={"top_k": 4})
        await client.load("n0", LoadOptions(model_id="m", quant="Q8_0"), policy)
        assert [model.state for model in reports.last["n0"].models] == ["loaded"]
        assert neuron.loads[0]["model_id"] == "m"
        assert neuron.loads[0]["quant"] == "Q8_0"
        assert neuron.loads[0]["residency_priority"] == 7
        assert neuron.loads[0]["defaults"] == {"top_k": 4}
        assert "idle_ttl_s" not in neuron.loads[0]
        neuron.status = 507
        with pytest.raises(InsufficientMemory, match='node "n0": too big'):
            await client.load("n0", LoadOptions(model_id="m"), None)
        with pytest.raises(NotFound):
            await client.unload("other", "m", force=False)


@async_test
async def test_draining_and_progress_are_told() -> None:
    """What a neuron says of itself beyond its state."""
    neuron = FakeNeuron()
    neuron.health = {"status": "draining"}
    loading = {"id": "m", "status": "loading", "stage": "weights", "progress": 0.4, "eta_s": 3}
    neuron.models = [{**loading, "residency_priority": 5}]
    async with fleet(neuron) as (_, reports):
        report = await reports.until("n0", is_draining=True)
        (model,) = report.models
        assert (model.state, model.detail, model.progress) == ("loading", "weights", 0.4)
        assert (model.eta_s, model.priority) == (3.0, 5)
        neuron.health = {}
        await reports.until("n0", is_draining=False)
