"""How well a host and its fleet are, in one word: `/health` and `cortexd status` say the same.

Pure. The words are those of the reference: "degraded" where no node can serve, "impaired" where a
model that is on a node cannot.
"""

from __future__ import annotations

from typing import Final

import msgspec

from cortexd.messages import ModelList

_UNSERVABLE: Final = frozenset({"failed", "recovering"})


class Unservable(msgspec.Struct, frozen=True):
    """A model that is on a node and cannot serve."""

    node: str
    model: str
    reason: str
    detail: str | None


def unservable(known: ModelList, here: str) -> list[Unservable]:
    """Return the models that are on this host, whose name is `here`, or on a node, and are down."""
    own = [
        Unservable(here, status.model_id, status.state, status.error or status.stage)
        for status in known.models
    ]
    remote = [
        Unservable(node.name, model.model_id, model.state, model.detail)
        for node in known.nodes
        if node.is_healthy
        for model in node.models
    ]
    return [one for one in own + remote if one.reason in _UNSERVABLE]


def fleet_state(known: ModelList, *, serves_here: bool) -> str:
    """Return "draining", "degraded", "impaired" or "ok"."""
    if known.is_draining:
        return "draining"
    if not serves_here and not any(node.is_healthy for node in known.nodes):
        return "degraded"
    return "impaired" if unservable(known, "") else "ok"
