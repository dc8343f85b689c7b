"""This machine as a cluster: its NVIDIA GPUs by NVML, its memory by /proc and cgroups, the space on a disk.

Nothing here imports torch or starts a CUDA context. AMD GPUs are not looked for.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from memplan.catalog.gpus import match_device
from memplan.errors import SpecError, UnsupportedError
from memplan.specs.hardware import ClusterSpec
from memplan.units import KiB, MiB

__all__ = ["Device", "detect_cluster", "free_disk", "free_disk_of", "host_memory", "read_nvml", "visible_devices"]


_NAME_IT = "Name the nearest GPU of the catalog with gpu, and its size with gpu_memory."


class Device(NamedTuple):
    """One NVIDIA GPU as its driver reports it."""

    name: str
    """As in ``nvidia-smi``: ``NVIDIA A100-SXM4-80GB``."""
    uuid: str
    """``GPU-...``; CUDA_VISIBLE_DEVICES may name a GPU by it."""
    memory: int
    """Bytes of the board."""
    reserved: int | None
    """Bytes of them that the driver keeps, so that no program sees them; None before driver R510."""
    mig: bool = False
    """Whether the GPU is split into MIG instances, of which a process uses one."""
    free: int = 0
    """Bytes of them that nobody uses now."""


def detect_cluster(
    nvme_path: str | None = None,
    *,
    root: Path = Path("/"),
    environ: Mapping[str, str] = os.environ,
    nvml: Callable[[], Sequence[Device]] | None = None,
) -> ClusterSpec:
    """Return this machine: one node with the NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves, and its host memory.

    ``gpu`` is None, with ``gpus`` 1, if no GPU is visible; ``host_memory`` is None where /proc has none.
    ``gpu_memory`` is the board's memory less what the driver reserves, which on Linux is torch's total: 24576 - 316
    MiB of an RTX 3090 are its 24260, 97871 - 1103 of a GH200 its 96768. It is None before driver R510, which does
    not tell what it reserves; the catalog's range holds then.
    ``nvme_path`` adds the free space of the disk that holds it. ``root`` holds ``proc`` and ``sys``, and
    ``nvml`` lists the GPUs (:func:`read_nvml`).

    Raises UnsupportedError for GPUs that differ, that the catalog does not have, or that are split by MIG;
    SpecError for an ``nvme_path`` that does not exist.
    """
    devices = visible_devices((nvml or read_nvml)(), environ)
    return ClusterSpec(
        **_gpu_fields(devices),
        host_memory=host_memory(root),
        nvme=None if nvme_path is None else free_disk(nvme_path),
        nvme_path=nvme_path,
    )


def _gpu_fields(devices: Sequence[Device]) -> dict[str, object]:
    if not devices:
        return {}
    device = devices[0]
    if len(_kinds(devices)) > 1:
        remedy = "Choose GPUs of one kind with CUDA_VISIBLE_DEVICES, or say which are meant with gpu and gpus."
        raise UnsupportedError.at("gpu", _listed(devices), "are different GPUs in one machine", remedy)
    if any(each.mig for each in devices):
        raise UnsupportedError.at("gpu", device.name, "is split by MIG, which is not detected", _NAME_IT)
    gpu = match_device(device.name, device.memory)
    if gpu is None:
        raise UnsupportedError.at("gpu", device.name, f"({device.memory} bytes) is not in the catalog", _NAME_IT)
    # The fullest card decides, and a driver may keep more of one that shows a desktop.
    seen = [each.memory - each.reserved for each in devices if each.reserved is not None]
    return {"gpu": gpu, "gpus": len(devices), "gpu_memory": min(seen, default=None)}


def _kinds(devices: Sequence[Device]) -> set[tuple[str, int]]:
    return {(device.name, device.memory) for device in devices}


def _listed(devices: Sequence[Device]) -> str:
    return ", ".join(sorted({device.name for device in devices}))


def visible_devices(devices: Sequence[Device], environ: Mapping[str, str] = os.environ) -> tuple[Device, ...]:
    """Return the devices that CUDA_VISIBLE_DEVICES leaves, in its order, by CUDA's own rules.

    An entry that is no device ends the list; an entry that comes twice empties it; a UUID may be shortened.
    Source: CUDA Programming Guide, section 5.2 (environment variables); torch/cuda/__init__.py
    ``_parse_visible_devices`` at 2.13.

    Raises UnsupportedError for a MIG instance, and for numbers where they depend on which GPU CUDA takes for
    the fastest: different GPUs without CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    value = environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return tuple(devices)
    if len(_kinds(devices)) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID" and _has_number(value):
        problem = f"counts different GPUs ({_listed(devices)}) from the fastest, which is not known"
        remedy = "Set CUDA_DEVICE_ORDER=PCI_BUS_ID too, or name the GPUs by UUID, as nvidia-smi -L shows them."
        raise UnsupportedError.at("CUDA_VISIBLE_DEVICES", value, problem, remedy)
    chosen: list[Device] = []
    for entry in value.split(","):
        device = _device(entry.strip(), devices)
        if device is None:
            break
        if device in chosen:
            return ()
        chosen.append(device)
    return tuple(chosen)


def _has_number(value: str) -> bool:
    return any(entry.strip().isdigit() for entry in value.split(","))


def _device(entry: str, devices: Sequence[Device]) -> Device | None:
    if entry.startswith("GPU-"):
        matches = [device for device in devices if device.uuid.startswith(entry)]
        return matches[0] if len(matches) == 1 else None
    if entry.startswith("MIG-"):
        raise UnsupportedError.at("CUDA_VISIBLE_DEVICES", entry, "is a MIG instance, which is not detected", _NAME_IT)
    known = entry.isascii() and entry.isdigit() and int(entry) < len(devices)
    return devices[int(entry)] if known else None


