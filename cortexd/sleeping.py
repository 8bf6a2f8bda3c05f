"""Which models sleep instead of being unloaded, and which have slept long enough. Pure.

Called by the evictor. A model asleep keeps its processes and holds its weights in host memory, so
that it is back in the time of a copy; an unloaded one has to be read and prepared again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from cortexd.models import ModelStatus

# Pinned memory cannot be swapped out, and file pages, other processes and the ranks' own working
# memory need a place: what a host must still have free once a model lies in its memory.
HOST_RESERVE_BYTES: Final = 4 * 2**30

Reason = Literal["asleep", "host_memory"]


class Overslept(NamedTuple):
    """A model that has to be unloaded, and why: asleep for too long, or the host is short."""

    model_id: str
    reason: Reason


def choose_sleepers(
    victims: Sequence[ModelStatus], *, host_free_bytes: int | None, ttl_s: float
) -> list[str]:
    """Return those of the victims for whose weights the host has room, first victim first.

    The others are unloaded: all of them with `ttl_s` 0, which switches sleep off, or while the
    host's free memory is unknown, and those that cannot sleep (`sleep_bytes` 0: on a CPU).
    """
    if ttl_s <= 0 or host_free_bytes is None:
        return []
    room = host_free_bytes - HOST_RESERVE_BYTES
    sleepers = []
    for model in victims:
        if model.state == "loaded" and 0 < model.sleep_bytes <= room:
            sleepers.append(model.model_id)
            room -= model.sleep_bytes
    return sleepers


def overslept(
    models: Sequence[ModelStatus], *, host_free_bytes: int | None, ttl_s: float
) -> list[Overslept]:
    """Return the sleeping models to unload now, longest asleep first.

    With `ttl_s` 0 only an operator puts models to sleep, and none is late. When the host is short
    of memory one is named at a time: its end shows in the next look.
    """
    asleep = sorted(
        (model for model in models if model.state == "sleeping"),
        key=lambda model: (-(model.state_s or 0.0), model.model_id),
    )
    found = [
        Overslept(model.model_id, "asleep")
        for model in asleep
        if 0 < ttl_s <= (model.state_s or 0.0)
    ]
    is_short = host_free_bytes is not None and host_free_bytes < HOST_RESERVE_BYTES
    if is_short and asleep and not found:
        return [Overslept(asleep[0].model_id, "host_memory")]
    return found
