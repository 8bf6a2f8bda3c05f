"""Sleep instead of an unload: the router and the evictor over scripted GPU engines."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from actors.router.router import Router
from cortexd.errors import InsufficientMemory, InvalidRequest, ModelLoading, ServiceUnavailable
from cortexd.messages import (
    ActorUp,
    EndRequest,
    ListModels,
    ModelList,
    SleepModel,
    StartGroup,
    StopGroup,
    UnloadIdle,
    WakeModel,
)
from cortexd.messages.control import ActorInfo
from cortexd.settings import Eviction, Settings
from tests.doubles.gpu_world import GpuWorld
from tests.doubles.router_world import (
    GIB,
    MODEL,
    OTHER,
    envelope,
    make_router,
    route,
    routed,
    run,
    state_of,
)


async def both_loaded_in_turn(router: Router) -> None:
    """Load OTHER, let it be idle, then load MODEL, for which there is no room beside it."""
    await routed(router, "first", OTHER)
    router.on_end_request(EndRequest("first"), envelope())
    await routed(router, "second")
    router.on_end_request(EndRequest("second"), envelope())


def evictions(world: GpuWorld) -> list[str]:
    """Return the reasons that were counted."""
    return [one.labels[-1] for one in world.measured if one.metric == "cortex_evictions_total"]


def test_displaced_model_sleeps_and_wakes_for_its_next_request(tmp_path: Path) -> None:
    """Both swap without a second load; the state is shown, and counted."""

    async def work() -> None:
        world = GpuWorld(tmp_path)
        world.foreign_bytes = 3 * GIB
        router = make_router(world, tmp_path)
        await both_loaded_in_turn(router)
        assert (state_of(router, OTHER), state_of(router)) == ("sleeping", "loaded")
        answer = await routed(router, "third", OTHER)
        assert answer.cold_start
        assert (state_of(router, OTHER), state_of(router)) == ("loaded", "sleeping")
        assert world.count(StartGroup) == 2
        assert world.count(StopGroup) == 0
        assert evictions(world) == ["sleep", "sleep"]
        results = [one.labels for one in world.measured if one.metric == "cortex_model_loads_total"]
        assert [labels[-1] for labels in results] == ["loaded", "loaded", "woken"]
        stages = [one for one in world.measured if one.metric == "cortex_model_load_seconds"]
        assert [one.labels[0] for one in stages if one.labels[-1] == "wake"] == [OTHER]

    run(work)


@pytest.mark.parametrize("host_free_bytes", [None, 5 * GIB])
def test_displaced_model_is_unloaded_where_the_host_has_no_room(
    tmp_path: Path, host_free_bytes: int | None
) -> None:
    """As before: its processes end."""

    async def work() -> None:
        world = GpuWorld(tmp_path)
        world.foreign_bytes = 3 * GIB
        world.host_free_bytes = host_free_bytes
        router = make_router(world, tmp_path)
        await both_loaded_in_turn(router)
        assert (state_of(router, OTHER), state_of(router)) == ("unloaded", "loaded")
        assert (world.count(SleepModel), evictions(world)) == (0, ["lru"])

    run(work)


def test_victim_whose_engine_refuses_to_sleep_is_unloaded(tmp_path: Path) -> None:
    """The engine looks at the host's memory once more, and knows better."""

    async def work() -> None:
        world = GpuWorld(tmp_path)
        world.foreign_bytes = 3 * GIB
        world.sleep_error = InsufficientMemory("the host has no room")
        router = make_router(world, tmp_path)
        await both_loaded_in_turn(router)
        assert (state_of(router, OTHER), evictions(world)) == ("unloaded", ["lru"])

    run(work)


