from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from memplan.catalog import gpus
from memplan.catalog.gpus import all_gpus, find_gpu, match_device, parse_cluster
from memplan.errors import ResolutionError, SpecError
from memplan.units import GiB, MiB

ROWS = json.loads(Path(gpus.__file__).with_name("data").joinpath("gpus.json").read_text())["gpus"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("A100-80GB", "A100-80GB"),
        ("a100 80gb", "A100-80GB"),
        ("A100_80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIe-40GB"),
        ("rtx3090", "RTX3090"),
        ("GeForce RTX 3090", "RTX3090"),
        ("3090", "RTX3090"),
        ("RTX3090-24GB", "RTX3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX3090Ti"),
        ("T4", "T4"),
        ("Tesla T4", "T4"),
        ("L4", "L4"),
        ("A10", "A10"),
        ("a10g", "A10G"),
        ("RTX A6000", "A6000"),
        ("RTX 6000 Ada", "RTX6000Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTXPRO6000"),
        ("RTX3060", "RTX3060-12GB"),
        ("V100 32gb", "V100-32GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("H100 SXM", "H100-80GB"),
        ("H100-PCIe-80GB", "H100-PCIe"),
        ("H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA H800", "H800"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("AMD Instinct MI250X/MI250", "MI250X"),
        ("MI250", "MI250"),
        ("cpu", "cpu"),
        ("CPU", "cpu"),
    ],
)
def test_names_ignore_case_punctuation_and_vendor(name: str, expected: str) -> None:
    assert find_gpu(name).name == expected


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("A100", "A100-40GB, A100-80GB, A100-PCIe-40GB, A100-PCIe-80GB"),
        ("Tesla V100", "V100-16GB, V100-32GB, V100-PCIe-16GB, V100-PCIe-32GB"),
        ("h100", "H100-80GB, H100-PCIe, H100-NVL"),
        ("RTX 3080", "RTX3080-10GB, RTX3080-12GB"),
    ],
)
def test_a_name_of_several_gpus_is_an_error_that_lists_them(name: str, listed: str) -> None:
    with pytest.raises(ResolutionError) as error:
        find_gpu(name)
    assert str(error.value) == f"gpu: {name!r} names several GPUs. Use one of {listed}."


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("rtx 3091", "RTX3090"),
        ("geforce 3091", "RTX3090"),
        ("A100-81GB", "A100-80GB"),
        ("mi300", "MI300X"),
        ("RTX 4090 Laptop GPU", "RTX4090"),
        ("A100-80GB x", "A100-80GB"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ResolutionError) as error:
        find_gpu(name)
    start, _, suggestions = str(error.value).partition("Did you mean ")
    assert start == f"gpu: {name!r} is not in the catalog. "
    assert near in suggestions.split("?")[0].split(" or ")


def test_a_name_like_nothing_lists_known_ones() -> None:
    with pytest.raises(ResolutionError, match=r"^gpu: 'qqq' is not in the catalog\. Known: A10, "):
        find_gpu("qqq")


@pytest.mark.parametrize("name", ["", " ", "--", "NVIDIA", 5, None])
def test_what_is_no_name_is_an_error(name: object) -> None:
    with pytest.raises(SpecError, match="is not a GPU's name"):
        find_gpu(name)  # type: ignore[arg-type]


def test_every_spelling_in_the_data_finds_its_row() -> None:
    aliases = [alias for row in ROWS for alias in row["aliases"]]
    for row in ROWS:
        own = [alias for alias in row["aliases"] if aliases.count(alias) == 1]
        for name in (row["name"], row["name"].lower(), row["name"].replace("-", " "), *own):
            assert find_gpu(name).name == row["name"]
    assert {alias for alias in aliases if aliases.count(alias) > 1} == {"NVIDIA GeForce RTX 3080"}


def test_names_are_unique_and_there_are_enough() -> None:
    names = [gpu.name for gpu in all_gpus()]
    assert len(names) == len(set(names)) >= 28
    assert "cpu" not in names


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda gpu: gpu.name)
def test_each_row_is_plausible(gpu: gpus.GPUSpec) -> None:
    row = next(row for row in ROWS if row["name"] == gpu.name)
    assert gpu.memory.low <= gpu.memory_bytes <= gpu.memory.high
    assert gpu.memory.unit == "B"
    assert len(gpu.memory.source) > 20
    assert len(gpu.source) > 20
    assert "recall" not in gpu.source
    # The size on the box: GiB for most, GB for H200 and B200 (141 and 180). ECC takes 1/16 of GDDR cards.
    size = row.get("marketed_gb") or int("".join(c for c in gpu.name.split("-")[-1] if c.isdigit()) or 0)
    if size > 10 and gpu.name not in {"H100-NVL", "MI250X"}:
        assert 0.91 * size * 10**9 < gpu.memory.low
        assert gpu.memory.high <= size * GiB
    # bf16 came with Ampere; P100 has no tensor cores. Matrix units are faster than the fp32 ones.
    assert gpu.supports_bf16 == (gpu.vendor == "amd" or (gpu.compute_capability or (0, 0)) >= (8, 0))
    assert (gpu.bf16_tflops is not None) == gpu.supports_bf16
    assert gpu.fp16_tflops is not None
    assert gpu.fp16_tflops > gpu.fp32_tflops
    threads = {(6, 0): 2048, (7, 0): 2048, (7, 5): 1024, (8, 0): 2048, (8, 6): 1536, (8, 9): 1536, (9, 0): 2048}
    threads |= {(10, 0): 2048, (10, 3): 2048, (12, 0): 1536}
    assert gpu.max_threads_per_sm == (threads[gpu.compute_capability] if gpu.compute_capability else 2048)
    pcie = {3: 15.75, 4: 31.5, 5: 63.0}[gpu.pcie_generation]
    assert gpu.link_gb_per_s == pcie if gpu.link == "pcie" else gpu.link_gb_per_s > pcie


