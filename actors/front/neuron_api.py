"""The neuron's own API: what this host is, what it holds, and loading and unloading by hand."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Sequence
from typing import Annotated, Literal
from urllib.parse import unquote

import msgspec
from aiohttp import web
from msgspec import Meta

from actors.front.body import read_body
from actors.front.decode import decode_body
from actors.front.health import json_response
from actors.front.model_merge import TEXT, model_limit
from actors.front.models import RUNNING, Abilities, abilities, used_mib
from actors.front.queries import host_report, known_models
from actors.front.services import SERVICES, Services
from cortexd.errors import InvalidValue, MissingParameter, ModelNotFound
from cortexd.memory_budget import within_limit
from cortexd.messages import HostReport, LoadModel, LoadReport, ModelList, UnloadModelNow
from cortexd.messages.fleet import DeviceReport
from cortexd.models import LoadOptions, ModelPolicy, ModelStatus
from cortexd.settings import NonNegativeFloat, NonNegativeInt

_MIB = 2**20
_MAX_BODY_BYTES = _MIB
# A load is as long as its download and its bytes ask for; the router and the supervisor watch for
# a stalled one, so this only bounds a lost answer.
_LOAD_DEADLINE_S = 24 * 3600.0
_UNLOAD_DEADLINE_S = 600.0
_HARNESSES = ["torch", "candle"]

ModelId = Annotated[str, Meta(min_length=1, max_length=512)]


class LoadBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /models/load`."""

    model_id: ModelId | None = None
    harness: Literal["torch", "candle"] | None = None
    quant: str | None = None
    tensor_parallel: Annotated[int, Meta(ge=1, le=64)] | None = None
    devices: Annotated[list[Annotated[int, Meta(ge=0, le=255)]], Meta(max_length=64)] | None = None
    residency_priority: NonNegativeInt | None = None
    idle_ttl_s: NonNegativeFloat | None = None
    defaults: dict[str, float] | None = None


class UnloadBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /models/unload`."""

    model_id: ModelId | None = None
    force: bool | None = None


async def discovery(request: web.Request) -> web.Response:
    """Answer what this host is made of."""
    services = request[SERVICES]
    host, known = await asyncio.gather(host_report(services), known_models(services))
    devices = _devices(services, host, known)
    limits = [status.limits.context for status in known.models if status.limits is not None]
    return json_response(
        {
            "hostname": host.hostname,
            "os": host.os,
            "kernel": host.kernel,
            "cuda_version": host.cuda_version,
            "cuda_unavailable_reason": host.gpu_fault,
            "driver_version": host.driver_version,
            "devices": [
                {
                    "index": device.index,
                    "name": device.name,
                    "kind": device.kind,
                    "vram_total_mb": device.memory_total_bytes // _MIB,
                    "compute_capability": device.compute_capability,
                }
                for device in devices
            ],
            "harnesses": _HARNESSES,
            "max_prompt_tokens": min(limits) - 1 if limits else None,
        }
    )


async def health(request: web.Request) -> web.Response:
    """Answer device load, model activation and each model's queue, from cached reports."""
    services = request[SERVICES]
    host, known = await asyncio.gather(host_report(services), known_models(services))
    loads = {load.model_id: load for load in host.loads}
    return json_response(
        {
            "status": "draining" if known.is_draining else "ok",
            "uptime_secs": int(time.monotonic() - services.started),
            "devices": _device_loads(_devices(services, host, known)),
            "activation": _activation(services, known),
            "models": [
                _model_load(services, status, loads.get(status.model_id))
                for status in known.models
                if status.state in RUNNING
            ],
        }
    )


async def list_models(request: web.Request) -> web.Response:
    """Answer the models of this host, those included that it knows and would load on demand."""
    services = request[SERVICES]
    known = await known_models(services)
    able = await asyncio.gather(*(abilities(services, status) for status in known.models))
    return json_response(
        [_model_entry(status, can) for status, can in zip(known.models, able, strict=True)]
    )


async def load(request: web.Request) -> web.Response:
    """Load a model and answer when it is loaded; a client that leaves does not stop the load."""
    body = decode_body(await read_body(request, _MAX_BODY_BYTES), LoadBody)
    options = _load_options(body)
    message = LoadModel(options, _policy(body))
    await request[SERVICES].bus.ask("router", message, deadline_s=_LOAD_DEADLINE_S)
    return json_response({"status": "loaded"})


async def unload(request: web.Request) -> web.Response:
    """Drain and unload a model, answer when its memory is free."""
    body = decode_body(await read_body(request, _MAX_BODY_BYTES), UnloadBody)
    if body.model_id is None:
        raise MissingParameter("model_id is missing", param="model_id")
    await request[SERVICES].bus.ask(
        "router",
        UnloadModelNow(body.model_id, force=body.force is True),
        deadline_s=_UNLOAD_DEADLINE_S,
    )
    return json_response({"status": "unloaded"})


async def endpoint(request: web.Request) -> web.Response:
    """Answer the base URL that serves a loaded model. Raises: ModelNotFound."""
    services = request[SERVICES]
    model_id = unquote(request.match_info["model_id"])
    known = await known_models(services)
    target = known.aliases.get(model_id, model_id)
    if not any(item.model_id == target and item.state in RUNNING for item in known.models):
        raise ModelNotFound(f'model "{model_id}" is not loaded on this neuron', param="model_id")
    return json_response({"url": _own_url(request)})


def _load_options(body: LoadBody) -> LoadOptions:
    """Return checked options; "candle" is the reference's name for the in-process engine."""
    if body.model_id is None:
        raise MissingParameter("model_id is missing", param="model_id")
    devices = None if body.devices is None else tuple(body.devices)
    tensor_parallel = body.tensor_parallel or 1
    if devices is not None and len(set(devices)) != len(devices):
        raise InvalidValue(f"devices is {list(devices)}; each may stand once", param="devices")
    if devices is not None and len(devices) != tensor_parallel:
        raise InvalidValue(
            f"devices lists {len(devices)} devices for tensor_parallel {tensor_parallel}; "
            "one device for each rank is needed",
            param="devices",
        )
    return LoadOptions(
        model_id=body.model_id,
        quant=body.quant or None,
        tensor_parallel=tensor_parallel,
        devices=devices,
    )


def _policy(body: LoadBody) -> ModelPolicy | None:
    """Return how the model is to be treated, None when the caller leaves that to this host."""
    policy = ModelPolicy(
        residency_priority=body.residency_priority,
        idle_ttl_s=body.idle_ttl_s,
        defaults=body.defaults or {},
    )
    return None if policy == ModelPolicy() else policy


def _own_url(request: web.Request) -> str:
    """Return this listener's address; a wildcard one as the client reached it."""
    transport = request.transport
    name = transport.get_extra_info("sockname") if transport is not None else None
    if not name:
        return f"http://{request.host}"
    host, port = name[0], name[1]
    is_v6 = ipaddress.ip_address(host.partition("%")[0]).version == 6
    return f"http://[{host}]:{port}" if is_v6 else f"http://{host}:{port}"


def _devices(services: Services, host: HostReport, known: ModelList) -> list[DeviceReport]:
    """Return the devices as far as models may use them: gateways place by what is free there."""
    return within_limit(host.devices, known.models, services.settings.engine.memory_limit_mib)


def _device_loads(devices: Sequence[DeviceReport]) -> list[dict[str, object]]:
    return [
        {
            "index": device.index,
            "vram_used_mb": device.memory_used_bytes // _MIB,
            "vram_free_mb": (device.memory_total_bytes - device.memory_used_bytes) // _MIB,
            "utilization_pct": device.utilization_pct,
            "temp_c": device.temperature_c,
        }
        for device in devices
    ]


def _activation(services: Services, known: ModelList) -> dict[str, object]:
    """Return how far the models that load at start are."""
    by_id = {status.model_id: status for status in known.models}
    wanted = [entry.model_id for entry in services.settings.default_models]
    due = {status.model_id: status.state for status in known.models if status.is_due}
    loading = [name for name, state in due.items() if state == "loading"]
    return {
        "state": "pre_warming" if due else "ready",
        "pending": [name for name in due if name not in loading],
        "in_progress": loading[0] if loading else None,
        "completed": [name for name in wanted if name in by_id and by_id[name].state in RUNNING],
        "failed": [
            {"model_id": status.model_id, "error": status.error}
            for status in known.models
            if status.state == "failed"
        ],
    }


def _model_load(
    services: Services, status: ModelStatus, report: LoadReport | None
) -> dict[str, object]:
    engine = services.settings.engine
    figures: dict[str, object] = {
        "id": status.model_id,
        "in_flight": status.in_flight,
        "max_in_flight": engine.max_num_seqs,
        "queue_depth": status.queue_depth,
        "max_queue_depth": engine.max_queue_depth,
    }
    if report is not None:
        figures |= {
            "is_asleep": report.is_asleep,
            "in_flight": report.num_running,
            "queue_depth": status.queue_depth + report.num_waiting,
            "kv_blocks_used": report.kv_blocks_used,
            "kv_blocks_total": report.kv_blocks_total,
            "kv_budget_mb": report.kv_bytes_total // _MIB,
            # What requests that wait will take is spoken for.
            "kv_available_mb": max(
                report.kv_bytes_total - report.kv_bytes_used - report.kv_bytes_waiting, 0
            )
            // _MIB,
            "tok_s_prefill": report.tok_s_prefill,
            "tok_s_decode": report.tok_s_decode,
        }
    return figures


def _model_entry(status: ModelStatus, can: Abilities) -> dict[str, object]:
    limit = model_limit(status.limits)
    entry: dict[str, object] = {
        "id": status.model_id,
        "harness": status.harness,
        "status": status.state,
        "devices": status.devices,
        "quant": status.quant,
        "residency_priority": status.priority,
        "vram_used_mb": used_mib(status),
        "capabilities": TEXT if status.state in RUNNING else [],  # []: not known
        "tool_call": can.can_call_tools,
        "reasoning": can.can_reason,
        "servable": {"ok": status.state in RUNNING, "detail": status.error or status.stage},
    }
    if limit is not None:
        entry["limit"] = limit
    if status.state in {"loading", "recovering"}:
        entry |= {"stage": status.stage, "progress": status.progress, "eta_s": status.eta_s}
    return entry
