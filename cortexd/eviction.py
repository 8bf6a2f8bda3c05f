"""Which loaded models make room for another, or have been idle too long. Pure functions of state.

Called by the evictor; the router decides and unloads. A model in use is never named. A residency
class protects from below: an incoming model displaces its own class and lower ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from cortexd.catalogue import DEFAULT_PRIORITY
from cortexd.models import ModelStatus

Strategy = Literal["lru", "priority"]


def choose_victims(
    models: Sequence[ModelStatus],
    *,
    needed_bytes: int,
    free_bytes: int,
    incoming: str | None,
    strategy: Strategy,
    priorities: Mapping[str, int],
) -> list[str]:
    """Return the models to unload so that `needed_bytes` are free, first victim first.

    Candidates are loaded or asleep, not in flight, and of a class that `incoming` may displace
    (without `incoming`: the default class and below). "lru" takes the longest unused first;
    "priority" takes the lowest class first, the longest unused within it. No victim is superfluous.
    The list is empty when there is room already, or when even all candidates would not make enough.
    """
    missing = needed_bytes - free_bytes
    if missing <= 0:
        return []
    own_class = DEFAULT_PRIORITY if incoming is None else _class(incoming, priorities)
    candidates = [
        model
        for model in models
        if model.state in {"loaded", "sleeping"}
        and model.in_flight == 0
        and model.memory_bytes > 0
        and model.model_id != incoming
        and may_displace(own_class, _class(model.model_id, priorities))
    ]
    if strategy == "priority":
        candidates.sort(key=lambda model: (_class(model.model_id, priorities), *_unused(model)))
    else:
        candidates.sort(key=_unused)
    victims: list[ModelStatus] = []
    for model in candidates:
        if missing <= 0:
            break
        victims.append(model)
        missing -= model.memory_bytes
    if missing > 0:
        return []
    # A big victim late in the order can make earlier small ones needless: spare the latest first.
    for model in reversed(victims[:-1]):
        if missing + model.memory_bytes <= 0:
            victims.remove(model)
            missing += model.memory_bytes
    return [model.model_id for model in victims]


def idle_models(models: Sequence[ModelStatus], idle_ttl_s: float) -> list[str]:
    """Return the loaded, unused models idle for their time to live, longest first.

    `idle_ttl_s` (seconds) holds for models without one of their own; 0 switches it off. A model
    that was never used has no idle time yet.
    """
    idle = []
    for model in models:
        ttl_s = idle_ttl_s if model.idle_ttl_s is None else model.idle_ttl_s
        if ttl_s > 0 and _is_unused(model) and (model.last_used_s or 0.0) >= ttl_s:
            idle.append(model)
    return [model.model_id for model in sorted(idle, key=_unused)]


def fragmented_models(models: Sequence[ModelStatus], after_cycles: int) -> list[str]:
    """Return the unused models that have seen so many unloads of others, most first.

    Their engines are as old as the memory they have worked in is fragmented; 0 switches it off.
    """
    if after_cycles <= 0:
        return []
    old = [model for model in models if _is_unused(model) and model.num_cycles >= after_cycles]
    return [
        model.model_id for model in sorted(old, key=lambda one: (-one.num_cycles, one.model_id))
    ]


def may_displace(incoming_class: int, resident_class: int) -> bool:
    """Return whether a model of one class may unload one of another: equal ranks swap both ways."""
    return incoming_class >= resident_class


def _is_unused(model: ModelStatus) -> bool:
    return model.state == "loaded" and model.in_flight == 0


def _class(model_id: str, priorities: Mapping[str, int]) -> int:
    return priorities.get(model_id, DEFAULT_PRIORITY)


def _unused(model: ModelStatus) -> tuple[float, float, str]:
    """Sort key: longest unused first, never used before all, then oldest load, then id."""
    unused_s = math.inf if model.last_used_s is None else model.last_used_s
    return (-unused_s, model.loaded_at or 0.0, model.model_id)
