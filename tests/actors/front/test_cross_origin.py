"""Browsers: which pages of other origins may use the API, on every way an answer is written."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web

from tests.actors.front.test_proxy import CHAT, NEURONS, replica, upstream
from tests.actors.front.test_proxy import MODEL as REMOTE
from tests.doubles.front import async_test, chat_body, served_front

PAGE = "http://localhost:3000"
QUESTION = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
ALLOW = "Access-Control-Allow-Origin"


async def asked(front: Any, origin: str, **headers: str) -> Any:
    """Return the answer to a browser's question, without its body."""
    url = front.url + CHAT
    async with front.http.options(url, headers={"Origin": origin, **QUESTION}) as response:
        text = await response.text()
        return response.status, response.headers, text


@async_test
async def test_page_that_is_named_may_ask_and_read_every_kind_of_answer() -> None:
    """The question, whole answers, streams, errors and lists tell the browser that it may."""
    async with served_front(allowed_origins=["https://other.example", PAGE]) as front:
        status, headers, _ = await asked(front, PAGE)
        assert (status, headers[ALLOW], headers["Vary"]) == (204, PAGE, "Origin")
        assert "POST" in headers["Access-Control-Allow-Methods"]
        assert headers["Access-Control-Allow-Headers"] == "authorization,content-type"
        for path, body in (
            (CHAT, chat_body()),
            (CHAT, chat_body(stream=True)),
            (CHAT, chat_body(max_tokens=0)),
            ("/v1/nothing", {}),
        ):
            request = front.http.post(front.url + path, json=body, headers={"Origin": PAGE})
            async with request as response:
                await response.read()
                assert response.headers.getall(ALLOW) == [PAGE]
                assert "x-request-id" in response.headers["Access-Control-Expose-Headers"]
        async with front.http.get(front.url + "/v1/models", headers={"Origin": PAGE}) as response:
            assert response.headers[ALLOW] == PAGE


@pytest.mark.parametrize("allowed", [[], ["https://other.example"]])
@async_test
async def test_other_pages_get_nothing_that_a_browser_would_hand_them(allowed: list[str]) -> None:
    """By default no page; the refusal names the option to set."""
    async with served_front(allowed_origins=allowed) as front:
        status, headers, text = await asked(front, PAGE)
        assert status == 405
        assert ALLOW not in headers
        assert "gateway.allowed_origins" in text
        url = front.url + CHAT
        async with front.http.post(url, json=chat_body(), headers={"Origin": PAGE}) as response:
            assert ALLOW not in response.headers


@async_test
async def test_any_page_may_where_the_star_stands_and_programs_see_nothing_of_it() -> None:
    """`["*"]` is answered to all that name an origin, also on the neuron's listener to none."""
    async with served_front(allowed_origins=["*"]) as front:
        assert (await asked(front, "null"))[1][ALLOW] == "*"
        _, _, headers = await front.chat()
        assert ALLOW not in headers
        neuron = front.http.get(front.neuron_url + "/version", headers={"Origin": PAGE})
        async with neuron as response:
            assert ALLOW not in response.headers


@async_test
async def test_what_a_node_says_of_origins_is_not_passed_on() -> None:
    """The gateway's own rule is the only one, said once."""

    async def node(request: web.Request) -> web.Response:
        return web.json_response({"ok": True}, headers={ALLOW: "*"})

    for allowed, expected in (([], []), ([PAGE], [PAGE])):
        async with (
            upstream(node) as url,
            served_front(neurons=NEURONS, allowed_origins=allowed) as front,
        ):
            front.fleet.replicas = [replica("a", url)]
            body = {"model": REMOTE, "messages": []}
            request = front.http.post(front.url + CHAT, json=body, headers={"Origin": PAGE})
            async with request as response:
                assert response.status == 200
                assert response.headers.getall(ALLOW, []) == expected
