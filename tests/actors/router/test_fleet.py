"""The router among several nodes, with the poller played by a script."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from actors.router.router import Router
from cortexd.catalogue import Catalogue, CatalogueModel
from cortexd.errors import ActorDown as ActorDownError
from cortexd.errors import (
    BadModelFile,
    Cancelled,
    CortexError,
    InsufficientMemory,
    InvalidRequest,
    ModelLoadFailed,
    ModelLoading,
    ModelNotFound,
    NoHealthyNode,
    Overloaded,
    QueueTimeout,
)
from cortexd.messages import (
    ActorDown,
    EndRequest,
    HeldLease,
    HeldLeases,
    LeaseReport,
    LoadOnNode,
    NeuronReport,
    NodeFailed,
    Ok,
    Place,
    QueryLoading,
    RoutedHere,
    RoutedRemote,
    UnloadOnNode,
)
from cortexd.messages.control import ActorInfo, Message
from cortexd.messages.neurons import NodeDevice, NodeModel
from cortexd.models import LoadOptions
from cortexd.settings import Gateway, NeuronEntry, Settings
from tests.doubles.router_world import World, attached_router, envelope, run

MODEL = "org/small"
COLD = "org/cold"


class NodesWorld(World):
    """Neurons that load what the router asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[LoadOnNode] = []
        self.load_error: CortexError | None = None
        self.unloads: list[tuple[str, str]] = []
        self.asked_to_load = asyncio.Event()
        self.may_load = asyncio.Event()
        self.may_load.set()

    async def ask(self, name: str, body: Message, *, deadline_s: float) -> Message:
        """Play the poller for loads."""
        if isinstance(body, UnloadOnNode):
            self.unloads.append((body.node, body.model_id))
            return Ok()
        if not isinstance(body, LoadOnNode):
            return await super().ask(name, body, deadline_s=deadline_s)
        assert name == "poller"
        self.loads.append(body)
        self.asked_to_load.set()
        await self.may_load.wait()
        if self.load_error is not None:
            raise self.load_error
        report(self.router, body.node, {body.options.model_id: "loaded"})
        return Ok()


class DyingPoller(NodesWorld):
    """The poller dies with the first load in hand."""

    def __init__(self) -> None:
        super().__init__()
        self.load_error = ActorDownError("poller died")

    async def wait_for(self, name: str, *, deadline_s: float) -> ActorInfo:
        """Start another one."""
        self.load_error = None
        return await super().wait_for(name, deadline_s=deadline_s)


def make_gateway(world: NodesWorld, folder: Path, role: Any = "gateway", **settings: Any) -> Router:
    """A router with two remote neurons and an external server."""
    neurons = [
        NeuronEntry(name="a", endpoint="http://a"),
        NeuronEntry(name="b", endpoint="http://b"),
        NeuronEntry(name="x", endpoint="http://x", kind="openai"),
    ]
    catalogue = Catalogue(models=[CatalogueModel(id=COLD, quant="Q8_0")], aliases={"s": MODEL})
    wanted = Settings(role=role, neurons=neurons, **settings)
    return attached_router(world, folder, catalogue, wanted)


def report(router: Router, name: str, states: dict[str, Any], **changes: Any) -> None:
    """Let the poller have seen a node."""
    seen = NeuronReport(
        name=name,
        kind="cortex",
        base_url=f"http://{name}",
        is_healthy=True,
        sequence=5,
        num_successes=1,
        devices=[NodeDevice(0, 8000, 8000)],
        models=[NodeModel(model_id, state) for model_id, state in states.items()],
    )
    router.on_neuron_report(msgspec.structs.replace(seen, **changes), envelope())


def see_all(router: Router, **states: dict[str, Any]) -> None:
    """Let all three nodes have answered."""
    for name in ("a", "b", "x"):
        kind = "openai" if name == "x" else "cortex"
        report(router, name, states.get(name, {}), kind=kind)


async def placed(
    router: Router, request: str = "r", model: str = MODEL, *, wait: bool = True, **fields: Any
) -> RoutedHere | RoutedRemote:
    """Ask where a request goes."""
    return await router.on_place(Place(model, request, wait, **fields), envelope())


