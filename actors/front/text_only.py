"""The path of a request that needs no engine, only the text side of a model.

Recorded and handed on like inference; what is served here is answered as one JSON document.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from actors.front.body import read_body
from actors.front.dialect import Dialect
from actors.front.health import json_response
from actors.front.inference import recorded
from actors.front.proxy import forward
from actors.front.record import RequestRecord
from actors.front.services import FORWARDS, SERVICES, Services

_MIB = 2**20

Answering = Callable[[Services, RequestRecord, bytes], Awaitable[msgspec.Struct]]


async def answer_text_only(
    request: web.Request, dialect: Dialect, answering: Answering
) -> web.StreamResponse:
    """Answer through a node, or with the document that `answering` makes of the body."""

    async def answer(request: web.Request, record: RequestRecord) -> web.StreamResponse:
        services = request[SERVICES]
        body = await read_body(request, services.settings.gateway.max_body_mib * _MIB)
        if request[FORWARDS]:
            forwarded = await forward(request, record, dialect, body)
            if forwarded is not None:
                return forwarded
        return json_response(await answering(services, record, body))

    return await recorded(request, request.path, answer)
