"""What the device can do at most: bytes copied and products computed per second, measured."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

_COPY_BYTES: Final = 2 << 30
_MATMUL_SIZE: Final = 8192
_ROUNDS: Final = 20


@dataclass(frozen=True, slots=True)
class Ceilings:
    """`copy_tb_s` counts bytes read and written; `matmul_tflop_s` is bfloat16."""

    copy_tb_s: float
    matmul_tflop_s: float


def measure_ceilings() -> Ceilings:
    """Return the best of several copies and products."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = seconds(lambda: target.copy_(source))
    left = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE, device="cuda", dtype=torch.bfloat16)
    matmul_s = seconds(lambda: left @ left)
    return Ceilings(2 * _COPY_BYTES / copy_s / 1e12, 2 * _MATMUL_SIZE**3 / matmul_s / 1e12)


def seconds(work: Callable[[], object]) -> float:
    """Return the least time of several runs, after a first one that does not count."""
    work()
    times = []
    for _ in range(_ROUNDS):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)


def describe_device() -> str:
    """Return the device's name, clocks and limits, and the versions, in one line."""
    query = "name,clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version"
    shown = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split("\n")[0]
    name = shown or torch.cuda.get_device_name()
    return f"device: {name}; torch {torch.__version__}, CUDA {torch.version.cuda}"