async def node_of(router: Router, request: str = "r", model: str = MODEL) -> str:
    """Return the name of the node."""
    answer = await placed(router, request, model)
    assert isinstance(answer, RoutedRemote)
    return answer.node


def test_burst_between_two_polls_is_shared_evenly(tmp_path: Path) -> None:
    """Own dispatches count at once, and are not counted twice when the next poll shows them."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        see_all(router, a={MODEL: "loaded"}, b={MODEL: "loaded"})
        names = Counter([await node_of(router, f"r{number}", "s") for number in range(32)])
        assert names == {"a": 16, "b": 16}
        # The poll of "a" shows our sixteen and four of another gateway.
        busy = [NodeModel(MODEL, "loaded", in_flight=16, queue_depth=4)]
        report(router, "a", {}, models=busy)
        names = Counter([await node_of(router, f"s{number}") for number in range(8)])
        assert names == {"b": 6, "a": 2}
        for number in range(32):
            router.on_end_request(EndRequest(f"r{number}"), envelope())
        assert sum(status.dispatched for status in router.fleet.statuses()) == 8
        router.on_actor_down(ActorDown(1, "front.0", 1, "", 0, "killed"))
        assert sum(status.dispatched for status in router.fleet.statuses()) == 0

    run(work)


def test_cold_model_is_loaded_once_for_fifty_requests(tmp_path: Path) -> None:
    """One load, by the catalogue's options; all requests wait for it, then go there."""

    async def work() -> None:
        world = NodesWorld()
        router = make_gateway(world, tmp_path)
        see_all(router)
        with pytest.raises(ModelLoading):
            await placed(router, "hasty", COLD, wait=False)
        answers = await asyncio.gather(*(placed(router, f"r{n}", COLD) for n in range(50)))
        assert {answer.node for answer in answers if isinstance(answer, RoutedRemote)} == {"a"}
        assert [(load.node, load.options.quant) for load in world.loads] == [("a", "Q8_0")]

    run(work)


def test_refusal_of_a_loading_model_says_how_far_it_is(tmp_path: Path) -> None:
    """Stage, progress and the time left, as its node told; the hint is that time."""

    async def work() -> None:
        world = NodesWorld()
        world.may_load.clear()
        router = make_gateway(world, tmp_path)
        see_all(router)
        loading = [NodeModel(COLD, "loading", detail="weights", progress=0.4, eta_s=17.0)]
        with pytest.raises(ModelLoading) as caught:
            await placed(router, "r1", COLD, wait=False)
        assert "starting" in caught.value.message
        report(router, "a", {}, models=loading)
        with pytest.raises(ModelLoading, match="weights") as caught:
            await placed(router, "r2", COLD, wait=False)
        assert caught.value.details == {"progress": 0.4, "eta_s": 17.0}
        assert caught.value.retry_after_s == 17
        told = router.on_query_loading(QueryLoading(COLD), envelope())
        assert (told.stage, told.progress, told.eta_s) == ("weights", 0.4, 17.0)
        world.may_load.set()

    run(work)


def test_failed_load_is_tried_elsewhere_then_tells_its_cause(tmp_path: Path) -> None:
    """Each node is tried once; then waiters and later requests get the cause, without a load."""

    async def work() -> None:
        world = NodesWorld()
        world.load_error = InsufficientMemory("too big")
        router = make_gateway(world, tmp_path)
        see_all(router)
        for request in ("r1", "r2"):
            with pytest.raises(ModelLoadFailed, match="too big") as caught:
                await placed(router, request, COLD)
            assert caught.value.retry_after_s
        assert [load.node for load in world.loads] == ["a", "b"]
        report(router, "b", {COLD: "loaded"})
        assert await node_of(router, "r3", COLD) == "b"

    run(work)


def test_load_goes_on_when_the_poller_that_asked_for_it_dies(tmp_path: Path) -> None:
    """The node has not failed: the next poller asks again, and joins the load that runs there."""

    async def work() -> None:
        world = DyingPoller()
        router = make_gateway(world, tmp_path)
        see_all(router)
        assert await node_of(router, "r1", COLD) == "a"
        assert [load.node for load in world.loads] == ["a", "a"]

    run(work)


