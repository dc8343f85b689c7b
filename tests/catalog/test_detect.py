from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import Any

import pytest

from memplan.catalog import detect
from memplan.catalog.detect import Device, detect_cluster, free_disk, host_memory, read_nvml, visible_devices
from memplan.errors import SpecError, UnsupportedError
from memplan.units import GiB, MiB

NO_LIMIT_V1 = "9223372036854771712"


def a100(index: int, reserved: int | None = 870 * MiB, mig: bool = False) -> Device:
    return Device("NVIDIA A100-SXM4-80GB", f"GPU-{index}a0-uuid", 81920 * MiB, reserved, mig)


RTX3090 = Device("NVIDIA GeForce RTX 3090", "GPU-3090-uuid", 24576 * MiB, 316 * MiB)


def files(root: Path, **contents: str) -> Path:
    """Write files, with __ for / in their names."""
    for name, text in contents.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    return files(tmp_path, proc__meminfo="MemTotal:       65536000 kB\nMemFree:  1000 kB\n")


def detected(machine: Path, *devices: Device, environ: dict[str, str] | None = None) -> Any:
    return detect_cluster(root=machine, environ=environ or {}, nvml=lambda: devices)


# -- GPUs


def test_gpus_of_one_kind(machine: Path) -> None:
    cluster = detected(machine, a100(0), a100(1), a100(2))
    assert (cluster.gpu.name, cluster.gpus, cluster.nodes) == ("A100-80GB", 3, 1)
    assert cluster.gpu_memory == (81920 - 870) * MiB
    assert cluster.host_memory == 65536000 * 1024
    assert cluster.nvme is None


def test_the_card_with_least_memory_decides(machine: Path) -> None:
    assert detected(machine, a100(0, 700 * MiB), a100(1, 900 * MiB)).gpu_memory == (81920 - 900) * MiB


def test_an_old_driver_leaves_the_catalogs_range(machine: Path) -> None:
    cluster = detected(machine, a100(0, reserved=None))
    assert cluster.gpu.name == "A100-80GB"
    assert cluster.gpu_memory is None


def test_no_gpu(machine: Path) -> None:
    cluster = detected(machine)
    assert (cluster.gpu, cluster.gpus, cluster.gpu_memory) == (None, 1, None)
    assert cluster.host_memory is not None


def test_no_gpu_and_no_proc(tmp_path: Path) -> None:
    assert detected(tmp_path).host_memory is None


def test_the_nvml_reader_is_used_by_default(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "read_nvml", lambda: (RTX3090,))
    assert detect_cluster(root=machine, environ={}).gpu.name == "RTX3090"  # type: ignore[union-attr]


def test_different_gpus_are_refused_until_one_kind_is_chosen(machine: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"A100-SXM4-80GB, NVIDIA GeForce RTX 3090' are different GPUs"):
        detected(machine, a100(0), RTX3090)
    cluster = detected(machine, a100(0), RTX3090, environ={"CUDA_VISIBLE_DEVICES": "GPU-3090"})
    assert (cluster.gpu.name, cluster.gpus) == ("RTX3090", 1)


def test_one_name_with_two_sizes_is_two_kinds(machine: Path) -> None:
    small = Device("NVIDIA GeForce RTX 3080", "GPU-1", 10240 * MiB, None)
    large = Device("NVIDIA GeForce RTX 3080", "GPU-2", 12288 * MiB, None)
    assert detected(machine, large).gpu.name == "RTX3080-12GB"
    with pytest.raises(UnsupportedError, match="different GPUs"):
        detected(machine, small, large)


def test_an_unknown_gpu_is_refused(machine: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'NVIDIA TITAN V' \(.* bytes\) is not in the catalog\. Name the near"):
        detected(machine, Device("NVIDIA TITAN V", "GPU-1", 12288 * MiB, None))


def test_mig_is_refused(machine: Path) -> None:
    with pytest.raises(UnsupportedError, match="is split by MIG"):
        detected(machine, a100(0, mig=True))
    with pytest.raises(UnsupportedError, match="is a MIG instance"):
        detected(machine, a100(0), environ={"CUDA_VISIBLE_DEVICES": "MIG-5c89-uuid"})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("1", [1]),
        ("2, 0", [2, 0]),
        ("0,2,-1,1", [0, 2]),  # the example of the CUDA documentation
        ("0,7,1", [0]),
        ("0,x,1", [0]),
        ("1,1", []),
        ("٣", []),
        ("NoDevFiles", []),
        ("GPU-1a0", [1]),
        ("GPU-2a0-uuid,GPU-0", [2, 0]),
        ("GPU-", []),  # of all three: not unique
        ("GPU-9", []),
    ],
)
def test_cuda_visible_devices(value: str | None, expected: list[int]) -> None:
    devices = [a100(0), a100(1), a100(2)]
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert [devices.index(device) for device in visible_devices(devices, environ)] == expected


