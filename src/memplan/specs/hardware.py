"""Where it runs: one GPU model and how many of them, host memory, NVMe."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from memplan.constants import Constant
from memplan.errors import SpecError
from memplan.specs._base import MemorySize, NonNegativeInt, PositiveInt, Spec

__all__ = ["ClusterSpec", "GPUSpec"]

GPUResolver: TypeAlias = Callable[[str], "GPUSpec"]
"""A GPU's name -> its row in the catalog; raises ResolutionError for an unknown name."""

_COUNTS = re.compile(
    r"(?:(?P<first>\d{1,15})\s*[x×]\s*)?(?:(?P<second>\d{1,15})\s*[x×]\s*)?(?P<name>.*)", re.IGNORECASE
)


class GPUSpec(Spec):
    """One model of GPU. Throughputs are peak and dense; None is a type the GPU has no units for."""

    name: str
    """As in the catalog: ``A100-80GB``; ``cpu`` is a device that follows CPU dispatch rules."""
    vendor: Literal["nvidia", "amd", "cpu"]
    """Who made it, which decides the rules for kernels and overheads."""
    memory: Constant
    """Bytes that torch sees (``torch.cuda.get_device_properties().total_memory``), with their range."""
    compute_capability: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """CUDA's (major, minor); None unless the vendor is nvidia."""
    sm_count: PositiveInt
    """Streaming multiprocessors; AMD: compute units; cpu: 1."""
    max_threads_per_sm: PositiveInt
    """Resident threads of one SM; AMD: of one compute unit; cpu: 1."""
    bandwidth_gb_per_s: float
    """Memory bandwidth, 10^9 bytes/s."""
    bf16_tflops: float | None
    """Dense bfloat16 with float32 accumulation, 10^12 FLOP/s; None without bf16 units."""
    fp16_tflops: float | None
    """Dense float16, 10^12 FLOP/s."""
    fp32_tflops: float
    """float32 outside tensor cores, 10^12 FLOP/s."""
    supports_bf16: bool
    """Whether bf16 runs in hardware; decides the default of mixed precision."""
    link: Literal["nvlink", "xgmi", "pcie", "none"]
    """How GPUs of one node reach each other."""
    link_gb_per_s: float
    """Bandwidth of that link per GPU and direction, 10^9 bytes/s."""
    pcie_generation: NonNegativeInt
    """PCIe to the host, 16 lanes; 0 where there is none."""
    source: str
    """Where the row's values were read: datasheets and measurements."""
    measured: tuple[Constant, ...] = ()
    """This machine's own constants, by the names of a profile; they go before those of all machines."""

    @model_validator(mode="after")
    def _consistent(self) -> GPUSpec:
        if self.memory.unit != "B":
            raise SpecError.at("memory", self.memory.unit, "is not its unit", "Give the memory in B.")
        if not self.source.strip():
            raise SpecError.at("source", self.source, "is blank", "Say where the values were read.")
        if (self.vendor == "nvidia") != (self.compute_capability is not None):
            remedy = "Give it for nvidia, and for nvidia only."
            raise SpecError.at("compute_capability", self.compute_capability, f"cannot be for {self.vendor}", remedy)
        for name in ("bandwidth_gb_per_s", "fp32_tflops"):
            if not 0 < getattr(self, name) < 1e6:  # NaN fails too
                raise SpecError.at(name, getattr(self, name), "is out of range", "Use a number from 0 to 1e6.")
        for name in ("bf16_tflops", "fp16_tflops", "link_gb_per_s"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1e6:
                raise SpecError.at(name, value, "is out of range", "Use a number from 0 to 1e6.")
        return self

    def own(self, name: str) -> Constant | None:
        """Return a constant that was measured on this machine, if it was."""
        return next((constant for constant in self.measured if constant.name == name), None)

    @property
    def memory_bytes(self) -> int:
        """Bytes that torch sees, as expected."""
        return int(self.memory.value)

    @property
    def is_cpu(self) -> bool:
        """Whether CPU dispatch rules apply, and no CUDA overheads."""
        return self.vendor == "cpu"


def _gpu(value: object) -> object:
    # Done here so that an error speaks of the GPU's fields, not of the arms of a union.
    if isinstance(value, dict):
        return GPUSpec.from_dict(value)
    if value is None or isinstance(value, GPUSpec) or (isinstance(value, str) and value.strip()):
        return value
    raise SpecError.at("", value, "is not a GPU", "Name one, as in A100-80GB, give a GPUSpec, or leave it out.")


LARGEST_CLUSTER = 2**18
"""Ranks beyond those of any cluster that is known: engines are played over every rank's partition."""


class ClusterSpec(Spec):
    """GPUs of one model on equal nodes. Raises SpecError for a wrong field, or GPUs that nodes cannot share evenly."""

    gpu: Annotated[GPUSpec | str | None, BeforeValidator(_gpu)] = None
    """A catalog name, a full spec, or None for the local GPU (capacity unknown if there is none)."""
    gpus: PositiveInt = 1
    """Data-parallel ranks in total, over all nodes; at most :data:`LARGEST_CLUSTER`."""
    nodes: PositiveInt = 1
    """Machines; divides ``gpus``."""
    gpu_memory: MemorySize | None = None
    """Bytes per GPU; overrides the catalog's. Text needs a unit, as in ``24GiB``."""
    host_memory: MemorySize | None = None
    """Bytes of RAM per node; None is unknown."""
    nvme: MemorySize | None = None
    """Bytes of NVMe per node; None is unknown."""
    nvme_path: Annotated[str, Field(min_length=1)] | None = None
    """Folder on the NVMe, for engines that offload to it."""

    @model_validator(mode="after")
    def _equal_nodes(self) -> ClusterSpec:
        if self.gpus > LARGEST_CLUSTER:
            problem = "is more than one data-parallel run has"
            raise SpecError.at("gpus", self.gpus, problem, f"Use at most {LARGEST_CLUSTER}.")
        if self.gpus % self.nodes:
            remedy = f"Use a multiple of {self.nodes}, such as {self.nodes * (self.gpus // self.nodes + 1)}."
            raise SpecError.at("gpus", self.gpus, f"cannot be shared evenly by {self.nodes} nodes", remedy)
        return self

    @property
    def gpus_per_node(self) -> int:
        """Ranks on one node."""
        return self.gpus // self.nodes

    @classmethod
    def parse(cls, text: str, resolver: GPUResolver | None = None) -> ClusterSpec:
        """Read ``NAME``, ``GPUSxNAME`` or ``NODESxGPUSxNAME``; the GPUs are those of one node.

        ``resolver`` turns the name into a :class:`GPUSpec`; without it the name is kept. Raises SpecError.

        >>> cluster = ClusterSpec.parse("2x8xH100-80GB")
        >>> cluster.nodes, cluster.gpus, cluster.gpu
        (2, 16, 'H100-80GB')
        """
        match = _COUNTS.fullmatch(text.strip())
        name = match["name"].strip() if match else ""
        if match is None or not name:
            raise SpecError.at("cluster", text, "has no GPU name", "Write it as 2xA100-80GB or 2x8xH100-80GB.")
        counts = [int(match[group]) for group in ("first", "second") if match[group] is not None]
        if 0 in counts:
            raise SpecError.at("cluster", text, "has a count of zero", "Write it as 2xA100-80GB or 2x8xH100-80GB.")
        nodes, per_node = [1, 1, *counts][-2:]
        given = {"gpus": nodes * per_node, "nodes": nodes} if counts else {}
        return cls(gpu=resolver(name) if resolver else name, **given)
