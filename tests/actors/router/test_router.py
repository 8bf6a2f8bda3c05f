"""The router's rules, with every other actor played by a script."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from actors.open_requests import OpenRequest, OpenRequests, open_requests_path
from cortexd.catalogue import Catalogue, CatalogueModel
from cortexd.errors import (
    BadModelFile,
    Cancelled,
    CudaUnavailable,
    DeadlineExceeded,
    InsufficientMemory,
    ModelAlreadyLoaded,
    ModelLoadFailed,
    ModelLoading,
    ModelNotFound,
    ModelSourceError,
    NodeDraining,
    Overloaded,
    RegistryUnreachable,
    WrongModality,
)
from cortexd.messages import (
    ActorDown,
    ActorUp,
    CatalogueChanged,
    DescribeModel,
    EndRequest,
    GroupDown,
    HeldLease,
    HeldLeases,
    HostReport,
    ListModels,
    LoadReport,
    RecycleModel,
    ResolveFiles,
    Routed,
    StartGroup,
    UnloadIdle,
)
from cortexd.messages.control import ActorInfo, Message
from cortexd.models import (
    LoadOptions,
    ModelPolicy,
    WeightBytes,
)
from cortexd.settings import Engine, Gateway, Settings
from tests.doubles.router_world import (
    GIB,
    MODEL,
    OTHER,
    World,
    attached_router,
    envelope,
    make_router,
    route,
    routed,
    run,
    state_of,
)
from tests.waiting import DEADLINE_S


def test_fifty_requests_for_a_cold_model_make_one_load(tmp_path: Path) -> None:
    """All get the same leader, and only one group is started."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        answers = await asyncio.gather(*(routed(router, f"r{n}") for n in range(50)))
        assert len({answer.leader for answer in answers}) == 1
        assert all(answer.cold_start for answer in answers)
        assert (world.count(ResolveFiles), world.count(StartGroup)) == (1, 1)
        assert router.models[MODEL].status().in_flight == 50
        assert not (await routed(router, "later")).cold_start

    run(work)


def test_fronts_are_told_of_the_files_before_the_engine_starts(tmp_path: Path) -> None:
    """So they read the tokenizer meanwhile; one that comes up later is told of what runs."""

    async def work() -> None:
        world = World()
        world.loads_by_itself = False
        for number, name in enumerate(("front.0", "front.1", "store"), start=1):
            world.peers.apply(ActorUp(number, ActorInfo(name, 1, "ready")))
        router = make_router(world, tmp_path)
        with pytest.raises(ModelLoading):
            await router.on_route(route(wait=False), envelope())
        async with asyncio.timeout(DEADLINE_S):
            await world.started.wait()
        assert world.texts == [("front.0", MODEL), ("front.1", MODEL)]
        router.on_actor_up(ActorUp(4, ActorInfo("front.2", 1, "ready")))
        router.on_actor_up(ActorUp(5, ActorInfo("evictor", 1, "ready")))
        assert world.texts[2:] == [("front.2", MODEL)]

    run(work)


def test_load_waits_for_a_store_that_starts_late(tmp_path: Path) -> None:
    """As on a busy machine, where the models of the daemon's start are asked for before."""

    async def work() -> None:
        world = World()
        world.starting.add("store")
        router = make_router(world, tmp_path)
        assert (await routed(router)).leader

    run(work)


def test_room_is_looked_for_though_the_poller_starts_late(tmp_path: Path) -> None:
    """What is unknown only because the daemon starts is waited for, not taken for room."""

    async def work() -> None:
        world = World()
        world.starting.add("poller")
        world.size_bytes = 100 * GIB
        router = make_router(world, tmp_path)
        with pytest.raises(ModelLoadFailed, match="does not fit"):
            await routed(router)

    run(work)


