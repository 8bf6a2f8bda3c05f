"""What the router makes of each node: who is passed over, for how long, and who may do without."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from actors.router.router import Router
from cortexd.catalogue import Catalogue, CatalogueModel
from cortexd.errors import (
    InsufficientMemory,
    ModelLoadFailed,
    ModelNotFound,
    NoHealthyNode,
    QueueTimeout,
)
from cortexd.messages import EndRequest, NodeFailed, RoutedHere, RoutedRemote
from cortexd.messages.neurons import NodeDevice, NodeModel
from cortexd.models import LoadOptions
from cortexd.settings import NeuronEntry, Settings
from tests.actors.router.test_fleet import (
    COLD,
    MODEL,
    NodesWorld,
    make_gateway,
    node_of,
    node_of_chain,
    placed,
    report,
    seats,
    see_all,
)
from tests.doubles.router_world import attached_router, envelope, run

LOADED = {MODEL: "loaded"}


def pass_time(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the router's view of the nodes be so much older."""

    class Later:
        """The clock, ahead."""

        monotonic_ns = time.monotonic_ns

        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + seconds

    for module in ("fleet", "remote_node", "remote_nodes", "remote_loads"):
        monkeypatch.setattr(f"actors.router.{module}.time", Later)


def gateway_of(
    world: NodesWorld, folder: Path, *neurons: NeuronEntry, models: Any = (), role: Any = "gateway"
) -> Router:
    """Return a router of these nodes and catalogue models."""
    settings = Settings(role=role, neurons=list(neurons))
    return attached_router(world, folder, Catalogue(models=list(models)), settings)


def neuron(name: str, **fields: Any) -> NeuronEntry:
    """Return a node's configuration."""
    return NeuronEntry(name=name, endpoint=f"http://{name}", **fields)


def fail(router: Router, node: str, *requests: str) -> None:
    """Let a node have failed at these requests."""
    for request in requests:
        router.on_node_failed(NodeFailed(node, "HTTP 500", request, False), envelope())


def test_node_of_which_nothing_is_heard_any_more_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The poller may be what is gone: what it said last is not true for ever."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        see_all(router, a=LOADED)
        assert await node_of(router) == "a"
        pass_time(monkeypatch, 30.0)
        with pytest.raises(NoHealthyNode):
            await placed(router, "r2")

    run(work)


def test_node_that_was_down_has_lost_its_prefixes(tmp_path: Path) -> None:
    """It came back without what it had: the conversation goes where its turn is."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        for name in ("a", "b"):
            seats(router, name, 16)
        assert await node_of_chain(router, "r0", [1, 2]) == "a"
        router.on_end_request(EndRequest("r0"), envelope())
        report(router, "a", LOADED, is_healthy=False, error="no answer")
        seats(router, "a", 16)
        assert await node_of_chain(router, "r1", [1, 2]) == "b"

    run(work)


def test_node_that_was_down_thrice_is_left_alone_though_it_answers(tmp_path: Path) -> None:
    """Flapping is worse than down: who is sent there is interrupted each time."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        for name in ("b", "x"):
            report(router, name, {})
        for _ in range(3):
            report(router, "a", LOADED)
            report(router, "a", LOADED, is_healthy=False, error="no answer")
        report(router, "a", LOADED)
        with pytest.raises(NoHealthyNode):
            await placed(router)

    run(work)


def test_configured_seats_bound_a_server_that_tells_none(tmp_path: Path) -> None:
    """And each request is asked for, since somebody counts them."""

    async def work() -> None:
        router = gateway_of(NodesWorld(), tmp_path, neuron("x", kind="openai", max_in_flight=1))
        report(router, "x", LOADED, kind="openai")
        first = await placed(router, "r1")
        assert isinstance(first, RoutedRemote)
        assert first.open_until == 0.0
        with pytest.raises(QueueTimeout):
            await placed(router, "r2", wait=False)

    run(work)


