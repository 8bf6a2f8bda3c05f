"""Keys and budgets at the HTTP edge: who is let in, to what, and what it costs them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from actors.front.app import Listener
from cortexd.keys import Key, Window, key_digest
from cortexd.settings import NeuronEntry
from tests.actors.front.test_proxy import CHAT, replica, upstream
from tests.actors.front.test_proxy import MODEL as REMOTE
from tests.doubles.fleet import ALIAS, MODEL
from tests.doubles.front import ServedFront, async_test, chat_body, served_front

MESSAGES = "/v1/messages"
_NEURONS = [NeuronEntry(name="a", endpoint="http://a")]


def key(name: str, **fields: Any) -> Key:
    """Return a key whose text is its name."""
    return Key(key_id=name, key_sha256=key_digest(name), **fields)


def bearer(text: str) -> dict[str, str]:
    """Return the header that shows a key."""
    return {"Authorization": f"Bearer {text}"}


def message_body(**fields: Any) -> dict[str, Any]:
    """Return a body of the other dialect."""
    return chat_body(max_tokens=4, **fields)


async def ask(
    front: ServedFront, headers: dict[str, str], path: str = CHAT, **fields: Any
) -> tuple[int, Any, Any]:
    """Ask in the dialect of a path."""
    body = message_body(**fields) if path == MESSAGES else chat_body(**fields)
    return await front.post(path, body, headers=headers)


@async_test
async def test_known_key_is_let_in_however_it_is_shown() -> None:
    """Both headers, any spelling of the scheme; the record says whose request it was."""
    async with served_front(keys=[key("good", account_id="team")]) as front:
        for headers in (bearer("good"), {"Authorization": "bearer  good"}, {"x-api-key": "good"}):
            for path in (CHAT, MESSAGES):
                assert (await ask(front, headers, path))[0] == 200
        record = (await front.fleet.wait_for_finished())[0]
        assert (record.account, record.key_id) == ("team", "good")


@pytest.mark.parametrize("headers", [{}, bearer("bad"), {"x-api-key": ""}, {"Authorization": "x"}])
def test_unknown_key_is_401_in_both_dialects(headers: dict[str, str]) -> None:
    """Nothing is told of models; the body is not even read; one record, one log line."""

    @async_test
    async def run() -> None:
        async with served_front(keys=[key("good")]) as front:
            status, body, answered = await ask(front, headers, model="no/such")
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert body["error"]["type"] == "invalid_request_error"
            assert answered["WWW-Authenticate"] == "Bearer"
            assert "Retry-After" not in answered
            status, body, _ = await ask(front, headers, MESSAGES)
            assert (status, body["type"]) == (401, "error")
            assert body["error"]["type"] == "authentication_error"
            records = await front.fleet.wait_for_finished(2)
            assert [record.status for record in records] == [401, 401]
            assert front.fleet.submits == []

    run()


@async_test
async def test_every_route_but_the_probes_asks_for_a_key() -> None:
    """A route that is added and forgotten here fails this test."""
    open_paths = {"/livez", "/readyz", "/version", "/health", "/"}
    async with served_front(keys=[key("good"), key("gw", gateway=True)]) as front:
        for listener in ("api", "neuron"):
            base = front.url if listener == "api" else front.neuron_url
            for route in Listener(front.services, listener).app.router.routes():
                assert route.resource is not None
                path = route.resource.canonical.replace("{model_id}", "m")
                if path in open_paths - ({"/health"} if listener == "neuron" else set()):
                    continue
                async with front.http.request(route.method, base + path) as response:
                    assert response.status == 401, (listener, route.method, path)


@async_test
async def test_key_opens_only_its_models() -> None:
    """Others are 403 by name, and are not listed."""
    async with served_front(keys=[key("k", models=[ALIAS])]) as front:
        status, body, _ = await ask(front, bearer("k"))
        assert (status, body["error"]["code"]) == (403, "model_not_allowed")
        status, body, _ = await ask(front, bearer("k"), MESSAGES)
        assert (status, body["error"]["type"]) == (403, "permission_error")
        assert (await ask(front, bearer("k"), model=ALIAS))[0] == 200
        async with front.http.get(front.url + "/v1/models", headers=bearer("k")) as response:
            assert [card["id"] for card in (await response.json())["data"]] == [ALIAS]
        async with front.http.get(f"{front.url}/v1/models/{MODEL}", headers=bearer("k")) as found:
            assert found.status == 404
        path = "/v1/messages/count_tokens"
        assert (await front.post(path, chat_body(), headers=bearer("k")))[0] == 403


@async_test
async def test_key_for_some_models_is_not_told_the_names_of_others() -> None:
    """Not even by the hint of a refusal."""
    async with served_front(keys=[key("k", models=["mine/*"]), key("all")]) as front:
        for path in (CHAT, MESSAGES):
            for name, told in (("all", "is not known here"), ("k", "those that this key opens")):
                status, body, _ = await ask(front, bearer(name), path, model="mine/none")
                assert status == 404
                assert told in body["error"]["message"]


@async_test
async def test_open_mode_serves_strangers_and_still_meters_those_it_knows() -> None:
    """Placeholder keys of clients do no harm where keys are optional."""
    async with served_front(keys=[key("k", hard_cap=1)], require_auth=False) as front:
        assert (await ask(front, {}))[0] == 200
        assert (await ask(front, bearer("none")))[0] == 200
        assert (await ask(front, bearer("k")))[0] == 429


@async_test
async def test_keys_that_cannot_be_read_are_503_not_401(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told that a key is bad while nobody knows."""
    monkeypatch.setattr("actors.front.auth._KEYS_GRACE_S", 0.05)
    async with served_front(keys=[]) as front:
        status, body, answered = await ask(front, bearer("k"))
        assert (status, body["error"]["code"]) == (503, "service_unavailable")
        assert answered["Retry-After"] == "5"
        status, body, _ = await ask(front, bearer("k"), MESSAGES)
        assert (status, body["error"]["type"]) == (529, "overloaded_error")


