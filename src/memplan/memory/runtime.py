"""What the libraries take for themselves: the CUDA context and NCCL beside torch's memory, cuBLAS inside it.

What the driver reserves is not here: the capacity that torch sees (``GPUSpec.memory``) is without it already.
Nothing here depends on the model. A machine's own figures, once measured, are better than any of these.
"""

from __future__ import annotations

from memplan.constants import Constant, exact
from memplan.specs.hardware import GPUSpec
from memplan.specs.software import SoftwareSpec
from memplan.units import KiB, MiB

__all__ = ["cublas_workspace", "cublas_workspaces", "cuda_context", "flash_attn", "nccl"]

# -- the context ------------------------------------------------------------------------------------------------------

_POINTS = (
    "least squares over 32 published processes on 17 GPUs from T4 to B200, CUDA >= 11.7: memory in use less torch's, "
    "from out-of-memory texts and nvidia-smi (among them TianheWu/CoSeR#10, DB-GPT-Hub#248, ali-vilab/VACE#56, "
    "sentence-transformers#3214, awslabs/keys_values#92, Wan-Video/Wan2.1#465, stas00/ml-engineering, "
    "unslothai/unsloth#8669); RMS error 41 MiB"
)
CONTEXT_FIXED = Constant("CUDA context, fixed part", 31, -7, 68, "MiB", f"{_POINTS}; range: 2 standard errors")
CONTEXT_PER_THOUSAND_THREADS = Constant(
    "CUDA context, per 1000 resident threads (SMs x threads per SM)",
    2.08,
    1.89,
    2.27,
    "MiB",
    f"{_POINTS}; range: 2 standard errors. The driver seems to hold local memory for every thread that can be resident",
)
CONTEXT_SPREAD = exact("CUDA context, largest miss of the fit", 85, "MiB", f"{_POINTS}, 83 MiB (H100 NVL), rounded up")
FITTED_THREADS = (40 * 1024, 148 * 2048)
"""Resident threads of the smallest and the largest GPU of the fit: T4 and B200."""
_EAGER = "without lazy loading (pytorch#86509), which torch 1.13 has with CUDA 11.7"
_OVERHEAD = "ml-engineering's training/performance"
EAGER_CONTEXT = Constant(
    "CUDA context with all kernels loaded at start",
    922,
    700,
    1200,
    "MiB",
    f"{_EAGER}: 922 MiB with torch 1.13.1, 942 with 2.1.1, on an A100 told to load all ({_OVERHEAD})",
)
OLD_EAGER_CONTEXT = Constant(
    "CUDA context with all kernels loaded at start, torch before 1.13",
    1343,
    700,
    1830,
    "MiB",
    f"{_EAGER}: 1343 MiB on a V100 (January 2022, transformers' perf_train_gpu_one), 1823 with torch 1.10.2 on an A100 "
    f"({_OVERHEAD}), 721 to 1687 in pytorch#28394, #49481, #49877, #55277 and stylegan2-ada#70",
)
HIP_CONTEXT = Constant(
    "HIP context",
    400,
    90,
    712,
    "MiB",
    "no published figure of a training process; low: 90 MiB of an idle context on an MI250X, measured along with "
    "Lumi-supercomputer/LUMI-AI-Guide#111; high: the largest CUDA context published; value: their mean",
)


