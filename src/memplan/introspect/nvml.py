"""One GPU's memory as its driver counts it, asked again and again by a process that is measured.

The driver's library stays open from the first question to the last: starting it takes longer than a step. Source: NVML
API reference, https://docs.nvidia.com/deploy/nvml-api; nvml.h of CUDA 13.
"""

from __future__ import annotations

import ctypes
from typing import Any

from memplan.catalog.detect import read_nvml, visible_devices
from memplan.errors import SpecError

__all__ = ["Driver"]

_NOT_AVAILABLE = 2**64 - 1
"""NVML_VALUE_NOT_AVAILABLE: the driver does not tell what a process uses, as under Windows."""
_MOST_PROCESSES = 256


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t, of nvmlDeviceGetComputeRunningProcesses_v3 (driver R510 and newer)."""

    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


class Driver:
    """The first visible GPU. Raises SpecError if there is none."""

    def __init__(self, library: Any = None) -> None:
        """``library`` is libnvidia-ml, by default this machine's."""
        devices = visible_devices(read_nvml()) if library is None else None
        if devices is not None and not devices:
            raise SpecError("gpu: there is no NVIDIA GPU here, and one is needed. Look at nvidia-smi.")
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1") if library is None else library
        self._nvml.nvmlInit_v2()
        self._handle = ctypes.c_void_p()
        if devices is None:
            self._nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._handle))
        else:
            self._nvml.nvmlDeviceGetHandleByUUID(devices[0].uuid.encode(), ctypes.byref(self._handle))

    def used(self) -> int:
        """Bytes in use, by whomever, and what the driver keeps; without a context. Raises RuntimeError."""
        memory = _Memory()
        code = self._nvml.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory))
        if code != 0:
            raise RuntimeError(f"NVML does not tell the memory in use: error {code}")
        return int(memory.total - memory.free)

    def processes(self) -> dict[int, int] | None:
        """Bytes of each process, as nvidia-smi lists them, by its number; None if the driver does not tell.

        In a container the numbers may be those of the host.
        """
        if not hasattr(self._nvml, "nvmlDeviceGetComputeRunningProcesses_v3"):
            return None
        count, found = ctypes.c_uint(_MOST_PROCESSES), (_Process * _MOST_PROCESSES)()
        if self._nvml.nvmlDeviceGetComputeRunningProcesses_v3(self._handle, ctypes.byref(count), found) != 0:
            return None
        listed = {each.pid: int(each.used) for each in found[: count.value]}
        return None if _NOT_AVAILABLE in listed.values() else listed

    def capability(self) -> tuple[int, int]:
        """The compute capability, for which torch would make a context. Raises RuntimeError."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        asked = (self._handle, ctypes.byref(major), ctypes.byref(minor))
        code = self._nvml.nvmlDeviceGetCudaComputeCapability(*asked)
        if code != 0:
            raise RuntimeError(f"NVML does not tell the compute capability: error {code}")
        return major.value, minor.value

    def version(self) -> str:
        """The driver's version; empty if it is not told."""
        text = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
        return text.value.decode() if self._nvml.nvmlSystemGetDriverVersion(text, 80) == 0 else ""