@async_test
async def test_budget_is_reserved_and_settled_to_what_was_used() -> None:
    """The charge is the answer's own usage."""
    async with served_front(keys=[key("k", hard_cap=1000)]) as front:
        status, body, _ = await ask(front, bearer("k"), max_tokens=30)
        assert status == 200
        charge = await front.fleet.wait_for_charge()
        assert charge.prompt_tokens == body["usage"]["prompt_tokens"]
        assert charge.completion_tokens == body["usage"]["completion_tokens"]


@async_test
async def test_used_up_budget_is_429_before_anything_is_loaded() -> None:
    """A balance has no Retry-After; figures say what is left; both dialects."""
    async with served_front(keys=[key("k", hard_cap=20)]) as front:
        status, body, answered = await ask(front, bearer("k"), max_tokens=50)
        error = body["error"]
        assert (status, error["code"], error["type"]) == (429, *["insufficient_quota"] * 2)
        assert (error["limit"], error["remaining"]) == (20, 20)
        assert "Retry-After" not in answered
        body = chat_body(max_tokens=50)
        status, answer, _ = await front.post(MESSAGES, body, headers=bearer("k"))
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        assert front.fleet.submits == []


@async_test
async def test_window_says_when_it_is_over() -> None:
    """`Retry-After` is the window's end, however far it is."""
    window = Window(kind="rolling", seconds=6000)
    async with served_front(keys=[key("k", hard_cap=50, window=window)]) as front:
        assert (await ask(front, bearer("k"), max_tokens=5))[0] == 200
        await front.fleet.wait_for_charge()
        status, body, answered = await ask(front, bearer("k"), max_tokens=30)
        assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 6000 <= int(answered["Retry-After"]) <= 6101
        assert body["error"]["reset_s"] >= 6000


@async_test
async def test_client_that_leaves_pays_for_what_was_produced() -> None:
    """A stream cut in the middle is settled at the tokens so far, not at none, not at all."""
    async with served_front(keys=[key("k", hard_cap=1000)], first_byte_hold_ms=0) as front:
        front.fleet.pause_after = 3
        body = msgspec.json.encode(chat_body(stream=True, max_tokens=50))
        response = await front.http.post(front.url + CHAT, data=body, headers=bearer("k"))
        await front.fleet.paused.wait()
        while b"l" not in await response.content.readline():
            pass
        response.close()
        charge = await front.fleet.wait_for_charge()
        assert charge.prompt_tokens > 0
        assert 0 < charge.completion_tokens <= 3


