"""`POST /v1/messages/count_tokens`: the very prompt a message would have, counted.

Only the tokenizer and the template are needed, so a model whose files are known is not loaded.
"""

from __future__ import annotations

from aiohttp import web

from actors.front.body import read_body
from actors.front.health import json_response
from actors.front.inference import recorded
from actors.front.messages import MessagesDialect, parse_messages
from actors.front.preparation import tokenise
from actors.front.proxy import forward
from actors.front.queries import known_models
from actors.front.record import RequestRecord
from actors.front.routing import route
from actors.front.services import FORWARDS, SERVICES, Services
from cortexd.anthropic import CountTokensRequest, TokensCounted
from cortexd.models import ModelFiles

_MIB = 2**20


async def count_tokens(request: web.Request) -> web.StreamResponse:
    """Answer how many tokens the prompt has. Raises: what a message with it would."""
    return await recorded(request, request.path, _answer)


async def _answer(request: web.Request, record: RequestRecord) -> web.StreamResponse:
    services = request[SERVICES]
    body = await read_body(request, services.settings.gateway.max_body_mib * _MIB)
    if request[FORWARDS]:
        forwarded = await forward(request, record, MessagesDialect(), body)
        if forwarded is not None:
            return forwarded
    wanted = parse_messages(body, CountTokensRequest)
    record.principal.check_model(wanted.model)
    text_model = await services.text_models.get(await _files(services, record, wanted.model))
    prompts = await tokenise(wanted, text_model)
    return json_response(TokensCounted(sum(len(ids) for ids, _ in prompts)))


async def _files(services: Services, record: RequestRecord, model: str) -> ModelFiles:
    """Return a model's files; only one that was never fetched is routed to, which fetches it."""
    known = await known_models(services)
    model_id = known.aliases.get(model, model)
    for status in known.models:
        if status.model_id == model_id:
            record.model = model_id
        if status.model_id == model_id and status.files is not None:
            return status.files
    lease_id = services.new_lease_id()
    try:
        wait_s = services.settings.gateway.unary_load_wait_s
        routed = await route(
            services.bus, model, lease_id, wait_s=wait_s, account=record.principal.account
        )
        return routed.files
    finally:
        services.leases.end(lease_id)
