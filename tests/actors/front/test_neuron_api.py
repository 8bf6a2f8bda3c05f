"""The neuron's own API over a real socket."""

from __future__ import annotations

from typing import Any

from cortexd.errors import InsufficientMemory, InvalidRequest, ModelAlreadyLoaded, ModelNotFound
from cortexd.messages import LoadModel, SleepModel, UnloadModelNow, WakeModel
from cortexd.models import LoadOptions, ModelPolicy
from tests.doubles.fleet import ALIAS, CONTEXT, MODEL
from tests.doubles.front import ServedFront, async_test, chat_body, served_front


async def post(front: ServedFront, path: str, body: Any) -> tuple[int, Any]:
    """Post to the neuron listener; return status and body."""
    async with front.http.post(front.neuron_url + path, json=body) as response:
        return response.status, await response.json()


@async_test
async def test_discovery_describes_the_host() -> None:
    """Host, devices in MiB, harnesses and the longest prompt."""
    async with served_front() as front:
        status, body = await front.get("/discovery", neuron=True)
        assert status == 200
        assert body == {
            "hostname": "host",
            "os": "Linux",
            "kernel": "6.1",
            "cuda_version": None,
            "cuda_unavailable_reason": None,
            "driver_version": None,
            "devices": [
                {
                    "index": 0,
                    "name": "test cpu",
                    "kind": "cpu",
                    "vram_total_mb": 8192,
                    "compute_capability": None,
                }
            ],
            "harnesses": ["torch", "candle"],
            "max_prompt_tokens": CONTEXT - 1,
        }


@async_test
async def test_health_has_devices_activation_and_queues() -> None:
    """The reference's payload: uptime, devices, activation, one entry per loaded model."""
    async with served_front() as front:
        _, body = await front.get("/health", neuron=True)
        assert body["uptime_secs"] >= 0
        assert body["devices"] == [
            {
                "index": 0,
                "vram_used_mb": 2048,
                "vram_free_mb": 6144,
                "utilization_pct": 12.5,
                "temp_c": None,
            }
        ]
        assert body["activation"]["state"] == "ready"
        (model,) = body["models"]
        assert (model["id"], model["in_flight"], model["queue_depth"]) == (MODEL, 2, 1)
        front.fleet.num_queued = 7
        _, body = await front.get("/health", neuron=True)
        assert body["models"][0]["queue_depth"] == 8, "those at the router wait too"
        front.fleet.begin_loading()
        _, body = await front.get("/health", neuron=True)
        assert body["activation"]["state"] == "ready", (
            "what a request loads is no part of the start"
        )
        front.fleet.finish_loading()
        front.fleet.is_due = True
        _, body = await front.get("/health", neuron=True)
        assert body["activation"]["state"] == "pre_warming"
        assert body["activation"]["pending"] == [MODEL]
        front.fleet.begin_loading()
        _, body = await front.get("/health", neuron=True)
        assert body["activation"]["in_progress"] == MODEL
        assert body["activation"]["pending"] == []
        front.fleet.finish_loading()


@async_test
async def test_queries_without_an_answer_are_503() -> None:
    """A poller that does not answer gives 503, never a hang."""
    async with served_front() as front:
        front.fleet.host_answers = False
        for path in ("/discovery", "/health"):
            status, body = await front.get(path, neuron=True)
            assert (status, body["error"]["code"]) == (503, "actor_down")


@async_test
async def test_models_and_endpoint() -> None:
    """The list has the reference's fields; a loaded model's endpoint is this listener."""
    async with served_front() as front:
        _, models = await front.get("/models", neuron=True)
        assert models[0]["id"] == MODEL
        assert models[0]["status"] == "loaded"
        assert models[0]["vram_used_mb"] == 5
        for name in (MODEL, MODEL.replace("/", "%2F"), ALIAS):
            status, body = await front.get(f"/models/{name}/endpoint", neuron=True)
            assert (status, body) == (200, {"url": front.neuron_url})
        status, body = await front.get("/models/nothing/endpoint", neuron=True)
        assert (status, body["error"]["code"]) == (404, "model_not_found")


@async_test
async def test_load_passes_checked_options_on() -> None:
    """All options reach the router; "candle" is the reference's name for our engine."""
    async with served_front() as front:
        status, body = await post(
            front,
            "/models/load",
            {
                "model_id": "a/b",
                "harness": "candle",
                "quant": "Q4_K_M",
                "tensor_parallel": 2,
                "devices": [0, 1],
            },
        )
        assert (status, body) == (200, {"status": "loaded"})
        (sent,) = front.fleet.all_sent(LoadModel)
        assert sent == LoadModel(
            LoadOptions(model_id="a/b", quant="Q4_K_M", tensor_parallel=2, devices=(0, 1))
        )


