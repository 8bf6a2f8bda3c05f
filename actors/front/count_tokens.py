"""`POST /v1/messages/count_tokens`: the very prompt a message would have, counted.

Only the tokenizer and the template are needed, so a model whose files are known is not loaded.
"""

from __future__ import annotations

from aiohttp import web

from actors.front.body import aside
from actors.front.messages import MessagesDialect, parse_messages
from actors.front.preparation import tokenise
from actors.front.record import RequestRecord
from actors.front.services import Services
from actors.front.text_lookup import text_model_of
from actors.front.text_only import answer_text_only
from cortexd.anthropic import CountTokensRequest, TokensCounted


async def count_tokens(request: web.Request) -> web.StreamResponse:
    """Answer how many tokens the prompt has. Raises: what a message with it would."""
    return await answer_text_only(request, MessagesDialect(), _count)


async def _count(services: Services, record: RequestRecord, body: bytes) -> TokensCounted:
    wanted = await aside(body, lambda body: parse_messages(body, CountTokensRequest))
    text_model, _ = await text_model_of(services, record, wanted.model)
    prompts = await tokenise(wanted, text_model)
    return TokensCounted(sum(len(ids) for ids, _ in prompts))
