"""Nodes that a front may send requests to without asking the router for each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web

from cortexd.messages import LeaseReport, NodeFailed, Place, RoutedRemote
from tests.actors.front.test_proxy import CHAT, MODEL, NEURONS, Handler, replica, upstream
from tests.doubles.front import ServedFront, async_test, chat_body, parse_events, served_front

EVENTS = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\ndata: [DONE]\n\n'


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


@asynccontextmanager
async def opened(handler: Handler, **gateway: Any) -> AsyncIterator[ServedFront]:
    """Serve a front that has asked for its node and has an idle connection to it."""
    async with upstream(handler) as url, served_front(neurons=NEURONS, **gateway) as front:
        front.fleet.replicas = [open_replica(url)]
        assert (await front.chat(model=MODEL))[0] == 200
        yield front


def streamed(request: web.Request) -> web.StreamResponse:
    """Begin a stream."""
    return web.StreamResponse(headers={"Content-Type": "text/event-stream"})


@async_test
async def test_head_of_a_stream_does_not_wait_for_its_first_event() -> None:
    """A node that has accepted and is silent is seen to have accepted."""
    go_on = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        if b'"stream"' not in await request.read():
            return web.json_response({})
        response = streamed(request)
        await response.prepare(request)
        await go_on.wait()
        await response.write(EVENTS)
        return response

    async with opened(handler) as front:
        body = chat_body(model=MODEL, stream=True)
        async with front.http.post(front.url + CHAT, json=body) as response:
            assert response.status == 200
            go_on.set()
            assert await response.read() == EVENTS


@async_test
async def test_open_node_that_is_slow_to_begin_is_covered_by_keepalives() -> None:
    """The client gets its 200 after the hold, as with any node."""
    go_on = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        if b'"stream"' not in await request.read():
            return web.json_response({})
        await go_on.wait()
        response = streamed(request)
        await response.prepare(request)
        await response.write(EVENTS)
        return response

    async with opened(handler, first_byte_hold_ms=10, keepalive_s=0.02) as front:
        body = chat_body(model=MODEL, stream=True)
        async with front.http.post(front.url + CHAT, json=body) as response:
            assert response.status == 200
            assert await response.content.readline() == b": ping\n"
            go_on.set()
            assert (await response.read()).endswith(EVENTS)


@async_test
async def test_stream_on_a_connection_that_the_node_drops_is_sent_again() -> None:
    """No byte of an answer was received, so the router is asked once more."""
    is_dropping = True

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal is_dropping
        if b'"stream"' not in await request.read():
            return web.json_response({})
        if is_dropping:
            is_dropping = False
            assert request.transport is not None
            request.transport.abort()
            await asyncio.Event().wait()  # until it is cancelled
        response = streamed(request)
        await response.prepare(request)
        await response.write(EVENTS)
        return response

    async with opened(handler) as front:
        assert await front.stream(CHAT, chat_body(model=MODEL, stream=True)) == parse_events(EVENTS)
        _, record = await front.fleet.wait_for_finished(2)
        assert (record.status, record.num_retries) == (200, 1)


@async_test
async def test_refusal_of_an_open_node_keeps_its_status() -> None:
    """A stream that never began is answered as a whole."""

    async def handler(request: web.Request) -> web.StreamResponse:
        is_stream = b'"stream"' in await request.read()
        error = {"error": {"message": "too long", "type": "invalid_request_error"}}
        return web.json_response(error if is_stream else {}, status=400 if is_stream else 200)

    async with opened(handler) as front:
        assert (await front.chat(model=MODEL, stream=True))[0] == 400
