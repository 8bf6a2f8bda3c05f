"""What a front tells a restarted router of: the leases it holds, here and at nodes."""

from __future__ import annotations

import asyncio

from aiohttp import web

from cortexd.messages import HeldLease, HeldLeases
from tests.actors.front.test_proxy import MODEL as REMOTE
from tests.actors.front.test_proxy import NEURONS, replica, upstream
from tests.doubles.fleet import MODEL
from tests.doubles.front import ServedFront, async_test, served_front
from tests.waiting import DEADLINE_S


def announced(front: ServedFront) -> list[HeldLease]:
    """Let the front announce, and return what it told."""
    before = len(front.fleet.all_sent(HeldLeases))
    front.services.leases.announce()
    told = front.fleet.all_sent(HeldLeases)[before:]
    return [
        lease for message in told if isinstance(message, HeldLeases) for lease in message.leases
    ]


@async_test
async def test_running_local_request_is_announced_until_it_ends() -> None:
    """The lease is the one that was asked for."""
    async with served_front() as front:
        front.fleet.pause_after = 2
        asking = asyncio.create_task(front.chat())
        await asyncio.wait_for(front.fleet.paused.wait(), DEADLINE_S)
        (lease,) = announced(front)
        assert lease.model_id == MODEL
        assert lease.node == ""
        assert {lease.request_id} == front.fleet.open_leases()
        front.fleet.resume()
        assert (await asking)[0] == 200
        assert announced(front) == []


@async_test
async def test_request_at_a_node_is_announced_with_it() -> None:
    """Until the node has answered."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        reached.set()
        await go_on.wait()
        return web.json_response({})

    async with upstream(handler) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url)]
        asking = asyncio.create_task(front.chat(model=REMOTE))
        await asyncio.wait_for(reached.wait(), DEADLINE_S)
        (lease,) = announced(front)
        assert (lease.model_id, lease.node) == (REMOTE, "a")
        go_on.set()
        assert (await asking)[0] == 200
        assert announced(front) == []
