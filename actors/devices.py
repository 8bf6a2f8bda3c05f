"""Reads the host's compute devices: NVIDIA GPUs through NVML, otherwise the CPU and its memory."""

from __future__ import annotations

import platform
from typing import Any, Final

import psutil

from cortexd.messages.fleet import DeviceReport

# Of NVML: the driver that runs is another one than its library is for.
_VERSION_MISMATCH: Final = 18


class DeviceProbe:
    """Open NVML once (when there is a driver) and read devices on demand; blocking."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self.driver_version: str | None = None
        self.cuda_version: str | None = None  # the newest that the driver runs
        self.unavailable_reason: str | None = None
        self.gpu_fault: str | None = None  # there are GPUs, and they cannot be used
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self.driver_version = str(pynvml.nvmlSystemGetDriverVersion())
            version = pynvml.nvmlSystemGetCudaDriverVersion()
            self.cuda_version = f"{version // 1000}.{version % 1000 // 10}"
        except Exception as error:  # NVMLError classes are made at run time; any means "no NVML"
            self.unavailable_reason = str(error)
            if getattr(error, "value", None) == _VERSION_MISMATCH:
                self.gpu_fault = (
                    f"{error}: the NVIDIA driver was updated since this host started; reboot it, "
                    'or set engine.device = "cpu"'
                )

    def read(self) -> list[DeviceReport]:
        """Return all GPUs, or the CPU as device 0 when there is none."""
        if self._nvml is not None and self._nvml.nvmlDeviceGetCount() > 0:
            return [self._gpu(index) for index in range(self._nvml.nvmlDeviceGetCount())]
        return [_cpu()]

    @staticmethod
    def host_free_bytes() -> int:
        """Return the memory that processes may still take without swapping."""
        return int(psutil.virtual_memory().available)

    def _gpu(self, index: int) -> DeviceReport:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        return DeviceReport(
            index=index,
            name=str(nvml.nvmlDeviceGetName(handle)),
            kind="cuda",
            memory_total_bytes=int(memory.total),
            memory_used_bytes=int(memory.used),
            utilization_pct=self._optional(
                lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            ),
            temperature_c=self._optional(
                lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
            ),
            compute_capability=f"{major}.{minor}",
        )

    def _optional(self, read: Any) -> float | None:
        """Return a reading that some boards and virtual GPUs do not offer."""
        try:
            return float(read())
        except self._nvml.NVMLError:
            return None


def _cpu() -> DeviceReport:
    memory = psutil.virtual_memory()
    return DeviceReport(
        index=0,
        name=platform.processor() or platform.machine(),
        kind="cpu",
        memory_total_bytes=memory.total,
        memory_used_bytes=memory.total - memory.available,
        utilization_pct=psutil.cpu_percent(interval=None),
    )