def cuda_context(gpu: GPUSpec, software: SoftwareSpec) -> Constant:
    """Return the bytes of one process's context on ``gpu``, kernels loaded so far included; 0 for a CPU.

    NVIDIA: a fit over published processes, -+ 85 MiB, the most by which it misses one of them; twice that for a GPU
    with fewer or more resident threads than those of the fit, or older than Volta. It is outside torch's counters.
    torch.compile's kernels come on top.

    >>> from memplan.catalog.gpus import find_gpu
    >>> int(cuda_context(find_gpu("A100-80GB"), SoftwareSpec()).value) // MiB
    491
    """
    if gpu.is_cpu:
        return exact("cuda_context", 0, "B", "a CPU has no context")
    own = gpu.own("cuda_context")
    if own is not None:
        return own
    if gpu.vendor == "amd":
        return _in_bytes("cuda_context", HIP_CONTEXT)
    if not software.at_least("torch", "1.13"):
        return _in_bytes("cuda_context", OLD_EAGER_CONTEXT)
    if not software.at_least("cuda", "11.7"):
        return _in_bytes("cuda_context", EAGER_CONTEXT)
    threads = gpu.sm_count * gpu.max_threads_per_sm
    expected = CONTEXT_FIXED.value + CONTEXT_PER_THOUSAND_THREADS.value * threads / 1000
    spread = CONTEXT_SPREAD.value
    source = f"{_POINTS}; largest miss {spread} MiB"
    fitted = FITTED_THREADS[0] <= threads <= FITTED_THREADS[1] and (gpu.compute_capability or (0, 0)) >= (7, 0)
    if not fitted:
        spread *= 2
        source += f"; doubled, since {gpu.name} is outside the fit"
    estimate = Constant("", expected, max(0, expected - spread), expected + spread, "MiB", source)
    return _in_bytes("cuda_context", estimate)


FLASH_ATTN_PER_THOUSAND_THREADS = Constant(
    "what runs with the flash-attn package have beside the context, per 1000 resident threads",
    0,
    0,
    8.33,
    "MiB",
    "1.0 to 1.8 GiB, unexplained, on one A100 in 12 runs (foundation-model-stack/fms-acceleration), and as much fits "
    "what QwenLM/Qwen shows; vLLM's forward on an RTX 3090 has none (noonghunna/club-3090#16). The driver holds local "
    "memory for every thread that can be resident (cms-sw/cmssw#51395), so it is taken to grow with those",
)


def flash_attn(gpu: GPUSpec, attn: str) -> Constant:
    """Return the bytes that a run with the flash-attn package may take beside context and NCCL: 0 for all that is
    known, and in its range what published runs have shown.

    >>> from memplan.catalog.gpus import find_gpu
    >>> bound = flash_attn(find_gpu("A100-80GB"), "flash_attention_2")
    >>> int(bound.value), int(bound.high) // MiB
    (0, 1842)
    >>> int(flash_attn(find_gpu("A100-80GB"), "sdpa").high)
    0
    """
    if attn != "flash_attention_2" or gpu.is_cpu or gpu.vendor == "amd":
        return exact("flash_attn", 0, "B", "its kernels do not run")
    each = FLASH_ATTN_PER_THOUSAND_THREADS
    thousands = gpu.sm_count * gpu.max_threads_per_sm / 1000
    values = (each.value * thousands, each.low * thousands, each.high * thousands)
    return _in_bytes("flash_attn", Constant("", *values, "MiB", each.source))


# -- cuBLAS -----------------------------------------------------------------------------------------------------------

_HANDLE_POOL = "aten/src/ATen/cuda/CublasHandlePool.cpp of torch"
CUBLAS_1 = exact("cuBLAS workspace, torch 1", 4096 * KiB, "B", f"{_HANDLE_POOL} 1.13: :4096:1")
CUBLAS = exact("cuBLAS workspace", 4096 * KiB * 2 + 16 * KiB * 8, "B", f"{_HANDLE_POOL} 2.0 .. 2.13: :4096:2:16:8")
CUBLAS_LARGE = exact(
    "cuBLAS workspace on Hopper and Blackwell",
    32 * MiB,
    "B",
    f"{_HANDLE_POOL}: 9.0 since 2.0 (pytorch#91564), 10.x and 12.x since 2.12 (pytorch#175344)",
)
CUBLASLT = exact(
    "cuBLASLt workspace",
    1 * MiB,
    "B",
    f"{_HANDLE_POOL}: a buffer of its own until 2.11, where it became cuBLAS's (pytorch#168175)",
)
HIPBLAS = exact("hipBLAS workspace", 32 * MiB, "B", f"{_HANDLE_POOL} 2.13, USE_ROCM")
HIPBLAS_LARGE = exact(
    "hipBLAS workspace on gfx942 and gfx950", 128 * MiB, "B", f"{_HANDLE_POOL} 2.13, USE_ROCM: MI300 and MI350 series"
)
HIPBLASLT = exact("hipBLASLt workspace", 76 * MiB, "B", f"{_HANDLE_POOL} 2.13, USE_ROCM")