FP32_PER_CLOCK = {(6, 0): 64, (7, 0): 64, (7, 5): 64, (8, 0): 64}
"""Multiply-adds of one SM, of NVIDIA's whitepapers; 128 from compute capability 8.6 on."""
MATRIX = {(6, 0): 2, (7, 0): 8, (7, 5): 8, (8, 0): 16, (8, 6): 4, (8, 9): 4, (9, 0): 16, (10, 0): 32, (10, 3): 32}
MATRIX |= {(12, 0): 4}
"""16-bit rate without sparsity over the float32 one, which GeForce halves; clocks of tensor cores may be lower."""


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda gpu: gpu.name)
def test_rates_are_dense_and_those_of_the_units_at_a_clock_that_exists(gpu: gpus.GPUSpec) -> None:
    assert gpu.fp16_tflops is not None
    if gpu.compute_capability:
        per_clock, ratio = FP32_PER_CLOCK.get(gpu.compute_capability, 128), MATRIX[gpu.compute_capability]
        named = next(row for row in ROWS if row["name"] == gpu.name)["aliases"]
        ratio //= 2 if any("GeForce" in alias for alias in named) else 1
    else:  # CDNA 2 and, from MI300 on, 3 and 4 (ROCm docs/conceptual/gpu-arch: FLOPS/CLOCK/CU)
        per_clock, ratio = (64 if gpu.name.startswith("MI2") else 128), (16 if gpu.name == "MI355X" else 8)
    clock = gpu.fp32_tflops * 1e12 / (2 * per_clock * gpu.sm_count)
    assert 1.2e9 < clock < 2.7e9
    assert gpu.fp16_tflops <= 1.02 * ratio * gpu.fp32_tflops
    assert gpu.bf16_tflops in (None, gpu.fp16_tflops)


def test_known_figures() -> None:
    # torch.cuda.get_device_properties(0).total_memory in MiB, as public logs print it.
    seen = {"T4": 15102, "RTX3090": 24260, "RTX4090": 24217, "RTX5090": 32120, "A100-40GB": 40514, "A100-80GB": 81251}
    seen |= {"H100-80GB": 81089, "H200": 143156, "B200": 182642, "MI300X": 196592, "L4": 22563, "A10G": 22587}
    seen |= {"H20": 97362, "RTX5060Ti-16GB": 15848, "RTX5070Ti": 15842, "GB200": 188733, "MI355X": 294892}
    seen |= {"RTX4090D": 24210, "L20": 45599, "A40": 48688}
    for name, mib in seen.items():
        memory = find_gpu(name).memory
        assert memory.low <= mib * MiB <= memory.high, name


def test_cpu_is_a_device_without_a_limit_or_cuda() -> None:
    cpu = find_gpu("cpu")
    assert cpu.is_cpu
    assert cpu.compute_capability is None
    assert cpu.link == "none"
    assert cpu.memory_bytes == 2**60


@pytest.mark.parametrize(
    ("text", "nodes", "count", "gpu"),
    [
        ("2x8xH100-80GB", 2, 16, "H100-80GB"),
        ("2xA100-80GB", 1, 2, "A100-80GB"),
        ("RTX3090", 1, 1, "RTX3090"),
        ("2 x rtx 3090", 1, 2, "RTX3090"),
        ("cpu", 1, 1, "cpu"),
        ("4xcpu", 1, 4, "cpu"),
    ],
)
def test_parse_cluster(text: str, nodes: int, count: int, gpu: str) -> None:
    cluster = parse_cluster(text)
    assert isinstance(cluster.gpu, gpus.GPUSpec)
    assert (cluster.nodes, cluster.gpus, cluster.gpu.name) == (nodes, count, gpu)


@pytest.mark.parametrize("text", ["", "2x", "0xT4", "2xA100", "1x2x3xT4", "-1xT4"])
def test_parse_cluster_refuses(text: str) -> None:
    with pytest.raises(SpecError):
        parse_cluster(text)


@pytest.mark.parametrize(
    ("name", "mib", "expected"),
    [
        ("NVIDIA GeForce RTX 3080", 10240, "RTX3080-10GB"),
        ("NVIDIA GeForce RTX 3080", 12288, "RTX3080-12GB"),
        ("NVIDIA GeForce RTX 3060", 12288, "RTX3060-12GB"),
        ("NVIDIA GeForce RTX 3060", 8192, None),
        ("NVIDIA A100-SXM4-80GB", 81920, "A100-80GB"),
        ("NVIDIA RTX A6000", 46068, "A6000"),
        ("NVIDIA RTX A6000", 49140, "A6000"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, None),
        ("NVIDIA GeForce RTX 4090 D", 24564, "RTX4090D"),
        ("NVIDIA GeForce RTX 5090 D", 32607, None),
        ("NVIDIA A40", 49140, "A40"),
        ("NVIDIA H100", 81559, None),
        ("NVIDIA GeForce GTX 1080 Ti", 11264, None),
    ],
)
def test_devices_match_by_name_and_size(name: str, mib: int, expected: str | None) -> None:
    gpu = match_device(name, mib * MiB)
    assert (gpu and gpu.name) == expected


def test_the_first_look_up_is_quick() -> None:
    # In a fresh process, the file's reading included; best of five, as other work may share the machine.
    code = (
        "import memplan.specs, memplan.catalog.gpus as g, time; t = time.perf_counter(); g.find_gpu('rtx 3090');"
        "print(time.perf_counter() - t)"
    )
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    assert min(times) < 0.005
