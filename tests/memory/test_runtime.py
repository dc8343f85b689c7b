import itertools
import math

import pytest

from memplan.catalog.gpus import all_gpus, find_gpu
from memplan.constants import Constant
from memplan.memory import runtime
from memplan.memory.runtime import cublas_workspace, cublas_workspaces, cuda_context, nccl
from memplan.specs.software import SoftwareSpec
from memplan.units import MiB

TORCH_2_13 = SoftwareSpec(torch="2.13.0", cuda="13.0")

# MiB of a process beyond torch's own counters. An out-of-memory text gives "in use" less "allocated" less "reserved but
# unallocated"; "idle" is a process that only made a context.
PUBLISHED = [
    ("T4", 99, "hpcaitech/Open-Sora#697"),
    ("T4", 104, "mbzuai-oryx/GeoPixel#5"),
    ("T4", 136, "Farzad-R/Finetune-LLAVA-NEXT#2"),
    ("RTX2080Ti", 197, "lllyasviel/FramePack#369, the GPU by its capacity of 10.74 GiB"),
    ("A4000", 210, "DengKaiCQ/VGGT-Long#6"),
    ("L4", 235, "ArcInstitute/evo2#190"),
    ("RTX3080-10GB", 257, "bcmi/libcom#54, the GPU by its capacity of 9.77 GiB"),
    ("A10", 224, "zai-org/CogVLM#236"),
    ("A10G", 282, "meta-pytorch/torchtune#229"),
    ("RTX3090", 304, "bytedance/X-Portrait#7"),
    ("RTX3090", 256, "invoke-ai/InvokeAI#9413, idle"),
    ("V100-32GB", 399, "README of nanoporetech/dorado, the GPU by its capacity of 31.73 GiB"),
    ("A100-40GB", 414, "awslabs/keys_values#92, idle"),
    ("A100-40GB", 500, "TianheWu/CoSeR#10"),
    ("A100-80GB", 426, "meta-pytorch/torchrec#3580"),
    ("A100-80GB", 502, "lianqi1008/Control-GIC#6"),
    ("A100-80GB", 510, "Kwai-Keye/Keye#11"),
    ("RTX4090", 471, "Phidias-Diffusion#8, idle"),
    ("RTX4090", 416, "DB-GPT-Hub#248"),
    ("RTX4090", 470, "flux-webui#11"),
    ("RTX4090", 502, "DB-GPT-Hub#248"),
    ("RTX6000Ada", 426, "unslothai/unsloth-zoo#1053, idle"),
    ("RTX6000Ada", 430, "DINGYANB/MTVCrafter#21"),
    ("L40", 420, "Step-Video-T2V#8"),
    ("L40S", 507, "Qwen3-VL#2097"),
    ("L40S", 512, "sentence-transformers#3214"),
    ("RTX5090", 594, "Wan-Video/Wan2.1#465"),
    ("H100-NVL", 676, "ali-vilab/VACE#56"),
    ("H200", 530, "stas00/ml-engineering, debugging: 139 GiB of 139.80 allocated, 289.25 MiB free"),
    ("B200", 612, "unslothai/unsloth#8669, idle"),
    ("B200", 712, "stas00/ml-engineering, debugging: a failed forward"),
    ("B200", 711, "stas00/ml-engineering, debugging: a failed backward"),
]


def mebibytes(constant: Constant) -> tuple[int, int, int]:
    assert constant.unit == "B"
    return tuple(round(number / MiB) for number in (constant.low, constant.value, constant.high))


# -- the context ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "published", "source"), PUBLISHED)
def test_every_published_process_lies_within_the_interval(name: str, published: int, source: str) -> None:
    context = cuda_context(find_gpu(name), TORCH_2_13)
    low, _, high = mebibytes(context)
    assert low <= published <= high, source
    assert high - low == 170


