"""`GET /v1/models`: every model the router knows, in the shape that the client's dialect has."""

from __future__ import annotations

import asyncio
import difflib
from dataclasses import dataclass
from datetime import UTC, datetime

from aiohttp import web

from actors.front.error_response import speaks_anthropic
from actors.front.health import json_response
from actors.front.queries import known_models
from actors.front.services import SERVICES, Services
from cortexd.anthropic import ModelInfo, ModelPage
from cortexd.errors import CortexError, ModelNotFound
from cortexd.messages import ModelList
from cortexd.models import ModelLimits, ModelStatus
from cortexd.openai import ModelCard, ModelCards, ModelLimit, ModelLocation

_OWNER = "cortexd"
_MIB = 2**20


async def list_models(request: web.Request) -> web.Response:
    """Answer all models and aliases."""
    services = request.app[SERVICES]
    cards = await _cards(services, await known_models(services))
    if not speaks_anthropic(request):
        return json_response(ModelCards(data=cards))
    infos = [_info(card) for card in cards]
    first_id, last_id = (infos[0].id, infos[-1].id) if infos else (None, None)
    return json_response(ModelPage(data=infos, first_id=first_id, last_id=last_id))


async def get_model(request: web.Request) -> web.Response:
    """Answer one model; ids may hold slashes. Raises: ModelNotFound."""
    services = request.app[SERVICES]
    wanted = request.match_info["model_id"]
    cards = await _cards(services, await known_models(services))
    for card in cards:
        if card.id == wanted:
            return json_response(_info(card) if speaks_anthropic(request) else card)
    close = difflib.get_close_matches(wanted, [card.id for card in cards], n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else "; see GET /v1/models"
    raise ModelNotFound(f'model "{wanted}" is not known here{hint}', param="model")


@dataclass(slots=True, frozen=True)
class _Abilities:
    """What only a model's tokenizer and template tell."""

    can_call_tools: bool = False
    can_reason: bool = False


async def _cards(services: Services, known: ModelList) -> list[ModelCard]:
    abilities = await asyncio.gather(*(_abilities(services, status) for status in known.models))
    by_id = {
        status.model_id: (status, able)
        for status, able in zip(known.models, abilities, strict=True)
    }
    cards = [_card(services, *by_id[status.model_id], status.model_id) for status in known.models]
    cards += [
        _card(services, *by_id[target], alias, alias_of=target)
        for alias, target in sorted(known.aliases.items())
        if target in by_id and alias not in by_id
    ]
    return cards


async def _abilities(services: Services, status: ModelStatus) -> _Abilities:
    """Return a loaded model's abilities; of others nothing is read for a mere list."""
    if status.state != "loaded" or status.files is None:
        return _Abilities()
    try:
        text_model = await services.text_models.get(status.files)
    except CortexError:
        return _Abilities()  # its requests say what is wrong with it
    return _Abilities(text_model.can_call_tools, text_model.can_reason)


def _card(
    services: Services,
    status: ModelStatus,
    abilities: _Abilities,
    model_id: str,
    alias_of: str | None = None,
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
        tool_call=abilities.can_call_tools,
        reasoning=abilities.can_reason,
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


def _info(card: ModelCard) -> ModelInfo:
    return ModelInfo(
        id=card.id,
        display_name=card.id,
        created_at=datetime.fromtimestamp(card.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        lifecycle="active",
        max_input_tokens=card.max_input_tokens,
        max_tokens=card.max_output_tokens,
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
