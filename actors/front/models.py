"""`GET /v1/models`: every model the router knows, in the shape that the client's dialect has."""

from __future__ import annotations

import asyncio
import difflib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import msgspec
from aiohttp import web

from actors.front.auth import PRINCIPAL
from actors.front.error_response import speaks_anthropic
from actors.front.health import json_response
from actors.front.model_merge import OWNER, TEXT, merged_cards, model_limit
from actors.front.queries import known_models
from actors.front.services import SERVICES, Services
from cortexd.anthropic import ModelInfo, ModelPage
from cortexd.errors import CortexError, ModelNotFound
from cortexd.messages import ModelList
from cortexd.models import ModelStatus
from cortexd.openai import ModelCard, ModelCards, ModelLocation

_MIB = 2**20
# States in which a request is answered without a load.
RUNNING: Final = frozenset({"loaded", "sleeping"})


async def list_models(request: web.Request) -> web.Response:
    """Answer all models and aliases."""
    services = request[SERVICES]
    cards = _open_to(request, await _cards(services, await known_models(services)))
    if not speaks_anthropic(request):
        return json_response(ModelCards(data=cards))
    infos = [_info(card) for card in cards]
    first_id, last_id = (infos[0].id, infos[-1].id) if infos else (None, None)
    return json_response(ModelPage(data=infos, first_id=first_id, last_id=last_id))


async def get_model(request: web.Request) -> web.Response:
    """Answer one model; ids may hold slashes. Raises: ModelNotFound."""
    services = request[SERVICES]
    wanted = request.match_info["model_id"]
    cards = _open_to(request, await _cards(services, await known_models(services)))
    for card in cards:
        if card.id == wanted:
            return json_response(_info(card) if speaks_anthropic(request) else card)
    close = difflib.get_close_matches(wanted, [card.id for card in cards], n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else "; see GET /v1/models"
    raise ModelNotFound(f'model "{wanted}" is not known here{hint}', param="model")


def _open_to(request: web.Request, cards: list[ModelCard]) -> list[ModelCard]:
    """Return the models that the request's key opens; of others not even the name is told."""
    principal = request[PRINCIPAL]
    return [card for card in cards if principal.may_use(card.id)]


@dataclass(slots=True, frozen=True)
class Abilities:
    """What only a model's tokenizer and template tell."""

    can_call_tools: bool = False
    can_reason: bool = False


async def _cards(services: Services, known: ModelList) -> list[ModelCard]:
    """Return a card for each model of this host and its neurons, and for each alias of one."""
    able = await asyncio.gather(*(abilities(services, status) for status in known.models))
    cards = {
        status.model_id: _card(services, status, can)
        for status, can in zip(known.models, able, strict=True)
    }
    cards = merged_cards(cards, known, created=services.created)
    aliases = [
        msgspec.structs.replace(cards[target], id=alias, alias_of=target)
        for alias, target in sorted(known.aliases.items())
        if target in cards and alias not in cards
    ]
    return [*cards.values(), *aliases]


async def abilities(services: Services, status: ModelStatus) -> Abilities:
    """Return a loaded model's abilities; of others nothing is read for a mere list."""
    if status.state not in RUNNING or status.files is None:
        return Abilities()
    try:
        text_model = await services.text_models.get(status.files)
    except CortexError:
        return Abilities()  # its requests say what is wrong with it
    return Abilities(text_model.can_call_tools, text_model.can_reason)


def _card(services: Services, status: ModelStatus, can: Abilities) -> ModelCard:
    limit = model_limit(status.limits)
    return ModelCard(
        id=status.model_id,
        object="model",
        created=int(status.loaded_at or services.created),
        owned_by=OWNER,
        loaded=status.state == "loaded",
        feasible_on=[services.node],
        locations=[
            ModelLocation(
                node=services.node, status=status.state, vram_estimate_mb=used_mib(status)
            )
        ],
        capabilities=list(TEXT) if status.state in RUNNING else [],
        tool_call=can.can_call_tools,
        reasoning=can.can_reason,
        limit=limit,
        max_model_len=None if limit is None else limit.context,
        max_input_tokens=None if limit is None else limit.input,
        max_output_tokens=None if limit is None else limit.output,
        progress=status.progress,
        stage=status.stage,
        eta_s=status.eta_s,
        error=status.error,
    )


def used_mib(status: ModelStatus) -> int | None:
    """Return the device memory that a model holds, None when it holds none."""
    return None if status.state == "sleeping" else round(status.memory_bytes / _MIB) or None


def _info(card: ModelCard) -> ModelInfo:
    return ModelInfo(
        id=card.id,
        display_name=card.id,
        created_at=datetime.fromtimestamp(card.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        lifecycle="active",
        max_input_tokens=card.max_input_tokens,
        max_tokens=card.max_output_tokens,
    )
