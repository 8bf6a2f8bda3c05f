"""Where a request for a model goes, given what is known of every node. Pure; called by the router.

Order of rules: a node that has the model loaded (else one where it sleeps) and a free seat, one
that knows the conversation's beginning before the least busy one unless it is clearly busier; a
place in the queue when all seats are taken; a node that is bringing the model up; a node that knows
it; a node that could hold it by the catalogue. Nothing is placed on a node that may not be used,
and a model is never brought up twice at the same time.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from cortexd.catalogue import CatalogueModel
from cortexd.errors import CortexError, ModelNotFeasible, ModelNotFound, NoHealthyNode
from cortexd.eviction import may_displace
from cortexd.models import LoadOptions, ModelState

_COMING_UP: Final = frozenset({"loading", "recovering", "draining"})
# A prefix is worth a wait of few requests; on a node of unknown size, of two.
_MAX_AFFINITY_SLACK: Final = 4
_UNKNOWN_SLACK: Final = 2
_SEATS_PER_SLACK: Final = 4
_FEASIBLE_RETRY_AFTER_S: Final = 3.0
_NO_NODE_RETRY_AFTER_S: Final = 5.0


@dataclass(slots=True, frozen=True)
class Device:
    """Memory of one device, MiB; `free_mib` None: unknown."""

    index: int
    total_mib: int
    free_mib: int | None = None


@dataclass(slots=True, frozen=True)
class Resident:
    """A loaded model, for one that wants its memory; `priority` is its residency class."""

    memory_mib: int
    priority: int
    is_busy: bool


@dataclass(slots=True, frozen=True)
class Node:
    """One node at this moment. `busy`: requests running or queued there, by loaded model.

    `is_healthy`: it may be used now. `is_seen`: its devices and models are known, if only from the
    time before it went away. `seats`: how many requests of a model run there at once, where that is
    known. `turn` rises with each request sent there.
    """

    name: str
    is_healthy: bool
    can_load: bool
    is_seen: bool = True
    devices: Sequence[Device] = ()
    states: Mapping[str, ModelState] = field(default_factory=dict)
    busy: Mapping[str, int] = field(default_factory=dict)
    seats: Mapping[str, int] = field(default_factory=dict)
    residents: Sequence[Resident] = ()
    turn: int = 0

    def has_seat(self, model_id: str) -> bool:
        """Tell whether one more request would run at once, as far as that is known."""
        seats = self.seats.get(model_id)
        return seats is None or self.busy.get(model_id, 0) < seats


@dataclass(slots=True, frozen=True)
class Placement:
    """What to do: send the request to `node` ("run"), wait for a seat there or at another replica
    ("queue"), load there ("load") or wait for a load ("wait").
    """

    action: Literal["run", "queue", "load", "wait"]
    node: str


def place(
    model_id: str,
    nodes: Sequence[Node],
    needs: CatalogueModel | None,
    known: Callable[[], Sequence[str]] = tuple,
    prefix_depths: Mapping[str, int] | None = None,
) -> Placement:
    """Return where the model runs, or should.

    `known` returns the names of all models, for the error; `prefix_depths` says for each node how
    much of the conversation it has seen. Raises: ModelNotFound, ModelNotFeasible, NoHealthyNode.
    """
    healthy = [node for node in nodes if node.is_healthy]
    # A sleeping one wakes for its next request, sooner than any load ends.
    loaded = [node for node in healthy if node.states.get(model_id) == "loaded"] or [
        node for node in healthy if node.states.get(model_id) == "sleeping"
    ]
    if loaded:
        free = [node for node in loaded if node.has_seat(model_id)]
        best = _replica(model_id, free or loaded, prefix_depths or {})
        return Placement("run" if free else "queue", best.name)
    coming_up = [node for node in healthy if node.states.get(model_id) in _COMING_UP]
    if coming_up:
        return Placement("wait", min(node.name for node in coming_up))
    candidates = [node for node in healthy if may_hold(node, model_id, needs)]
    if not candidates:
        raise _refusal(model_id, nodes, needs, known)
    best = min(candidates, key=lambda node: _load_rank(node, model_id, needs))
    return Placement("load", best.name)


def _replica(model_id: str, replicas: Sequence[Node], depths: Mapping[str, int]) -> Node:
    """Return the replica that knows the prefix, unless it is clearly busier; else the idlest."""
    idlest = min(replicas, key=lambda node: (node.busy.get(model_id, 0), node.turn, node.name))
    least = idlest.busy.get(model_id, 0)
    near = [
        node
        for node in replicas
        if node.busy.get(model_id, 0) - least <= _slack(node.seats.get(model_id))
    ]
    best = max(near, key=lambda node: (depths.get(node.name, 0), -node.busy.get(model_id, 0)))
    return best if depths.get(best.name, 0) > 0 else idlest


def _slack(seats: int | None) -> int:
    """Return by how many requests a node may be busier and still be preferred."""
    return _UNKNOWN_SLACK if seats is None else min(seats // _SEATS_PER_SLACK, _MAX_AFFINITY_SLACK)


def may_hold(node: Node, model_id: str, needs: CatalogueModel | None) -> bool:
    """Tell whether the model may be loaded on the node, healthy or not."""
    if not node.can_load:
        return False
    if needs is None:
        return model_id in node.states
    if needs.pinned_on and node.name not in needs.pinned_on:
        return False
    return model_id in node.states or len(fitting_devices(node, needs)) >= needs.min_devices


def fitting_devices(node: Node, needs: CatalogueModel) -> list[Device]:
    """Return the devices that alone have the memory the model wants of each."""
    return [device for device in node.devices if device.total_mib >= needs.min_device_vram_mb]


def load_options(model_id: str, needs: CatalogueModel | None, node: Node) -> LoadOptions:
    """Return how the model is loaded on the node: on its first devices that fit."""
    if needs is None:
        return LoadOptions(model_id=model_id)
    devices: tuple[int, ...] | None = None
    if needs.min_devices > 1:
        fitting = fitting_devices(node, needs)
        devices = tuple(device.index for device in fitting[: needs.min_devices]) or None
    return LoadOptions(
        model_id=model_id,
        harness=needs.harness,
        quant=needs.quant,
        tensor_parallel=needs.min_devices,
        devices=devices,
    )


def _load_rank(
    node: Node, model_id: str, needs: CatalogueModel | None
) -> tuple[bool, bool, int, int, str]:
    """Return the sort key of a cold load.

    Not failed there, known, fits free before fits after unloading others, most free, name.
    """
    state = node.states.get(model_id)
    free_mib = sum(_free_mib(device) for device in node.devices)
    fit = 0 if _fits_free(node, needs) else 1 if _fits_evicting(node, needs) else 2
    return (state == "failed", state is None, fit, -free_mib, node.name)


def _fits_evicting(node: Node, needs: CatalogueModel | None) -> bool:
    """Tell whether there is room once all idle models that this one may displace are gone."""
    if needs is None:
        return True
    freed_mib = sum(
        one.memory_mib
        for one in node.residents
        if not one.is_busy and may_displace(needs.priority, one.priority)
    )
    wanted_mib = max(needs.vram_mb or 0, needs.min_devices * needs.min_device_vram_mb)
    return sum(_free_mib(device) for device in node.devices) + freed_mib >= wanted_mib


def _fits_free(node: Node, needs: CatalogueModel | None) -> bool:
    """Tell whether enough single devices have room now, without unloading anything."""
    if needs is None:
        return True
    share_mib = max(needs.min_device_vram_mb, (needs.vram_mb or 0) // needs.min_devices)
    roomy = [device for device in node.devices if _free_mib(device) >= share_mib]
    return len(roomy) >= needs.min_devices


def _free_mib(device: Device) -> int:
    return device.total_mib if device.free_mib is None else device.free_mib


def _refusal(
    model_id: str,
    nodes: Sequence[Node],
    needs: CatalogueModel | None,
    known: Callable[[], Sequence[str]],
) -> CortexError:
    """Return why no healthy node serves the model; retriable when another one may come back."""
    absent = [node for node in nodes if not node.is_healthy]
    suitable = [
        node.name
        for node in nodes
        if _is_unknown(node, needs)
        or (not node.is_healthy and (model_id in node.states or may_hold(node, model_id, needs)))
    ]
    if suitable:
        return NoHealthyNode(
            f'model "{model_id}" runs on {_names(suitable)}, which takes no requests now (down, '
            "draining, or left alone after failures); retry later",
            retry_after_s=_FEASIBLE_RETRY_AFTER_S,
        )
    if needs is not None and not any(node.can_load for node in nodes):
        return ModelNotFeasible(
            f'model "{model_id}" is loaded nowhere, and no node loads models; external servers: '
            f"{_names([node.name for node in nodes])}",
            param="model",
        )
    if needs is not None:
        return ModelNotFeasible(
            f'model "{model_id}" needs {needs.min_devices} device(s) of at least '
            f"{needs.min_device_vram_mb} MiB{_pinned(needs)}, which no node has; nodes: "
            f"{_names([node.name for node in nodes])}",
            param="model",
        )
    if len(absent) == len(nodes):
        return NoHealthyNode(
            f"no node takes requests now ({_names([node.name for node in nodes])}: down, draining, "
            "or left alone after failures); retry later",
            retry_after_s=_NO_NODE_RETRY_AFTER_S,
        )
    names = known()
    close = difflib.get_close_matches(model_id, names, n=3, cutoff=0.5)
    hint = f"did you mean {_names(close)}?" if close else f"known models: {_names(names)}"
    return ModelNotFound(f'model "{model_id}" is not known on any node; {hint}', param="model")


def _is_unknown(node: Node, needs: CatalogueModel | None) -> bool:
    """Tell whether a node whose devices are not known may turn out to suit a catalogue model."""
    if needs is None or node.is_seen or not node.can_load:
        return False
    return not needs.pinned_on or node.name in needs.pinned_on


def _pinned(needs: CatalogueModel) -> str:
    return f" on {_names(needs.pinned_on)}" if needs.pinned_on else ""


def _names(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names) or "none"
