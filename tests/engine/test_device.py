"""The choice of device and dtype, and the reading of torch's errors."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from cortexd import errors
from cortexd.settings import Engine as EngineSettings
from engine import device
from engine.kernels.cpu import library
from tests.engine.doubles import TINY

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("where", "stored", "is_quantized", "setting", "expected"),
    [
        (CPU, "bfloat16", True, "auto", torch.float32),
        (CPU, "bfloat16", False, "auto", torch.float32),
        (CPU, "bfloat16", False, "bfloat16", torch.bfloat16),
        (CPU, "float16", False, "auto", torch.float32),
        (CPU, "float32", False, "auto", torch.float32),
        (CPU, "bfloat16", False, "float32", torch.float32),
        (CUDA, "float32", False, "auto", torch.bfloat16),
        (CUDA, "bfloat16", True, "float16", torch.float16),
    ],
)
def test_choose_dtype_follows_device_and_file(
    where: torch.device, stored: str, is_quantized: bool, setting: Any, expected: torch.dtype
) -> None:
    """What "auto" means, and that a setting overrides it."""
    spec = msgspec.structs.replace(TINY, torch_dtype=stored)
    assert device.choose_dtype(EngineSettings(dtype=setting), where, spec, is_quantized) == expected


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_choose_dtype_keeps_bfloat16_where_no_native_kernel_runs(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 torch would hold the weights twice as large."""
    if backend == "auto":
        monkeypatch.setattr(device.native, "available", lambda: False)
    spec = msgspec.structs.replace(TINY, torch_dtype="bfloat16")
    settings = EngineSettings(backend=backend)
    assert device.choose_dtype(settings, CPU, spec, is_quantized=False) == torch.bfloat16
    assert device.choose_dtype(settings, CPU, spec, is_quantized=True) == torch.float32


def test_kernels_line_names_the_active_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native kernels, the reference that was asked for, or why there are none."""
    assert device.kernels_line(EngineSettings(), CPU).startswith("cpu kernels: native ")
    reference = EngineSettings(backend="reference")
    assert device.kernels_line(reference, CPU) == "kernels: reference"
    monkeypatch.setattr(library, "_load", lambda: "no C++ compiler found")
    line = device.kernels_line(EngineSettings(), CPU)
    assert line == "cpu kernels: torch reference (no C++ compiler found)"


def test_missing_native_kernels_are_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The reference runs, and the log says why."""
    monkeypatch.setattr(library, "_load", lambda: "no C++ compiler found")
    assert device.choose_backend(EngineSettings(), CPU) == "auto"
    (record,) = caplog.records
    assert record.getMessage() == "backend.reference"
    assert "no C++ compiler found" in str(record.__dict__)


@pytest.mark.parametrize(
    ("setting", "hidden_size", "expected"),
    [
        ("auto", 1023, "exact"),
        ("auto", 1024, "auto"),
        ("exact", 4096, "exact"),
        ("rounded", 64, "auto"),
    ],
)
def test_activations_follow_the_setting_then_the_size(
    setting: Any, hidden_size: int, expected: str
) -> None:
    """Small models keep their digits unless told otherwise."""
    spec = msgspec.structs.replace(TINY, hidden_size=hidden_size)
    assert device.choose_backend(EngineSettings(activations=setting), CPU, spec) == expected


def test_rounded_activations_are_refused_where_nothing_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not silently ignored: on CUDA, and on a CPU without native kernels."""
    settings = EngineSettings(activations="rounded")
    with pytest.raises(errors.ConfigError, match='the model runs on cuda:0; use "auto"'):
        device.choose_backend(settings, CUDA, TINY)
    monkeypatch.setattr(library, "_load", lambda: "no C++ compiler found")
    with pytest.raises(errors.ConfigError, match="no C\\+\\+ compiler found"):
        device.choose_backend(settings, CPU, TINY)


def test_choose_device_refuses_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" falls to the CPU, "cuda" does not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose_device(EngineSettings()) == CPU
    with pytest.raises(errors.ConfigError, match="no CUDA device"):
        device.choose_device(EngineSettings(device="cuda"))


def test_choose_device_takes_the_gpu_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first CUDA device is the default where there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.choose_device(EngineSettings()) == CUDA
    assert device.choose_device(EngineSettings(device="cpu")) == CPU


def test_errors_are_told_apart() -> None:
    """Memory can be made, a poisoned device cannot be healed, other faults are neither."""
    host = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 99 bytes")
    fatal = RuntimeError("CUDA error: an illegal memory access was encountered")
    other = RuntimeError("shapes do not match")
    for error in (host, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert device.is_out_of_memory(error)
        assert not device.is_device_poisoned(error)
    assert device.is_device_poisoned(fatal)
    assert not device.is_out_of_memory(fatal)
    assert not device.is_device_poisoned(other)
    assert not device.is_device_poisoned(ValueError("CUDA error"))


def test_free_memory_of_the_host_is_positive() -> None:
    """The operating system's own figure."""
    assert device.free_memory_bytes(CPU) > 0
