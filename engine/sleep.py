"""Sleep: a model's weights wait in pinned host memory, and its device memory is free for others.

Used by the engine between steps, with no request running. Weights are copied out and back into the
same tensors; the KV cache is not kept, so the prefix cache is emptied. Waking is a copy over the
bus, many times faster than a load. On a CPU there is nothing to gain, and it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cortexd import errors
from engine import device as devices


class Asleep:
    """Storages that were emptied, and the bytes of those that are kept in host memory."""

    def __init__(self, kept: list[Tensor], dropped: list[Tensor]) -> None:
        """Empty the tensors' storages, of which several tensors may share one."""
        self._host: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._sizes: list[tuple[torch.UntypedStorage, int]] = []
        for storage in _storages(kept):
            is_pinned = storage.device.type == "cuda"
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=is_pinned)
            host.copy_(_bytes_of(storage))
            self._host.append((storage, host))
            storage.resize_(0)
        for storage in _storages(dropped):
            self._sizes.append((storage, storage.nbytes()))
            storage.resize_(0)

    def wake(self) -> None:
        """Fill the storages again, dropped ones with zeros; may be repeated after an error.

        Raises: RuntimeError when the device has no memory for them.
        """
        for storage, size in self._sizes:
            storage.resize_(size)
            _bytes_of(storage).zero_()
        for storage, host in self._host:
            storage.resize_(host.nbytes)
            _bytes_of(storage).copy_(host, non_blocking=True)
        # The pinned copies are freed next, and must have been read.
        if self._host and self._host[0][0].device.type == "cuda":
            torch.cuda.synchronize(self._host[0][0].device)


def _storages(tensors: list[Tensor]) -> list[torch.UntypedStorage]:
    """Return the tensors' storages, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return list({s.data_ptr(): s for s in storages if s.nbytes()}.values())


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def tensors_of(root: object) -> list[Tensor]:
    """Return all tensors that an object of the engine holds, directly or through others."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    pending = [root]
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, Tensor):
            found[id(current)] = current
        else:
            pending += _parts(current)
    return list(found.values())


def _parts(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value
    elif type(value).__module__.startswith("engine."):
        yield from getattr(value, "__dict__", {}).values()
        for kind in type(value).__mro__:
            for name in getattr(kind, "__slots__", ()):
                yield getattr(value, name, None)


def may_sleep(device: torch.device, is_split: bool) -> bool:
    """Return whether a model there can sleep, given host memory for its weights."""
    return device.type != "cpu" and not is_split


def check_can_sleep(device: torch.device, weight_bytes: int, *, is_split: bool) -> None:
    """Raise InvalidRequest where a model cannot sleep, InsufficientMemory without room for it."""
    if device.type == "cpu":
        raise errors.InvalidRequest(
            "the model cannot sleep: it runs on the cpu, its weights are in host memory already; "
            "unload it to free that"
        )
    if is_split:
        raise errors.InvalidRequest(
            "the model cannot sleep: it is split over several ranks; unload it instead"
        )
    free = devices.free_memory_bytes(torch.device("cpu"))
    if free < weight_bytes:
        raise errors.InsufficientMemory(
            f"the model's weights take {weight_bytes} bytes of host memory to sleep, {free} are "
            "available; unload it instead",
            needed_bytes=weight_bytes,
            available_bytes=free,
        )
