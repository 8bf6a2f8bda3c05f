"""Requests that another node serves: over real sockets, with the router played by a double."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from actors.front import node_connection
from actors.front.relayed import RelayedStream
from cortexd.errors import ModelNotFeasible
from cortexd.messages import (
    EndRequest,
    Loading,
    NodeFailed,
    Place,
    QueryNode,
    RequestFinished,
    RoutedRemote,
)
from cortexd.settings import NeuronEntry
from tests.doubles.certificate import serving_context, write_certificate
from tests.doubles.front import ServedFront, async_test, chat_body, parse_events, served_front
from tests.waiting import DEADLINE_S

MODEL = "org/remote"
NEURONS = [NeuronEntry(name="a", endpoint="http://a"), NeuronEntry(name="b", endpoint="http://b")]
CHAT = "/v1/chat/completions"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def upstream(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Serve a handler on all paths; yield the base URL."""
    app = web.Application(client_max_size=2**24)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    address = runner.addresses[0]
    try:
        yield f"http{'s' if tls else ''}://{address[0]}:{address[1]}"
    finally:
        await runner.cleanup()


def replica(node: str, url: str, kind: Any = "cortex", model: str = MODEL) -> RoutedRemote:
    """A place where the model runs."""
    return RoutedRemote(node, kind, url, model, 1)


async def node_b(request: web.Request) -> web.Response:
    """Answer as the other node."""
    return web.json_response({"node": "b"})


def silent(closed: asyncio.Event) -> Handler:
    """Return a handler that accepts and never answers; `closed` says that it was given up."""

    async def handler(request: web.Request) -> web.Response:
        try:
            await asyncio.Event().wait()
        finally:
            closed.set()
        raise AssertionError("it is cancelled")

    return handler


async def finished(front: ServedFront) -> RequestFinished:
    """Return the record of the only request."""
    (record,) = await front.fleet.wait_for_finished()
    return record


@async_test
async def test_local_models_are_served_here_without_a_detour() -> None:
    """A host with neurons answers for its own models itself."""
    async with served_front(neurons=NEURONS) as front:
        status, body, _ = await front.chat()
        assert (status, body["choices"][0]["message"]["content"]) == (200, "Hello, world!")
        assert (await finished(front)).node == front.services.node


@async_test
async def test_answer_and_record_are_the_nodes() -> None:
    """Body, status and foreign headers pass; hop-by-hop ones do not; usage is recorded."""
    seen: list[tuple[bytes, dict[str, str]]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append((await request.read(), dict(request.headers)))
        answer = b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}'
        return web.Response(body=answer, headers={"X-Engine": "e1", "x-request-id": "theirs"})

    async with upstream(handler) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url)]
        sent = msgspec.json.encode(chat_body(model=MODEL, unknown_knob=[1, None]))
        headers = {"Connection": "keep-alive, X-Hop", "X-Hop": "1", "X-Team": "t"}
        status, body, answered = await front.post(CHAT, sent, headers=headers)
        assert (status, body["usage"]["prompt_tokens"]) == (200, 5)
        assert answered["X-Engine"] == "e1"
        assert answered.getall("x-request-id") != ["theirs"]
        ((received, received_headers),) = seen
        assert received == sent
        assert received_headers["X-Team"] == "t"
        assert "X-Hop" not in received_headers
        record = await finished(front)
        assert (record.node, record.model, record.status) == ("a", MODEL, 200)
        assert (record.prompt_tokens, record.completion_tokens) == (5, 2)


@async_test
async def test_refused_connection_is_retried_on_another_replica() -> None:
    """The router hears of the node, the client of nothing."""
    async with upstream(node_b) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", "http://127.0.0.1:1"), replica("b", url)]
        status, body, _ = await front.chat(model=MODEL)
        assert (status, body) == (200, {"node": "b"})
        assert [failed.node for failed in front.fleet.all_sent(NodeFailed)] == ["a"]  # type: ignore[attr-defined]
        front.fleet.replicas.pop()
        status, body, headers = await front.chat(model=MODEL)
        assert (status, body["error"]["code"]) == (503, "no_healthy_node")
        assert headers["Retry-After"] == "5"


