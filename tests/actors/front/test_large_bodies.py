"""Work on a large body is done aside, so that no other stream waits for it."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import pytest
from aiohttp import web

from actors.front import dispatch, entitlement
from actors.front.body import aside
from actors.front.chat import ChatDialect
from actors.front.model_value import with_model
from cortexd.token_estimate import estimate_request
from tests.actors.front.test_keys import bearer, key
from tests.actors.front.test_open_nodes import open_replica
from tests.actors.front.test_proxy import MODEL as REMOTE
from tests.actors.front.test_proxy import NEURONS, upstream
from tests.doubles.front import async_test, chat_body, served_front

CHAT = "/v1/chat/completions"
LARGE = "word " * 100_000


@async_test
async def test_only_a_large_body_takes_a_thread() -> None:
    """A small one is done before a thread had begun; errors come as they are."""

    def where(body: bytes) -> int:
        return threading.get_ident()

    assert await aside(b"small", where) == threading.get_ident()
    assert await aside(LARGE.encode(), where) != threading.get_ident()
    with pytest.raises(UnicodeDecodeError):
        await aside(b"\xff" * len(LARGE), lambda body: body.decode())


@async_test
async def test_large_requests_are_read_counted_and_changed_aside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here, and on their way to a node, an open one too, that gets them whole."""
    threads: dict[str, set[int]] = {}

    def noting(name: str, work: Any) -> Any:
        def run(*args: Any) -> Any:
            threads.setdefault(name, set()).add(threading.get_ident())
            return work(*args)

        return run

    monkeypatch.setattr(ChatDialect, "parse", noting("parse", ChatDialect.parse))
    monkeypatch.setattr(entitlement, "estimate_request", noting("estimate", estimate_request))
    monkeypatch.setattr(dispatch, "with_model", noting("address", with_model))
    bodies: list[Any] = []

    async def handler(request: web.Request) -> web.Response:
        bodies.append(msgspec.json.decode(await request.read()))
        return web.json_response({})

    for keys in ([key("k")], None):
        async with upstream(handler) as url, served_front(neurons=NEURONS, keys=keys) as front:
            front.fleet.context = len(LARGE) + 100
            status, _, _ = await front.post(CHAT, chat_body(LARGE), headers=bearer("k"))
            assert status == 200
            node = msgspec.structs.replace(open_replica(url), model_id="org/behind")
            front.fleet.replicas = [node]
            for _ in range(2):
                body = chat_body(LARGE, model=REMOTE)
                assert (await front.post(CHAT, body, headers=bearer("k")))[0] == 200
    assert bodies == [chat_body(LARGE, model="org/behind")] * 4
    assert threads.keys() == {"parse", "estimate", "address"}
    assert not any(threading.get_ident() in seen for seen in threads.values())
