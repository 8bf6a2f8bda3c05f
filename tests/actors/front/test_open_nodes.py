"""Nodes that a front may send requests to without asking the router for each."""

from __future__ import annotations

import time

import msgspec
from aiohttp import web

from cortexd.messages import LeaseReport, NodeFailed, Place, RoutedRemote
from tests.actors.front.test_proxy import MODEL, NEURONS, replica, upstream
from tests.doubles.front import ServedFront, async_test, served_front


def open_replica(url: str, for_s: float = 60.0) -> RoutedRemote:
    """A node that the router leaves open."""
    routed = replica("a", url, "openai")
    return msgspec.structs.replace(routed, open_until=time.monotonic() + for_s)


async def reports(front: ServedFront) -> tuple[list[str], dict[str, bool]]:
    """Return the leases that were begun without asking, and those that ended: if answered."""
    front.services.leases.flush()
    begun, ended = [], {}
    for message in front.fleet.all_sent(LeaseReport):
        assert isinstance(message, LeaseReport)
        begun += [lease.request_id for lease in message.begun]
        ended |= {one.request_id: one.is_answered for one in message.ended}
    return begun, ended


async def answer(request: web.Request) -> web.Response:
    """Answer anything."""
    return web.json_response({})


@async_test
async def test_open_node_is_asked_for_once() -> None:
    """What follows goes there at once, and the router is told all of it."""
    async with upstream(answer) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [open_replica(url)]
        for _ in range(3):
            assert (await front.chat(model=MODEL))[0] == 200
        assert len(front.fleet.all_sent(Place)) == 1
        begun, ended = await reports(front)
        assert len(begun) == 2
        assert set(begun) < ended.keys()
        assert list(ended.values()) == [True] * 3


@async_test
async def test_time_of_an_open_node_ends() -> None:
    """Then the router is asked again."""
    async with upstream(answer) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [open_replica(url, for_s=-1.0)]
        for _ in range(2):
            assert (await front.chat(model=MODEL))[0] == 200
        assert len(front.fleet.all_sent(Place)) == 2


@async_test
async def test_failure_closes_an_open_node() -> None:
    """The router hears first of those that went well, then of the failure, then the question."""
    is_down = False

    async def handler(request: web.Request) -> web.Response:
        return web.json_response({}, status=500 if is_down else 200)

    async with upstream(handler) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [open_replica(url)]
        for _ in range(2):
            assert (await front.chat(model=MODEL))[0] == 200
        is_down = True
        assert (await front.chat(model=MODEL))[0] == 500
        kinds = [type(message) for _, message in front.fleet.sent]
        assert kinds.index(LeaseReport) < kinds.index(NodeFailed)
        assert (await front.chat(model=MODEL))[0] == 500
        assert len(front.fleet.all_sent(Place)) == 2