@async_test
async def test_load_and_unload_errors_have_their_status() -> None:
    """Bad bodies 400 by field, and each refusal with its own status."""
    async with served_front() as front:
        for fields, code, param in (
            ({}, "missing_required_parameter", "model_id"),
            ({"model_id": 5}, "invalid_type", "model_id"),
            ({"model_id": "a", "harness": "vllm"}, "invalid_value", "harness"),
            ({"model_id": "a", "tensor_parallel": 0}, "invalid_value", "tensor_parallel"),
            ({"model_id": "a", "devices": [0, 1]}, "invalid_value", "devices"),
            (
                {"model_id": "a", "devices": [0, 0], "tensor_parallel": 2},
                "invalid_value",
                "devices",
            ),
            ({"model_id": "a", "devices": [-1]}, "invalid_value", "devices[0]"),
        ):
            status, body = await post(front, "/models/load", fields)
            error = body["error"]
            assert (status, error["code"], error["param"]) == (400, code, param), error
        status, body = await post(front, "/models/unload", {})
        assert (status, body["error"]["param"]) == (400, "model_id")
        for error, status in (
            (ModelAlreadyLoaded("other options"), 409),
            (InsufficientMemory("too big"), 507),
            (ModelNotFound("no"), 404),
        ):
            front.fleet.load_error = error
            assert (await post(front, "/models/load", {"model_id": "a"}))[0] == status
            assert (await post(front, "/models/unload", {"model_id": "a"}))[0] == status


@async_test
async def test_unload_passes_force_on() -> None:
    """`force` is handed to the router."""
    async with served_front() as front:
        assert await post(front, "/models/unload", {"model_id": MODEL, "force": True}) == (
            200,
            {"status": "unloaded"},
        )
        assert front.fleet.all_sent(UnloadModelNow) == [UnloadModelNow(MODEL, force=True)]


@async_test
async def test_sleeping_model_is_shown_as_such_and_serves() -> None:
    """A request wakes it, so it is servable; it holds no device memory."""
    async with served_front() as front:
        front.fleet.is_asleep = True
        model = (await front.get("/models", neuron=True))[1][0]
        assert (model["status"], model["servable"]["ok"]) == ("sleeping", True)
        assert model["vram_used_mb"] is None
        assert (await front.get(f"/models/{MODEL}/endpoint", neuron=True))[0] == 200
        card = (await front.get("/v1/models"))[1]["data"][0]
        assert (card["loaded"], card["locations"][0]["status"]) == (False, "sleeping")


@async_test
async def test_sleep_and_wake_are_asked_of_the_router() -> None:
    """By name or alias; what it refuses has its status."""
    async with served_front() as front:
        assert await post(front, "/models/sleep", {"model_id": ALIAS}) == (
            200,
            {"status": "sleeping"},
        )
        assert await post(front, "/models/wake", {"model_id": MODEL}) == (
            200,
            {"status": "loaded"},
        )
        assert ("router", SleepModel(ALIAS)) in front.fleet.sent
        assert ("router", WakeModel(MODEL)) in front.fleet.sent
        front.fleet.load_error = InvalidRequest("the model cannot sleep: it runs on the cpu")
        status, body = await post(front, "/models/sleep", {"model_id": MODEL})
        assert status == 400
        assert "runs on the cpu" in body["error"]["message"]
        status, body = await post(front, "/models/wake", {})
        assert (status, body["error"]["param"]) == (400, "model_id")


@async_test
async def test_neuron_serves_inference_too() -> None:
    """The same inference routes answer on the neuron's listener."""
    async with served_front() as front:
        status, body = await post(front, "/v1/chat/completions", chat_body())
        assert status == 200
        assert body["choices"][0]["message"]["content"] == "Hello, world!"


@async_test
async def test_load_takes_the_callers_policy() -> None:
    """A gateway tells what its catalogue says of the model; bad values are refused by name."""
    async with served_front() as front:
        body = {
            "model_id": MODEL,
            "residency_priority": 7,
            "idle_ttl_s": 5,
            "defaults": {"top_k": 3},
        }
        assert (await post(front, "/models/load", body))[0] == 200
        (load,) = front.fleet.all_sent(LoadModel)
        assert isinstance(load, LoadModel)
        assert load.policy == ModelPolicy(
            residency_priority=7, idle_ttl_s=5, defaults={"top_k": 3.0}
        )
        status, answer = await post(front, "/models/load", {"model_id": MODEL, "idle_ttl_s": -1})
        assert (status, answer["error"]["param"]) == (400, "idle_ttl_s")


@async_test
async def test_state_beyond_loaded_is_told() -> None:
    """How far a load is, what the model can, and whether this host takes requests."""
    async with served_front() as front:
        _, models = await front.get("/models", neuron=True)
        assert (models[0]["tool_call"], models[0]["residency_priority"]) == (True, 100)
        assert (await front.get("/health", neuron=True))[1]["status"] == "ok"
        front.fleet.begin_loading()
        front.fleet.is_draining = True
        _, models = await front.get("/models", neuron=True)
        assert (models[0]["status"], models[0]["progress"]) == ("loading", 0.25)
        assert (await front.get("/health", neuron=True))[1]["status"] == "draining"
        assert (await front.get("/health"))[1]["status"] == "draining"
        assert (await front.get("/readyz"))[0] == 503
