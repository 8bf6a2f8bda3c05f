"""`/models/sleep` and `/models/wake`: a loaded model's weights wait in host memory, and come back.

Asked of the router, to which a sleeping model has a state of its own; a request wakes it.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from aiohttp import web
from msgspec import Meta

from actors.front.body import read_body
from actors.front.decode import decode_body
from actors.front.health import json_response
from actors.front.services import SERVICES
from cortexd.errors import MissingParameter
from cortexd.messages import SleepModel, WakeModel

_MAX_BODY_BYTES: Final = 2**20
# Beyond what the router gives the engine; one that cannot wake is loaded anew, which takes longer.
_DEADLINE_S: Final = 600.0


class SleepBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of both."""

    model_id: Annotated[str, Meta(min_length=1, max_length=512)] | None = None


async def sleep(request: web.Request) -> web.Response:
    """Move a model's weights to host memory; answer when its device memory is free."""
    await _ask_router(request, SleepModel)
    return json_response({"status": "sleeping"})


async def wake(request: web.Request) -> web.Response:
    """Move a model's weights back; answer when it can run."""
    await _ask_router(request, WakeModel)
    return json_response({"status": "loaded"})


async def _ask_router(request: web.Request, kind: type[SleepModel | WakeModel]) -> None:
    body = decode_body(await read_body(request, _MAX_BODY_BYTES), SleepBody)
    if body.model_id is None:
        raise MissingParameter("model_id is missing", param="model_id")
    services = request[SERVICES]
    await services.bus.ask("router", kind(body.model_id), deadline_s=_DEADLINE_S)