def test_load_with_a_structural_fault_is_tried_nowhere_else(tmp_path: Path) -> None:
    """Another node would find the same fault in the same files."""

    async def work() -> None:
        world = NodesWorld()
        world.load_error = BadModelFile("truncated")
        router = make_gateway(world, tmp_path)
        see_all(router)
        with pytest.raises(BadModelFile):
            await placed(router, "r1", COLD)
        assert len(world.loads) == 1

    run(work)


def test_node_that_refuses_is_left_alone_until_it_answers(tmp_path: Path) -> None:
    """A refused connection counts at once, the next good poll mends it."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        see_all(router, a={MODEL: "loaded"})
        router.on_node_failed(NodeFailed("a", "refused"), envelope())
        with pytest.raises(NoHealthyNode) as caught:
            await placed(router)
        assert caught.value.retry_after_s
        report(router, "a", {MODEL: "loaded"}, error="timeout")
        with pytest.raises(NoHealthyNode):
            await placed(router)
        report(router, "a", {MODEL: "loaded"})
        assert await node_of(router) == "a"
        report(router, "a", {})
        with pytest.raises(ModelNotFound):
            await placed(router)

    run(work)


def test_excluded_node_is_not_chosen_again(tmp_path: Path) -> None:
    """A retry goes to another replica."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        see_all(router, a={MODEL: "loaded"}, b={MODEL: "loaded"})
        answer = await placed(router, exclude=["a"])
        assert isinstance(answer, RoutedRemote)
        assert answer.node == "b"

    run(work)


async def check_waits_for_polls(router: Router) -> None:
    """Check that a request waits until the nodes have answered, and goes where the model is."""
    waiting = asyncio.create_task(placed(router))
    await asyncio.sleep(0)
    see_all(router, b={MODEL: "loaded"})
    answer = await waiting
    assert isinstance(answer, RoutedRemote)
    assert answer.node == "b"


def test_first_request_of_a_new_gateway_waits_for_the_first_polls(tmp_path: Path) -> None:
    """A router that knows nothing yet refuses nothing for a moment."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        await check_waits_for_polls(router)

    run(work)


def test_first_polls_of_a_busy_machine_are_waited_for_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The poller starts when it gets a turn, and a poll may take its whole time."""

    class Later:
        """Five seconds after the router's start."""

        monotonic_ns = time.monotonic_ns

        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + 5.0

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        monkeypatch.setattr("actors.router.fleet.time", Later)
        await check_waits_for_polls(router)

    run(work)


def test_node_that_starts_with_the_gateway_is_waited_for(tmp_path: Path) -> None:
    """Its first polls found nobody: neurons need longer to start than a gateway."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        for _ in range(2):
            for name in ("a", "b", "x"):
                report(router, name, {}, is_healthy=False, num_successes=0, error="refused")
        await check_waits_for_polls(router)

    run(work)


def test_request_that_ends_while_it_waits_holds_nothing(tmp_path: Path) -> None:
    """A client that leaves during a load frees its place; the load goes on."""

    async def work() -> None:
        world = NodesWorld()
        world.may_load.clear()
        router = make_gateway(world, tmp_path)
        see_all(router)
        waiting = asyncio.create_task(placed(router, "r1", COLD))
        await world.asked_to_load.wait()
        router.on_end_request(EndRequest("r1"), envelope())
        world.may_load.set()
        with pytest.raises(Cancelled):
            await waiting
        assert sum(status.dispatched for status in router.fleet.statuses()) == 0
        assert await node_of(router, "r2", COLD) == "a"

    run(work)


def test_host_with_an_engine_is_one_of_the_nodes(tmp_path: Path) -> None:
    """Loaded elsewhere wins; what only this host has is served here."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path, role="all")
        see_all(router, a={MODEL: "loaded"})
        assert await node_of(router) == "a"
        report(router, "a", {MODEL: "loaded"}, devices=[NodeDevice(0, 1, 1)])
        router.models[COLD].become("loading")
        assert await placed(router, model=COLD) == RoutedHere(COLD)
        (card,) = router.fleet.catalogue_cards()
        assert "a" in card.feasible_on
        assert len(card.feasible_on) == 3  # not the external server

    run(work)