def test_numbers_among_different_gpus_need_the_pci_order() -> None:
    devices = [RTX3090, a100(0)]
    with pytest.raises(UnsupportedError, match="Set CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        visible_devices(devices, {"CUDA_VISIBLE_DEVICES": "0"})
    in_order = {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert visible_devices(devices, in_order) == (RTX3090,)
    assert visible_devices(devices, {"CUDA_VISIBLE_DEVICES": ""}) == ()


# -- host memory


def test_cgroup_version_2_counts_every_level(machine: Path) -> None:
    files(machine, proc__self__cgroup="0::/a/b\n")
    mount = machine / "sys/fs/cgroup"
    (mount / "a/b").mkdir(parents=True)
    (mount / "a/b/memory.max").write_text("max\n")
    assert host_memory(machine) == 65536000 * 1024
    (mount / "a/memory.max").write_text(f"{8 * GiB}\n")
    assert host_memory(machine) == 8 * GiB
    (mount / "a/b/memory.max").write_text(f"{4 * GiB}\n")
    assert host_memory(machine) == 4 * GiB
    (mount / "memory.max").write_text(f"{2 * GiB}\n")
    assert host_memory(machine) == 2 * GiB


def test_cgroup_version_2_in_a_container(machine: Path) -> None:
    # The path is the host's where there is no cgroup namespace; the container's own cgroup is the mount.
    files(machine, proc__self__cgroup="0::/docker/0123\n")
    folder = machine / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text(f"{16 * GiB}\n")
    assert host_memory(machine) == 16 * GiB


def test_cgroup_version_1(machine: Path) -> None:
    files(machine, proc__self__cgroup="9:name=systemd:/\n4:cpu,memory:/job:1\n1:cpuset:/job\n0::/\n")
    folder = machine / "sys/fs/cgroup/memory/job:1"
    folder.mkdir(parents=True)
    (folder.parent / "memory.limit_in_bytes").write_text(f"{NO_LIMIT_V1}\n")
    (folder / "memory.limit_in_bytes").write_text(f"{NO_LIMIT_V1}\n")
    assert host_memory(machine) == 65536000 * 1024
    (folder / "memory.limit_in_bytes").write_text(f"{3 * GiB}\n")
    assert host_memory(machine) == 3 * GiB


def test_cgroup_version_1_counts_every_level(machine: Path) -> None:
    """As on a machine with both versions, where the second one has no memory controller."""
    files(machine, proc__self__cgroup="9:name=systemd:/\n4:memory:/kubepods/pod7/c1\n0::/\n")
    mount = machine / "sys/fs/cgroup/memory"
    leaf = mount / "kubepods/pod7/c1"
    leaf.mkdir(parents=True)
    (mount.parent / "unified").mkdir()
    for folder, limit in (
        (mount, NO_LIMIT_V1),
        (leaf.parent.parent, 32 * GiB),
        (leaf.parent, 6 * GiB),
        (leaf, 8 * GiB),
    ):
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    assert host_memory(machine) == 6 * GiB
    (leaf / "memory.limit_in_bytes").write_text(f"{5 * GiB}\n")
    assert host_memory(machine) == 5 * GiB


def test_a_limit_above_a_container_of_version_1(machine: Path) -> None:
    """The container's own cgroup is its mount; what its pod may have is in memory.stat alone."""
    files(machine, proc__self__cgroup="4:memory:/kubepods/pod7/c1\n")
    mount = machine / "sys/fs/cgroup/memory"
    mount.mkdir(parents=True)
    (mount / "memory.limit_in_bytes").write_text(f"{NO_LIMIT_V1}\n")
    stat = "cache 4096\nhierarchical_memory_limit {}\nhierarchical_memsw_limit 1\ntotal_cache 4096\n"
    (mount / "memory.stat").write_text(stat.format(7 * GiB))
    assert host_memory(machine) == 7 * GiB
    (mount / "memory.stat").write_text(stat.format(NO_LIMIT_V1))
    assert host_memory(machine) == 65536000 * 1024


@pytest.mark.parametrize("swap", ["0", "max", str(64 * GiB)])
def test_swap_is_no_memory(swap: str, machine: Path) -> None:
    """Neither the machine's nor a cgroup's: what is page-locked cannot be swapped out."""
    files(machine, proc__meminfo="MemTotal:       65536000 kB\nSwapTotal:      65536000 kB\n")
    files(machine, proc__self__cgroup="0::/job\n")
    assert host_memory(machine) == 65536000 * 1024
    folder = machine / "sys/fs/cgroup/job"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text(f"{4 * GiB}\n")
    (folder / "memory.swap.max").write_text(f"{swap}\n")
    (folder / "memory.high").write_text("max\n")
    assert host_memory(machine) == 4 * GiB


@pytest.mark.parametrize("text", ["", "nonsense\n", "0\n", "MemTotal:\n", "MemTotal: many kB\n"])
def test_odd_files_are_no_memory_and_no_crash(tmp_path: Path, text: str) -> None:
    files(tmp_path, proc__meminfo=text, proc__self__cgroup=text)
    assert host_memory(tmp_path) is None


def test_an_odd_cgroup_file_leaves_the_machines_memory(machine: Path) -> None:
    files(machine, proc__self__cgroup="nonsense\n0::/\n")
    folder = machine / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text("lots\n")
    assert host_memory(machine) == 65536000 * 1024


def test_this_machine_has_memory() -> None:
    assert (host_memory() or GiB) >= 64 * MiB


# -- disk


def test_free_disk(tmp_path: Path, machine: Path) -> None:
    cluster = detect_cluster(str(tmp_path), root=machine, environ={}, nvml=lambda: ())
    assert cluster.nvme_path == str(tmp_path)
    assert cluster.nvme is not None
    assert abs(cluster.nvme - shutil.disk_usage(tmp_path).free) < GiB


@pytest.mark.parametrize("path", ["/no/such/folder", "a\0b"])
def test_a_path_that_does_not_exist(path: str) -> None:
    with pytest.raises(SpecError, match=r"^nvme_path: .* cannot be used \("):
        free_disk(path)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10 * GiB, 10 * GiB, 0))  # type: ignore[attr-defined]
    with pytest.raises(SpecError, match="without free space"):
        free_disk(str(tmp_path))


