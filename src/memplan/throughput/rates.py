"""How fast things go: shares of what a datasheet promises that have been seen to be reached, each with its range."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Literal

from memplan.constants import Constant, exact
from memplan.specs.hardware import ClusterSpec, GPUSpec
from memplan.throughput.kernels import Product, Work

Case = Literal["fast", "expected", "slow"]
"""Which end of the constants' ranges is taken: the fast one gives the least time."""

CASES: tuple[Case, ...] = ("fast", "expected", "slow")

# -- the GPU -----------------------------------------------------------------------------------------------------------

MATMUL = Constant(
    "matrix products in 16 bit, of the peak",
    0.68,
    0.58,
    0.87,
    "1",
    "high: largest of any shape, 267.9 of 312 TFLOPS on an A100 SXM (github.com/mag-/gpu_benchmark, README); "
    "expected: calibrated on the A100 rows of mosaicml/llm-foundry in benchmarks/published, all other sources held out",
)
MATMUL_AMD = Constant(
    "matrix products in 16 bit on AMD, of the peak",
    0.45,
    0.35,
    0.60,
    "1",
    "high: largest of any shape, 758.3 of 1307 TFLOPS on an MI300X (github.com/mag-/gpu_benchmark, README); expected: "
    "an assumption, as far below it as on NVIDIA's GPUs",
)
MATMUL_FP32 = Constant(
    "matrix products in float32, of the peak outside tensor cores",
    0.80,
    0.65,
    0.93,
    "1",
    "cuBLAS's sgemm is near the peak of a V100 (14 of 15.7 TFLOPS); TF32 is off by default "
    "(torch.backends.cuda.matmul)",
)
TILE = exact(
    "tile of a matrix product, rows and columns",
    128,
    "1",
    "NVIDIA, Matrix Multiplication Background User's Guide: 256 x 128 and 128 x 128 tiles are the most "
    "efficient; tiles "
    "are given out in waves of one for each multiprocessor",
)
SPLIT_K = exact(
    "length of a product over which cuBLAS splits it, if there are too few tiles",
    1024,
    "1",
    "split-K kernels of cuBLAS and CUTLASS (stream-K); the length is an assumption",
)
MATMUL_HOPPER = Constant(
    "matrix products in 16 bit on compute capability 9 and 10, of the peak",
    0.55,
    0.42,
    0.80,
    "1",
    "high: largest of any shape, 792.1 of 989 TFLOPS on an H100 SXM, 499.5 of 756 on an H100 PCIe "
    "(github.com/mag-/gpu_benchmark, README); expected: calibrated on the H100 rows of mosaicml/llm-foundry, all other "
    "sources held out; power holds clocks down, more than on older GPUs",
)
FLASH = Constant(
    "fused attention on compute capability 8.x, of the peak",
    0.52,
    0.40,
    0.70,
    "1",
    "FlashAttention-2 (arXiv 2307.08691): 50 to 73 % of an A100's peak for causal and other heads of 64 and 128",
)
FLASH_HOPPER = Constant(
    "FlashAttention-2 on compute capability 9.0 and later, of the peak",
    0.30,
    0.18,
    0.36,
    "1",
    "335 of 989 TFLOPS on an H100 at best (arXiv 2307.08691)",
)
CUDNN = Constant(
    "cuDNN's attention, of the peak",
    0.48,
    0.35,
    0.65,
    "1",
    "forward up to 740 of 989 TFLOPS, backward up to 550 on an H100 (arXiv 2407.08608, with FlashAttention-3)",
)
EFFICIENT = Constant(
    "memory-efficient attention, of the peak",
    0.30,
    0.18,
    0.40,
    "1",
    "xformers' kernel in the figures of arXiv 2307.08691: about 100 of 312 TFLOPS on an A100; older GPUs alike",
)
BANDWIDTH = Constant(
    "elementwise kernels, of the memory's bandwidth",
    0.83,
    0.70,
    0.92,
    "1",
    "a copy reaches 4.3 of 4.8 TB/s on an H200; strided and reducing kernels less",
)
KERNEL = Constant(
    "a kernel's least time",
    3e-6,
    2e-6,
    5e-6,
    "s",
    "launch and drain of an empty kernel are about 2 to 5 us on the GPU (NVIDIA, Getting Started with CUDA "
    "Graphs: 2.9 us "
    "kernels with 3.8 us between launches)",
)
HOST_FORWARD = Constant(
    "the host's time for one result of a forward",
    20e-6,
    10e-6,
    35e-6,
    "s",
    "eager torch 2.13 with transformers 5.23, forwards of tiny Llama and GPT-2 on one core of an AMD EPYC: 21 to "
    "29 us a "
    "result, views and modules included; server cores are up to twice as fast, a CUDA launch takes longer than a tiny "
    "CPU kernel",
)
HOST_ZERO3 = Constant(
    "the host's time for one hook of ZeRO-3, before or after a module",
    150e-6,
    80e-6,
    350e-6,
    "s",
    "DeepSpeed 0.19.8 with a tiny Llama of 24 layers on one core of an AMD EPYC, one rank: 110 to 320 us for "
    "each time a "
    "module begins or ends, beside what it computes",
)
HOST_ZERO12 = Constant(
    "the host's time for one gradient of ZeRO-1 and 2",
    200e-6,
    80e-6,
    400e-6,
    "s",
    "the same model under ZeRO-2: 300 us a gradient",
)
HOST_FSDP = Constant(
    "the host's time for one collective of FSDP, with the copies around it",
    1.5e-3,
    0.7e-3,
    3e-3,
    "s",
    "the same model under FSDP2 of torch 2.13 as one of 4 ranks: 2 ms a collective",
)
HOST_BACKWARD = Constant(
    "the host's time for one result of a backward",
    10e-6,
    5e-6,
    16e-6,
    "s",
    "the same models' backwards: 8 to 13 us a result",
)

