"""Whether the devices that a model may use have room for it, by what the poller saw last.

Used by the model loader before it starts any process. Pure; the engine checks again what it really
finds, since a report is up to a second old.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cortexd.errors import InsufficientMemory
from cortexd.memory_need import MemoryNeed, describe, memory_need, missing_bytes, what_fits
from cortexd.messages import ResolvedFiles
from cortexd.messages.fleet import DeviceReport
from cortexd.models import LoadOptions
from cortexd.settings import Engine

_RETRY_AFTER_S = 30


@dataclass(frozen=True, slots=True)
class DeviceRoom:
    """What each device needs (one entry per rank there), has free, and lacks; by device index."""

    kind: str
    needs: dict[int, list[MemoryNeed]]
    free: dict[int, int]
    missing: dict[int, int]

    @classmethod
    def of(
        cls,
        wanted: Sequence[int],
        resolved: ResolvedFiles,
        settings: Engine,
        devices: Sequence[DeviceReport],
    ) -> DeviceRoom:
        """Take the device of every rank; on a host without the CUDA devices all share the CPU."""
        free = {
            device.index: device.memory_total_bytes - device.memory_used_bytes for device in devices
        }
        kinds = {device.index: device.kind for device in devices}
        uses_cpu = settings.device == "cpu" or "cuda" not in kinds.values()
        kind = "cpu" if uses_cpu else "cuda"
        need = memory_need(
            resolved.spec, resolved.weights, settings, kind=kind, world_size=len(wanted)
        )
        needs: dict[int, list[MemoryNeed]] = {}
        for index in wanted:
            needs.setdefault(0 if uses_cpu else index, []).append(need)
        if uses_cpu and kinds.get(0) != "cpu":
            free = {}  # the report is about GPUs: the host's memory is unknown
        totals = {index: sum(each.total for each in ranks) for index, ranks in needs.items()}
        return cls(kind, needs, free, missing_bytes(totals, free))

    @classmethod
    def to_wake(
        cls, wanted: Sequence[int], memory_bytes: int, devices: Sequence[DeviceReport]
    ) -> DeviceRoom:
        """Take the devices of a sleeping model's ranks, which together held so many bytes there."""
        need = MemoryNeed(-(-memory_bytes // len(wanted)), 0, 0, 0)
        needs: dict[int, list[MemoryNeed]] = {}
        for index in wanted:
            needs.setdefault(index, []).append(need)
        free = {
            device.index: device.memory_total_bytes - device.memory_used_bytes for device in devices
        }
        totals = {index: sum(each.total for each in ranks) for index, ranks in needs.items()}
        return cls("cuda", needs, free, missing_bytes(totals, free))

    @property
    def needed_bytes(self) -> int:
        """All ranks together."""
        return sum(need.total for ranks in self.needs.values() for need in ranks)

    def too_small_to_wake(self, options: LoadOptions) -> InsufficientMemory:
        """Return the error: what a sleeping model needs, and what is free."""
        index, lacking = next(iter(self.missing.items()))
        needed = sum(need.total for need in self.needs[index])
        return InsufficientMemory(
            f'model "{options.model_id}" cannot wake: device {index} needs {needed >> 20} MiB and '
            f"{(needed - lacking) >> 20} are free; unload a model",
            retry_after_s=_RETRY_AFTER_S,
            needed_bytes=self.needed_bytes,
            available_bytes=self.needed_bytes - sum(self.missing.values()),
        )

    def refusal(
        self, options: LoadOptions, resolved: ResolvedFiles, settings: Engine
    ) -> InsufficientMemory:
        """Return the error: needed and free bytes of each device, and what would fit."""
        index = next(iter(self.missing))
        num_ranks = len(self.needs[index])
        fitting = what_fits(
            resolved.spec,
            resolved.weights,
            settings,
            kind=self.kind,
            world_size=options.tensor_parallel,
            free_bytes=self.free[index] // num_ranks,
        )
        advice = f"or use what would fit: {', '.join(fitting)}" if fitting else ""
        lacking = {each: self.needs[each] for each in self.missing}
        return InsufficientMemory(
            f'model "{options.model_id}" does not fit: {describe(lacking, self.free)}; unload a '
            f"model, {advice or 'or choose a smaller one or a smaller quant of it'}",
            retry_after_s=_RETRY_AFTER_S,
            needed_bytes=self.needed_bytes,
            available_bytes=self.needed_bytes - sum(self.missing.values()),
        )
