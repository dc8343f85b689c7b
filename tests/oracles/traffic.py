"""The bytes that a rank gives to collectives in one optimizer step: the real engines, as rank 0 of N in one process.

A row runs as in :mod:`tests.oracles.o2`, and a dispatch mode counts what reaches ``c10d``: for every collective the
bytes of its larger side, which is what a ring passes on (N - 1) / N of, or twice that for an all-reduce. What is counted
is the second step, all micro-batches of it.

    python -m tests.oracles.traffic        measures all rows again and archives them
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
    lora = {**_BASE, "values": _WIDE, "lora": {"rank": 8}, "dtype": "bfloat16"}
    return [*found, {**lora, "strategy": "zero2"}, {**lora, "strategy": "zero3"}]


def measure(options: dict[str, Any]) -> dict[str, int]:
    """Train two steps and return the second one's bytes by collective; the process is spent afterwards."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    o2.import_libraries()
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    o2._become_rank_zero(options["gpus"])
    o2._do_without_native_optimizers()
    recorder = o2.Recorder()
    counted: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d" and recorder.step == 2:
                nbytes = max((_nbytes(arg) for arg in args), default=0)
                if nbytes > SMALL:
                    counted[func._opname] += nbytes
            return func(*args, **(kwargs or {}))

    recorder.scan = lambda: 0  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as directory, o2._quiet(), Counting():
        arguments = o2._arguments(options, Path(directory))
        o2._train(next(iter(CONFIGS["llama"].values())), options, arguments, recorder)
    return dict(counted)


def _nbytes(arg: Any) -> int:
    """Of a tensor, or of lists of them."""
    if isinstance(arg, list | tuple):
        return sum(map(_nbytes, arg))
    return arg.numel() * arg.element_size() if hasattr(arg, "element_size") else 0


def main() -> None:
    """Measure every row in a process of its own."""
    context = multiprocessing.get_context("spawn")
    found = []
    for options in rows():
        with context.Pool(1) as pool, contextlib.suppress(KeyboardInterrupt):
            result = pool.apply(measure, (options,))
        print(json.dumps(options), result, flush=True)  # noqa: T201
        found.append({"options": options, "bytes": result})
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")}
    ARCHIVE.write_text(json.dumps({"versions": versions, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
