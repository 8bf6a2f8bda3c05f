"""`POST /v1/messages/count_tokens`: the very prompt a message would have, counted.

Only the tokenizer and the template are needed, so a model whose files are known is not loaded.
"""

from __future__ import annotations

from aiohttp import web

from actors.front.body import aside, read_body
from actors.front.health import json_response
from actors.front.inference import recorded
from actors.front.messages import MessagesDialect, parse_messages
from actors.front.preparation import tokenise
from actors.front.proxy import forward
from actors.front.record import RequestRecord
from actors.front.services import FORWARDS, SERVICES
from actors.front.text_lookup import text_model_of
from cortexd.anthropic import CountTokensRequest, TokensCounted

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
    wanted = await aside(body, lambda body: parse_messages(body, CountTokensRequest))
    text_model, _ = await text_model_of(services, record, wanted.model)
    prompts = await tokenise(wanted, text_model)
    return json_response(TokensCounted(sum(len(ids) for ids, _ in prompts)))