_GFX94_GFX95 = ("MI300", "MI308", "MI325", "MI350", "MI355")


def cublas_workspaces(
    gpu: GPUSpec,
    software: SoftwareSpec,
    *,
    training: bool,
    bias: bool = False,
    gradient_checkpointing: bool = False,
) -> tuple[int, ...]:
    """Return the bytes of each workspace that GEMMs take from torch's memory and keep; empty for a CPU.

    A thread has one per stream. The first ones are the main thread's, taken in the first forward; with ``training``,
    autograd's device thread takes the same in the first backward. ``bias`` says whether a Linear has one, which goes
    through cuBLASLt: a buffer of its own before torch 2.11, in the thread that runs the forward (under
    ``gradient_checkpointing`` in both). ROCm counts hipBLAS's and hipBLASLt's, since either may run a GEMM; neither
    was torch's before 2.6.

    CUBLAS_WORKSPACE_CONFIG on the target machine would change them; torch > 2.13 may give them back after each GEMM.

    >>> from memplan.catalog.gpus import find_gpu
    >>> cublas_workspaces(find_gpu("A100-80GB"), SoftwareSpec(), training=True)
    (8519680, 8519680)
    """
    if gpu.is_cpu:
        return ()
    if gpu.vendor == "amd" and not software.at_least("torch", "2.6"):
        return ()  # rocBLAS took its own from the driver (pytorch#138791, of November 2024)
    if gpu.vendor == "amd":
        hipblas = HIPBLAS_LARGE if gpu.name.upper().startswith(_GFX94_GFX95) else HIPBLAS
        return (int(hipblas.value), int(HIPBLASLT.value)) * (2 if training else 1)
    workspace = int(_cublas_default(gpu, software).value)
    lt = (int(CUBLASLT.value),) if bias and not software.at_least("torch", "2.11") else ()
    forward = (workspace, *lt)
    backward = (workspace, *(lt if gradient_checkpointing else ()))
    return forward + backward if training else forward


def cublas_workspace(
    gpu: GPUSpec,
    software: SoftwareSpec,
    *,
    training: bool,
    bias: bool = False,
    gradient_checkpointing: bool = False,
) -> int:
    """Return the bytes of all of :func:`cublas_workspaces`; they are part of ``torch.cuda.memory_allocated``."""
    return sum(
        cublas_workspaces(gpu, software, training=training, bias=bias, gradient_checkpointing=gradient_checkpointing)
    )


def _cublas_default(gpu: GPUSpec, software: SoftwareSpec) -> Constant:
    own = gpu.own("cublas_workspace")
    if own is not None:
        return own
    major, _ = gpu.compute_capability or (0, 0)
    if not software.at_least("torch", "2.0"):
        return CUBLAS_1
    if major == 9 or (major in (10, 12) and software.at_least("torch", "2.12")):
        return CUBLAS_LARGE
    return CUBLAS


# -- NCCL -------------------------------------------------------------------------------------------------------------

