"""`GET /v1/models`: every model the router knows, in the shape OpenAI clients read."""

from __future__ import annotations

import difflib

from aiohttp import web

from actors.front.health import json_response
from actors.front.queries import known_models
from actors.front.services import SERVICES, Services
from cortexd.errors import ModelNotFound
from cortexd.messages import ModelList
from cortexd.models import ModelLimits, ModelStatus
from cortexd.openai import ModelCard, ModelCards, ModelLimit, ModelLocation

_OWNER = "cortexd"
_MIB = 2**20


async def list_models(request: web.Request) -> web.Response:
    """Answer all models and aliases."""
    services = request.app[SERVICES]
    return json_response(ModelCards(data=_cards(services, await known_models(services))))


async def get_model(request: web.Request) -> web.Response:
    """Answer one model; ids may hold slashes. Raises: ModelNotFound."""
    services = request.app[SERVICES]
    wanted = request.match_info["model_id"]
    cards = _cards(services, await known_models(services))
    for card in cards:
        if card.id == wanted:
            return json_response(card)
    close = difflib.get_close_matches(wanted, [card.id for card in cards], n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else "; see GET /v1/models"
    raise ModelNotFound(f'model "{wanted}" is not known here{hint}', param="model")


def _cards(services: Services, known: ModelList) -> list[ModelCard]:
    cards = [_card(services, status, status.model_id) for status in known.models]
    by_id = {status.model_id: status for status in known.models}
    cards += [
        _card(services, by_id[target], alias, alias_of=target)
        for alias, target in sorted(known.aliases.items())
        if target in by_id and alias not in by_id
    ]
    return cards


def _card(
    services: Services, status: ModelStatus, model_id: str, alias_of: str | None = None
) -> ModelCard:
    limit = model_limit(status.limits)
    memory_mb = round(status.memory_bytes / _MIB) or None
    return ModelCard(
        id=model_id,
        object="model",
        created=int(status.loaded_at or services.created),
        owned_by=_OWNER,
        loaded=status.state == "loaded",
        feasible_on=[services.node],
        locations=[
            ModelLocation(node=services.node, status=status.state, vram_estimate_mb=memory_mb)
        ],
        capabilities=["text"],
        tool_call=False,
        reasoning=False,
        limit=limit,
        max_model_len=None if limit is None else limit.context,
        max_input_tokens=None if limit is None else limit.input,
        max_output_tokens=None if limit is None else limit.output,
        alias_of=alias_of,
        progress=status.progress,
        stage=status.stage,
        eta_s=status.eta_s,
        error=status.error,
    )


def model_limit(limits: ModelLimits | None) -> ModelLimit | None:
    """Return the limits as clients read them, None when unknown."""
    if limits is None:
        return None
    return ModelLimit(
        context=limits.context,
        input=max(limits.context - 1, 1),
        output=limits.output or limits.context,
    )
