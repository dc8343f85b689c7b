"""The bytes that a rank gives to collectives in one optimizer step: the real engines, as rank 0 of N in one process.

A row runs as in :mod:`tests.oracles.o2`, and a dispatch mode counts what reaches ``c10d``: for every collective the
bytes of its larger side, of which a ring passes on (N - 1) / N, or twice that for an all-reduce. Rows with offload run
under :class:`tests.oracles.o2.TwoSides`, which tells copies between host and device. The second step is counted, all
micro-batches of it.

    python -m tests.oracles.traffic        measures what the archive lacks
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from tests.oracles import o2
from tests.oracles.families import CONFIGS

ARCHIVE = Path(__file__).parents[2] / "benchmarks" / "measurements" / "traffic.json"

SMALL = 4096
"""Bytes: norms, losses, flags of overflow; no traffic to speak of."""

_BASE = {
    "strategy": "ddp",
    "dtype": "float32",
    "mixed_precision": "bf16",
    "gpus": 4,
    "micro_batch_size": 1,
    "seq_len": 16,
    "num_layers": 3,
}
_WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048}


def rows() -> list[dict[str, Any]]:
    """The options of every row."""
    found = []
    for accumulated in (1, 3):
        base = {**_BASE, "grad_accum_steps": accumulated, "values": _WIDE}
        found += [{**base, "strategy": kind, "dtype": "bfloat16"} for kind in ("zero1", "zero2", "zero3")]
        found.append({**base, "strategy": "zero2", "dtype": "bfloat16", "zero": {"reduce_scatter": False}})
        found.append({**base, "strategy": "zero3", "dtype": "bfloat16", "gradient_checkpointing": True})
        reuse = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
        found.append({**base, "strategy": "zero3", "dtype": "bfloat16", "zero": reuse})
        found.append({**base, "strategy": "fsdp"})
        found.append({**base, "strategy": "fsdp", "gradient_checkpointing": True})
        found.append({**base, "strategy": "fsdp", "fsdp": {"reshard_after_forward": False}})
    for keys in (
        {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 200_000},
        {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 1_000_000},
        {"stage3_max_reuse_distance": 1_000_000, "stage3_prefetch_bucket_size": 200_000},
    ):
        deep = {**_BASE, "values": _WIDE, "num_layers": 8, "grad_accum_steps": 2, "dtype": "bfloat16"}
        found.append({**deep, "strategy": "zero3", "zero": {**keys, "stage3_param_persistence_threshold": 1000}})
    for accumulated in (1, 3):
        base = {**_BASE, "values": _WIDE, "grad_accum_steps": accumulated}
        half = {**base, "dtype": "bfloat16", "offload_optimizer": "cpu"}
        found.append({**half, "strategy": "zero2"})
        found.append({**half, "strategy": "zero3"})
        found.append({**half, "strategy": "zero3", "offload_param": "cpu"})
        found.append({**base, "strategy": "fsdp", "offload_param": "cpu"})
    lora = {**_BASE, "values": _WIDE, "lora": {"rank": 8}, "dtype": "bfloat16"}
    return [*found, {**lora, "strategy": "zero2"}, {**lora, "strategy": "zero3"}]


def measure(options: dict[str, Any]) -> dict[str, int]:
    """Train two steps and return the second one's bytes by collective; the process is spent afterwards."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    o2.import_libraries()
    o2._become_rank_zero(options["gpus"])
    o2._do_without_native_optimizers()
    recorder = o2.Recorder()
    counted: Counter[str] = Counter()

    offloads = any(name in options for name in ("offload_optimizer", "offload_param"))
    sides = o2.TwoSides() if offloads else None
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu" if sides is None else "cpu:0"

    def count(name: str, nbytes: int) -> None:
        if nbytes > SMALL and recorder.step == 2:
            counted[name] += nbytes

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                count(func._opname, max((_nbytes(arg) for arg in args), default=0))
            out = func(*args, **(kwargs or {}))
            if sides is not None and func._opname in ("copy_", "clone", "_to_copy"):
                to, source = out, args[1] if func._opname == "copy_" else args[0]
                where = sides.side_of(to)
                casts = func._opname == "_to_copy" and to.dtype != source.dtype  # autograd's, which names CPU as device
                if where != sides.side_of(source) and not casts:
                    count("to_gpu" if where == "device" else "to_host", _nbytes(to if where == "device" else source))
            return out

    recorder.scan = lambda: 0  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as directory, o2._quiet(), sides or contextlib.nullcontext(), Counting():
        arguments = o2._arguments(options, Path(directory))
        o2._train(next(iter(CONFIGS["llama"].values())), options, arguments, recorder)
    return dict(counted)


def _nbytes(arg: Any) -> int:
    """Of a tensor, or of lists of them."""
    if isinstance(arg, list | tuple):
        return sum(map(_nbytes, arg))
    return arg.numel() * arg.element_size() if hasattr(arg, "element_size") else 0


def main() -> None:
    """Measure each row in a process of its own."""
    context = multiprocessing.get_context("spawn")
    known = json.loads(ARCHIVE.read_text())["rows"] if ARCHIVE.exists() else []
    found = []
    for options in rows():
        archived = [row for row in known if row["options"] == options]
        if archived:
            found += archived
            continue
        with context.Pool(1) as pool, contextlib.suppress(KeyboardInterrupt):
            result = pool.apply(measure, (options,))
        print(json.dumps(options), result, flush=True)  # noqa: T201
        found.append({"options": options, "bytes": result})
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")}
    ARCHIVE.write_text(json.dumps({"versions": versions, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
