"""Health for people, probes and load balancers. None of it waits for a device."""

from __future__ import annotations

import asyncio
import platform
import time
from collections import Counter
from functools import lru_cache
from importlib import metadata

import msgspec
from aiohttp import web

import cortexd
from actors.front.queries import known_models
from actors.front.services import SERVICES
from cortexd.errors import CortexError, ShuttingDown
from cortexd.fleet_state import fleet_state, unservable


def json_response(document: object, *, status: int = 200) -> web.Response:
    """Return a JSON answer."""
    return web.Response(
        status=status, body=msgspec.json.encode(document), content_type="application/json"
    )


async def livez(request: web.Request) -> web.Response:
    """Answer that the event loop lives."""
    return json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """Answer 200 when requests can be routed, 503 before that and while draining."""
    services = request[SERVICES]
    if services.is_draining:
        raise ShuttingDown("this server is shutting down", retry_after_s=5)
    if services.bus.incarnation_of("router") is None:
        return json_response({"status": "starting", "missing": ["router"]}, status=503)
    if (await known_models(services)).is_draining:
        return json_response({"status": "draining"}, status=503)
    return json_response({"status": "ok"})


async def health(request: web.Request) -> web.Response:
    """Answer the state of the fleet as this gateway sees it; always 200."""
    services = request[SERVICES]
    try:
        known = await known_models(services)
    except CortexError as error:
        status = "starting" if services.bus.incarnation_of("router") is None else "degraded"
        total = int(services.serves_here) + services.num_neurons
        return json_response(
            {"status": status, "nodes": {"healthy": 0, "total": total}, "reason": error.message}
        )
    statuses = known.models
    healthy = int(services.serves_here) + sum(node.is_healthy for node in known.nodes)
    body: dict[str, object] = {
        "status": fleet_state(known, serves_here=services.serves_here),
        "nodes": {"healthy": healthy, "total": int(services.serves_here) + len(known.nodes)},
        "models": dict(Counter(status.state for status in statuses)) | {"total": len(statuses)},
        "requests": {
            "active": services.num_active,
            "lost_messages": services.num_lost_messages + services.spending.num_lost,
        },
        "tasks": len(asyncio.all_tasks()),
        "uptime_s": round(time.monotonic() - services.started, 3),
    }
    if draining := [node.name for node in known.nodes if node.is_draining]:
        body["draining"] = draining
    if down := unservable(known, services.node):
        body["unservable"] = down
    return json_response(body)


async def version(request: web.Request) -> web.Response:
    """Answer what runs here."""
    return json_response(_version())


@lru_cache
def _version() -> dict[str, object]:
    return {
        "package_version": cortexd.__version__,
        "git_sha": "unknown",
        "python_version": platform.python_version(),
        "torch_version": _installed("torch"),
        "target": f"{platform.machine()}-{platform.system().lower()}",
        "features": [
            "chat",
            "completions",
            "messages",
            "models",
            "neuron",
            "responses",
            "tokenize",
        ],
    }


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
