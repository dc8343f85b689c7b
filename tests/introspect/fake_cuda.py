"""A GPU that is not there: torch.cuda and NVML as the worker sees them, over tensors of the host.

Counters are those of the tracker that runs on a CPU, so a run takes the whole of the worker's CUDA branch.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import memplan
from memplan.catalog.detect import Device
from memplan.units import GiB, MiB

TOTAL = 143_771 * MiB
CONTEXT = 600 * MiB
OTHERS = 3 * GiB
DEVICE = Device("NVIDIA H200", "GPU-0", TOTAL, 0, free=TOTAL - OTHERS)


class Nvml:
    """libnvidia-ml for one GPU, of which ``processes`` have bytes."""

    def __init__(self, processes: dict[int, int] | None, used: int = OTHERS) -> None:
        self.listed, self.in_use = processes, used
        if processes is not None:  # a driver before R510 does not tell
            self.nvmlDeviceGetComputeRunningProcesses_v3 = self._list

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        return 0 if uuid == b"GPU-0" else 2

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.free = TOTAL, TOTAL - self.in_use
        return 0

    def _list(self, handle: Any, count: Any, found: Any) -> int:
        for place, (pid, used) in enumerate((self.listed or {}).items()):
            found[place].pid, found[place].used = pid, used
        count._obj.value = len(self.listed or {})
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = 9, 0
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:
        ctypes.memmove(text, b"580.1\0", 6)
        return 0


def install(tells_processes: bool) -> None:
    """Make this process see the GPU; ``tells_processes`` is whether the driver says what each process has."""
    import torch
    from torch.overrides import TorchFunctionMode

    from memplan.introspect import nvml, trace, worker

    made = trace.real_tracker()
    held = SimpleNamespace(peak=0, limit=TOTAL, context=False, matmul=False, allocator=[])

    class Tracker(type(made)):  # type: ignore[misc]
        def _see(self, tensor: Any, op: str) -> None:
            super()._see(tensor, op)
            held.peak = max(held.peak, self.live)
            if self.live > held.limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    made.__class__ = Tracker
    library = Nvml({4242: OTHERS} if tells_processes else None)

    def in_use() -> int:
        mine = made.live + (CONTEXT if held.context else 0)
        library.in_use = OTHERS + mine
        if library.listed is not None and held.context:
            library.listed[os.getpid()] = mine
        return OTHERS + mine

    def counters(*_: Any) -> dict[str, int]:
        found = {"allocated": made.live, "requested": made.live, "reserved": made.live, "active": made.live}
        peaks = dict.fromkeys(found, held.peak)
        return {
            **{f"{name}_bytes.all.current": size for name, size in found.items()},
            **{f"{name}_bytes.all.peak": size for name, size in peaks.items()},
            "num_alloc_retries": 1,
        }

    def begin(*_: Any) -> None:
        held.context = True
        in_use()

    def again(*_: Any) -> None:
        held.peak = made.live

    def smaller(fraction: float) -> None:
        held.limit = int(fraction * TOTAL)

    def info() -> tuple[int, int]:
        return TOTAL - in_use(), TOTAL

    properties = SimpleNamespace(name="NVIDIA H200", total_memory=TOTAL, major=9, minor=0, multi_processor_count=132)
    fakes: dict[str, Any] = {
        "init": lambda: None,
        "synchronize": begin,
        "mem_get_info": info,
        "get_device_properties": lambda _: properties,
        "memory_reserved": lambda: made.live,
        "memory_allocated": lambda: made.live,
        "memory_stats": counters,
        "reset_peak_memory_stats": again,
        "host_memory_stats": lambda: {"allocated_bytes.peak": 7, "allocated_bytes.current": 5},
        "reset_peak_host_memory_stats": lambda: None,
        "empty_cache": lambda: None,
        "set_per_process_memory_fraction": smaller,
    }
    for name, fake in fakes.items():
        assert hasattr(torch.cuda, name)  # a name that torch does not have would be found on a GPU only
        setattr(torch.cuda, name, fake)
    torch._C._cuda_clearCublasWorkspaces = lambda: None  # type: ignore[attr-defined]
    torch._C._accelerator_setAllocatorSettings = lambda text: Path("allocator").write_text(text)  # type: ignore[assignment]
    torch.cuda.memory._record_memory_history = lambda **_: None  # type: ignore[assignment]
    frames = [{"filename": "/x/transformers/models/a.py", "line": 7, "name": "forward"}]
    event = {"action": "alloc", "addr": 1, "size": 1000, "frames": frames}
    torch.cuda.memory._snapshot = lambda: {"device_traces": [[event]]}  # type: ignore[assignment,misc]

    class OnHost(TorchFunctionMode):
        """Tensors that are asked of the GPU are made on the host."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            if func is torch.Tensor.pin_memory:
                return args[0]
            return func(*args, **kwargs)

    # train.py of a plan asks preflight before it loads a weight; a run that is to be measured does not.
    torch.cuda.is_available = lambda: sys._getframe(1).f_code.co_name == "check"

    def asked_preflight(*_: Any) -> None:
        raise AssertionError("preflight was asked")

    memplan.preflight = asked_preflight  # type: ignore[assignment]
    OnHost().__enter__()
    made.__enter__()
    asked = worker._arguments
    worker._arguments = lambda job: {**asked(job), "use_cpu": True, "dataloader_pin_memory": False}
    nvml.read_nvml = lambda: (DEVICE,)  # type: ignore[attr-defined]
    nvml.ctypes.CDLL = lambda _: library  # type: ignore[attr-defined,misc,assignment]