@async_test
async def test_connection_closed_before_the_head_is_tried_once_more() -> None:
    """A node that had merely closed an idle connection serves the second try."""
    tries = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal tries
        tries += 1
        if tries % 3:
            assert request.transport is not None
            request.transport.close()
        return web.json_response({"tries": tries})

    async with upstream(handler) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url)]
        status, body, _ = await front.chat(model=MODEL)
        assert (status, body["error"]["code"], tries) == (502, "upstream_unavailable", 2)
        status, body, _ = await front.chat(model=MODEL)
        assert (status, body["tries"]) == (200, 3)


@async_test
async def test_answer_without_end_does_not_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A whole answer has a bound; past it the node's connection is closed and the client told."""
    monkeypatch.setattr(node_connection, "MAX_BODY_BYTES", 2**20)
    closed = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(bytes(2**16))
        finally:
            closed.set()

    async with upstream(handler) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url)]
        status, body, _ = await front.post(CHAT, chat_body(model=MODEL))
        assert (status, body["error"]["code"]) == (502, "upstream_interrupted")
        assert "body is over 1048576 bytes" in body["error"]["message"]
        await asyncio.wait_for(closed.wait(), DEADLINE_S)


@async_test
async def test_node_behind_tls_is_checked_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unary and stream over https, on one connection; a certificate nobody trusts is told of."""

    async def handler(request: web.Request) -> web.StreamResponse:
        if not (await request.json()).get("stream"):
            assert request.transport is not None
            peer = request.transport.get_extra_info("peername")
            return web.json_response({"peer": list(peer)})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(5):
            await response.write(b'data: {"n": %d}\n\n' % number)
            await asyncio.sleep(0.002)
        await response.write(b"data: [DONE]\n\n")
        return response

    tls = serving_context(tmp_path)
    async with upstream(handler, tls) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url)]
        status, body, _ = await front.post(CHAT, chat_body(model=MODEL))
        assert (status, body["error"]["code"]) == (503, "no_healthy_node")
        (failed,) = front.fleet.all_sent(NodeFailed)
        assert isinstance(failed, NodeFailed)
        assert "certificate verify failed" in failed.reason
    monkeypatch.setenv("SSL_CERT_FILE", str(write_certificate(tmp_path)))
    async with upstream(handler, tls) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url)]
        answers = [await front.post(CHAT, chat_body(model=MODEL)) for _ in range(2)]
        assert [status for status, _, _ in answers] == [200, 200]
        assert answers[0][1] == answers[1][1], "the connection is kept"
        events = await front.stream(CHAT, chat_body(model=MODEL, stream=True))
        assert events == [*({"n": number} for number in range(5)), "[DONE]"]


@async_test
async def test_client_that_leaves_closes_the_nodes_socket() -> None:
    """The node sees the end of its stream at once, and the lease is over."""
    closed = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices":[]}\n\n')
        try:
            await asyncio.Event().wait()
        finally:
            closed.set()
        return response

    async with upstream(handler) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url)]
        body = chat_body(model=MODEL, stream=True)
        async with front.http.post(front.url + CHAT, json=body) as response:
            assert await response.content.readline() == b'data: {"choices":[]}\n'
        async with asyncio.timeout(DEADLINE_S):
            await closed.wait()
        await front.fleet.wait_for(EndRequest)
        record = await finished(front)
        assert (record.status, record.error_code) == (499, "request_cancelled")


@async_test
async def test_clients_that_leave_a_busy_stream_disturb_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What the node still sends for them is dropped, without a word in the log."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b'data: {"choices":[]}\n\n' * 20)
                await asyncio.sleep(0)
        return response

    async with upstream(handler) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url)]
        sent = msgspec.json.encode(chat_body(model=MODEL, stream=True))

        async def leave() -> None:
            async with front.http.post(front.url + CHAT, data=sent) as response:
                await response.content.readany()
                response.close()

        for _ in range(5):
            await asyncio.gather(*(leave() for _ in range(8)))
        await front.fleet.wait_for_finished(40)
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == []


@async_test
async def test_fault_of_ours_in_mid_stream_is_its_last_event(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is told in the stream that has begun, and the log has the cause."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices":[]}\n\n')
        return response

    def fail(self: RelayedStream, chunk: bytes) -> bytes:
        raise ZeroDivisionError("nobody foresaw this")

    monkeypatch.setattr(RelayedStream, "push", fail)
    async with upstream(handler) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url)]
        events = await front.stream(CHAT, chat_body(model=MODEL, stream=True))
        assert events[-1]["error"]["code"] == "internal_error"
        assert (await finished(front)).error_code == "internal_error"
        assert "nobody foresaw this" in caplog.text


@async_test
async def test_silent_node_and_loading_model_are_filled_with_keepalives() -> None:
    """The client gets its 200 after the hold, comments, then the node's bytes as they are."""
    events = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\ndata: [DONE]\n\n'
    go_on = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(events[:20])
        await go_on.wait()
        await response.write(events[20:])
        return response

    async with (
        upstream(handler) as url,
        served_front(neurons=NEURONS, first_byte_hold_ms=10, keepalive_s=0.02) as front,
    ):
        front.fleet.replicas = [replica("a", url)]
        front.fleet.placing.clear()
        body = chat_body(model=MODEL, stream=True)
        async with front.http.post(front.url + CHAT, json=body) as response:
            assert response.status == 200
            for _ in range(2):
                assert await response.content.readline() == b": ping\n"
            front.fleet.placing.set()
            go_on.set()
            rest = await response.read()
        assert parse_events(rest)[-1] == "[DONE]"
        assert rest.endswith(events)