# -- between GPUs ------------------------------------------------------------------------------------------------------

NVLINK = Constant(
    "collectives over NVLink, of its bandwidth in one direction",
    0.75,
    0.38,
    0.90,
    "1",
    "370 of 450 GB/s on 8 H100, but for all-reduces with NVLink SHARP (NCCL's author, NVIDIA/nccl-tests#212); 208 of "
    "300 between 2 A100 (#178), about 200 on 8 (#149); low: 116 of 300 between 2 bridged H100 PCIe (#194)",
)
PCIE_PEERS = Constant(
    "collectives over PCIe, of 16 lanes in one direction",
    0.35,
    0.15,
    0.70,
    "1",
    "all-reduces: 20 of 31.5 GB/s between A100 on several bridges (NVIDIA/nccl-tests#178), 35 and 28 of 63 on 4 and 8 "
    "RTX 5090 (NVIDIA/nccl#1639); expected and low: an assumption for hosts whose memory passes on every byte twice",
)
NETWORK = {
    "V100": 6.25,
    "A100": 25.0,
    "A800": 25.0,
    "H100": 50.0,
    "H800": 50.0,
    "H200": 50.0,
    "H20": 50.0,
    "GH200": 50.0,
    "B200": 50.0,
    "GB200": 50.0,
    "B300": 100.0,
    "MI300X": 50.0,
    "MI325X": 50.0,
    "MI355X": 50.0,
    "MI250": 25.0,
    "MI250X": 25.0,
}
"""GB/s per GPU and direction between nodes: an assumption, of the vendor's own systems (DGX-1 with 4 x 100 Gb/s, DGX
A100 with 200 Gb/s per GPU, DGX H100 and later with 400 Gb/s, with 800 beside B300; Frontier's nodes with 4 x 200 Gb/s
for 8 dies)."""
OTHER_NETWORK = 12.5
"""GB/s per node of other GPUs: 100 Gb/s."""
NETWORK_SHARE = Constant(
    "collectives between nodes, of the network's bandwidth",
    0.80,
    0.30,
    0.95,
    "1",
    "all-reduces of 24 A100 on 3 nodes with 4 x 200 Gb/s: 85 of 100 GB/s, at best 96 (NVIDIA/nccl-tests#119); low: the "
    "network is slower than that of the vendor's own systems",
)
CALL = Constant(
    "a collective's latency",
    40e-6,
    3.5e-6,
    150e-6,
    "s",
    "all-reduces of 128 bytes between H100 nodes: 62 us (NVIDIA/nccl#1453); low: 3.5 us in a row on 4 H800, which wait "
    "for nobody (NVIDIA/nccl#1984); high: an assumption for many nodes",
)
OVERLAP = Constant(
    "transfers beside kernels: the share of the shorter one that is hidden",
    0.85,
    0.50,
    1.0,
    "1",
    "an assumption: the first and last transfer are not hidden, and both share multiprocessors and memory",
)

# -- the host ----------------------------------------------------------------------------------------------------------

