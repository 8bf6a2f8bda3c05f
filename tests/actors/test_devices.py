"""What a host says of its GPUs, with NVML played by a script."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from actors.devices import DeviceProbe


class NvmlError(Exception):
    """NVML's errors have a number."""

    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


def nvml(error: NvmlError | None) -> ModuleType:
    """Return a driver library that fails to start with this error, or has no device."""
    module = ModuleType("pynvml")

    def start() -> None:
        if error is not None:
            raise error

    module.__dict__.update(
        nvmlInit=start,
        nvmlSystemGetDriverVersion=lambda: "550.1",
        nvmlSystemGetCudaDriverVersion=lambda: 12040,
        nvmlDeviceGetCount=lambda: 0,
    )
    return module


def test_versions_are_those_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's is the newest that the driver runs."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml(None))
    probe = DeviceProbe()
    assert (probe.driver_version, probe.cuda_version) == ("550.1", "12.4")
    assert probe.gpu_fault is None


@pytest.mark.parametrize(("number", "has_fault"), [(12, False), (9, False), (18, True)])
def test_only_a_driver_that_does_not_fit_its_library_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, number: int, has_fault: bool
) -> None:
    """A host without library or driver has no GPU; one that was updated and not rebooted has."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml(NvmlError(number)))
    probe = DeviceProbe()
    assert (probe.gpu_fault is not None) == has_fault
    if probe.gpu_fault is not None:
        assert "reboot" in probe.gpu_fault
    assert [device.kind for device in probe.read()] == ["cpu"]
