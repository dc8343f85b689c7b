import pytest

from memplan.constants import Constant, exact
from memplan.errors import ResolutionError, SpecError
from memplan.specs import ClusterSpec, GPUSpec
from memplan.units import GiB


def gpu(**changes) -> GPUSpec:
    fields = {
        "name": "A100-80GB",
        "vendor": "nvidia",
        "memory": Constant("A100-80GB memory", 79.2 * GiB // 1, 79 * GiB, 79.3 * GiB // 1, "B", "OOM texts"),
        "compute_capability": (8, 0),
        "sm_count": 108,
        "max_threads_per_sm": 2048,
        "bandwidth_gb_per_s": 2039,
        "bf16_tflops": 312,
        "fp16_tflops": 312,
        "fp32_tflops": 19.5,
        "supports_bf16": True,
        "link": "nvlink",
        "link_gb_per_s": 300,
        "pcie_generation": 4,
        "source": "datasheet",
    }
    return GPUSpec(**(fields | changes))


def test_a_gpu_round_trips_with_its_range() -> None:
    spec = gpu()
    assert GPUSpec.from_json(spec.to_json()) == spec
    assert spec.memory_bytes == 79.2 * GiB // 1
    assert not spec.is_cpu
    assert ClusterSpec.from_json(ClusterSpec(gpu=spec).to_json()).gpu == spec


def test_the_cpu_has_no_compute_capability() -> None:
    cpu = gpu(name="cpu", vendor="cpu", compute_capability=None, link="none", link_gb_per_s=0, pcie_generation=0)
    assert cpu.is_cpu


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": exact("m", 80, "GiB", "s")}, r"^memory: 'GiB' is not its unit"),
        ({"source": " "}, r"^source: ' ' is blank"),
        ({"compute_capability": None}, r"^compute_capability: null cannot be for nvidia"),
        ({"vendor": "amd"}, r"^compute_capability: \(8, 0\) cannot be for amd"),
        ({"bandwidth_gb_per_s": 0}, r"^bandwidth_gb_per_s: 0.0 is out of range"),
        ({"bf16_tflops": float("nan")}, r"^bf16_tflops: nan is out of range"),
        ({"sm_count": 0}, r"^sm_count: 0 is not a positive integer"),
    ],
)
def test_a_wrong_row_is_named(changes, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        gpu(**changes)


@pytest.mark.parametrize(
    ("text", "nodes", "gpus", "name"),
    [
        ("RTX3090", 1, 1, "RTX3090"),
        ("2xA100-80GB", 1, 2, "A100-80GB"),
        ("2x8xH100-80GB", 2, 16, "H100-80GB"),
        (" 4 X MI300X ", 1, 4, "MI300X"),
        ("8×T4", 1, 8, "T4"),
        ("RTX 4090", 1, 1, "RTX 4090"),
        ("cpu", 1, 1, "cpu"),
    ],
)
def test_parse(text: str, nodes: int, gpus: int, name: str) -> None:
    cluster = ClusterSpec.parse(text)
    assert (cluster.nodes, cluster.gpus, cluster.gpu) == (nodes, gpus, name)
    assert cluster.gpus_per_node * nodes == gpus


@pytest.mark.parametrize("text", ["", "2x", "2x8x", "0xT4", "2x0xT4", "2000000000000xT4"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(SpecError, match=r"^(cluster|gpus): "):
        ClusterSpec.parse(text)


def test_parse_asks_the_resolver() -> None:
    assert ClusterSpec.parse("2xa100", lambda name: gpu(name=name.upper())).gpu == gpu(name="A100")

    def unknown(name: str) -> GPUSpec:
        raise ResolutionError.at("gpu", name, "is not in the catalog", "Run memplan gpus.")

    with pytest.raises(ResolutionError, match="'H1000' is not in the catalog"):
        ClusterSpec.parse("8xH1000", unknown)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gpus": 3, "nodes": 2}, r"^gpus: 3 cannot be shared evenly by 2 nodes\. Use a multiple of 2, such as 4\.$"),
        ({"gpus": 1, "nodes": 2}, r"such as 2\.$"),
        ({"gpus": 2**18 + 1}, r"^gpus: 262145 is more than one data-parallel run has\. Use at most 262144\.$"),
        ({"gpu_memory": 24}, r"^gpu_memory: 24 is a size in bytes, and below 1 MiB\. Write a unit, as in '24GiB'\.$"),
        ({"gpu_memory": "24"}, r"^gpu_memory: '24' has no unit"),
        ({"host_memory": float("nan")}, r"^host_memory: nan is not a size"),
        ({"nvme": 1e30}, r"^nvme: 1e\+30 is not a size"),
        ({"nvme": 1e7 + 0.5}, r"^nvme: .* is not a whole number of bytes"),
        ({"gpu": ""}, r"^gpu: '' is not a GPU"),
        ({"gpu": 3}, r"^gpu: 3 is not a GPU"),
        ({"gpu": {"name": "x"}}, r"^gpu\.vendor: missing"),
    ],
)
def test_a_wrong_cluster_is_named(fields, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ClusterSpec(**fields)


def test_sizes_take_units() -> None:
    cluster = ClusterSpec(gpu_memory="24GiB", host_memory=64 * GiB, nvme="2 TB")
    assert (cluster.gpu_memory, cluster.host_memory, cluster.nvme) == (24 * GiB, 64 * GiB, 2 * 10**12)