PCIE = Constant(
    "copies between GPU and pinned host memory, of PCIe's 16 lanes",
    0.80,
    0.24,
    0.87,
    "1",
    "12 of 15.75 GB/s on a V100, 25 of 31.5 on an A100 (ZaidQureshi/bam#54), 52.8 of 63 on an H100 (NVIDIA/nvbandwidth"
    "#24); low: 3.8 of 15.75 to memory of the other socket, where 12.2 are reached from the GPU's own "
    "(mpicbg-scicomp/gearshifft#82)",
)
PCIE_GB_PER_S = {0: 15.75, 3: 15.75, 4: 31.5, 5: 63.0, 6: 126.0}
"""16 lanes in one direction, by generation."""
CPU_ADAM = Constant(
    "DeepSpeedCPUAdam, core-seconds per parameter",
    11.5e-9,
    3.4e-9,
    25e-9,
    "s",
    "an assumption between 3.4 to 3.6 ns on one core with nothing beside it (torch's AdamW on flat tensors, "
    "ISEEKYAN/Megatron-LM#188) and 16.9 ns on the host of one GPU (22.9 s for 1.35 x 10^9 parameters, deepspeedai/"
    "DeepSpeed#1635)",
)
CORES = Constant(
    "cores of a node",
    64,
    16,
    128,
    "1",
    "an assumption: two server sockets; low: a workstation",
)
HOST_MEMORY = Constant(
    "bandwidth of a node's memory, GB/s",
    200,
    50,
    400,
    "GB/s",
    "an assumption: two sockets of 8 channels of DDR4-3200 have 410 GB/s, of which STREAM reaches 3/4; low: a desktop",
)
CPU_ADAM_BYTES = exact(
    "bytes that CPU Adam moves per parameter",
    30,
    "B",
    "reads the gradient, reads and writes master and both moments in float32, writes the 16-bit weight",
)
NVME_READ = Constant(
    "reads from a node's NVMe, GB/s",
    6.0,
    3.0,
    25.0,
    "GB/s",
    "one PCIe 4.0 drive; low: PCIe 3.0; high: 8 drives of a DGX-2. DeepNVMe (deepspeedai/DeepSpeed, "
    "blogs/deepnvme/08-2024) measures 10 GB/s on Azure's NC96ads_A100_v4",
)
NVME_WRITE = Constant(
    "writes to a node's NVMe, GB/s",
    4.0,
    2.0,
    16.0,
    "GB/s",
    "as reads; DeepNVMe measures 5 GB/s on the same machine",
)


@dataclass(frozen=True)
class Machine:
    """What a cluster's spec does not say of its nodes. Give what you know; the rest is assumed, with a range."""

    cores: Constant = CORES
    """Of a node; its ranks share them."""
    threads: int | None = None
    """OpenMP threads of a rank, for optimizers on the host. None is its share of the cores, and one thread as the slow
    case: torchrun and accelerate set OMP_NUM_THREADS=1 for several ranks where it is not set
    (torch/distributed/run.py, accelerate/utils/launch.py), and DeepSpeed#1635 had no more for one."""
    host_memory: Constant = HOST_MEMORY
    nvme_read: Constant = NVME_READ
    nvme_write: Constant = NVME_WRITE
    network_gb_per_s: float | None = None
    """10^9 bytes/s per GPU and direction between nodes; None is what the GPU's vendor builds."""


DEFAULT_MACHINE = Machine()