def test_model_for_something_else_answers_no_chats_and_is_not_loaded(tmp_path: Path) -> None:
    """By what the catalogue declares; without a declaration it is taken to answer."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        embedder = CatalogueModel(id=MODEL, capabilities=["embedding"])
        catalogue = Catalogue(models=[embedder], aliases={"small": MODEL})
        router.on_catalogue_changed(CatalogueChanged(catalogue), envelope())
        for name in (MODEL, "small"):
            with pytest.raises(WrongModality, match="embedding"):
                await routed(router, model=name)
        assert not world.started.is_set()
        assert router.models[MODEL].state == "unloaded"

    run(work)


def test_alias_routes_to_its_model_and_unknown_names_close_ones(tmp_path: Path) -> None:
    """An alias is an entry of its own; a typo is answered with what was meant, of all that runs."""

    async def work() -> None:
        router = make_router(World(), tmp_path)
        assert (await routed(router, model="small")).model_id == MODEL
        with pytest.raises(ModelNotFound, match=f'did you mean "{MODEL}"'):
            await router.on_route(route(model="org/smal"), envelope())
        await router.load(LoadOptions(model_id="by/hand"))
        with pytest.raises(ModelNotFound, match='did you mean "by/hand"'):
            await router.on_route(route(model="by/han"), envelope())

    run(work)


def test_route_without_wait_starts_the_load_and_says_so(tmp_path: Path) -> None:
    """The answer is retriable and the load goes on."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        with pytest.raises(ModelLoading) as caught:
            await router.on_route(route(wait=False), envelope())
        assert caught.value.retry_after_s is not None
        assert (await routed(router)).leader

    run(work)


def test_wait_ends_at_its_deadline_and_opens_no_lease(tmp_path: Path) -> None:
    """A slow load does not leave leases that nobody closes."""

    async def work() -> None:
        world = World()
        world.loads_by_itself = False
        router = make_router(world, tmp_path)
        with pytest.raises(DeadlineExceeded):
            await router.on_route(route(), envelope(deadline_s=0.02))
        world.spawn_up(router.models[MODEL].group, 1)
        await routed(router, "r2")
        assert list(router.models[MODEL].leases) == ["r2"]

    run(work)


def test_request_that_ends_while_it_waits_opens_no_lease(tmp_path: Path) -> None:
    """EndRequest also ends a wait."""

    async def work() -> None:
        world = World()
        world.loads_by_itself = False
        router = make_router(world, tmp_path)
        waiting = asyncio.create_task(router.on_route(route(), envelope()))
        await asyncio.wait_for(world.started.wait(), timeout=DEADLINE_S)
        router.on_end_request(EndRequest("r1"), envelope())
        world.spawn_up(router.models[MODEL].group, 1)
        with pytest.raises(Cancelled):
            await waiting
        assert not router.models[MODEL].leases

    run(work)


def test_dead_front_gives_its_leases_back(tmp_path: Path) -> None:
    """Only the dead incarnation's leases close; its requests are counted in its place."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        await routed(router)
        front = OpenRequests(open_requests_path(tmp_path, "front.0", 1))
        front.begin(OpenRequest("r1", "/v1/messages", MODEL, "here"))
        await router.on_route(route("r2"), envelope(front="front.1"))
        router.on_actor_down(ActorDown(1, "front.0", 1, "", 0, "killed"))
        assert list(router.models[MODEL].leases) == ["r2"]
        lost = [one for one in world.measured if one.metric.startswith("cortex_request")]
        assert [(one.metric, one.value) for one in lost] == [
            ("cortex_requests_total", 1),
            ("cortex_request_errors_total", 1),
        ]
        assert all(MODEL in one.labels for one in lost)

    run(work)


def test_structural_failure_is_told_at_once_and_not_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that cannot be loaded stays refused until somebody loads it on purpose."""

    async def work() -> None:
        world = World()
        world.resolve_error = BadModelFile("m.gguf: cut short")
        router = make_router(world, tmp_path)
        for request in ("r1", "r2"):
            with pytest.raises(BadModelFile, match="cut short"):
                await routed(router, request)
        monkeypatch.setattr("actors.router.managed_model._MAX_COOLDOWN_S", 0.0)
        with pytest.raises(BadModelFile):
            await routed(router, "much later")
        assert world.count(ResolveFiles) == 1
        world.resolve_error = None
        await router.load(LoadOptions(model_id=MODEL))
        assert state_of(router) == "loaded"

    run(work)


