"""The path of one inference request through the front: body, check, run, answer, record."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from actors.front.auth import authenticate
from actors.front.body import aside, read_body
from actors.front.choice import ChoiceOutput
from actors.front.dialect import Answer, Dialect, encoded
from actors.front.entitlement import admit
from actors.front.generation import Generation
from actors.front.proxy import forward
from actors.front.record import RequestRecord
from actors.front.request import InferenceRequest
from actors.front.services import FORWARDS, REQUEST_ID, SERVICES
from actors.front.stream import stream_answer
from actors.front.written import write_whole
from cortexd.errors import ModelNotFound, ShuttingDown

_MIB = 2**20
_JSON_FIELDS = (("Content-Type", "application/json"),)
_DRAIN_RETRY_AFTER_S = 5.0


async def recorded(
    request: web.Request,
    route: str,
    answer: Callable[[web.Request, RequestRecord], Awaitable[web.StreamResponse]],
) -> web.StreamResponse:
    """Answer a request whose key is known; exactly one record is closed, whatever the ending."""
    services = request[SERVICES]
    record = RequestRecord(request[REQUEST_ID], route, client=request.remote or "")
    services.enter()
    record.begin(services)
    try:
        if services.is_draining:
            raise ShuttingDown(
                "this server is shutting down; try again", retry_after_s=_DRAIN_RETRY_AFTER_S
            )
        record.principal = await authenticate(request, services.keys)
        response = await answer(request, record)
        if record.status == 0:
            record.status = response.status
        return response
    except ModelNotFound as error:
        told = _without_other_names(record, error)
        record.note_ending(told)
        raise told from None
    except BaseException as error:
        record.note_ending(error)
        raise
    finally:
        record.close(services)
        services.leave()


def _without_other_names(record: RequestRecord, error: ModelNotFound) -> ModelNotFound:
    """Return the error; a key that opens some models is not told what others are called."""
    if record.principal.opens_all_models:
        return error
    return ModelNotFound(
        "no such model is known here; GET /v1/models lists those that this key opens",
        param="model",
    )


class InferenceHandler:
    """Handle one dialect's route."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer the request."""
        return await recorded(request, self._dialect.route, self._answer)

    async def _answer(self, request: web.Request, record: RequestRecord) -> web.StreamResponse:
        services = request[SERVICES]
        gateway = services.settings.gateway
        body = await read_body(request, gateway.max_body_mib * _MIB)
        await admit(services, record, body)
        if request[FORWARDS]:
            forwarded = await forward(request, record, self._dialect, body)
            if forwarded is not None:
                return forwarded
        wanted = await aside(body, self._dialect.parse)
        record.principal.check_model(wanted.model)
        record.is_stream = wanted.is_stream
        lease_id = services.new_lease_id()
        answer = Answer(
            id=self._dialect.id_prefix + lease_id,
            created=int(time.time()),
            model=wanted.model,
            request_id=request[REQUEST_ID],
            include_usage=wanted.include_usage,
        )
        patience_s = gateway.request_timeout_s if wanted.is_stream else gateway.unary_load_wait_s
        with Generation(
            services,
            wanted,
            record,
            lease_id,
            load_wait_s=patience_s,
            may_resubmit=not wanted.is_stream,
        ) as generation:
            answer.usage = lambda: generation.usage() if generation.is_submitted else None
            if wanted.is_stream:
                encoder = self._dialect.encoder(answer)
                return await stream_answer(request, generation, answer, encoder, record)
            outputs = await _run_to_end(generation, wanted)
            answer.fingerprint = generation.fingerprint
            usage = generation.usage()
            body = await encoded(outputs, lambda: self._dialect.response(answer, outputs, usage))
            return await write_whole(request, 200, _JSON_FIELDS, body)


async def _run_to_end(generation: Generation, wanted: InferenceRequest) -> list[ChoiceOutput]:
    """Return one merged output per choice, by index."""
    merged: dict[int, ChoiceOutput] = {}
    num_resubmits = generation.num_resubmits
    while not generation.is_finished:
        outputs = await generation.next(math.inf)
        if generation.num_resubmits != num_resubmits:
            num_resubmits = generation.num_resubmits
            merged.clear()  # the engine died: the answer starts anew
        for output in outputs:
            if output.index in merged:
                merged[output.index].extend(output)
            else:
                merged[output.index] = output
    return [merged[index] for index in sorted(merged)]
