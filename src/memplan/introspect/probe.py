"""A few short runs on the GPU that is there: what ``memplan calibrate`` runs in a process of its own.

    python -m memplan.introspect.probe FILE

What was seen is written to the file, as JSON: bytes, and seconds of each repetition. With RANK and WORLD_SIZE in the
environment it joins the others and sees what NCCL takes. torch is imported inside functions only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

__all__ = ["main"]

PRODUCTS = ((4096, 4096, 4096), (8192, 8192, 8192), (4096, 14336, 4096), (8192, 2048, 8192), (2048, 4096, 11008))
"""(m, n, k) as those of a transformer's layers: tokens, outputs, inputs."""
COPIED = 1 << 30
"""Bytes of a copy: several times a GPU's cache."""
REPEATED = 5
"""Times that each is repeated, after once that is not counted."""


def main(path: str) -> int:
    """Run all of it, and write what was seen."""
    from memplan.introspect.worker import resident, versions, with_its_parent

    with_its_parent()
    found: dict[str, Any] = {"versions": versions()}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        found["nccl"] = nccl_bytes()
    else:
        found |= memory()
        found["products"] = {name: products(name) for name in ("bfloat16", "float16", "float32")}
        found["copies"] = copies()
    found["host"] = resident()
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.replace(path)
    return 0


def memory() -> dict[str, Any]:
    """What the process has outside of torch's allocator, as it begins and after a small step, and cuBLAS within it."""
    import torch

    from memplan.introspect.nvml import Driver
    from memplan.introspect.worker import cuda_versions, used_by_cuda

    driver = Driver()
    before = driver.used()
    torch.cuda.init()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    context = driver.used() - before
    elsewhere = used_by_cuda() - context
    one = torch.ones((256, 256), device="cuda", dtype=torch.bfloat16)
    held = torch.cuda.memory_allocated()
    product = one @ one
    workspace = torch.cuda.memory_allocated() - held - product.nbytes
    small_step()
    torch.cuda.synchronize()
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": {"name": properties.name, "total_memory": properties.total_memory, "driver": driver.version()},
        "cuda": cuda_versions(),
        "used_before": before,
        "context": context,
        "after_step": used_by_cuda() - elsewhere - torch.cuda.memory_reserved(),
        "workspace": workspace,
    }


def small_step() -> None:
    """A layer's forward, backward and step, in autocast: the kernels that a training process loads."""
    import torch
    from torch.nn import functional

    layer = torch.nn.TransformerEncoderLayer(512, 8, 1024, batch_first=True, device="cuda")
    embedding = torch.nn.Embedding(1000, 512, device="cuda")
    optimizer = torch.optim.AdamW([*layer.parameters(), *embedding.parameters()], fused=True)
    tokens = torch.randint(0, 1000, (2, 256), device="cuda")
    for _ in range(2):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            hidden = layer(embedding(tokens))
            heads = hidden.view(2, 256, 8, 64).transpose(1, 2)
            mixed = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
            logits = functional.linear(mixed.transpose(1, 2).reshape(2, 256, 512), embedding.weight)
        loss: Any = functional.cross_entropy(logits.float().view(-1, 1000), tokens.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def products(dtype: str) -> dict[str, list[float]]:
    """Seconds of matrix products of random numbers, by ``m,n,k``."""
    import torch

    found: dict[str, list[float]] = {}
    for m, n, k in PRODUCTS:
        a, b = (torch.randn(shape, device="cuda").to(getattr(torch, dtype)) for shape in ((m, k), (k, n)))
        out = torch.empty((m, n), device="cuda", dtype=getattr(torch, dtype))
        found[f"{m},{n},{k}"] = seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))  # type: ignore[misc]
    return found


def copies() -> dict[str, list[float]]:
    """Seconds of copies of COPIED bytes: within the GPU, and to and from pinned and other host memory."""
    import torch

    on_gpu, other = (torch.ones(COPIED, dtype=torch.uint8, device="cuda") for _ in range(2))
    pinned = torch.ones(COPIED, dtype=torch.uint8).pin_memory()
    pageable = torch.ones(COPIED, dtype=torch.uint8)
    return {
        "within": seconds(lambda: other.copy_(on_gpu)),
        "pinned_up": seconds(lambda: on_gpu.copy_(pinned, non_blocking=True)),
        "pinned_down": seconds(lambda: pinned.copy_(on_gpu, non_blocking=True)),
        "pageable_up": seconds(lambda: on_gpu.copy_(pageable)),
        "pageable_down": seconds(lambda: pageable.copy_(on_gpu)),
    }


def seconds(run: Callable[[], object]) -> list[float]:
    """Seconds of each repetition."""
    import torch

    found = []
    for _ in range(REPEATED + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found[1:]


def nccl_bytes() -> int:
    """Bytes that a communicator of all ranks takes of this GPU, once it has run the collectives of training."""
    import torch
    from torch import distributed

    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", timeout=timedelta(seconds=120))
    tensor = torch.ones(16 << 20, device="cuda")
    parts = torch.empty(distributed.get_world_size() * tensor.numel(), device="cuda")
    small_step_on = tensor * 2 + tensor  # kernels that are no part of NCCL
    del small_step_on
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved()
    for _ in range(2):
        distributed.all_reduce(tensor)
        distributed.all_gather_into_tensor(parts, tensor)
        distributed.reduce_scatter_tensor(tensor, parts)
    torch.cuda.synchronize()
    after, _ = torch.cuda.mem_get_info()
    found = int(free - after - (torch.cuda.memory_reserved() - held))
    distributed.destroy_process_group()
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