# -- NVML, spoken to through its C interface


class FakeNvml:
    """libnvidia-ml as ctypes shows it: functions that fill what they are pointed to, and return a status."""

    def __init__(
        self, *devices: Device, version_2: bool = True, init: int = 0, count: int = 0, broken: int = -1
    ) -> None:
        self.devices = devices
        self.statuses = {"init": init, "count": count}
        self.broken = broken
        self.open = 0
        if version_2:
            self.nvmlDeviceGetMemoryInfo_v2 = self._memory_2

    def nvmlInit_v2(self) -> int:
        self.open += self.statuses["init"] == 0
        return self.statuses["init"]

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.devices)
        return self.statuses["count"]

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        handle._obj.value = index + 1  # a pointer: 0 would be null
        return 15 if index == self.broken else 0  # NVML_ERROR_GPU_IS_LOST

    def _device(self, handle: ctypes.c_void_p) -> Device:
        return self.devices[(handle.value or 0) - 1]

    def nvmlDeviceGetName(self, handle: ctypes.c_void_p, buffer: Any, size: int) -> int:
        buffer.value = self._device(handle).name.encode()[: size - 1]
        return 0

    def nvmlDeviceGetUUID(self, handle: ctypes.c_void_p, buffer: Any, size: int) -> int:
        buffer.value = self._device(handle).uuid.encode()[: size - 1]
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:
        assert ctypes.sizeof(memory._obj) == 24
        memory._obj.total = self._device(handle).memory
        return 0

    def _memory_2(self, handle: ctypes.c_void_p, memory: Any) -> int:
        assert ctypes.sizeof(memory._obj) == 40
        if memory._obj.version != 0x02000028:  # nvmlMemory_v2: version 2, 40 bytes
            return 25  # NVML_ERROR_ARGUMENT_VERSION_MISMATCH
        memory._obj.reserved = self._device(handle).reserved
        return 0

    def nvmlDeviceGetMigMode(self, handle: ctypes.c_void_p, current: Any, pending: Any) -> int:
        if self._device(handle).mig:
            current._obj.value = pending._obj.value = 1
            return 0
        return 3  # NVML_ERROR_NOT_SUPPORTED


def install(monkeypatch: pytest.MonkeyPatch, library: FakeNvml) -> FakeNvml:
    def load(name: str) -> FakeNvml:
        assert name == "libnvidia-ml.so.1"
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    return library


def test_nvml_devices_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = (a100(0), a100(1, mig=True), RTX3090)
    library = install(monkeypatch, FakeNvml(*devices))
    assert read_nvml() == devices
    assert library.open == 0


def test_an_old_nvml_does_not_tell_what_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(RTX3090, version_2=False))
    (device,) = read_nvml()
    assert device.reserved is None
    assert device.memory == 24576 * MiB


def test_a_lost_gpu_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(a100(0), a100(1), broken=0))
    assert read_nvml() == (a100(1),)


def test_a_driver_that_does_not_answer_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(a100(0), init=9))  # NVML_ERROR_DRIVER_NOT_LOADED
    assert read_nvml() == ()
    library = install(monkeypatch, FakeNvml(a100(0), count=999))
    assert read_nvml() == ()
    assert library.open == 0


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> FakeNvml:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert read_nvml() == ()
