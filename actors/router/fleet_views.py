"""What the router's fleet shows of its nodes: for people, for `/v1/models`, for error messages."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from actors.router.remote_loads import RemoteLoad
from actors.router.remote_node import RemoteNode
from cortexd.catalogue import CatalogueModel, Cost
from cortexd.messages import Loading
from cortexd.messages.neurons import CatalogueCard, NodeStatus
from cortexd.openai import ModelCost
from cortexd.placement import Node, may_hold

if TYPE_CHECKING:
    from actors.router.router import Router

_COMING_UP = ("loading", "recovering")


def node_statuses(nodes: Iterable[RemoteNode]) -> list[NodeStatus]:
    """Return what is known of each remote node."""
    now = time.monotonic()
    return [
        NodeStatus(
            name=node.entry.name,
            kind=node.entry.kind,
            endpoint=node.entry.endpoint,
            is_healthy=node.is_healthy,
            age_s=None if node.report is None else now - node.heard_at,
            dispatched=len(node.leases),
            models=[] if node.report is None else node.report.models,
            error=None if node.report is None else node.report.error,
            is_draining=node.report is not None and node.report.is_draining,
            breaker=node.breaker.state(now),
        )
        for node in nodes
    ]


def loaded_ids(nodes: Iterable[NodeStatus]) -> list[str]:
    """Return the models that a neuron which answers has loaded; external servers keep theirs."""
    loaded = {
        model.model_id
        for node in nodes
        if node.is_healthy and node.kind == "cortex"
        for model in node.models
        if model.state in {"loaded", "sleeping"}
    }
    return sorted(loaded)


def catalogue_cards(
    views: Sequence[Node], catalogue: Iterable[CatalogueModel]
) -> list[CatalogueCard]:
    """Return each catalogue model with the nodes where it could run now."""
    healthy = [view for view in views if view.is_healthy]
    return [
        CatalogueCard(
            model_id=model.id,
            feasible_on=[view.name for view in healthy if may_hold(view, model.id, model)],
            capabilities=model.capabilities,
            cost=None if model.cost is None else _cost(model.cost),
        )
        for model in catalogue
    ]


def _cost(cost: Cost) -> ModelCost:
    return ModelCost(
        input=cost.input,
        output=cost.output,
        cache_read=cost.cache_read,
        cache_write=cost.cache_write,
    )


def loading_of(model_id: str, nodes: Iterable[RemoteNode], load: RemoteLoad | None) -> Loading:
    """Return how far a model's load is: as its node tells, else that it was asked for."""
    for node in nodes:
        for model in node.report.models if node.report is not None else []:
            if model.model_id == model_id and model.state in _COMING_UP and node.is_healthy:
                return Loading(model.detail or model.state, model.progress, model.eta_s)
    return Loading() if load is None else Loading("starting")


def known_names(
    router: Router, catalogue: Collection[str], nodes: Iterable[RemoteNode]
) -> list[str]:
    """Return every name a request may use."""
    names = {*router.aliases, *catalogue, *router.models}
    for node in nodes:
        if node.report is not None:
            names |= {model.model_id for model in node.report.models}
    return sorted(names)