def test_the_fit_is_the_least_squares_line_through_them() -> None:
    threads = [find_gpu(name).sm_count * find_gpu(name).max_threads_per_sm / 1000 for name, _, _ in PUBLISHED]
    found = [float(published) for _, published, _ in PUBLISHED]
    mean_x, mean_y = sum(threads) / len(threads), sum(found) / len(found)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(threads, found, strict=True)) / sum(
        (x - mean_x) ** 2 for x in threads
    )
    fixed = mean_y - slope * mean_x
    misses = [y - fixed - slope * x for x, y in zip(threads, found, strict=True)]
    assert round(slope, 2) == runtime.CONTEXT_PER_THOUSAND_THREADS.value
    assert round(fixed) == runtime.CONTEXT_FIXED.value
    assert round(math.sqrt(sum(miss**2 for miss in misses) / len(misses))) == 41
    assert 80 < max(abs(miss) for miss in misses) <= runtime.CONTEXT_SPREAD.value
    assert (min(threads) * 1000, max(threads) * 1000) == runtime.FITTED_THREADS


@pytest.mark.parametrize(
    ("name", "expected"), [("T4", 116), ("V100-16GB", 372), ("RTX3090", 293), ("A100-80GB", 491), ("H100-80GB", 593)]
)
def test_contexts_worked_by_hand(name: str, expected: int) -> None:
    # 31 + 2.08 x SMs x threads per SM / 1000
    assert mebibytes(cuda_context(find_gpu(name), TORCH_2_13))[1] == expected


@pytest.mark.parametrize("name", ["P100-16GB"])
def test_outside_the_fit_the_interval_is_twice_as_wide(name: str) -> None:
    context = cuda_context(find_gpu(name), TORCH_2_13)
    low, expected, high = mebibytes(context)
    assert high - expected == expected - low == 170
    assert "outside the fit" in context.source


def test_a_gpu_with_more_threads_than_the_fit_is_outside_it() -> None:
    giant = find_gpu("B200").replace(name="giant", sm_count=200)
    low, expected, high = mebibytes(cuda_context(giant, TORCH_2_13))
    assert (low, expected, high) == (713, 883, 1053)


def test_without_lazy_loading_a_context_holds_every_kernel() -> None:
    low, expected, high = mebibytes(cuda_context(find_gpu("RTX3090"), SoftwareSpec(torch="1.12.1")))
    assert low <= 721 < expected < 1687 <= high  # pytorch#55277: a GTX 1080 and a RTX 3090
    assert high >= 1823  # an A100 with torch 1.10.2
    low, expected, high = mebibytes(cuda_context(find_gpu("A100-80GB"), SoftwareSpec(torch="2.0", cuda="11.6")))
    assert low < 922 <= expected < 942 < high  # told to load all: torch 1.13.1 and 2.1.1


def test_amd_spans_from_an_idle_context_to_the_largest_known() -> None:
    assert mebibytes(cuda_context(find_gpu("MI300X"), TORCH_2_13)) == (90, 400, 712)


# -- cuBLAS -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "torch", "each"),
    [
        ("A100-80GB", "2.13", 8_519_680),
        ("T4", "2.4", 8_519_680),
        ("T4", "1.13.1", 4_194_304),
        ("H100-80GB", "2.13", 33_554_432),
        ("H200", "2.0", 33_554_432),
        ("H100-80GB", "1.13", 4_194_304),
        ("B200", "2.12", 33_554_432),
        ("RTX5090", "2.13", 33_554_432),
        ("RTX5090", "2.11", 8_519_680),
    ],
)
def test_cublas_takes_a_workspace_for_each_thread(name: str, torch: str, each: int) -> None:
    gpu, software = find_gpu(name), SoftwareSpec(torch=torch)
    assert cublas_workspaces(gpu, software, training=True) == (each, each)
    assert cublas_workspaces(gpu, software, training=False) == (each,)
    assert cublas_workspace(gpu, software, training=True) == 2 * each


def test_two_workspaces_of_a_training_process_are_not_16_mib() -> None:
    assert cublas_workspace(find_gpu("A100-80GB"), TORCH_2_13, training=True) == 17_039_360
    assert cublas_workspace(find_gpu("H100-80GB"), TORCH_2_13, training=True) == 67_108_864


def test_a_bias_goes_through_cublaslt_which_had_its_own_buffer() -> None:
    gpu, before = find_gpu("A100-80GB"), SoftwareSpec(torch="2.10")
    assert cublas_workspaces(gpu, TORCH_2_13, training=True, bias=True) == (8_519_680, 8_519_680)
    assert cublas_workspaces(gpu, before, training=True, bias=True) == (8_519_680, MiB, 8_519_680)
    again = cublas_workspaces(gpu, before, training=True, bias=True, gradient_checkpointing=True)
    assert again == (8_519_680, MiB, 8_519_680, MiB)
    assert cublas_workspaces(gpu, before, training=False, bias=True) == (8_519_680, MiB)