_BUFFERS = "12 MiB per connection and channel (NVIDIA/nccl src/transport/p2p.cc: LL, LL128 and 4 MiB of SIMPLE)"
NCCL_PCIE = Constant(
    "NCCL over PCIe",
    100,
    24,
    400,
    "MiB",
    f"{_BUFFERS}; low: a ring of 2 channels; value: ring and tree of 4; high: with the kernels, below NVLink's",
)
NCCL_NVLINK_PAIR = Constant(
    "NCCL over NVLink, 2 GPUs",
    544,
    300,
    1049,
    "MiB",
    "544 MB per group of 2 A100 (NVIDIA/nccl#964); low: 300 MiB for 2 A100 beside their contexts "
    "(meta-pytorch/torchrec#3580); high: 1.6 GB with the context (NVIDIA/nccl#864)",
)
NCCL_NVLINK = Constant(
    "NCCL over NVLink, more GPUs",
    700,
    300,
    1049,
    "MiB",
    "688 MB per group of 3 and 4 A100 (NVIDIA/nccl#964), 0.70 GiB in DDP on 4 A100 (awslabs/keys_values#92), 0.95 GiB "
    "on 4 A100 (wbfwonderful/Vad-R1#11); high: 1.6 GB with the context (NVIDIA/nccl#864)",
)
NCCL_NVSWITCH = Constant(
    "NCCL on Hopper and Blackwell NVSwitch",
    800,
    400,
    1400,
    "MiB",
    f"no published total of one communicator; low: 8 H100 before an all-to-all, 1.06 GB with the context "
    f"(NVIDIA/nccl#1685); value: rings and trees of 16 to 24 channels, {_BUFFERS}, and NVLS's 256 MiB; high: NVLS's "
    "384 MiB on B200 and 1049 MiB as on A100",
)
NCCL_NODES = Constant(
    "NCCL between nodes",
    300,
    100,
    600,
    "MiB",
    "buffers per network channel, which grow with the adapters (NVIDIA/nccl#818) but not beyond 2 nodes "
    "(NVIDIA/nccl#986); high: a shared network buffer of 512 MiB (NVIDIA/nccl#2363)",
)
RCCL_FIRST = Constant(
    "RCCL, first communicator",
    950,
    300,
    1040,
    "MiB",
    "MI250X, 16 to 128 ranks (Lumi-supercomputer/LUMI-AI-Guide#111); low, on one node: as NCCL over NVLink",
)
RCCL_FURTHER = Constant(
    "RCCL, each further communicator",
    653,
    300,
    670,
    "MiB",
    "MI250X, 627 to 656 MiB at 16 to 128 ranks (Lumi-supercomputer/LUMI-AI-Guide#111)",
)


def nccl(gpu: GPUSpec, gpus: int, gpus_per_node: int, software: SoftwareSpec, *, communicators: int = 1) -> Constant:
    """Return the bytes of NCCL's buffers on each of ``gpus`` ranks, outside torch's counters; 0 for one GPU or a CPU.

    ``communicators`` is how many process groups run collectives (DDP and one-dimensional FSDP: 1). Totals are published
    for few machines, so the interval is wide; all-to-all, which takes much more, is not in it. A further communicator
    may share the first one's buffers, so the low end counts one.

    >>> from memplan.catalog.gpus import find_gpu
    >>> nccl(find_gpu("A100-80GB"), 8, 8, SoftwareSpec()).value // MiB
    700
    """
    if gpus == 1 or gpu.is_cpu:
        return exact("nccl", 0, "B", "one GPU has nobody to talk to" if gpus == 1 else "a CPU uses gloo")
    own = gpu.own("nccl")
    if own is not None and gpus <= gpus_per_node and communicators == 1:
        return own
    if gpu.vendor == "amd":
        first, further = RCCL_FIRST, RCCL_FURTHER
    else:
        first = further = _nccl_in_node(gpu, gpus_per_node)
    low = first.low
    value = first.value + further.value * (communicators - 1)
    high = first.high + further.high * (communicators - 1)
    source = first.source if communicators == 1 else f"{communicators} communicators: {first.source}; {further.source}"
    if gpus > gpus_per_node and gpu.vendor == "nvidia":
        low += NCCL_NODES.low
        value += NCCL_NODES.value * communicators
        high += NCCL_NODES.high * communicators
        source += f"; between nodes: {NCCL_NODES.source}"
    return _in_bytes("nccl", Constant("", value, low, high, "MiB", source))


def _nccl_in_node(gpu: GPUSpec, gpus_per_node: int) -> Constant:
    if gpu.link != "nvlink" or gpus_per_node == 1:
        return NCCL_PCIE
    if (gpu.compute_capability or (0, 0)) >= (9, 0):
        return NCCL_NVSWITCH
    return NCCL_NVLINK_PAIR if gpus_per_node == 2 else NCCL_NVLINK


def _in_bytes(name: str, mebibytes: Constant) -> Constant:
    value, low, high = (round(number * MiB) for number in (mebibytes.value, mebibytes.low, mebibytes.high))
    return Constant(name, value, low, high, "B", mebibytes.source)
