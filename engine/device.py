"""The choice of device and dtype, memory figures, and which torch errors mean what.

Called by the engine when it loads and when a step fails. Stateless.
"""

from __future__ import annotations

import logging
import os
from typing import Final

import psutil
import torch

from cortexd import errors
from cortexd.log import event
from cortexd.models import ModelSpec
from cortexd.settings import Engine as EngineSettings
from engine.kernels import cpu as native
from engine.kernels import triton as triton_kernels
from engine.layers.linear import Backend

# Below it "auto" activations keep 16 bits: rounding to 8 costs a small model most (SmolLM2-135M,
# 576 wide, forgets the capital of France) and saves it least.
_MIN_ROUNDED_HIDDEN_SIZE: Final = 1024
_log = logging.getLogger("cortexd.engine")

Device = torch.device  # for those who may not import torch

DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Substrings of the messages torch raises as plain RuntimeError when host memory is exhausted.
_HOST_OOM_MARKS: Final = ("can't allocate memory", "not enough memory")
# No CUDA call succeeds after one of these: the process must end.
_FATAL_MARKS: Final = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "NCCL error", "device-side")


def choose_device(settings: EngineSettings, index: int = 0) -> torch.device:
    """Return the device the settings ask for; of several CUDA devices the one of this index.

    Raises: ConfigError when there is no such device.
    """
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise errors.ConfigError(
            'engine.device = "cuda", but torch sees no CUDA device; use "auto" or "cpu"'
        )
    if not available or settings.device == "cpu":
        return torch.device("cpu")
    if index and index >= torch.cuda.device_count():
        raise errors.ConfigError(
            f"CUDA device {index} does not exist; devices here: 0 to "
            f"{torch.cuda.device_count() - 1}; name others with devices"
        )
    return torch.device("cuda", index)


def choose_dtype(
    settings: EngineSettings, device: torch.device, spec: ModelSpec, is_quantized: bool
) -> torch.dtype:
    """Return the compute dtype.

    "auto" is bfloat16 on CUDA. On a CPU it is float32: the native kernels multiply weights as they
    are stored with float32 activations, and float16 arithmetic is slow there. Only bfloat16
    safetensors that stay dense run in bfloat16 where there are no native kernels, as float32 would
    double them.
    """
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    if device.type == "cuda":
        return torch.bfloat16
    is_native = settings.backend != "reference" and native.available()
    is_bfloat16 = spec.torch_dtype == "bfloat16" and not is_quantized
    return torch.bfloat16 if is_bfloat16 and not is_native else torch.float32


def choose_backend(
    settings: EngineSettings, device: torch.device, spec: ModelSpec | None = None
) -> Backend:
    """Return what computes on the device; "auto" and "exact" stand for the native CPU kernels.

    Raises: ConfigError when the settings demand Triton, or rounded activations, and the kernels for
    that cannot run here.
    """
    is_cpu = device.type == "cpu"
    if settings.activations == "rounded" and not (is_cpu and native.available()):
        reason = native.status() if is_cpu else f"the model runs on {device}"
        raise errors.ConfigError(
            f'engine.activations = "rounded" is for the CPU\'s kernels, but {reason}; use "auto"'
        )
    if settings.backend == "auto" and is_cpu:
        if not native.available():
            event(_log, "backend.reference", logging.WARNING, device="cpu", reason=native.status())
        is_small = spec is not None and spec.hidden_size < _MIN_ROUNDED_HIDDEN_SIZE
        is_exact = settings.activations == "exact" or (settings.activations == "auto" and is_small)
        return "exact" if is_exact else "auto"
    if settings.backend == "reference":
        return "reference"
    reason = triton_kernels.why_unusable(device)
    if not reason:
        return "triton"
    if settings.backend == "triton":
        raise errors.ConfigError(
            f'engine.backend = "triton", but {reason}; use "auto" or "reference"'
        )
    event(_log, "backend.reference", logging.WARNING, device=str(device), reason=reason)
    return "reference"


def kernels_line(settings: EngineSettings, device: torch.device) -> str:
    """Say in one line which kernels compute on the device, and why the reference where it does."""
    backend = choose_backend(settings, device)
    if backend in ("auto", "exact"):
        return native.status()
    return f"kernels: {backend}"


def set_num_threads(settings: EngineSettings, world_size: int = 1) -> None:
    """Let torch and the native kernels use as many threads as the settings say.

    0 is as many as this process may run on, shared among the ranks of its group.
    """
    count = settings.num_threads or max(1, len(os.sched_getaffinity(0)) // world_size)
    torch.set_num_threads(count)
    if native.available():
        native.set_num_threads(count)


def leave_threads_to_native() -> None:
    """Let torch compute on one thread, because a whole step is one native call.

    What remains for torch is small, and its threads would spin for a while after each operation on
    the cores that the native ones need (measured: 3 ms of a 20 ms step).
    """
    torch.set_num_threads(1)


def free_memory_bytes(device: torch.device, world_size: int = 1) -> int:
    """Return how much memory can be had on the device now; on a CPU all ranks share it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the caching allocator holds and does not use can be had as well.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    return int(psutil.virtual_memory().available) // world_size


def total_memory_bytes(device: torch.device) -> int:
    """Return how much memory the device has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)


def device_name(device: torch.device) -> str:
    """Return the device as users name it."""
    if device.type == "cuda":
        return f"cuda:{device.index or 0} ({torch.cuda.get_device_name(device)})"
    count = native.num_threads() if native.available() else torch.get_num_threads()
    return f"cpu ({count} threads)"


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether the error says that host or device memory is exhausted."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _HOST_OOM_MARKS)


def is_device_poisoned(error: BaseException) -> bool:
    """Tell whether the device cannot be used any more by this process."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return any(mark in str(error) for mark in _FATAL_MARKS)


def is_alive(device: torch.device) -> bool:
    """Tell whether the device can go on, once it has done what it was asked for.

    Kernels fail after their call has returned.
    """
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def release_cached_memory(device: torch.device) -> None:
    """Give the caching allocator's unused memory back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