@async_test
async def test_refused_request_costs_nothing() -> None:
    """Errors before the first token release all that was reserved."""
    async with served_front(keys=[key("k", hard_cap=1000)]) as front:
        assert (await ask(front, bearer("k"), temperature=9))[0] == 400
        assert (await ask(front, bearer("k"), model="no/such"))[0] == 404
        await front.fleet.wait_for_charge(2)
        assert [one.prompt_tokens + one.completion_tokens for one in front.fleet.charges] == [0, 0]


@async_test
async def test_dead_owner_of_the_budgets_is_503_and_its_return_is_not_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fail closed and say so; what ended meanwhile is settled when it is back."""
    monkeypatch.setattr("actors.front.spending._GRACE_S", 0.1)
    async with served_front(keys=[key("k", hard_cap=1000)]) as front:
        front.fleet.incarnations["budgets"] = None
        status, body, answered = await ask(front, bearer("k"))
        assert (status, body["error"]["code"]) == (503, "service_unavailable")
        assert answered["Retry-After"] == "5"
        front.fleet.incarnations["budgets"] = 2
        assert (await ask(front, bearer("k")))[0] == 200
        assert (await front.fleet.wait_for_charge()).completion_tokens > 0


@async_test
async def test_end_is_told_until_it_is_heard() -> None:
    """An owner that dies while a request runs learns of its end from its successor's first word."""
    async with served_front(keys=[key("k", hard_cap=1000)]) as front:
        front.fleet.pause_after = 2
        task = front.http.post(
            front.url + CHAT, data=msgspec.json.encode(chat_body(max_tokens=9)), headers=bearer("k")
        )
        asking = asyncio.ensure_future(task)
        await front.fleet.paused.wait()
        front.fleet.incarnations["budgets"] = None
        front.fleet.resume()
        assert (await asking).status == 200
        assert front.fleet.charges == []
        front.fleet.incarnations["budgets"] = 2
        assert (await front.fleet.wait_for_charge()).completion_tokens == 9


# Other nodes


@async_test
async def test_clients_key_and_claims_never_reach_a_node(tmp_path: Path) -> None:
    """A node sees this gateway's key and the account the gateway knows, or nothing."""
    seen: list[Any] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.headers)
        return web.Response(body=b'{"choices":[],"usage":{"prompt_tokens":5}}')

    secret = tmp_path / "a.key"
    secret.write_text("gw-secret")
    secret.chmod(0o600)
    neurons = [
        NeuronEntry(name="a", endpoint="http://a", key_file=str(secret)),
        NeuronEntry(name="b", endpoint="http://b", kind="openai"),
    ]
    claims = {"x-cortexd-account": "boss", "x-cortexd-key-id": "boss"}
    keys = [key("k", account_id="team")]
    async with upstream(handler) as url, served_front(neurons=neurons, keys=keys) as front:
        for node, kind in (("a", "cortex"), ("b", "openai")):
            front.fleet.replicas = [replica(node, url, kind)]
            headers = bearer("k") | {"x-api-key": "k"} | claims
            assert (await ask(front, headers, model=REMOTE))[0] == 200
        ours, theirs = seen
        assert ours["Authorization"] == "Bearer gw-secret"
        assert (ours["x-cortexd-account"], ours["x-cortexd-key-id"]) == ("team", "k")
        assert not {"authorization", "x-cortexd-account"} & {name.lower() for name in theirs}
        assert not any("x-api-key" in headers for headers in seen)


@async_test
async def test_node_that_refuses_the_gateways_key_is_not_the_clients_fault() -> None:
    """A 401 between the two is a 502 to the client."""

    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=401, body=b'{"error":{"code":"invalid_api_key"}}')

    async with upstream(handler) as url, served_front(neurons=_NEURONS, keys=[key("k")]) as front:
        front.fleet.replicas = [replica("a", url)]
        status, body, _ = await ask(front, bearer("k"), model=REMOTE)
        assert (status, body["error"]["code"]) == (502, "upstream_error")
        assert "key_file" in body["error"]["message"]