def test_transient_failure_cools_down_then_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests in the cool-down get the cause and when to retry; after it the load is tried."""

    async def work() -> None:
        world = World()
        world.resolve_error = ModelSourceError("the hub does not answer")
        router = make_router(world, tmp_path)
        with pytest.raises(ModelLoadFailed, match="does not answer") as caught:
            await routed(router)
        assert caught.value.retry_after_s == pytest.approx(10, abs=1)
        world.resolve_error = None
        router.models[MODEL].state_since -= 11
        assert (await routed(router, "r2")).leader

    run(work)


def test_failed_load_of_an_invented_id_makes_no_series_of_its_own(tmp_path: Path) -> None:
    """Anybody can invent ids; metrics name the models that are configured or have files."""

    async def work() -> None:
        world = World()
        world.resolve_error = ModelSourceError("the hub does not answer")
        router = make_router(world, tmp_path)
        for model_id in (MODEL, "typed/wrong"):
            with pytest.raises(ModelSourceError):
                await router.load(LoadOptions(model_id=model_id))
        loads = [one.labels for one in world.measured if one.metric == "cortex_model_loads_total"]
        assert [labels[-1] for labels in loads] == ["failed", "failed"]
        assert MODEL in loads[0]
        assert "unknown" in loads[1]

    run(work)


def test_unload_of_a_failed_model_forgets_the_failure(tmp_path: Path) -> None:
    """What nobody configured leaves the lists, a model of the catalogue may be asked for again."""

    async def work() -> None:
        world = World()
        world.resolve_error = ModelSourceError("the hub does not answer")
        router = make_router(world, tmp_path)
        for model_id in (MODEL, "typed/wrong"):
            with pytest.raises(ModelSourceError):
                await router.load(LoadOptions(model_id=model_id))
            assert state_of(router, model_id) == "failed"
            await router.unload(model_id, force=False)
        assert "typed/wrong" not in router.models
        assert state_of(router) == "unloaded"
        world.resolve_error = None
        assert (await routed(router)).leader

    run(work)


def test_group_death_recovers_and_a_given_up_group_fails(tmp_path: Path) -> None:
    """While a group restarts requests wait; when the root gave it up they get its error."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        first = await routed(router)
        group = router.models[MODEL].group
        router.on_group_down(GroupDown(1, group, 1, "killed", will_restart=True, commanded=False))
        assert state_of(router) == "recovering"
        world.spawn_up(group, 2)
        second = await routed(router, "r2")
        assert second.epoch == first.epoch + 1
        error = InsufficientMemory("too big").to_info()
        router.on_group_down(GroupDown(2, group, 2, "out of memory", False, False, error))
        with pytest.raises(ModelLoadFailed, match="too big"):
            await routed(router, "r3")

    run(work)


class BusyLeaders(World):
    """Leaders that are asked what they run while a step keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.is_late = False

    async def _describe(self, leader: str) -> Message:
        self.is_asked.set()
        await self.may_answer.wait()
        if self.is_late:
            self.is_late = False
            raise DeadlineExceeded("no answer")
        return await super()._describe(leader)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_leader_that_is_too_busy_to_answer_is_asked_until_it_is_gone(
    tmp_path: Path, is_replaced: bool
) -> None:
    """A step may last; one whose successor runs has nothing to say any more."""

    async def work() -> None:
        world = BusyLeaders()
        router = make_router(world, tmp_path)
        world.is_late = True
        waiting = asyncio.create_task(routed(router))
        await world.is_asked.wait()
        if is_replaced:
            successor = ActorInfo(f"{router.models[MODEL].group}/0", 2, "starting")
            world.peers.apply(ActorUp(world.peers.sequence + 1, successor))
        world.may_answer.set()
        if is_replaced:
            for _ in range(10):
                await asyncio.sleep(0)
            assert (world.count(DescribeModel), state_of(router)) == (1, "loading")
            world.spawn_up(router.models[MODEL].group, 2)
        assert (await waiting).incarnation == (2 if is_replaced else 1)
        assert world.count(DescribeModel) == 2

    run(work)


def test_model_that_is_unloaded_before_its_leader_was_heard_stays_unloaded(tmp_path: Path) -> None:
    """What the leader said of itself is old by then."""

    async def work() -> None:
        world = BusyLeaders()
        router = make_router(world, tmp_path)
        loading = asyncio.create_task(router.load(LoadOptions(model_id=MODEL)))
        await world.is_asked.wait()
        model = router.models[MODEL]
        await router.unload(MODEL, force=True)
        with pytest.raises(ModelLoadFailed):
            await loading
        world.may_answer.set()
        for _ in range(10):
            await asyncio.sleep(0)
        assert (model.state, model.leader) == ("unloaded", "")

    run(work)


def test_load_waits_to_hear_what_adopted_models_hold(tmp_path: Path) -> None:
    """A restarted router does not give memory away that a busy leader has not told of yet."""

    async def work() -> None:
        world = BusyLeaders()
        world.may_answer.set()
        router = make_router(world, tmp_path)
        await router.load(LoadOptions(model_id=OTHER))
        group = router.models[OTHER].group
        info = ActorInfo(f"{group}/0", 1, "ready", group=group, epoch=1, rank=0)
        world.peers.apply(ActorUp(world.peers.sequence + 1, info))
        world.may_answer.clear()
        world.is_asked.clear()
        world.size_bytes, world.victims = 2 * GIB, [OTHER]
        again = make_router(world, tmp_path, engine=Engine(memory_limit_mib=4096))
        await again.on_start()
        await world.is_asked.wait()
        loading = asyncio.create_task(again.load(LoadOptions(model_id=MODEL)))
        for _ in range(50):
            await asyncio.sleep(0)
        world.may_answer.set()
        await loading
        assert (state_of(again, OTHER), state_of(again)) == ("unloaded", "loaded")
        await again.on_stop()

    run(work)


@pytest.mark.parametrize("is_reachable", [True, False])
def test_router_that_dies_while_it_loads_the_first_model_forgets_no_other(
    tmp_path: Path, is_reachable: bool
) -> None:
    """What the next one brings up is all that was to be, also what waits for its registry."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        router.default_models = [LoadOptions(model_id=name) for name in (MODEL, OTHER)]
        last = router.models[OTHER]
        if is_reachable:
            world.loads_by_itself = False
            await router.on_start()
            await world.started.wait()
        else:
            world.resolve_error = RegistryUnreachable("no network")
            await router.on_start()
            while "registry" not in (last.stage or ""):
                await last.wait_changed()
        assert last.status().is_due
        await router.on_stop()
        world.loads_by_itself, world.resolve_error = True, None
        again = make_router(world, tmp_path)
        await again.on_start()
        for name in (MODEL, OTHER):
            model = again.models[name]
            while not model.is_in("loaded"):
                await model.wait_changed()
        for _ in range(10):
            await asyncio.sleep(0)  # the loader is told after those who wait
        assert not any(model.is_due for model in again.models.values())
        await again.on_stop()

    run(work)