def test_waiting_request_gets_the_seat_that_a_poll_shows_free(tmp_path: Path) -> None:
    """What another gateway had running there has ended."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        see_all(router)
        taken = [NodeModel(MODEL, "loaded", in_flight=1, max_in_flight=1)]
        report(router, "a", {}, models=taken)
        waiting = asyncio.create_task(placed(router))
        for _ in range(5):
            await asyncio.sleep(0)
        assert router.fleet.queue_depths() == {MODEL: 1}
        seats(router, "a", 1)
        answer = await waiting
        assert isinstance(answer, RoutedRemote)
        assert answer.node == "a"

    run(work)


@pytest.mark.parametrize("in_the_way", [{"priority": 200}, {"in_flight": 1}])
def test_cold_load_goes_where_what_is_in_the_way_may_be_displaced(
    tmp_path: Path, in_the_way: dict[str, int]
) -> None:
    """Neither a higher class nor a model in use makes room."""

    async def work() -> None:
        world = NodesWorld()
        cold = CatalogueModel(id=COLD, vram_mb=6000)
        router = gateway_of(world, tmp_path, neuron("a"), neuron("b"), models=[cold])
        for name, fields in (("a", in_the_way), ("b", {})):
            resident = NodeModel("org/resident", "loaded", memory_mib=7000, **fields)
            report(router, name, {}, models=[resident], devices=[NodeDevice(0, 8000, 1000)])
        assert await node_of(router, "r", COLD) == "b"

    run(work)


def test_trial_request_that_tells_nothing_lets_another_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client left, or the node went down with it for a cause that polls have told."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        see_all(router, a=LOADED)
        fail(router, "a", "f1", "f2", "f3")
        pass_time(monkeypatch, 5.0)
        report(router, "a", LOADED)
        assert await node_of(router, "trial") == "a"
        with pytest.raises(NoHealthyNode):
            await placed(router, "beside it")
        router.on_end_request(EndRequest("trial"), envelope())
        assert await node_of(router, "second trial") == "a"
        report(router, "a", LOADED, is_healthy=False, error="no answer")
        fail(router, "a", "second trial")
        report(router, "a", LOADED)
        assert await node_of(router, "third trial") == "a"

    run(work)


def test_operator_is_told_why_a_load_failed(tmp_path: Path) -> None:
    """At the gateway as at the node."""

    async def work() -> None:
        world = NodesWorld()
        world.load_error = InsufficientMemory("too big")
        router = make_gateway(world, tmp_path)
        see_all(router)
        with pytest.raises(InsufficientMemory, match="too big"):
            await router.load(LoadOptions(model_id="org/any"))

    run(work)


def test_pause_after_a_failed_load_grows_and_ends_with_a_success(tmp_path: Path) -> None:
    """Ten seconds, twenty, and after a load that worked ten again."""

    async def work() -> None:
        world = NodesWorld()
        router = gateway_of(world, tmp_path, neuron("a"), models=[CatalogueModel(id=COLD)])
        options = LoadOptions(model_id=COLD)

        async def pause_after_failures(count: int) -> float:
            world.load_error = InsufficientMemory("too big")
            report(router, "a", {})
            for _ in range(count):
                with pytest.raises(InsufficientMemory):
                    await router.load(options)
            with pytest.raises(ModelLoadFailed) as caught:
                await placed(router, "r", COLD)
            assert caught.value.retry_after_s
            return caught.value.retry_after_s

        assert await pause_after_failures(1) <= 10
        assert 10 < await pause_after_failures(1) <= 20
        world.load_error = None
        await router.load(options)
        assert await pause_after_failures(1) <= 10

    run(work)


def test_node_whose_pause_is_over_is_as_good_as_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had failed to load the model."""

    async def work() -> None:
        world = NodesWorld()
        models = [CatalogueModel(id=COLD)]
        router = gateway_of(world, tmp_path, neuron("a"), neuron("b"), models=models)
        report(router, "a", {})
        report(router, "b", {}, is_draining=True)
        world.load_error = InsufficientMemory("too big")
        with pytest.raises(ModelLoadFailed):
            await placed(router, "r1", COLD)
        world.load_error = None
        pass_time(monkeypatch, 11.0)
        for name in ("a", "b"):
            report(router, name, {})
        assert await node_of(router, "r2", COLD) == "a"

    run(work)


# A host of role "all"


def test_model_that_failed_by_hand_here_is_not_known_to_requests(tmp_path: Path) -> None:
    """An operator tried an id; a request must not load it again."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path, role="all")
        see_all(router)
        model = router.local.add(LoadOptions(model_id="org/tried"), is_known=False)
        model.become("failed", error=InsufficientMemory("too big"))
        with pytest.raises(ModelNotFound):
            await placed(router, "r", "org/tried")

    run(work)


def test_draining_host_sends_requests_to_its_neurons(tmp_path: Path) -> None:
    """What only it has is refused with a hint."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path, role="all")
        see_all(router)
        router.models[COLD].become("loaded")
        assert await placed(router, "r1", COLD) == RoutedHere(COLD)
        router.drain(is_on=True)
        report(router, "b", {COLD: "loaded"})
        assert {await node_of(router, f"s{n}", COLD) for n in range(3)} == {"b"}
        for name in ("a", "b"):
            report(router, name, {}, is_draining=True)
        with pytest.raises(NoHealthyNode):
            await placed(router, "r2", COLD)

    run(work)


def test_conversation_stays_with_this_host_too(tmp_path: Path) -> None:
    """It remembers what it served itself, as it does for its neurons."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path, role="all")
        see_all(router, a={COLD: "loaded"})
        router.models[COLD].become("loaded")
        chains: dict[bool, list[int]] = {}
        for number in range(2):
            answer = await placed(router, f"r{number}", COLD, prefix=[number])
            chains[isinstance(answer, RoutedHere)] = [number]
            router.on_end_request(EndRequest(f"r{number}"), envelope())
        for number in range(3):
            answer = await placed(router, f"s{number}", COLD, prefix=[*chains[True], 7 + number])
            assert answer == RoutedHere(COLD)

    run(work)


def test_server_that_has_a_model_of_this_host_is_not_open(tmp_path: Path) -> None:
    """The next request may go here instead."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path, role="all")
        see_all(router, x={COLD: "loaded"})
        answer = await placed(router, "r", COLD)
        assert isinstance(answer, RoutedRemote)
        assert (answer.node, answer.open_until) == ("x", 0.0)

    run(work)