@async_test
async def test_answers_of_nodes_are_charged_also_without_usage() -> None:
    """Usage where it is told, counted and estimated where it is not."""
    answer = b'{"choices":[{"message":{"content":"%s"}}]}' % (b"a" * 400)

    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=answer)

    keys = [key("k", hard_cap=100_000)]
    async with upstream(handler) as url, served_front(neurons=_NEURONS, keys=keys) as front:
        front.fleet.replicas = [replica("a", url)]
        assert (await ask(front, bearer("k"), content="b" * 400, model=REMOTE))[0] == 200
        charge = await front.fleet.wait_for_charge()
        assert 100 <= charge.prompt_tokens <= 110
        assert 100 <= charge.completion_tokens <= 110


@async_test
async def test_stream_of_a_node_that_its_client_leaves_is_charged_by_its_events() -> None:
    """Usage rides on the last event, which never comes: the events are counted."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(7):
            await response.write(b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n')
        await asyncio.sleep(60)
        return response

    keys = [key("k", hard_cap=100_000)]
    async with upstream(handler) as url, served_front(neurons=_NEURONS, keys=keys) as front:
        front.fleet.replicas = [replica("a", url)]
        body = msgspec.json.encode(chat_body("b" * 400, model=REMOTE, stream=True))
        response = await front.http.post(front.url + CHAT, data=body, headers=bearer("k"))
        for _ in range(14):
            await response.content.readline()
        response.close()
        charge = await front.fleet.wait_for_charge()
        assert charge.completion_tokens == 5  # of seven events two may be the end
        assert 100 <= charge.prompt_tokens <= 110


@async_test
async def test_whole_answer_of_a_node_that_its_client_leaves_is_charged_too() -> None:
    """By the last one's speed, since its counts would have come with it; at most what was asked."""
    is_asked = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        if b"hang" in await request.read():
            is_asked.set()
            await asyncio.Event().wait()
        return web.Response(body=b'{"choices":[],"usage":{"completion_tokens":1000000000}}')

    keys = [key("k")]
    async with upstream(handler) as url, served_front(neurons=_NEURONS, keys=keys) as front:
        front.fleet.replicas = [replica("a", url)]
        assert (await ask(front, bearer("k"), model=REMOTE))[0] == 200
        await front.fleet.wait_for_charge()
        asking = asyncio.create_task(
            ask(front, bearer("k"), content="hang", model=REMOTE, max_tokens=50)
        )
        await is_asked.wait()
        asking.cancel()
        charge = await front.fleet.wait_for_charge(2)
        assert charge.completion_tokens == 50
        assert charge.prompt_tokens > 0
        assert (await front.fleet.wait_for_finished(2))[1].status == 499


# The neuron listener


@async_test
async def test_only_a_gateway_may_manage_a_neuron_and_speak_for_others() -> None:
    """Its word decides whose cache is used; anybody else's claim counts for nothing."""
    keys = [key("gw", gateway=True), key("k")]
    claims = {"x-cortexd-account": "team", "x-cortexd-key-id": "alice"}
    async with served_front(keys=keys) as front:
        for name, status in (("gw", 200), ("k", 403), ("bad", 401)):
            url = front.neuron_url + "/models"
            async with front.http.get(url, headers=bearer(name)) as response:
                assert response.status == status
        body = msgspec.json.encode(chat_body())
        for url, name in (
            (front.neuron_url, "gw"),
            (front.neuron_url, "k"),
            (front.url, "gw"),
        ):
            headers = bearer(name) | claims
            async with front.http.post(url + CHAT, data=body, headers=headers) as response:
                assert response.status == 200
        records = await front.fleet.wait_for_finished(3)
        assert [(one.account, one.key_id) for one in records] == [
            ("team", "alice"),
            ("k", "k"),
            ("gw", "gw"),
        ]
        headers = bearer("gw") | {"x-cortexd-account": "a b"}
        async with front.http.post(front.neuron_url + CHAT, data=body, headers=headers) as bad:
            assert bad.status == 400


@async_test
async def test_accounts_do_not_share_cached_prefixes() -> None:
    """Keys of one account do; strangers share among themselves."""
    keys = [key("a1", account_id="a"), key("a2", account_id="a"), key("b")]
    async with served_front(keys=keys, require_auth=False) as front:
        for headers in (bearer("a1"), bearer("a2"), bearer("b"), {}):
            assert (await ask(front, headers))[0] == 200
        await ask(front, {}, cache_salt="account b:")  # guesses what "b" has
        salts = [submit.cache_salt for submit in front.fleet.submits]
        assert salts[0] == salts[1]
        assert salts[3] == ""
        assert len(set(salts)) == 4