def test_unload_waits_for_requests_and_refuses_when_they_do_not_end(tmp_path: Path) -> None:
    """Nothing in use is unloaded unless forced."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path, gateway=Gateway(drain_s=0.05))
        await routed(router)
        with pytest.raises(Overloaded, match="1 requests"):
            await router.unload(MODEL, force=False)
        assert state_of(router) == "loaded"
        unloading = asyncio.create_task(router.unload(MODEL, force=False))
        await asyncio.sleep(0)
        router.on_end_request(EndRequest("r1"), envelope())
        await unloading
        assert state_of(router) == "unloaded"
        await routed(router, "r2")
        await router.unload(MODEL, force=True)
        assert state_of(router) == "unloaded"

    run(work)


def test_model_that_was_too_busy_to_be_unloaded_is_to_run_after_a_restart(tmp_path: Path) -> None:
    """The unload was refused, so nothing has changed."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path, gateway=Gateway(drain_s=0.01))
        await routed(router)
        with pytest.raises(Overloaded):
            await router.unload(MODEL, force=False)
        again = make_router(world, tmp_path)
        await again.on_start()
        model = again.models[MODEL]
        while not model.is_in("loaded"):
            await model.wait_changed()
        await again.on_stop()

    run(work)


def test_unload_is_done_as_soon_as_the_last_request_ends(tmp_path: Path) -> None:
    """It does not wait for the time it would have given them."""

    async def work() -> None:
        router = make_router(World(), tmp_path, gateway=Gateway(drain_s=10 * DEADLINE_S))
        await routed(router)
        unloading = asyncio.create_task(router.unload(MODEL, force=False))
        while state_of(router) != "draining":
            await router.models[MODEL].wait_changed()
        router.on_end_request(EndRequest("r1"), envelope())
        await unloading
        assert state_of(router) == "unloaded"

    run(work)


def test_end_of_an_older_group_does_not_concern_the_present_one(tmp_path: Path) -> None:
    """It is told late, when the next epoch serves already."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        await routed(router)
        await router.unload(MODEL, force=True)
        assert (await routed(router, "r2")).epoch == 2
        group = router.models[MODEL].group
        router.on_group_down(GroupDown(1, group, 1, "killed", will_restart=False, commanded=False))
        assert state_of(router) == "loaded"

    run(work)


def test_idle_proposal_is_ignored_while_in_use(tmp_path: Path) -> None:
    """The router looks again: a request that came meanwhile wins."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        await routed(router)
        await router.on_unload_idle(UnloadIdle(MODEL, 60), envelope())
        assert state_of(router) == "loaded"
        router.on_end_request(EndRequest("r1"), envelope())
        await router.on_unload_idle(UnloadIdle(MODEL, 60), envelope())
        assert state_of(router) == "unloaded"

    run(work)


