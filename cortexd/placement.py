"""Where a request for a model goes, given what is known of every node. Pure; called by the router.

Order of rules: a node that has the model loaded, the least busy first; a node that is bringing it
up; a node that knows it; a node that could hold it by the catalogue. Nothing is placed on a node
that does not answer, and a model is never brought up twice at the same time.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from cortexd.catalogue import CatalogueModel
from cortexd.errors import CortexError, ModelNotFeasible, ModelNotFound, NoHealthyNode
from cortexd.models import LoadOptions, ModelState

_COMING_UP: Final = frozenset({"loading", "recovering", "draining"})
_FEASIBLE_RETRY_AFTER_S: Final = 3.0
_NO_NODE_RETRY_AFTER_S: Final = 5.0


@dataclass(slots=True, frozen=True)
class Device:
    """Memory of one device, MiB; `free_mib` None: unknown."""

    index: int
    total_mib: int
    free_mib: int | None = None


@dataclass(slots=True, frozen=True)
class Node:
    """One node at this moment. `busy`: requests running or queued there, by loaded model.

    `is_seen`: its devices and models are known, if only from the time before it went away.
    """

    name: str
    is_healthy: bool
    can_load: bool
    is_seen: bool = True
    devices: Sequence[Device] = ()
    states: Mapping[str, ModelState] = field(default_factory=dict)
    busy: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Placement:
    """What to do: send the request to `node` ("run"), load there ("load") or wait for it."""

    action: Literal["run", "load", "wait"]
    node: str


def place(
    model_id: str, nodes: Sequence[Node], needs: CatalogueModel | None, known: Sequence[str] = ()
) -> Placement:
    """Return where the model runs, or should. `known` names all models, for the error.

    Raises: ModelNotFound, ModelNotFeasible, NoHealthyNode.
    """
    healthy = [node for node in nodes if node.is_healthy]
    loaded = [node for node in healthy if node.states.get(model_id) == "loaded"]
    if loaded:
        best = min(loaded, key=lambda node: (node.busy.get(model_id, 0), node.name))
        return Placement("run", best.name)
    coming_up = [node for node in healthy if node.states.get(model_id) in _COMING_UP]
    if coming_up:
        return Placement("wait", min(node.name for node in coming_up))
    candidates = [node for node in healthy if may_hold(node, model_id, needs)]
    if not candidates:
        raise _refusal(model_id, nodes, needs, known)
    best = min(candidates, key=lambda node: _load_rank(node, model_id, needs))
    return Placement("load", best.name)


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
) -> tuple[bool, bool, bool, int, str]:
    """Return the sort key of a cold load: not failed there, known, fits free, most free, name."""
    state = node.states.get(model_id)
    free_mib = sum(_free_mib(device) for device in node.devices)
    return (state == "failed", state is None, not _fits_free(node, needs), -free_mib, node.name)


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
    model_id: str, nodes: Sequence[Node], needs: CatalogueModel | None, known: Sequence[str]
) -> CortexError:
    """Return why no healthy node serves the model; retriable when another one may come back."""
    absent = [node for node in nodes if not node.is_healthy]
    suitable = [
        node.name
        for node in absent
        if model_id in node.states or may_hold(node, model_id, needs) or _is_unknown(node, needs)
    ]
    if suitable:
        return NoHealthyNode(
            f'model "{model_id}" runs on {_names(suitable)}, which does not answer; retry later',
            retry_after_s=_FEASIBLE_RETRY_AFTER_S,
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
            f"no node answers ({_names([node.name for node in nodes])}); retry later",
            retry_after_s=_NO_NODE_RETRY_AFTER_S,
        )
    close = difflib.get_close_matches(model_id, known, n=3, cutoff=0.5)
    hint = f"did you mean {_names(close)}?" if close else f"known models: {_names(known)}"
    return ModelNotFound(f'model "{model_id}" is not known on any node; {hint}', param="model")


def _is_unknown(node: Node, needs: CatalogueModel | None) -> bool:
    """Tell whether a node that was never seen may turn out to suit a catalogue model."""
    if needs is None or node.is_seen or not node.can_load:
        return False
    return not needs.pinned_on or node.name in needs.pinned_on


def _pinned(needs: CatalogueModel) -> str:
    return f" on {_names(needs.pinned_on)}" if needs.pinned_on else ""


def _names(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names) or "none"