def test_operator_loads_and_unloads_at_the_neurons_of_a_gateway(tmp_path: Path) -> None:
    """`cortexd load` on a gateway goes to a node, `unload` to all with the model or its failure."""

    async def work() -> None:
        world = NodesWorld()
        router = make_gateway(world, tmp_path)
        see_all(router)
        await router.load(LoadOptions(model_id="org/any"))
        await router.load(LoadOptions(model_id=COLD))
        wanted = [LoadOptions(model_id="org/any"), LoadOptions(model_id=COLD, quant="Q8_0")]
        assert [load.options for load in world.loads] == wanted
        with pytest.raises(ModelNotFound, match=f'"org/none" is not loaded; loaded: "{COLD}"'):
            await router.unload("org/none", force=False)
        see_all(router, a={"org/any": "loaded"}, b={"org/any": "failed"}, x={"org/any": "loaded"})
        await router.unload("org/any", force=False)
        assert world.unloads == [("a", "org/any"), ("b", "org/any")]
        see_all(router, x={"ext/model": "loaded"})
        with pytest.raises(InvalidRequest, match='"x", an external server'):
            await router.unload("ext/model", force=False)
        with pytest.raises(ModelNotFound, match="loaded: none"):
            await router.unload("org/none", force=False)

    run(work)


def seats(router: Router, name: str, count: int) -> None:
    """Let a node have been seen with the model loaded and so many seats."""
    models = [NodeModel(MODEL, "loaded", max_in_flight=count)]
    report(router, name, {}, models=models)


def test_conversation_stays_where_its_prefix_is(tmp_path: Path) -> None:
    """The replica that has seen the beginning wins, unless it is clearly busier."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        for name in ("a", "b"):
            seats(router, name, 16)
        first = await node_of_chain(router, "r0", [1, 2])
        other = {"a": "b", "b": "a"}[first]
        router.on_end_request(EndRequest("r0"), envelope())
        assert await node_of_chain(router, "s0", [7]) == other  # a new one goes to the next in turn
        router.on_end_request(EndRequest("s0"), envelope())
        nodes = [await node_of_chain(router, f"t{n}", [1, 2, 30 + n]) for n in range(6)]
        assert nodes[:5] == [first] * 5  # up to four requests busier
        assert nodes[5] == other
        seats(router, first, 16)
        report(router, first, {}, models=[NodeModel(MODEL, "loaded")], is_healthy=False)
        assert await node_of_chain(router, "u", [1, 2]) == other

    run(work)


async def node_of_chain(router: Router, request: str, chain: list[int]) -> str:
    """Return the node of a request with this prefix."""
    answer = await placed(router, request, prefix=chain)
    assert isinstance(answer, RoutedRemote)
    return answer.node


def test_requests_without_a_seat_wait_and_take_turns_by_principal(tmp_path: Path) -> None:
    """The queue is bounded; keys share freed seats; who leaves frees the place."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path, gateway=Gateway(max_queue_depth=3))
        seats(router, "a", 2)
        order: list[str] = []

        async def ask(name: str, principal: str) -> None:
            await placed(router, name, account=principal)
            order.append(name)

        await ask("g1", "greedy")
        await ask("g2", "greedy")
        waiting = {}
        for name, principal in (("g3", "greedy"), ("g4", "greedy"), ("m1", "modest")):
            waiting[name] = asyncio.create_task(ask(name, principal))
            await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await ask("g5", "greedy")
        assert caught.value.retry_after_s
        # Another modest one displaces the greedy key's latest.
        waiting["m2"] = asyncio.create_task(ask("m2", "modest2"))
        with pytest.raises(Overloaded):
            await waiting["g4"]
        router.on_end_request(EndRequest("m2"), envelope())
        with pytest.raises(Cancelled):
            await waiting["m2"]
        assert router.fleet.queue_depths() == {MODEL: 2}
        router.on_end_request(EndRequest("g1"), envelope())
        await waiting["m1"]
        router.on_end_request(EndRequest("g2"), envelope())
        await waiting["g3"]
        assert order == ["g1", "g2", "m1", "g3"]
        assert router.fleet.queue_depths() == {}

    run(work)


