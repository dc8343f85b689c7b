"""The bytes that a rank gives to collectives in one optimizer step: the real engines, as rank 0 of N in one process.

A row runs as in :mod:`tests.oracles.o2`, and a dispatch mode counts what reaches ``c10d``: for every collective the
bytes of its larger side, of which a ring passes on (N - 1) / N, or twice that for an all-reduce. Rows with offload run
under :class:`tests.oracles.o2.TwoSides`, which tells copies between host and device. With NVMe :class:`Files` stands
for DeepSpeed's aio, whose compiled op only reads and writes what Python hands to it. The second step is counted, all
micro-batches of it.

    python -m tests.oracles.traffic        measures what the archive lacks
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import multiprocessing
import os
import tempfile
import unittest.mock
import warnings
from collections import Counter
from collections.abc import Callable
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
_NVME = {
    **_BASE,
    "strategy": "zero3",
    "dtype": "bfloat16",
    "gpus": 2,
    "num_layers": 2,
    "values": {"hidden_size": 1152, "intermediate_size": 3001, "vocab_size": 5001},
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
        alone = {**base, "dtype": "bfloat16", "strategy": "zero3", "offload_param": "cpu"}
        found.append(alone)  # masters on the GPU
        found.append({**base, "strategy": "fsdp", "offload_param": "cpu"})
    for accumulated in (1, 3):
        found += [{**_NVME, "grad_accum_steps": accumulated, **keys} for keys in _nvme()]
        half = {**_BASE, "values": _WIDE, "grad_accum_steps": accumulated, "strategy": "zero3", "dtype": "bfloat16"}
        for places in ({"offload_optimizer": "cpu"}, {"offload_optimizer": "cpu", "offload_param": "cpu"}):
            zero = {"sub_group_size": 150_000, "offload_optimizer": {"ratio": 0.4}, "zero_force_ds_cpu_optimizer": True}
            found.append({**half, **places, "zero": zero})
    lora = {**_BASE, "values": _WIDE, "lora": {"rank": 8}, "dtype": "bfloat16"}
    return [*found, {**lora, "strategy": "zero2"}, {**lora, "strategy": "zero3"}]


def _nvme() -> list[dict[str, Any]]:
    """Optimizer, weights, or both on NVMe; sub-groups that are many, and some that stay in host memory."""
    optimizer, param = {"offload_optimizer": "nvme"}, {"offload_param": "nvme"}
    away = {"offload_param": {"buffer_size": 4_000_000, "max_in_cpu": 0}, "stage3_max_reuse_distance": 0}
    many = {"sub_group_size": 3_000_000}
    some = {"offload_param": {"buffer_size": 4_000_000, "max_in_cpu": 8_000_000}, "stage3_max_reuse_distance": 0}
    return [
        optimizer,
        {**optimizer, "zero": many},
        {**optimizer, "zero": {**many, "offload_optimizer": {"pipeline_read": True, "buffer_count": 8}}},
        {**param, "zero": away},
        {**param, "offload_optimizer": "cpu", "zero": away},
        {**optimizer, **param, "zero": away},
        {**optimizer, **param, "zero": {**away, "stage3_prefetch_bucket_size": 0}},
        {**optimizer, **param, "zero": {**some, **many}},
        {**optimizer, **param, "gradient_checkpointing": True, "zero": away},
    ]


class Files:
    """In place of DeepSpeed's aio_handle: files are read and written at once, and every request is counted."""

    def __init__(self, count: Callable[[str, int], None], sides: o2.TwoSides) -> None:
        self._count, self._sides = count, sides
        self._locked: set[int] = set()
        self._pending = 0

    def __call__(self, **settings: Any) -> Files:
        """A handle of its own: each waits for its own requests."""
        handle = Files(self._count, self._sides)
        handle._locked = self._locked
        return handle

    def new_cpu_locked_tensor(self, elements: int, example: Any) -> Any:
        import torch

        tensor = torch.empty(elements, dtype=example.dtype)
        self._sides.put(tensor, "host")
        self._locked.add(tensor.untyped_storage().data_ptr())
        return tensor

    def free_cpu_locked_tensor(self, tensor: Any) -> bool:
        self._locked.discard(tensor.untyped_storage().data_ptr())
        return True

    def is_pinned(self, tensor: Any) -> bool:
        return tensor.untyped_storage().data_ptr() in self._locked

    def async_pwrite(self, buffer: Any, path: str, offset: int) -> int:
        Path(path).write_bytes(ctypes.string_at(buffer.data_ptr(), buffer.nbytes))
        self._count("nvme_write", buffer.nbytes)
        self._pending += 1
        return 0

    def async_pread(self, buffer: Any, path: str, offset: int) -> int:
        data = Path(path).read_bytes()[: buffer.nbytes]
        ctypes.memmove(buffer.data_ptr(), data, len(data))  # past the dispatch mode, which would see a copy
        self._count("nvme_read", buffer.nbytes)
        self._pending += 1
        return 0

    def wait(self) -> int:
        done, self._pending = self._pending, 0
        return done


def measure(options: dict[str, Any]) -> dict[str, int]:
    """Train two steps and return the second one's bytes by collective; the process is spent afterwards."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    o2.import_libraries()
    o2._become_rank_zero(options["gpus"], options.get("nodes", 1))
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
    swapping: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if "nvme" in (options.get("offload_optimizer"), options.get("offload_param")):
        from deepspeed.ops.op_builder import AsyncIOBuilder

        assert sides is not None
        module = unittest.mock.Mock(aio_handle=Files(count, sides))
        swapping = unittest.mock.patch.object(AsyncIOBuilder, "load", return_value=module)
    quiet = (o2._quiet(), swapping, sides or contextlib.nullcontext(), Counting())
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        for each in quiet:
            stack.enter_context(each)
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
