"""Estimates with numbers that are easy to find again in a page."""

from __future__ import annotations

from typing import Any

from memplan.results import (
    Assumption,
    Components,
    Estimate,
    EstimateList,
    GpuMemory,
    HostMemory,
    ModelInfo,
    NvmeMemory,
    Phase,
    Term,
    verdict_for,
    worst_verdict,
)
from memplan.units import GiB, MiB

PARTS = {
    "weights": 25 * GiB,
    "gradients": 20 * GiB,
    "optimizer": 10 * GiB,
    "activations": 5 * GiB,
    "workspace": MiB,
    "fragmentation": 3 * GiB,
    "context": GiB // 2,
}
SETUP: dict[str, Any] = {
    "task": "train", "strategy": "ddp", "offload_optimizer": "none", "offload_param": "none",
    "dtype": "float32", "mixed_precision": "bf16", "micro_batch_size": 4, "seq_len": 2048, "grad_accum_steps": 1,
    "optim": "adamw_torch_fused", "attn": "sdpa", "gradient_checkpointing": False, "liger": False,
    "lora": None, "quantization": None, "device_map": None, "max_new_tokens": None,
}  # fmt: skip


def estimate(
    *,
    parts: dict[str, int] = PARTS,
    capacity: int | None = 80 * GiB,
    gpu: str | None = "A100-80GB",
    setup: dict[str, Any] | None = None,
    host: HostMemory | None = None,
    nvme: NvmeMemory | None = None,
    slack: int = GiB,
    **fields: Any,
) -> Estimate:
    components = Components(**parts)
    reserved = components.allocated + components.fragmentation
    device = reserved + components.context + components.nccl
    host = host or HostMemory(capacity=None, peak=0, pinned=0, ranks=2, components={})
    nvme = nvme or NvmeMemory(capacity=None, bytes=0, components={})
    places = [(device - slack, device + slack, capacity)]
    places += [(size, size, room) for size, room in ((host.peak, host.capacity), (nvme.bytes, nvme.capacity)) if size]
    defaults: dict[str, Any] = {
        "model": ModelInfo(
            id="org/model",
            architecture="LlamaForCausalLM",
            parameters=6_738_415_616,
            trainable_parameters=6_738_415_616,
            source="catalog",
        ),
        "setup": SETUP | (setup or {}),
        "cluster": {"gpu": gpu, "gpus": 2, "nodes": 1},
        "software": {"torch": "2.13.0"},
        "gpu": GpuMemory(
            capacity=capacity,
            peak_allocated=components.allocated,
            peak_reserved=reserved,
            peak_device=device,
            low=device - slack,
            high=device + slack,
            peak_phase="backward",
            steady_allocated=components.allocated,
            components=components,
            phases=(
                Phase(name="load", allocated=25 * GiB),
                Phase(name="backward", allocated=components.allocated),
                Phase(name="idle", allocated=0),
            ),
        ),
        "host": host,
        "nvme": nvme,
        "verdict": worst_verdict(verdict_for(*place) for place in places),
        "assumptions": (
            Assumption(name="cuda_context", value=GiB // 2, low=GiB // 4, high=GiB, source="nvidia-smi of " + 90 * "x"),
            Assumption(name="tokens per expert (tokens)", value=12, low=8, high=20, source="a paper"),
        ),
    }
    return Estimate(**(defaults | fields))


def several() -> EstimateList:
    small = dict(PARTS, activations=GiB)
    return EstimateList(
        estimates=(
            estimate(capacity=40 * GiB),
            estimate(parts=small, capacity=64 * GiB, setup={"micro_batch_size": 1, "grad_accum_steps": 4}),
            estimate(parts=small, capacity=64 * GiB, setup={"gradient_checkpointing": True}),
        )
    )


TERM = Term(
    name="weights", formula="4 x parameters", filled="4 x 6,738,415,616", bytes=26_953_662_464, source="torch.float32"
)