def test_wait_for_a_seat_has_an_end(tmp_path: Path) -> None:
    """503 with a hint after the configured time, counted from the first ask."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path, gateway=Gateway(queue_wait_s=0.01))
        seats(router, "a", 1)
        await placed(router, "r1")
        with pytest.raises(QueueTimeout) as caught:
            await placed(router, "r2", since=time.monotonic())
        assert caught.value.retry_after_s
        assert router.fleet.queue_depths() == {}

    run(work)


@pytest.mark.parametrize(
    ("name", "model_id"), [("s", MODEL), (COLD, COLD), ("org/invented", None), ("org/gone", None)]
)
def test_refusal_tells_which_of_the_known_models_it_is_about(
    tmp_path: Path, name: str, model_id: str | None
) -> None:
    """For the log and the metrics of the front; a name that a client invented is none."""

    async def work() -> None:
        world = NodesWorld()
        world.load_error = InsufficientMemory("too big")
        router = make_gateway(world, tmp_path, gateway=Gateway(max_queue_depth=0))
        seats(router, "a", 1)
        for node in ("b", "x"):
            report(router, node, {})
        await placed(router, "first")
        with pytest.raises(CortexError) as caught:
            await placed(router, "r", name)
        assert caught.value.to_info().to_exception().model == model_id

    run(work)


def test_node_that_was_cut_off_serves_at_its_first_good_poll(tmp_path: Path) -> None:
    """Requests that failed while its polls failed are no case for the breaker."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        see_all(router, a={MODEL: "loaded"})
        for number in range(5):
            await placed(router, f"r{number}")
        report(router, "a", {MODEL: "loaded"}, is_healthy=False, error="no answer")
        for number in range(5):
            failed = NodeFailed("a", "cut off", f"r{number}", is_refusing=False)
            router.on_node_failed(failed, envelope())
            router.on_end_request(EndRequest(f"r{number}"), envelope())
        report(router, "a", {MODEL: "loaded"})
        assert await node_of(router, "r5") == "a"

    run(work)


def test_node_that_fails_requests_is_left_alone_then_tried_by_one(tmp_path: Path) -> None:
    """The breaker opens although the polls are good; one request is the trial."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        see_all(router, a={MODEL: "loaded"})
        for number in range(3):
            await placed(router, f"r{number}")
            failed = NodeFailed("a", "HTTP 500", f"r{number}", is_refusing=False)
            router.on_node_failed(failed, envelope())
            router.on_end_request(EndRequest(f"r{number}"), envelope())
        report(router, "a", {MODEL: "loaded"})
        with pytest.raises(NoHealthyNode):
            await placed(router, "r3")
        (status, *_) = router.fleet.statuses()
        assert (status.is_healthy, status.breaker) == (True, "open")

    run(work)


def test_draining_node_gets_nothing_new(tmp_path: Path) -> None:
    """It is healthy and passed over."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        see_all(router)
        report(router, "a", {MODEL: "loaded"}, is_draining=True)
        report(router, "b", {MODEL: "loaded"})
        assert {await node_of(router, f"r{n}") for n in range(3)} == {"b"}
        report(router, "b", {MODEL: "loaded"}, is_draining=True)
        with pytest.raises(NoHealthyNode):
            await placed(router, "r9")

    run(work)


def test_node_without_choice_or_seats_is_open_to_the_front(tmp_path: Path) -> None:
    """Only an external server that alone has the model, as long as it does not fail."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        see_all(router, x={MODEL: "loaded"})
        before = time.monotonic()
        first = await placed(router, "r1")
        assert isinstance(first, RoutedRemote)
        assert first.open_until > before
        see_all(router, x={MODEL: "loaded"}, a={MODEL: "unloaded"})
        second = await placed(router, "r2")
        assert isinstance(second, RoutedRemote)
        assert (second.node, second.open_until) == ("x", 0.0)
        see_all(router, a={MODEL: "loaded"})
        third = await placed(router, "r3")
        assert isinstance(third, RoutedRemote)
        assert (third.node, third.open_until) == ("a", 0.0)

    run(work)


def test_request_that_tries_a_node_again_opens_it_to_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server failed: one request finds out whether it still does."""

    class Later:
        """When the breaker lets one through."""

        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + 5.0

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        see_all(router, x={MODEL: "loaded"})
        for number in range(3):
            failed = NodeFailed("x", "HTTP 500", f"f{number}", is_refusing=False)
            router.on_node_failed(failed, envelope())
        with pytest.raises(NoHealthyNode):
            await placed(router, "early")
        for module in ("fleet", "remote_node", "remote_nodes"):
            monkeypatch.setattr(f"actors.router.{module}.time", Later)
        trial = await placed(router, "trial")
        assert isinstance(trial, RoutedRemote)
        assert (trial.node, trial.open_until) == ("x", 0.0)
        router.on_end_request(EndRequest("trial", is_answered=True), envelope())
        after = await placed(router, "after")
        assert isinstance(after, RoutedRemote)
        assert after.open_until > 0

    run(work)