@dataclass(frozen=True)
class Rates:
    """Speeds of one cluster in one case, in bytes, FLOPs and seconds."""

    gpu: GPUSpec
    cluster: ClusterSpec
    machine: Machine
    case: Case
    flash_attn: bool = False
    """The flash-attn package, and not torch's choice of a kernel."""

    def of(self, share: Constant) -> float:
        """A constant of which more is faster."""
        return {"fast": share.high, "expected": share.value, "slow": share.low}[self.case]

    def cost(self, constant: Constant) -> float:
        """A constant of which less is faster."""
        return {"fast": constant.low, "expected": constant.value, "slow": constant.high}[self.case]

    # -- the GPU ---------------------------------------------------------------------------------------------------

    def peak(self, dtype: str) -> float:
        """FLOP/s of matrix products, as reached. A type without units of its own is computed as float32."""
        gpu = self.gpu
        own = gpu.own(f"matmul_{dtype}")
        if own is not None:
            return self.of(own)
        units = {"bfloat16": gpu.bf16_tflops, "float16": gpu.fp16_tflops, "int32": gpu.fp16_tflops}.get(dtype)
        if units is None:
            return gpu.fp32_tflops * 1e12 * self.of(MATMUL_FP32)
        if gpu.vendor == "amd":
            return units * 1e12 * self.of(MATMUL_AMD)
        return units * 1e12 * self.of(MATMUL_HOPPER if self._is_of_data_centers else MATMUL)

    @property
    def _is_of_data_centers(self) -> bool:
        """Hopper and Blackwell, but for the latter's cards for workstations."""
        return (self.gpu.compute_capability or (0, 0))[0] in (9, 10)

    def attention(self, dtype: str) -> float:
        """FLOP/s of fused attention."""
        gpu = self.gpu
        units = {"bfloat16": gpu.bf16_tflops, "float16": gpu.fp16_tflops}.get(dtype)
        if units is None:
            return gpu.fp32_tflops * 1e12 * self.of(EFFICIENT)
        if gpu.vendor == "amd" or (gpu.compute_capability or (0, 0)) < (8, 0):
            return units * 1e12 * self.of(EFFICIENT)
        if not self._is_of_data_centers:
            return units * 1e12 * self.of(FLASH)
        return units * 1e12 * self.of(FLASH_HOPPER if self.flash_attn else CUDNN)

    @cached_property
    def bandwidth(self) -> float:
        """Bytes/s of the GPU's memory, as reached."""
        own = self.gpu.own("copy")
        if own is not None:  # that a copy reaches, of which other kernels reach no more
            return self.of(own) * self.of(BANDWIDTH) / BANDWIDTH.high
        return self.gpu.bandwidth_gb_per_s * 1e9 * self.of(BANDWIDTH)

    def product(self, product: Product) -> float:
        """Seconds of a matrix product: of its tiles, in waves, or of the bytes that it reads and writes."""
        m, n, k, dtype = product
        tile = int(TILE.value)
        tiles = ceil(m / tile) * ceil(n / tile)
        waves = tiles / self.gpu.sm_count
        if waves < 1:  # fewer tiles than multiprocessors: each is split as far as its length allows
            used = min(1.0, waves * max(1, k // int(SPLIT_K.value)))
        else:
            used = waves / ceil(waves)
        itemsize = 4 if dtype in ("float32", "int32") else 2
        moved = itemsize * (m * k + k * n + m * n)
        return max(2 * m * n * k / (self.peak(dtype) * used), moved / self.bandwidth, self.cost(KERNEL))

    def gpu_seconds(self, work: Work) -> tuple[float, float]:
        """Seconds of the kernels of a stage: those of products and attention, and the others'."""
        least, bandwidth = self.cost(KERNEL), self.bandwidth
        computing = sum(self.product(product) * count for product, count in work.products.items())
        for (dtype, flops), count in work.attention.items():
            computing += count * max(flops / self.attention(dtype), least)
        computing += sum(flops / self.peak(dtype) for dtype, flops in work.unknown.items())
        moving = sum(count * max(nbytes / bandwidth, least) for nbytes, count in work.elementwise.items())
        return computing, moving

    # -- links -----------------------------------------------------------------------------------------------------

    @cached_property
    def link(self) -> float:
        """Bytes/s at which a ring over all ranks passes data on."""
        gpu, cluster = self.gpu, self.cluster
        share = self.of(PCIE_PEERS if gpu.link == "pcie" else NVLINK)
        inside = gpu.link_gb_per_s * 1e9 * share
        if cluster.nodes == 1:
            return inside
        network = self.machine.network_gb_per_s
        if network is None:
            network = NETWORK.get(gpu.name.split("-")[0], OTHER_NETWORK / cluster.gpus_per_node)
        across = network * cluster.gpus_per_node * 1e9 * self.of(NETWORK_SHARE)
        return min(inside, across) if cluster.gpus_per_node > 1 else across

    @cached_property
    def pcie(self) -> float:
        """Bytes/s between a GPU and pinned host memory, one way."""
        own = self.gpu.own("pcie")
        if own is not None:
            return self.of(own)
        return PCIE_GB_PER_S.get(self.gpu.pcie_generation, PCIE_GB_PER_S[3]) * 1e9 * self.of(PCIE)

    @cached_property
    def cpu_step(self) -> float:
        """Seconds per parameter of a rank's partition that is stepped on the host, all of its node's ranks at once."""
        ranks = self.cluster.gpus_per_node
        cores = max(self.of(self.machine.cores) / ranks, 1)
        if self.machine.threads is not None:
            cores = min(cores, self.machine.threads)
        elif self.case == "slow":
            cores = 1
        memory = self.of(self.machine.host_memory) * 1e9 / ranks
        return max(self.cost(CPU_ADAM) / cores, CPU_ADAM_BYTES.value / memory)

    @cached_property
    def nvme(self) -> tuple[float, float]:
        """Bytes/s at which one rank reads and writes NVMe, all of its node's ranks at once."""
        ranks = self.cluster.gpus_per_node
        return self.of(self.machine.nvme_read) * 1e9 / ranks, self.of(self.machine.nvme_write) * 1e9 / ranks
