"""What of a device's memory models may still take: what is free, within the operator's limit. Pure.

Used by the router before it starts an engine, and by the neuron API for gateways that place by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from cortexd.memory_need import MIB, SCRATCH_BYTES
from cortexd.messages.fleet import DeviceReport
from cortexd.models import ModelStatus

# These hold their memory, or are about to.
_HOLDING = frozenset({"loading", "loaded", "draining", "recovering"})


def held_bytes(model: ModelStatus, kind: str) -> int:
    """Return what a model's processes take on all its devices of this kind ("cpu" or "cuda")."""
    if model.state == "sleeping":
        return model.tensor_parallel * SCRATCH_BYTES[kind]  # its processes' own stays
    if model.state not in _HOLDING or not model.memory_bytes:
        return 0
    return model.memory_bytes + model.tensor_parallel * SCRATCH_BYTES[kind]


def within_limit(
    devices: Sequence[DeviceReport], models: Iterable[ModelStatus], limit_mib: int
) -> list[DeviceReport]:
    """Return the devices with no more memory, used and free, than models may take of each.

    `limit_mib` 0: all there is. What loads at this moment counts as used: the device does not show
    it yet.
    """
    held = list(models)
    return [_limited(device, held, limit_mib * MIB) for device in devices]


def _limited(device: DeviceReport, models: Sequence[ModelStatus], limit: int) -> DeviceReport:
    ours = coming = 0
    for model in models:
        share = _share(model, device)
        ours += share
        coming += share if model.state == "loading" else 0
    total = min(device.memory_total_bytes, limit) if limit else device.memory_total_bytes
    free = device.memory_total_bytes - device.memory_used_bytes - coming
    if limit:
        free = min(free, limit - ours)
    return msgspec.structs.replace(
        device, memory_total_bytes=total, memory_used_bytes=total - min(max(free, 0), total)
    )


def _share(model: ModelStatus, device: DeviceReport) -> int:
    """Return what a model holds on one device; on a CPU all its ranks are on the same."""
    held = held_bytes(model, device.kind)
    if device.kind == "cpu":
        return held
    indices = model.devices or tuple(range(model.tensor_parallel))
    return held // model.tensor_parallel if device.index in indices else 0
