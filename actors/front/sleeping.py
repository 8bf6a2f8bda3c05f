"""`/models/sleep` and `/models/wake`: a loaded model's weights wait in host memory, and come back.

Asked of the model's leader itself: to the router the model stays loaded, since a request wakes it.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from aiohttp import web
from msgspec import Meta

from actors.front.body import read_body
from actors.front.decode import decode_body
from actors.front.health import json_response
from actors.front.queries import known_models
from actors.front.services import SERVICES
from cortexd.errors import MissingParameter, ModelNotFound
from cortexd.messages import SleepModel, WakeModel
from cortexd.messages.control import Message

_MAX_BODY_BYTES: Final = 2**20
# Pinning the memory of a large model takes a second for each few GB.
_DEADLINE_S: Final = 120.0


class SleepBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of both."""

    model_id: Annotated[str, Meta(min_length=1, max_length=512)] | None = None


async def sleep(request: web.Request) -> web.Response:
    """Move a model's weights to host memory; answer when its device memory is free."""
    await _ask_leader(request, SleepModel())
    return json_response({"status": "asleep"})


async def wake(request: web.Request) -> web.Response:
    """Move a model's weights back; answer when it can run."""
    await _ask_leader(request, WakeModel())
    return json_response({"status": "loaded"})


async def _ask_leader(request: web.Request, message: Message) -> None:
    body = decode_body(await read_body(request, _MAX_BODY_BYTES), SleepBody)
    if body.model_id is None:
        raise MissingParameter("model_id is missing", param="model_id")
    services = request.app[SERVICES]
    known = await known_models(services)
    target = known.aliases.get(body.model_id, body.model_id)
    for status in known.models:
        if status.model_id == target and status.state == "loaded" and status.leader is not None:
            await services.bus.ask(status.leader, message, deadline_s=_DEADLINE_S)
            return
    raise ModelNotFound(f'model "{body.model_id}" is not loaded on this neuron', param="model_id")
