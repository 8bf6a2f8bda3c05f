"""The parts of the router's fleet view: one remote node, and this host as a node.

Only the router's loop touches them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from actors.router.managed_model import Lease, ManagedModel
from cortexd.affinity import PrefixMemory
from cortexd.breaker import Breaker
from cortexd.catalogue import DEFAULT_PRIORITY
from cortexd.messages import HostReport, NeuronReport
from cortexd.placement import Device, Node, Resident
from cortexd.settings import NeuronEntry

# A node that nothing has been heard of for so long is not trusted, whatever it said last.
_MAX_AGE_S: Final = 10.0


@dataclass(slots=True)
class RemoteNode:
    """One neuron: what it said last, and what we have sent there."""

    entry: NeuronEntry
    report: NeuronReport | None = None
    heard_at: float = 0.0
    is_refusing: bool = False  # a connection failed since the last report
    leases: dict[str, Lease] = field(default_factory=dict)  # by request
    known_then: dict[str, int] = field(default_factory=dict)  # our leases at the last report
    breaker: Breaker = field(default_factory=Breaker)
    prefixes: PrefixMemory = field(default_factory=PrefixMemory)

    @property
    def has_answered(self) -> bool:
        """Tell whether it ever answered a poll."""
        return self.report is not None and self.report.num_successes > 0

    @property
    def is_healthy(self) -> bool:
        """Tell whether it answers."""
        if self.report is None or self.is_refusing or not self.report.is_healthy:
            return False
        return time.monotonic() - self.heard_at < _MAX_AGE_S

    @property
    def is_usable(self) -> bool:
        """Tell whether a request may go there now."""
        if not self.is_healthy or (self.report is not None and self.report.is_draining):
            return False
        return self.breaker.allows(time.monotonic())

    def has_model(self, model_id: str) -> bool:
        """Tell whether it was last seen with a model, in whatever state."""
        report = self.report
        return report is not None and any(one.model_id == model_id for one in report.models)

    def num_own(self, model_id: str) -> int:
        """Return how many of our requests run there for a model."""
        return sum(lease.model_id == model_id for lease in self.leases.values())

    def heard(self, report: NeuronReport) -> None:
        """Take over a report."""
        was_healthy = self.report is not None and self.report.is_healthy
        self.report = report
        self.heard_at = time.monotonic()
        if report.error is None:
            self.is_refusing = False
        if was_healthy and not report.is_healthy:
            self.breaker.went_down(self.heard_at)
            self.prefixes.forget()
        self.known_then = {model.model_id: self.num_own(model.model_id) for model in report.models}

    def view(self, turn: int = 0, *, failed_id: str | None = None) -> Node:
        """Return what placement looks at; our own dispatches count at once.

        `failed_id` is a model whose last load here failed.
        """
        report = self.report
        name, can_load = self.entry.name, self.entry.kind == "cortex"
        if report is None:
            return Node(name, False, can_load, is_seen=False)
        busy = {}
        for model in report.models:
            reported = model.in_flight + model.queue_depth
            of_others = max(0, reported - self.known_then.get(model.model_id, 0))
            busy[model.model_id] = of_others + self.num_own(model.model_id)
        states = {model.model_id: model.state for model in report.models}
        if failed_id is not None and states.get(failed_id, "unloaded") == "unloaded":
            states[failed_id] = "failed"
        return Node(
            name,
            self.is_usable,
            can_load,
            is_seen=self.has_answered and (bool(report.devices) or not can_load),
            devices=[Device(item.index, item.total_mib, item.free_mib) for item in report.devices],
            states=states,
            busy=busy,
            seats=self._seats(report),
            residents=[
                Resident(
                    model.memory_mib or 0,
                    DEFAULT_PRIORITY if model.priority is None else model.priority,
                    busy[model.model_id] > 0,
                )
                for model in report.models
                if model.state == "loaded"
            ],
            turn=turn,
        )

    def _seats(self, report: NeuronReport) -> dict[str, int]:
        """Return the seats of each model: as configured, else as the node says."""
        configured = self.entry.max_in_flight
        return {
            model.model_id: seats
            for model in report.models
            if (seats := configured or model.max_in_flight)
        }


def local_view(
    name: str,
    models: Mapping[str, ManagedModel],
    host: HostReport | None,
    *,
    is_draining: bool,
    turn: int,
) -> Node:
    """Return this host as placement looks at it; what a request may not load is left out."""
    return Node(
        name,
        is_healthy=not is_draining,
        can_load=True,
        is_seen=host is not None,
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
        turn=turn,
    )