@async_test
async def test_failures_after_the_hold_are_error_events() -> None:
    """A refusal, or the node's error, comes in band once the 200 is out."""

    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "full", "code": "queue_full"}}, status=429)

    async with (
        upstream(handler) as url,
        served_front(neurons=NEURONS, first_byte_hold_ms=1, keepalive_s=0.02) as front,
    ):
        front.fleet.replicas = [replica("a", url)]
        for refusal, code in ((None, "queue_full"), (ModelNotFeasible("no"), "model_not_feasible")):
            front.fleet.load_error = refusal
            front.fleet.placing.clear()
            body = chat_body(model=MODEL, stream=True)
            async with front.http.post(front.url + CHAT, json=body) as response:
                await response.content.readline()
                front.fleet.placing.set()
                events = parse_events(await response.read())
            assert events[-1]["error"]["code"] == code


@async_test
async def test_error_within_the_hold_keeps_its_status() -> None:
    """A stream's quick failure is the node's own answer."""

    async def handler(request: web.Request) -> web.Response:
        error = {"error": {"message": "full", "code": "queue_full"}}
        return web.json_response(error, status=429, headers={"Retry-After": "3"})

    async with (
        upstream(handler) as url,
        served_front(neurons=NEURONS, first_byte_hold_ms=5000) as front,
    ):
        front.fleet.replicas = [replica("a", url)]
        status, body, headers = await front.chat(model=MODEL, stream=True)
        assert (status, body["error"]["message"], headers["Retry-After"]) == (429, "full", "3")
        assert (await finished(front)).error_code == "queue_full"


@async_test
async def test_neuron_listener_hands_nothing_on() -> None:
    """Requests cannot go in circles: a neuron serves what it has."""
    async with served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", "http://127.0.0.1:1")]
        body = chat_body(model=MODEL)
        async with front.http.post(front.neuron_url + CHAT, json=body) as response:
            assert response.status == 404


@async_test
async def test_node_on_its_way_out_sends_the_request_elsewhere() -> None:
    """A refusal is no answer; any other 503 is the client's."""
    code = "node_draining"

    async def leaving(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "no", "code": code}}, status=503)

    async with (
        upstream(leaving) as one,
        upstream(node_b) as two,
        served_front(neurons=NEURONS) as front,
    ):
        front.fleet.replicas = [replica("a", one), replica("b", two)]
        assert (await front.chat(model=MODEL))[:2] == (200, {"node": "b"})
        code = "model_loading"
        status, body, _ = await front.chat(model=MODEL)
        assert (status, body["error"]["code"]) == (503, "model_loading")


