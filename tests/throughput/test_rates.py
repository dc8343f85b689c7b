from dataclasses import fields, replace

import pytest

from memplan.catalog.gpus import all_gpus, find_gpu
from memplan.constants import Constant
from memplan.specs.hardware import ClusterSpec
from memplan.throughput import rates as module
from memplan.throughput.kernels import Product
from memplan.throughput.rates import CASES, DEFAULT_MACHINE, MATMUL, Machine, Rates


def rates(gpu: str = "A100-80GB", case: str = "expected", gpus: int = 8, nodes: int = 1, **machine) -> Rates:
    cluster = ClusterSpec(gpu=find_gpu(gpu), gpus=gpus, nodes=nodes)
    return Rates(find_gpu(gpu), cluster, replace(DEFAULT_MACHINE, **machine), case)  # type: ignore[arg-type]


def test_constants_name_their_sources() -> None:
    constants = [value for value in vars(module).values() if isinstance(value, Constant)]
    assert len(constants) > 20
    assert len({constant.name for constant in constants}) == len(constants)


def test_a_large_product_takes_its_flops() -> None:
    n = 108 * 128
    product = Product(n, n, 8192, "bfloat16")
    assert rates().product(product) == pytest.approx(2 * n * n * 8192 / (312e12 * MATMUL.value), rel=0.01)


def test_a_product_of_few_tiles_does_not_use_the_gpu() -> None:
    few, many = Product(128, 128 * 27, 1024, "bfloat16"), Product(128, 128 * 108, 1024, "bfloat16")
    assert rates().product(few) > 0.4 * rates().product(many)


def test_a_product_with_a_narrow_matrix_is_bound_by_memory() -> None:
    narrow = Product(4096, 8, 4096, "bfloat16")
    moved = 2 * (4096 * 4096 + 4096 * 8 + 4096 * 8)
    assert rates().product(narrow) == pytest.approx(moved / rates().bandwidth)


def test_nothing_is_faster_than_a_kernels_launch() -> None:
    assert rates().product(Product(1, 1, 1, "bfloat16")) == module.KERNEL.value


def test_bfloat16_without_units_is_computed_as_float32() -> None:
    assert rates("V100-16GB").peak("bfloat16") == rates("V100-16GB").peak("float32")
    assert rates("V100-16GB").peak("float16") > 5 * rates("V100-16GB").peak("float32")


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda gpu: gpu.name)
def test_every_gpu_is_fastest_in_the_fast_case(gpu) -> None:
    product = Product(4096, 4096, 4096, "float16")
    found = [rates(gpu.name, case) for case in CASES]
    assert [each.product(product) for each in found] == sorted(each.product(product) for each in found)
    for name in ("link", "pcie", "bandwidth"):
        speeds = [getattr(each, name) for each in found]
        assert speeds == sorted(speeds, reverse=True)
        assert speeds[-1] > 0
    assert [each.cpu_step for each in found] == sorted(each.cpu_step for each in found)
    assert found[0].attention("float16") >= found[1].attention("float16") >= found[2].attention("float16")


def test_nodes_share_a_network() -> None:
    inside, across = rates(), rates(gpus=16, nodes=2)
    assert across.link == pytest.approx(8 * 25e9 * module.NETWORK_SHARE.value)
    assert inside.link == pytest.approx(300e9 * module.NVLINK.value)
    assert rates(gpus=16, nodes=2, network_gb_per_s=1.0).link == pytest.approx(8e9 * module.NETWORK_SHARE.value)
    assert rates("RTX3090", gpus=2).link < 0.1 * inside.link


def test_ranks_of_a_node_share_cores_and_nvme() -> None:
    alone, shared = rates(gpus=1), rates(gpus=8)
    assert shared.cpu_step == pytest.approx(8 * alone.cpu_step)
    assert shared.nvme[0] == pytest.approx(alone.nvme[0] / 8)
    assert rates(gpus=8, threads=1).cpu_step == pytest.approx(module.CPU_ADAM.value)
    assert rates(gpus=8, case="slow").cpu_step == pytest.approx(module.CPU_ADAM.high)  # torchrun's one thread


def test_a_machine_is_assumed_where_it_is_not_told() -> None:
    assert {field.name for field in fields(Machine)} == {
        "cores", "threads", "host_memory", "nvme_read", "nvme_write", "network_gb_per_s",
    }  # fmt: skip