def test_restarted_router_keeps_what_a_front_says_is_in_use(tmp_path: Path) -> None:
    """Leases that the one before granted hold a model, until they end or their front dies."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        await routed(router)
        router.on_end_request(EndRequest("r1"), envelope())
        held = [HeldLease(name, MODEL) for name in ("old1", "old2")]
        router.on_held_leases(HeldLeases([*held, HeldLease("x", "no/such")]), envelope())
        router.on_end_request(EndRequest("old1"), envelope())
        await router.on_unload_idle(UnloadIdle(MODEL, 60), envelope())
        assert state_of(router) == "loaded"
        router.on_actor_down(ActorDown(1, "front.0", 1, "", 0, "killed"))
        await router.on_unload_idle(UnloadIdle(MODEL, 60), envelope())
        assert state_of(router) == "unloaded"

    run(work)


def test_no_room_asks_the_evictor_and_unloads_its_victims(tmp_path: Path) -> None:
    """A model that does not fit displaces what the evictor names, once nothing uses it."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        await routed(router, model=OTHER)
        router.on_end_request(EndRequest("r1"), envelope())
        world.used_bytes = 3 * GIB
        world.size_bytes = 2 * GIB
        world.victims = [OTHER]
        await routed(router, "r2")
        assert (state_of(router, OTHER), state_of(router)) == ("unloaded", "loaded")

    run(work)


def test_load_by_name_alone_is_as_the_catalogue_says(tmp_path: Path) -> None:
    """By an operator, a gateway or at the start; how a model is served stands in one place."""

    async def work() -> None:
        world = World()
        entries = [CatalogueModel(id=name, quant="Q8_0") for name in (MODEL, OTHER)]
        defaults = [LoadOptions(model_id=OTHER)]
        router = attached_router(world, tmp_path, Catalogue(models=entries), Settings(), defaults)
        await router.on_start()
        await routed(router, "r1", OTHER)
        await router.load(LoadOptions(model_id=MODEL))
        for name in (MODEL, OTHER):
            assert router.models[name].status().quant == "Q8_0"
        await router.load(LoadOptions(model_id="org/by-hand", quant="Q4_0"))
        await router.load(LoadOptions(model_id="org/by-hand"))
        assert router.models["org/by-hand"].status().quant == "Q4_0"
        await router.on_stop()

    run(work)


def test_model_for_gpus_that_cannot_be_used_is_not_loaded_on_the_cpu(tmp_path: Path) -> None:
    """It is refused with what is to be done, unless the host is configured for its CPU."""

    async def work() -> None:
        world = World()
        world.gpu_fault = "version mismatch: reboot it"
        router = make_router(world, tmp_path)
        with pytest.raises(CudaUnavailable, match="reboot"):
            await router.load(LoadOptions(model_id=MODEL))
        assert world.count(StartGroup) == 0
        router = make_router(world, tmp_path, engine=Engine(device="cpu"))
        await router.load(LoadOptions(model_id=MODEL))

    run(work)


def test_load_with_other_options_is_refused(tmp_path: Path) -> None:
    """The same options join; others must unload first."""

    async def work() -> None:
        router = make_router(World(), tmp_path)
        await router.load(LoadOptions(model_id=MODEL))
        await router.load(LoadOptions(model_id=MODEL))
        with pytest.raises(
            ModelAlreadyLoaded,
            match=r"\(quant default, tensor_parallel 1, devices default\); unload it first",
        ):
            await router.load(LoadOptions(model_id=MODEL, quant="Q8_0"))

    run(work)


def test_no_room_and_no_victim_says_both_numbers(tmp_path: Path) -> None:
    """What does not fit is refused before any process is started."""

    async def work() -> None:
        world = World()
        world.used_bytes = 3 * GIB
        world.size_bytes = 2 * GIB
        router = make_router(world, tmp_path)
        with pytest.raises(
            ModelLoadFailed, match=r"needs 2\.3 GiB \(weights 2\.0 .* 1\.0 GiB are free"
        ):
            await routed(router)
        assert world.count(StartGroup) == 0

    run(work)