@async_test
async def test_node_that_accepts_and_is_gone_is_left_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A unary answer may take long, as long as the polls say that its node lives."""
    monkeypatch.setattr("actors.front.node_watch.CHECK_PERIOD_S", 0.05)
    closed = asyncio.Event()
    async with (
        upstream(silent(closed)) as one,
        upstream(node_b) as two,
        served_front(neurons=NEURONS) as front,
    ):
        front.fleet.replicas = [replica("a", one), replica("b", two)]
        asking = asyncio.create_task(front.chat(model=MODEL))
        await front.fleet.wait_for(QueryNode, 2)
        assert not asking.done()
        front.fleet.lost_nodes.add("a")
        assert (await asking)[:2] == (200, {"node": "b"})
        await closed.wait()
        (failed,) = front.fleet.all_sent(NodeFailed)
        assert isinstance(failed, NodeFailed)
        assert (failed.node, failed.is_refusing) == ("a", False)


@async_test
async def test_node_that_answers_polls_and_works_on_nothing_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As long as the polls say that something runs there, however long; not longer."""
    monkeypatch.setattr("actors.front.node_watch.CHECK_PERIOD_S", 0.02)
    monkeypatch.setattr("actors.front.node_watch.HEAD_TIMEOUT_S", 0.05)
    closed = asyncio.Event()
    async with (
        upstream(silent(closed)) as one,
        upstream(node_b) as two,
        served_front(neurons=NEURONS) as front,
    ):
        front.fleet.replicas = [replica("a", one), replica("b", two)]
        # The other one is not given up either, however late a busy machine lets it answer.
        front.fleet.in_flight.update(a=1, b=1)
        asking = asyncio.create_task(front.chat(model=MODEL))
        await front.fleet.wait_for(QueryNode, 8)
        assert not asking.done()
        front.fleet.in_flight["a"] = 0
        assert (await asking)[:2] == (200, {"node": "b"})
        await closed.wait()
        (failed,) = front.fleet.all_sent(NodeFailed)
        assert isinstance(failed, NodeFailed)
        assert "does not work on it" in failed.reason
        assert (await finished(front)).num_retries == 1


@async_test
async def test_conversation_is_told_to_the_router_and_the_ending_too() -> None:
    """The chain of the prompt goes along; a proper answer and a fault are told apart."""
    status_code = 200

    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "x"}}, status=status_code)

    async with upstream(handler) as url, served_front(neurons=NEURONS) as front:
        front.fleet.replicas = [replica("a", url)]
        for code in (200, 429, 500):
            status_code = code
            await front.chat(model=MODEL)
        places = [body for body in front.fleet.all_sent(Place) if isinstance(body, Place)]
        assert places[0].prefix
        assert {tuple(place.prefix) for place in places} == {tuple(places[0].prefix)}
        ends = await front.fleet.wait_for(EndRequest, 3)
        assert [end.is_answered for end in ends if isinstance(end, EndRequest)] == [
            True,
            True,
            False,
        ]


@async_test
async def test_waiting_stream_is_told_how_far_the_load_is() -> None:
    """As a comment line, in which nothing of a node's words can pass for an event."""
    events = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\ndata: [DONE]\n\n'

    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=events, headers={"Content-Type": "text/event-stream"})

    async with (
        upstream(handler) as url,
        served_front(neurons=NEURONS, first_byte_hold_ms=10, keepalive_s=0.02) as front,
    ):
        front.fleet.replicas = [replica("a", url)]
        front.fleet.loading = Loading("weights\n\ndata: x", 0.41, 11.2)
        front.fleet.placing.clear()
        body = chat_body(model=MODEL, stream=True)
        async with front.http.post(front.url + CHAT, json=body) as response:
            line = await response.content.readline()
            assert line == b": loading stage=weightsdata: x 41% eta=11s\n"
            front.fleet.placing.set()
            assert (await response.read()).endswith(events)
