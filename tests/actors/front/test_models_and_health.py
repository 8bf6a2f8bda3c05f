"""Model cards, health and probes over a real socket."""

from __future__ import annotations

from cortexd.errors import ActorDown
from cortexd.messages.neurons import CatalogueCard, NodeModel, NodeStatus
from cortexd.openai import ModelCost
from tests.doubles.fleet import ALIAS, CONTEXT, MODEL
from tests.doubles.front import async_test, served_front


@async_test
async def test_models_lists_ids_and_aliases_with_limits() -> None:
    """Every model and alias is an entry; limits stand in both forms clients read."""
    async with served_front() as front:
        status, body = await front.get("/v1/models")
        assert status == 200
        assert body["object"] == "list"
        model, alias = body["data"]
        assert model == {
            "id": MODEL,
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "cortexd",
            "loaded": True,
            "feasible_on": [front.services.node],
            "locations": [{"node": front.services.node, "status": "loaded", "vram_estimate_mb": 5}],
            "capabilities": ["text"],
            "tool_call": True,
            "reasoning": False,
            "limit": {"context": CONTEXT, "input": CONTEXT - 1, "output": CONTEXT},
            "max_model_len": CONTEXT,
            "max_input_tokens": CONTEXT - 1,
            "max_output_tokens": CONTEXT,
        }
        assert alias == {**model, "id": ALIAS, "alias_of": MODEL}


@async_test
async def test_model_by_id_takes_slashes_plain_or_escaped() -> None:
    """`/v1/models/{id}` finds ids with slashes; an unknown one is 404 with close names."""
    async with served_front() as front:
        for path in (MODEL, MODEL.replace("/", "%2F"), ALIAS):
            status, body = await front.get(f"/v1/models/{path}")
            assert status == 200
            assert body["id"] in {MODEL, ALIAS}
        status, body = await front.get("/v1/models/org/tiny-modle")
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        assert MODEL in body["error"]["message"]


@async_test
async def test_models_without_router_is_503() -> None:
    """No router: an error with Retry-After at once, never a hang."""
    async with served_front() as front:
        front.fleet.incarnations["router"] = None
        status, body = await front.get("/v1/models")
        assert (status, body["error"]["code"]) == (503, ActorDown.code)


@async_test
async def test_health_names_the_state() -> None:
    """`/health` is always 200: ok, impaired by a model, or starting while there is no router."""
    async with served_front() as front:
        status, body = await front.get("/health")
        assert (status, body["status"]) == (200, "ok")
        assert body["nodes"] == {"healthy": 1, "total": 1}
        assert body["tasks"] > 0
        assert body["models"] == {"loaded": 1, "total": 1}
        assert "unservable" not in body
        front.fleet.has_failed = True
        status, body = await front.get("/health")
        assert (status, body["status"]) == (200, "impaired")
        here = front.services.node
        assert body["unservable"] == [
            {"node": here, "model": MODEL, "reason": "failed", "detail": None}
        ]
        front.fleet.incarnations["router"] = None
        status, body = await front.get("/health")
        assert (status, body["status"]) == (200, "starting")


@async_test
async def test_probes_and_version() -> None:
    """`/livez` answers always, `/readyz` needs the router, and `HEAD /` is 200."""
    async with served_front() as front:
        assert await front.get("/livez") == (200, {"status": "ok"})
        assert (await front.get("/readyz"))[0] == 200
        front.fleet.incarnations["router"] = None
        assert (await front.get("/livez"))[0] == 200
        assert (await front.get("/readyz"))[0] == 503
        _, version = await front.get("/version")
        assert version["package_version"]
        async with front.http.head(front.url + "/") as response:
            assert response.status == 200


@async_test
async def test_price_and_places_of_the_catalogue_are_listed() -> None:
    """Also of a model that is loaded nowhere; a free one says 0, an unpriced one nothing."""
    async with served_front() as front:
        free = ModelCost(input=0.0, output=0.0)
        front.fleet.catalogue = [
            CatalogueCard(model_id="org/cold", feasible_on=["n"], capabilities=["v"], cost=free),
            CatalogueCard(model_id=MODEL, feasible_on=[front.services.node]),
        ]
        _, body = await front.get("/v1/models")
        cards = {card["id"]: card for card in body["data"]}
        assert cards["org/cold"]["cost"] == {"input": 0.0, "output": 0.0}
        assert (cards["org/cold"]["loaded"], cards["org/cold"]["feasible_on"]) == (False, ["n"])
        assert "cost" not in cards[MODEL]


@async_test
async def test_capabilities_are_those_declared_unless_a_node_knows_better() -> None:
    """A cold model and a server that says nothing of its models have what the catalogue says."""
    declared = {name: ["text", "vision"] for name in ("org/cold", "org/far", "ext/vl", MODEL)}
    async with served_front() as front:
        front.fleet.catalogue = [
            CatalogueCard(model_id=name, feasible_on=[], capabilities=can)
            for name, can in declared.items()
        ]
        seen = [NodeModel("ext/vl", "loaded"), NodeModel("org/far", "unloaded")]
        known = NodeModel("org/known", "loaded", capabilities=["text", "image"])
        front.fleet.nodes = [
            NodeStatus(
                name="n",
                kind="openai",
                endpoint="http://n",
                is_healthy=True,
                age_s=0.1,
                dispatched=0,
                models=[*seen, known, NodeModel("org/plain", "loaded")],
            )
        ]

        async def capabilities() -> dict[str, list[str]]:
            _, body = await front.get("/v1/models")
            return {card["id"]: card["capabilities"] for card in body["data"]}

        others = {"org/known": ["text", "image"], "org/plain": ["text"]}
        assert await capabilities() == {**declared, **others, MODEL: ["text"], ALIAS: ["text"]}
        front.fleet.begin_loading()
        assert await capabilities() == {**declared, **others, ALIAS: declared[MODEL]}
        front.fleet.finish_loading()