def test_rocm_counts_hipblas_and_hipblaslt() -> None:
    assert cublas_workspaces(find_gpu("MI250X"), TORCH_2_13, training=False) == (32 * MiB, 76 * MiB)
    assert cublas_workspaces(find_gpu("MI300X"), TORCH_2_13, training=True) == (128 * MiB, 76 * MiB) * 2
    assert cublas_workspaces(find_gpu("MI300X"), SoftwareSpec(torch="2.5"), training=True) == ()


# -- NCCL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gpus", "published", "source"),
    [
        ("A100-40GB", 2, 544 * 10**6 / MiB, "NVIDIA/nccl#964"),
        ("A100-40GB", 4, 688 * 10**6 / MiB, "NVIDIA/nccl#964"),
        ("A100-40GB", 4, 0.70 * 1024, "awslabs/keys_values#92"),
        ("A100-80GB", 4, 1.43 * 1024 - 491, "wbfwonderful/Vad-R1#11, less the context"),
        ("A100-80GB", 2, 789 - 426, "meta-pytorch/torchrec#3580"),
        ("H100-80GB", 8, 1.06e9 / MiB - 593, "NVIDIA/nccl#1685 before the all-to-all, less the context"),
        ("MI250X", 8, 950, "Lumi-supercomputer/LUMI-AI-Guide#111"),
    ],
)
def test_published_communicators_lie_within_the_interval(name: str, gpus: int, published: float, source: str) -> None:
    low, _, high = mebibytes(nccl(find_gpu(name), gpus, gpus, TORCH_2_13))
    assert low <= published <= high, source


def test_pcie_takes_less_than_nvlink_and_a_pair_less_than_a_ring() -> None:
    expected = [
        nccl(find_gpu(name), gpus, gpus, TORCH_2_13).value
        for name, gpus in [("RTX3090", 2), ("A100-80GB", 2), ("A100-80GB", 8), ("H100-80GB", 8)]
    ]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(expected))


def test_more_nodes_and_more_communicators_take_more() -> None:
    gpu = find_gpu("A100-80GB")
    assert mebibytes(nccl(gpu, 8, 8, TORCH_2_13)) == (300, 700, 1049)
    assert mebibytes(nccl(gpu, 16, 8, TORCH_2_13)) == (400, 1000, 1649)
    assert mebibytes(nccl(gpu, 8, 8, TORCH_2_13, communicators=2)) == (300, 1400, 2098)
    # One GPU per node: nothing goes over NVLink.
    assert mebibytes(nccl(gpu, 2, 1, TORCH_2_13)) == (124, 400, 1000)
    assert mebibytes(nccl(find_gpu("MI250X"), 16, 8, TORCH_2_13, communicators=3)) == (300, 950 + 2 * 653, 2380)


# -- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda gpu: gpu.name)
def test_every_catalog_gpu_has_figures_with_a_source(gpu) -> None:
    context, alone = cuda_context(gpu, TORCH_2_13), nccl(gpu, 1, 1, TORCH_2_13)
    assert context.source.strip()
    assert (alone.low, alone.value, alone.high) == (0, 0, 0)
    assert 0 < context.low < context.value < context.high < gpu.memory_bytes / 4
    assert nccl(gpu, 2, 2, TORCH_2_13).value > 0
    assert 0 < cublas_workspace(gpu, TORCH_2_13, training=False) < cublas_workspace(gpu, TORCH_2_13, training=True)
    assert all(isinstance(number, int) for number in (context.low, context.value, context.high))


def test_a_cpu_has_none_of_it() -> None:
    cpu = find_gpu("cpu")
    assert cuda_context(cpu, TORCH_2_13).high == 0
    assert nccl(cpu, 8, 8, TORCH_2_13).high == 0
    assert cublas_workspaces(cpu, TORCH_2_13, training=True) == ()
    assert cublas_workspace(cpu, TORCH_2_13, training=True) == 0