def test_fifty_requests_for_a_sleeping_model_wake_it_once(tmp_path: Path) -> None:
    """Those that do not wait are told that it is loading, and for how long."""

    async def work() -> None:
        world = GpuWorld(tmp_path)
        router = make_router(world, tmp_path)
        await routed(router)
        router.on_end_request(EndRequest("r1"), envelope())
        await router.on_sleep(SleepModel("small"), envelope())
        assert (state_of(router), world.awake) == ("sleeping", set())
        world.may_wake.clear()
        with pytest.raises(ModelLoading) as caught:
            await router.on_route(route(wait=False), envelope())
        assert caught.value.retry_after_s == 1.0
        waiting = [asyncio.create_task(routed(router, f"w{n}")) for n in range(50)]
        await world.is_waking.wait()
        world.may_wake.set()
        await asyncio.gather(*waiting)
        assert (world.count(WakeModel), world.count(StartGroup)) == (1, 1)
        assert router.models[MODEL].status().in_flight == 50

    run(work)


def test_model_that_cannot_wake_is_loaded_anew(tmp_path: Path) -> None:
    """The request that woke it is answered by the new group."""

    async def work() -> None:
        world = GpuWorld(tmp_path)
        world.wake_error = InsufficientMemory("no room for a cache of that size")
        router = make_router(world, tmp_path)
        first = await routed(router)
        router.on_end_request(EndRequest("r1"), envelope())
        await router.on_sleep(SleepModel(MODEL), envelope())
        second = await routed(router, "r2")
        assert second.epoch == first.epoch + 1
        assert (world.count(StopGroup), world.count(StartGroup)) == (1, 2)
        assert state_of(router) == "loaded"

    run(work)


def test_sleep_by_hand_is_refused_in_use_and_as_the_engine_says(tmp_path: Path) -> None:
    """The model runs on."""

    async def work() -> None:
        world = GpuWorld(tmp_path)
        router = make_router(world, tmp_path)
        await routed(router)
        with pytest.raises(ServiceUnavailable, match="answers 1 requests"):
            await router.on_sleep(SleepModel(MODEL), envelope())
        router.on_end_request(EndRequest("r1"), envelope())
        world.sleep_error = InvalidRequest("it runs on the cpu")
        with pytest.raises(InvalidRequest, match="on the cpu"):
            await router.on_sleep(SleepModel(MODEL), envelope())
        assert state_of(router) == "loaded"
        world.sleep_error = None
        await router.on_sleep(SleepModel(MODEL), envelope())
        await router.on_wake(WakeModel(MODEL), envelope())
        assert state_of(router) == "loaded"
        await router.on_sleep(SleepModel(MODEL), envelope())
        await router.unload(MODEL, force=False)
        assert (state_of(router), world.asleep) == ("unloaded", set())

    run(work)


def test_idle_model_sleeps_and_is_unloaded_when_it_has_slept_enough(tmp_path: Path) -> None:
    """The evictor watches both; it says why."""

    async def work() -> None:
        eviction = Eviction(idle_ttl_s=0.05, sleep_ttl_s=0.05)
        world = GpuWorld(tmp_path, Settings(eviction=eviction))
        router = make_router(world, tmp_path)
        await routed(router)
        router.on_end_request(EndRequest("r1"), envelope())
        await world.evictor.on_start()
        model = router.models[MODEL]
        while not model.is_in("unloaded"):
            await model.wait_changed()
        await world.evictor.on_stop()
        words = [(one.reason, one.may_sleep) for one in world.asked if isinstance(one, UnloadIdle)]
        assert (words[0], words[-1]) == (("idle", True), ("asleep", False))
        assert evictions(world) == ["sleep", "asleep"]

    run(work)


def test_restarted_router_finds_the_model_asleep(tmp_path: Path) -> None:
    """And wakes it for the next request."""

    async def work() -> None:
        world = GpuWorld(tmp_path)
        router = make_router(world, tmp_path)
        await routed(router)
        router.on_end_request(EndRequest("r1"), envelope())
        await router.on_sleep(SleepModel(MODEL), envelope())
        group = router.models[MODEL].group
        info = ActorInfo(f"{group}/0", 1, "ready", group=group, epoch=1, rank=0)
        world.peers.apply(ActorUp(world.peers.sequence + 1, info))
        later = make_router(world, tmp_path)
        await later.on_start()
        model = later.models[MODEL]
        while not model.is_in("sleeping"):
            await model.wait_changed()
        assert (await routed(later, "r2")).epoch == 1
        listed = later.on_list_models(ListModels(), envelope())
        assert isinstance(listed, ModelList)
        await later.on_stop()

    run(work)