def host_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of RAM that this process may use: the machine's, or its cgroup's limit if that is less.

    None where /proc/meminfo cannot be read (it is Linux's). Limits of every level of the cgroup count,
    version 1 or 2, since the kernel enforces each of them; of version 1 also those above a container, which it does not
    see, but of which ``memory.stat`` has the least (``hierarchical_memory_limit``). Swap is no RAM, whatever its limit.
    """
    total = _meminfo(root / "proc" / "meminfo")
    return None if total is None else min([total, *_cgroup_limits(root)])


def _meminfo(path: Path) -> int | None:
    for line in _lines(path):
        name, _, value = line.partition(":")
        parts = value.split()
        if name == "MemTotal" and parts and parts[0].isdigit():
            return int(parts[0]) * KiB
    return None


def _cgroup_limits(root: Path) -> list[int]:
    mount = root / "sys" / "fs" / "cgroup"
    limits: list[int] = []
    for line in _lines(root / "proc" / "self" / "cgroup"):
        _, _, membership = line.partition(":")
        controllers, _, path = membership.partition(":")
        if "memory" in controllers.split(","):
            limits += _limits(mount / "memory", path, "memory.limit_in_bytes")
            limits += _limits(mount / "memory", path, "memory.stat", "hierarchical_memory_limit ")
        elif not controllers:  # version 2 has one hierarchy, without controllers' names
            limits += _limits(mount, path, "memory.max")
    return limits


def _limits(mount: Path, path: str, file: str, key: str = "") -> list[int]:
    """Return the limits from a cgroup up to the mount: a number alone in a file, or what follows a key in it.

    A container may see its own cgroup as the mount itself.
    """
    relative = PurePosixPath(path.lstrip("/"))
    lines = (line for level in (relative, *relative.parents) for line in _lines(mount / level / file))
    texts = [line.removeprefix(key) for line in lines if line.startswith(key)]
    # "max" is no limit; version 1 writes about 2**63 for none, which no minimum keeps.
    return [int(text) for text in texts if text.isdigit()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def free_disk(path: str) -> int:
    """Return the bytes that a user may still write on the disk that holds ``path``.

    Raises SpecError for a path that does not exist or may not be seen, and for a full disk.
    """
    try:
        free = shutil.disk_usage(path).free
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError.at("nvme_path", path, f"cannot be used ({reason.lower()})", "Name a folder.") from None
    if free < MiB:
        raise SpecError.at("nvme_path", path, "is on a disk without free space", "Name a folder on another disk.")
    return free


def free_disk_of(path: str) -> int:
    """As :func:`free_disk`, of a folder that may not be there yet: DeepSpeed makes it (``os.makedirs``)."""
    folder = Path(path).absolute()
    there = (each for each in (folder, *folder.parents) if os.path.exists(each))  # noqa: PTH110  # no PermissionError
    return free_disk(str(next(there, folder)))


class _Memory(ctypes.Structure):
    """NVML's nvmlMemory_t."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _MemoryV2(ctypes.Structure):
    """NVML's nvmlMemory_v2_t, of driver R510 and newer."""

    _fields_ = [
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


_MEMORY_V2 = ctypes.sizeof(_MemoryV2) | 2 << 24  # NVML_STRUCT_VERSION(Memory, 2) in nvml.h
_TEXT_SIZE = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE and NVML_DEVICE_UUID_V2_BUFFER_SIZE in nvml.h


def read_nvml() -> tuple[Device, ...]:
    """Return this machine's NVIDIA GPUs in PCI order; none if the driver is absent or does not answer.

    Source: NVML API reference, https://docs.nvidia.com/deploy/nvml-api.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ()
    if nvml.nvmlInit_v2() != 0:
        return ()
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return ()
        devices = (_nvml_device(nvml, index) for index in range(count.value))
        return tuple(device for device in devices if device is not None)
    finally:
        nvml.nvmlShutdown()


def _nvml_device(nvml: ctypes.CDLL, index: int) -> Device | None:
    handle = ctypes.c_void_p()
    memory = _Memory()
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:
        return None  # a GPU that has fallen off the bus, or that this user may not touch
    if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return None
    current, pending = ctypes.c_uint(), ctypes.c_uint()
    if hasattr(nvml, "nvmlDeviceGetMigMode"):  # not in drivers before R450; an error leaves 0, off
        nvml.nvmlDeviceGetMigMode(handle, ctypes.byref(current), ctypes.byref(pending))
    return Device(
        name=_nvml_text(nvml.nvmlDeviceGetName, handle),
        uuid=_nvml_text(nvml.nvmlDeviceGetUUID, handle),
        memory=memory.total,
        free=memory.free,
        reserved=_nvml_reserved(nvml, handle),
        mig=current.value == 1,
    )


def _nvml_text(function: Callable[..., int], handle: ctypes.c_void_p) -> str:
    buffer = ctypes.create_string_buffer(_TEXT_SIZE)
    return buffer.value.decode("utf-8", "replace") if function(handle, buffer, _TEXT_SIZE) == 0 else ""


def _nvml_reserved(nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> int | None:
    if not hasattr(nvml, "nvmlDeviceGetMemoryInfo_v2"):
        return None
    memory = _MemoryV2(version=_MEMORY_V2)
    known = nvml.nvmlDeviceGetMemoryInfo_v2(handle, ctypes.byref(memory)) == 0
    return int(memory.reserved) if known else None
