"""The parts of the router's fleet view: one remote node, one remote load, and this host as a node.

Only the router's loop touches them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from actors.managed_model import ManagedModel
from cortexd.errors import CortexError
from cortexd.messages import HostReport, NeuronReport
from cortexd.placement import Device, Node
from cortexd.settings import NeuronEntry

# A node that nothing has been heard of for so long is not trusted, whatever it said last.
_MAX_AGE_S: Final = 10.0
_FIRST_COOLDOWN_S: Final = 10.0
_MAX_COOLDOWN_S: Final = 600.0


@dataclass(slots=True)
class RemoteNode:
    """One neuron: what it said last, and what we have sent there."""

    entry: NeuronEntry
    report: NeuronReport | None = None
    heard_at: float = 0.0
    is_refusing: bool = False  # a connection failed since the last report
    leases: dict[str, tuple[str, str]] = field(default_factory=dict)  # request → (model, front)
    known_then: dict[str, int] = field(default_factory=dict)  # our leases at the last report

    @property
    def is_healthy(self) -> bool:
        """Tell whether it may be used now."""
        if self.report is None or self.is_refusing or not self.report.is_healthy:
            return False
        return time.monotonic() - self.heard_at < _MAX_AGE_S

    def num_own(self, model_id: str) -> int:
        """Return how many of our requests run there for a model."""
        return sum(model == model_id for model, _ in self.leases.values())

    def heard(self, report: NeuronReport) -> None:
        """Take over a report."""
        self.report = report
        self.heard_at = time.monotonic()
        if report.error is None:
            self.is_refusing = False
        self.known_then = {model.model_id: self.num_own(model.model_id) for model in report.models}

    def view(self) -> Node:
        """Return what placement looks at; our own dispatches count at once."""
        report = self.report
        name, can_load = self.entry.name, self.entry.kind == "cortex"
        if report is None:
            return Node(name, False, can_load, is_seen=False)
        busy = {}
        for model in report.models:
            reported = model.in_flight + model.queue_depth
            of_others = max(0, reported - self.known_then.get(model.model_id, 0))
            busy[model.model_id] = of_others + self.num_own(model.model_id)
        return Node(
            name,
            self.is_healthy,
            can_load,
            is_seen=report.num_successes > 0,
            devices=[Device(item.index, item.total_mib, item.free_mib) for item in report.devices],
            states={model.model_id: model.state for model in report.models},
            busy=busy,
        )


@dataclass(slots=True)
class RemoteLoad:
    """A load that runs at a node, or the failure of the last one."""

    node: str
    error: CortexError | None = None
    failed_at: float = 0.0
    num_failures: int = 0

    @property
    def cooldown_left_s(self) -> float:
        """Seconds until a failed load is tried again."""
        if self.error is None:
            return 0.0
        cooldown_s = _FIRST_COOLDOWN_S * 2.0 ** min(self.num_failures - 1, 10)
        return max(0.0, self.failed_at + min(cooldown_s, _MAX_COOLDOWN_S) - time.monotonic())


def local_view(name: str, models: Mapping[str, ManagedModel], host: HostReport | None) -> Node:
    """Return this host as placement looks at it; what a request may not load is left out."""
    return Node(
        name,
        is_healthy=True,
        can_load=True,
        devices=[
            Device(
                device.index,
                device.memory_total_bytes >> 20,
                (device.memory_total_bytes - device.memory_used_bytes) >> 20,
            )
            for device in (host.devices if host is not None else [])
        ],
        states={
            model_id: model.state
            for model_id, model in models.items()
            if model.is_known or model.state not in {"unloaded", "failed"}
        },
        busy={model_id: len(model.leases) for model_id, model in models.items()},
    )