def test_requests_that_a_front_began_itself_count_as_the_nodes_turn(tmp_path: Path) -> None:
    """Among idle replicas the next request goes to the one that was sent one least recently."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        see_all(router, a={MODEL: "loaded"})
        assert await node_of(router, "r1") == "a"
        see_all(router, x={MODEL: "loaded"})
        router.on_lease_report(LeaseReport([HeldLease("r2", MODEL, "x")], []), envelope())
        for request in ("r1", "r2"):
            router.on_end_request(EndRequest(request), envelope())
        see_all(router, a={MODEL: "loaded"}, x={MODEL: "loaded"})
        assert await node_of(router, "r3") == "a"

    run(work)


def test_requests_begun_at_an_open_node_count_there(tmp_path: Path) -> None:
    """They are leases as any other; a failure after them counts from one again."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        see_all(router, x={MODEL: "loaded"})
        begun = [HeldLease(f"r{number}", MODEL, "x", "acc", [1]) for number in range(3)]
        router.on_lease_report(LeaseReport(begun, []), envelope())
        assert {request for _, request, _ in router.fleet.nodes.leases()} == {"r0", "r1", "r2"}
        failed = NodeFailed("x", "HTTP 500", "f", is_refusing=False)
        for _ in range(2):
            router.on_node_failed(failed, envelope())
        ended = [EndRequest("r0", is_answered=True), EndRequest("r1")]
        router.on_lease_report(LeaseReport([], ended), envelope())
        router.on_node_failed(failed, envelope())
        assert await node_of(router, "r4") == "x", "the answer in between broke the row"
        front = envelope().src
        router.on_actor_down(ActorDown(1, front.name, front.incarnation, "", 0, "killed"))
        assert list(router.fleet.nodes.leases()) == []

    run(work)


def test_restarted_router_holds_what_runs_at_the_nodes(tmp_path: Path) -> None:
    """Fronts tell it; the requests count there until they end, those of unknown nodes never."""

    async def work() -> None:
        router = make_gateway(NodesWorld(), tmp_path)
        see_all(router, a={MODEL: "loaded"}, b={MODEL: "loaded"})
        held = [HeldLease("old", MODEL, "a"), HeldLease("lost", MODEL, "gone")]
        router.on_held_leases(HeldLeases(held), envelope())
        assert [name for name, _, _ in router.fleet.nodes.leases()] == ["a"]
        assert await node_of(router, "new") == "b", "it is the less busy one"
        for request in ("old", "new"):
            router.on_end_request(EndRequest(request), envelope())
        assert list(router.fleet.nodes.leases()) == []

    run(work)


def test_metrics_hear_of_a_node_that_is_left_alone_at_once(tmp_path: Path) -> None:
    """Nobody waits for the next round of gauges; anonymous requests are shown with their node."""

    async def work() -> None:
        world = NodesWorld()
        router = make_gateway(world, tmp_path)
        see_all(router, a={MODEL: "loaded"})
        await placed(router, "r0")
        for number in range(3):
            failed = NodeFailed("a", "HTTP 500", f"f{number}", is_refusing=False)
            router.on_node_failed(failed, envelope())
        shown = {(one.metric, *one.labels): one.value for one in world.gauges}
        assert shown["cortex_node_breaker_state", "a"] == 2
        assert shown["cortex_node_breaker_state", "b"] == 0
        assert shown["cortex_model_anon_in_flight", "a", MODEL] == 1

    run(work)