def test_room_is_for_what_is_loaded_not_for_the_file(tmp_path: Path) -> None:
    """A model that is quantised at load needs less than its file; the error says what would fit."""

    async def work() -> None:
        world = World()
        world.used_bytes = 3 * GIB
        world.size_bytes = 4 * GIB
        world.weights = WeightBytes(GIB // 2, GIB // 2, GIB // 2)
        for name in ("fits", "full"):
            (tmp_path / name).mkdir()
        await routed(make_router(world, tmp_path / "fits"))
        world.weights = WeightBytes(2 * GIB, 2 * GIB, 4 * GIB, {"q8_0": GIB, "q4_0": GIB // 2})
        with pytest.raises(ModelLoadFailed, match=r'use what would fit: quant = "q4_0"$'):
            await routed(make_router(world, tmp_path / "full"))

    run(work)


def test_another_catalogue_takes_effect_without_a_restart(tmp_path: Path) -> None:
    """New names are known at once, old ones forgotten; what runs goes on."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        await routed(router)
        new = Catalogue(
            models=[CatalogueModel(id="org/new", quant="Q4_0")], aliases={"n": "org/new"}
        )
        router.on_catalogue_changed(CatalogueChanged(new), envelope())
        assert set(router.models) == {MODEL, "org/new"}
        assert (await routed(router, "r2")).model_id == MODEL
        assert (await routed(router, "r3", "n")).model_id == "org/new"
        with pytest.raises(ModelNotFound):
            await routed(router, "r4", "small")
        for request in ("r1", "r2", "r"):
            router.on_end_request(EndRequest(request), envelope())
        await router.unload(MODEL, force=False)
        assert MODEL not in router.models

    run(work)


def test_engine_that_outlived_others_is_started_anew_and_waiters_wait(tmp_path: Path) -> None:
    """Each unload ages the others; recycling ends the age, and a model in use is left alone."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        await routed(router, "r1")
        for number in range(2):
            await routed(router, f"o{number}", OTHER)
            router.on_end_request(EndRequest(f"o{number}"), envelope())
            await router.unload(OTHER, force=False)
        model = router.models[MODEL]
        assert model.status().num_cycles == 2
        epoch = model.epoch
        await router.on_recycle(RecycleModel(MODEL), envelope())
        assert model.epoch == epoch
        router.on_end_request(EndRequest("r1"), envelope())
        recycling = asyncio.create_task(router.on_recycle(RecycleModel(MODEL), envelope()))
        await asyncio.sleep(0)
        assert (await routed(router, "r2")).epoch > epoch
        await recycling
        assert (model.status().num_cycles, model.state) == (0, "loaded")

    run(work)


def test_recycled_model_that_no_catalogue_names_stays(tmp_path: Path) -> None:
    """An operator had brought it; starting its engine anew does not take it away."""

    async def work() -> None:
        router = make_router(World(), tmp_path)
        await router.load(LoadOptions(model_id="org/by-hand"))
        await router.on_recycle(RecycleModel("org/by-hand"), envelope())
        assert state_of(router, "org/by-hand") == "loaded"

    run(work)


def test_policy_of_the_loader_wins_over_the_hosts_catalogue(tmp_path: Path) -> None:
    """Class, time to live and request defaults come with the load."""

    async def work() -> None:
        router = make_router(World(), tmp_path)
        assert router.models[MODEL].status().priority == 100
        policy = ModelPolicy(residency_priority=7, idle_ttl_s=3, defaults={"top_k": 5})
        await router.load(LoadOptions(model_id=MODEL), policy)
        status = router.models[MODEL].status()
        assert (status.priority, status.idle_ttl_s) == (7, 3)
        assert (await routed(router)).defaults == {"top_k": 5}

    run(work)


@pytest.mark.parametrize("model_id", [MODEL, "org/by-hand"])
def test_policy_of_the_loader_outlives_the_router_and_another_catalogue(
    tmp_path: Path, model_id: str
) -> None:
    """A gateway gave it once, with the load; nobody would give it again."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        options = LoadOptions(model_id=model_id)
        await router.load(options)
        policy = ModelPolicy(residency_priority=7, idle_ttl_s=3, defaults={"top_k": 5})
        await router.load(options, policy)
        again = make_router(world, tmp_path)
        await again.on_start()
        entry = CatalogueModel(id=MODEL, residency_priority=20)
        again.on_catalogue_changed(CatalogueChanged(Catalogue(models=[entry])), envelope())
        assert (await routed(again, "r2", model_id)).defaults == {"top_k": 5}
        status = again.models[model_id].status()
        assert (status.priority, status.idle_ttl_s) == (7, 3)
        await again.on_stop()

    run(work)


def test_draining_host_takes_nothing_new_also_after_a_restart(tmp_path: Path) -> None:
    """What runs keeps its lease; off takes requests again."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        await routed(router, "r1")
        router.drain(is_on=True)
        with pytest.raises(NodeDraining) as caught:
            await routed(router, "r2")
        assert caught.value.retry_after_s
        assert list(router.models[MODEL].leases) == ["r1"]
        again = make_router(world, tmp_path)
        assert again.is_draining
        again.drain(is_on=False)
        assert not make_router(world, tmp_path).is_draining

    run(work)


def test_default_model_whose_registry_is_out_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others load meanwhile; it waits as unloaded, not failed, and comes at last."""
    monkeypatch.setattr("actors.router.activation._FIRST_DELAY_S", 0.01)

    async def work() -> None:
        world = World()
        world.resolve_error = RegistryUnreachable("no network")
        router = make_router(world, tmp_path)
        router.default_models = [LoadOptions(model_id=MODEL)]
        await router.on_start()
        model = router.models[MODEL]
        while world.count(ResolveFiles) < 3:
            await model.wait_changed()
        world.resolve_error = None
        while not model.is_in("loaded"):
            await model.wait_changed()
        await router.on_stop()

    run(work)


def test_offered_context_follows_the_engines_speed(tmp_path: Path) -> None:
    """What a leader offers now is what requests are checked against and lists show."""

    async def work() -> None:
        router = make_router(World(), tmp_path)
        before = (await routed(router)).limits
        for context, expected in ((0, before.context), (17, 17), (before.context,) * 2):
            load = LoadReport(MODEL, 0, 0, 0, 1, 0.0, 0.0, 0, 0, 0, 0, context=context)
            router.on_host_report(HostReport("h", "Linux", "6", None, [], [load]), envelope())
            limits = (await routed(router, f"r{context}")).limits
            assert (limits.context, limits.output) == (expected, expected - 1)

    run(work)


def test_load_waits_for_a_busy_model_to_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease wins over an eviction; the newcomer gets its turn when it ends."""
    monkeypatch.setattr("actors.router.room_maker._RECHECK_S", 0.01)

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        await routed(router, "r1", OTHER)
        world.used_bytes, world.size_bytes, world.victims = 3 * GIB, 2 * GIB, [OTHER]
        waiting = asyncio.create_task(routed(router, "r2"))
        while router.models[MODEL].stage != "waiting for room":
            await router.models[MODEL].wait_changed()
        assert state_of(router, OTHER) == "loaded"
        router.on_end_request(EndRequest("r1"), envelope())
        await waiting
        assert (state_of(router, OTHER), state_of(router)) == ("unloaded", "loaded")

    run(work)


def test_load_does_not_wait_for_a_busy_model_of_a_higher_class(tmp_path: Path) -> None:
    """That one stays when its requests have ended."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        await router.load(LoadOptions(model_id=OTHER), ModelPolicy(residency_priority=200))
        await routed(router, "r1", OTHER)
        world.used_bytes, world.size_bytes = 3 * GIB, 2 * GIB
        loading = asyncio.create_task(router.load(LoadOptions(model_id=MODEL)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert loading.done()
        with pytest.raises(InsufficientMemory):
            await loading

    run(work)


@pytest.mark.parametrize("is_freed", [True, False])
def test_load_is_refused_only_after_a_look_at_what_an_unload_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_freed: bool
) -> None:
    """However late the look comes; the first one to come may have begun before the unload."""
    monkeypatch.setattr("actors.router.room_maker._RECHECK_S", 0.01)
    monkeypatch.setattr("actors.router.room_maker._LOOKS_DEADLINE_S", 3600.0)

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        await routed(router, "r1", OTHER)
        router.on_end_request(EndRequest("r1"), envelope())
        await router.unload(OTHER, force=False)
        world.used_bytes, world.size_bytes = 3 * GIB, 2 * GIB
        look = HostReport("h", "Linux", "6", None, [], [])
        waiting = asyncio.create_task(routed(router, "r2"))
        for _ in range(2):
            is_done, _ = await asyncio.wait({waiting}, timeout=0.1)
            assert not is_done
            router.on_host_report(look, envelope())
        if is_freed:
            world.used_bytes = 0
            await waiting
            assert state_of(router) == "loaded"
        else:
            with pytest.raises(ModelLoadFailed, match="are free"):
                await waiting

    run(work)


def test_two_loads_at_once_do_not_count_on_the_same_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second sees what the first will take, although the device does not show it yet."""
    monkeypatch.setattr("actors.router.room_maker._RECHECK_S", 0.01)

    async def work() -> None:
        world = World()
        world.size_bytes = 2 * GIB
        world.loads_by_itself = False
        router = make_router(world, tmp_path)
        first = asyncio.create_task(routed(router, "r1"))
        await world.started.wait()
        second = asyncio.create_task(routed(router, "r2", OTHER))
        while router.models[OTHER].stage != "waiting for room":
            await router.models[OTHER].wait_changed()
        assert world.count(StartGroup) == 1
        world.spawn_up(router.models[MODEL].group, 1)
        await first
        world.loads_by_itself = True
        router.on_end_request(EndRequest("r1"), envelope())
        await second
        assert world.count(StartGroup) == 2

    run(work)


def test_requests_beyond_the_engines_seats_wait_in_turn(tmp_path: Path) -> None:
    """Accounts take turns, the queue is bounded, and who leaves frees its place."""

    async def work() -> None:
        engine = Engine(max_num_seqs=1, max_queue_depth=2)
        router = make_router(World(), tmp_path, engine=engine)

        async def ask(name: str, account: str) -> Routed:
            message = msgspec.structs.replace(route(name), account=account)
            return await router.on_route(message, envelope())

        await ask("g1", "greedy")
        await ask("g2", "greedy")  # one more than runs, so that the engine never idles
        waiting = {
            name: asyncio.create_task(ask(name, account))
            for name, account in (("g3", "greedy"), ("m1", "modest"))
        }
        await asyncio.sleep(0)
        (status, *_) = router.on_list_models(ListModels(), envelope()).models
        assert (status.in_flight, status.queue_depth) == (2, 2)
        with pytest.raises(Overloaded, match=r"engine\.max_queue_depth"):
            await ask("m2", "modest")
        router.on_end_request(EndRequest("g1"), envelope())
        await waiting["m1"]
        assert not waiting["g3"].done()
        router.on_end_request(EndRequest("g3"), envelope())
        with pytest.raises(Cancelled):
            await waiting["g3"]
        assert set(router.models[MODEL].leases) == {"g2", "m1"}

    run(work)


def test_requests_in_the_queue_ask_again_when_the_engine_ends(tmp_path: Path) -> None:
    """They are told that it loads, which their front waits for."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path, engine=Engine(max_num_seqs=1))
        for name in ("r1", "r2"):
            await routed(router, name)
        waiting = asyncio.create_task(router.on_route(route("r3"), envelope()))
        await asyncio.sleep(0)
        assert router.requests.queue_depths() == {MODEL: 1}
        group = router.models[MODEL].group
        router.on_group_down(GroupDown(0, group, 1, "killed", will_restart=True, commanded=False))
        with pytest.raises(ModelLoading):
            await waiting

    run(work)


def test_anonymous_requests_are_shown_by_model(tmp_path: Path) -> None:
    """Only requests without an account count; the series goes with the last request."""

    async def work() -> None:
        world = World()
        router = make_router(world, tmp_path)
        await routed(router)
        await router.on_route(msgspec.structs.replace(route("r2"), account="team"), envelope())

        def shown() -> list[float]:
            router.show_gauges()
            name = "cortex_model_anon_in_flight"
            return [one.value for one in world.gauges if one.metric == name]

        assert shown() == [1]
        router.on_end_request(EndRequest("r1"), envelope())
        assert shown() == [0]
        router.on_end_request(EndRequest("r2"), envelope())
        assert shown() == []

    run(work)


def test_new_router_records_what_a_front_left_while_none_was_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its file waits; one line for each request, with the client's own id."""

    async def work() -> None:
        front = OpenRequests(open_requests_path(tmp_path, "front.0", 1))
        front.begin(OpenRequest("r1", "/v1/messages", MODEL, "here"))
        router = make_router(World(), tmp_path)
        up = ActorUp(1, ActorInfo("front.0", 2, "ready"))
        for _ in range(2):
            router.on_actor_up(up)

    with caplog.at_level("WARNING"):
        run(work)
    (line,) = [record for record in caplog.records if "request.finished" in record.getMessage()]
    assert line.__dict__["cortexd_fields"]["id"] == "r1"
