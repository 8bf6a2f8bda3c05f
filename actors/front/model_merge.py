"""Model cards over all nodes: where a model is, where it could be, its tightest limits. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from cortexd.messages import ModelList
from cortexd.messages.neurons import NodeModel
from cortexd.models import ModelLimits
from cortexd.openai import ModelCard, ModelLimit, ModelLocation

OWNER = "cortexd"
_ABSENT = ("unloaded", "failed")
# What every model that runs in our engine can do.
TEXT: Final = ("text",)


def merged_cards(
    cards: dict[str, ModelCard], known: ModelList, *, created: int
) -> dict[str, ModelCard]:
    """Return the cards of this host joined with what its neurons and the catalogue say."""
    merged = dict(cards)
    for node in known.nodes:
        for model in node.models if node.is_healthy else []:
            card = merged.get(model.model_id) or _empty(model.model_id, created)
            merged[model.model_id] = _with_node(card, node.name, model)
    for entry in known.catalogue:
        card = merged.get(entry.model_id) or _empty(entry.model_id, created)
        merged[entry.model_id] = msgspec.structs.replace(
            card,
            # The catalogue may forbid a node that knows the model.
            feasible_on=_union(_holders(card), entry.feasible_on),
            capabilities=card.capabilities or entry.capabilities,
            cost=entry.cost,
        )
    return {name: _with_capabilities(card) for name, card in merged.items()}


def model_limit(limits: ModelLimits | None) -> ModelLimit | None:
    """Return the limits as clients read them, None when unknown."""
    if limits is None:
        return None
    return ModelLimit(
        context=limits.context,
        input=max(limits.context - 1, 1),
        output=limits.output or limits.context,
    )


def _empty(model_id: str, created: int) -> ModelCard:
    return ModelCard(
        id=model_id,
        object="model",
        created=created,
        owned_by=OWNER,
        loaded=False,
        feasible_on=[],
        locations=[],
        capabilities=[],
        tool_call=False,
        reasoning=False,
    )


def _with_node(card: ModelCard, node: str, model: NodeModel) -> ModelCard:
    location = ModelLocation(node=node, status=model.state, vram_estimate_mb=model.memory_mib)
    limit = _tightest(card.limit, model_limit(model.limits))
    return msgspec.structs.replace(
        card,
        loaded=card.loaded or model.state == "loaded",
        feasible_on=_union(card.feasible_on, [node]),
        locations=[*card.locations, location],
        capabilities=_union(card.capabilities, model.capabilities),
        tool_call=card.tool_call or model.can_call_tools,
        reasoning=card.reasoning or model.can_reason,
        limit=limit,
        max_model_len=None if limit is None else limit.context,
        max_input_tokens=None if limit is None else limit.input,
        max_output_tokens=None if limit is None else limit.output,
        progress=card.progress if model.progress is None else model.progress,
        stage=model.detail if model.progress is not None else card.stage,
        eta_s=card.eta_s if model.eta_s is None else model.eta_s,
        error=model.detail if model.state == "failed" else card.error,
    )


def _with_capabilities(card: ModelCard) -> ModelCard:
    """Return the card of a model that nobody says anything of as that of one that answers."""
    if card.capabilities:
        return card
    return msgspec.structs.replace(card, capabilities=list(TEXT))


def _holders(card: ModelCard) -> list[str]:
    """Return the nodes that have the model, or are about to."""
    return [place.node for place in card.locations if place.status not in _ABSENT]


def _tightest(one: ModelLimit | None, other: ModelLimit | None) -> ModelLimit | None:
    if one is None or other is None:
        return one or other
    return min(one, other, key=lambda limit: limit.context)


def _union(first: Iterable[str], second: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*first, *second]))
