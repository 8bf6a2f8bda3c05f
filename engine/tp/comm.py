"""The collectives of one tensor-parallel group: shared memory or gloo on the CPU, NCCL on CUDA.

Made by the leader and the workers from the address that the leader minted, called by the parallel
layers. A group is an object of its own, not torch's global default, so nothing else in the process
depends on it. Any failure is a RuntimeError: the ranks are then out of step and must end.
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor

from cortexd.errors import ConfigError, DeadlineExceeded
from cortexd.log import event
from engine.tp.sharding import Shard
from engine.tp.shared_memory import SharedMemory, memory_bytes

INIT_TIMEOUT_S: Final = 60.0
_log = logging.getLogger("cortexd.ranks")
# Substrings of what NCCL says when a driver was updated and the machine not restarted since.
_DRIVER_MISMATCH: Final = ("driver/library version mismatch", "CUDA driver version is insufficient")


class Comm:
    """A rank's end of its group. `Comm()` is a world of one: no process group is made."""

    def __init__(
        self, shard: Shard | None = None, group: Any = None, timeout_s: float = 0.0
    ) -> None:
        self.shard = shard or Shard()
        assert self.shard.is_whole or group is not None, f"{shard} needs a process group"
        self._group = group
        self._timeout = timedelta(seconds=timeout_s)
        self._memory: SharedMemory | None = None

    @classmethod
    def join(cls, address: str, shard: Shard, device: torch.device, *, timeout_s: float) -> Comm:
        """Join the group that meets at `address` (file:///path or tcp://host:port).

        Every collective has `timeout_s`. Raises: DeadlineExceeded when not all ranks came within 60
        seconds, ConfigError when the driver does not fit its library.
        """
        if shard.is_whole:
            return cls()
        try:
            group = _make_group(address, shard, device)
            comm = cls(shard, group, timeout_s)
            comm._meet(device)
        except RuntimeError as error:
            if any(mark.lower() in str(error).lower() for mark in _DRIVER_MISMATCH):
                raise ConfigError(
                    f"NCCL cannot start: {error}; the NVIDIA driver was updated while in use, or "
                    "is too old: restart the machine, or install the driver that torch needs"
                ) from error
            raise DeadlineExceeded(
                f"rank {shard.rank} of {shard.world_size} could not join its group at {address} "
                f"within {INIT_TIMEOUT_S:g} s: {str(error).splitlines()[0][:200]}"
            ) from error
        return comm

    def __repr__(self) -> str:
        return f"Comm(rank {self.rank} of {self.world_size})"

    @property
    def rank(self) -> int:
        """This rank; 0 leads."""
        return self.shard.rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.shard.world_size

    @property
    def backend(self) -> str:
        """What carries the tensors."""
        if self._memory is not None:
            return "shared memory"
        return "nothing" if self._group is None else str(self._group.name())

    def share_memory(self, *, is_possible: bool) -> None:
        """Use shared memory instead of gloo from now on, if all ranks can; a collective on a CPU.

        A kernel may forbid that one process opens another's memory: then gloo goes on.
        """
        if self.shard.is_whole:
            return
        size = memory_bytes(self.world_size)
        fd = os.memfd_create("cortexd-ranks", os.MFD_CLOEXEC) if self.rank == 0 else -1
        try:
            if fd >= 0:
                os.ftruncate(fd, size)
            place = self.broadcast(torch.tensor([os.getpid(), fd]))
            memory = self._opened(*place.tolist()) if is_possible else None
            num_ready = int(self.all_reduce(torch.tensor([int(memory is not None)])))
        finally:
            if fd >= 0:
                os.close(fd)
        if num_ready == self.world_size:
            self._memory = memory

    def _opened(self, pid: int, fd: int) -> SharedMemory | None:
        try:
            own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            event(_log, "ranks.no_shared_memory", logging.WARNING, error=str(error))
            return None
        try:
            timeout_s = self._timeout.total_seconds()
            return SharedMemory.opened(own, self.rank, self.world_size, timeout_s)
        finally:
            os.close(own)

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Return the sum over all ranks, in the dtype of `partial`, which may be overwritten.

        On the CPU it is added up in float32, so a sum does not depend on how its terms round.
        """
        if self.shard.is_whole:
            return partial
        is_exact = partial.is_cuda or not partial.is_floating_point()
        total = partial.contiguous() if is_exact else partial.float().contiguous()
        if self._memory is not None:
            return self._memory.add_up(total).to(partial.dtype)
        options = _options("AllreduceOptions", self._timeout)
        self._group.allreduce([total], options).wait()
        return total.to(partial.dtype)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return rank 0's `tensor`; that of the others is overwritten."""
        if not self.shard.is_whole:
            options = _options("BroadcastOptions", self._timeout)
            options.rootRank = 0
            self._group.broadcast([tensor], options).wait()
        return tensor

    def gather_columns(self, part: Tensor, part_size: int, total_size: int) -> Tensor:
        """Return on rank 0 all ranks' columns side by side: (num_rows, total_size).

        `part` has `part_size` columns, those of the last ranks may be fewer. Other ranks get no
        columns.
        """
        if self.shard.is_whole:
            return part
        padded = part.contiguous()
        if part.shape[1] < part_size:
            padded = torch.nn.functional.pad(part, (0, part_size - part.shape[1]))
        if self._memory is not None:
            parts = self._memory.gather(padded)
            return torch.cat(parts, 1)[:, :total_size] if parts else part[:, :0]
        options = _options("GatherOptions", self._timeout)
        options.rootRank = 0
        if self.rank:
            self._group.gather([], [padded], options).wait()
            return part[:, :0]
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        self._group.gather([parts], [padded], options).wait()
        return torch.cat(parts, 1)[:, :total_size]

    def sanity_sum(self, device: torch.device) -> int:
        """Return the sum of a one from every rank: the world size, if the group works."""
        return int(self.all_reduce(torch.ones(1, dtype=torch.int32, device=device)))

    def _meet(self, device: torch.device) -> None:
        """Make the connections now: NCCL would make them at the first collective."""
        self.all_reduce(torch.zeros(1, dtype=torch.int32, device=device))


def _make_group(address: str, shard: Shard, device: torch.device) -> Any:
    # Not at the top: a single rank never needs it, and its import takes time.
    from torch._C._distributed_c10d import FileStore, TCPStore
    from torch.distributed import distributed_c10d as c10d

    timeout = timedelta(seconds=INIT_TIMEOUT_S)
    if address.startswith("file://"):
        store: Any = FileStore(address.removeprefix("file://"), shard.world_size)
    else:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        store = TCPStore(
            host, int(port), shard.world_size, is_master=shard.rank == 0, timeout=timeout
        )
    store.set_timeout(timeout)
    if device.type == "cuda":
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timeout
        torch.cuda.set_device(device)
        return c10d.ProcessGroupNCCL(store, shard.rank, shard.world_size, options)
    # All ranks are on this host; gloo would otherwise look up the host's name.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return c10d.ProcessGroupGloo(store, shard.rank, shard.world_size, timeout)


def _options(kind: str, timeout: timedelta) -> Any:
    from torch.distributed import distributed_c10d as c10d

    options = getattr(c10d, kind)()
    options.timeout = timeout
    return options
