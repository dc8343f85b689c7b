"""On which stream a rank allocates in one optimizer step: the real engines, as rank 0 of N in one process on CPU.

A row runs as in :mod:`tests.oracles.o2`, but with streams that know which of them is current in the place of those that
do nothing on a CPU: torch's for FSDP, DeepSpeed's accelerator's for ZeRO, which then takes CUDA's side of each branch.
A dispatch mode sees what operations allocate, and FSDP's ``alloc_storage`` is counted beside it. What is allocated in
the second step while another stream than the default one is current is counted, by size.

A CPU's autograd runs every node on one stream, so what a node allocates that ran in its forward on another one (FSDP1's
SplitWithSizesBackward0) is not seen here.

    python -m tests.oracles.streams        measures what the archive lacks
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.oracles import o2
from tests.oracles.families import CONFIGS

ARCHIVE = Path(__file__).parents[2] / "benchmarks" / "measurements" / "streams.json"

SMALL = 4096
"""Bytes: scalars, and what is as small."""

_BASE = {
    "strategy": "ddp",
    "dtype": "float32",
    "mixed_precision": "bf16",
    "gpus": 4,
    "micro_batch_size": 1,
    "seq_len": 16,
    "num_layers": 3,
    "values": {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048},
}


def rows() -> list[dict[str, Any]]:
    """The options of every row."""
    half = {**_BASE, "dtype": "bfloat16"}
    pure = {**half, "mixed_precision": "no"}
    found = [
        {**half, "strategy": kind, "zero": {"overlap_comm": overlaps, "reduce_bucket_size": 150_000}}
        for kind in ("zero1", "zero2")
        for overlaps in (True, False)
    ]
    gathering = {"stage3_param_persistence_threshold": 1000, "stage3_prefetch_bucket_size": 200_000}
    found += [{**half, "strategy": "zero3"}, {**half, "strategy": "zero3", "zero": {"overlap_comm": False}}]
    found.append({**half, "strategy": "zero3", "zero": {**gathering, "stage3_max_reuse_distance": 0}})
    found.append({**half, "strategy": "zero3", "gradient_checkpointing": True, "zero": gathering})
    found.append({**half, "strategy": "zero3", "lora": {"rank": 8}})
    for base in (_BASE, pure):
        found.append({**base, "strategy": "fsdp"})
        found += [{**base, "strategy": "fsdp", "fsdp": {"version": 1, **keys}} for keys in _fsdp1()]
    found.append({**_BASE, "strategy": "fsdp", "gradient_checkpointing": True})
    found.append({**_BASE, "strategy": "fsdp", "fsdp": {"dp_replicate_size": 2}})
    return found + held_out()


def held_out() -> list[dict[str, Any]]:
    """Rows that were measured after the rules had been written."""
    half, adapted = {**_BASE, "dtype": "bfloat16"}, {**_BASE, "lora": {"rank": 8}}
    in_float32 = {"overlap_comm": True, "grad_accum_dtype": "fp32", "reduce_bucket_size": 100_000}
    return [
        {**half, "strategy": "zero2", "gpus": 3, "zero": in_float32},
        {**half, "strategy": "zero2", "zero": {"overlap_comm": True, "reduce_scatter": False}},
        {
            **half,
            "strategy": "zero3",
            "zero": {"reduce_scatter": False, "stage3_allgather_sequential": True},
        },
        {**half, "strategy": "zero3", "zero": {"grad_accum_dtype": "fp32", "contiguous_gradients": False}},
        {**half, "strategy": "zero3", "zero": {"zero_hpz_partition_size": 2}},
        {**adapted, "strategy": "fsdp", "gpus": 3},
        {**adapted, "strategy": "fsdp", "gradient_checkpointing": True, "fsdp": {"version": 1}},
        {**_BASE, "strategy": "fsdp", "gpus": 3, "fsdp": {"version": 1, "backward_prefetch": "BACKWARD_POST"}},
        {**_BASE, "strategy": "fsdp", "fsdp": {"version": 1, "use_orig_params": False, "forward_prefetch": True}},
    ]


def _fsdp1() -> list[dict[str, Any]]:
    return [
        {},
        {"backward_prefetch": "BACKWARD_PRE", "forward_prefetch": True},
        {"sharding_strategy": "SHARD_GRAD_OP"},
        {"sharding_strategy": "NO_SHARD"},
    ]


class _Streams:
    """Streams by number, in the order in which they are made; 0 is the default one."""

    def __init__(self) -> None:
        self.current: Any = None
        made = iter(range(10**6))

        class Stream:
            def __init__(self, *_: Any, **__: Any) -> None:
                self.number = next(made)

            def wait_stream(self, stream: Any) -> None: ...
            def wait_event(self, event: Any) -> None: ...
            def synchronize(self) -> None: ...

            def record_event(self, event: Any = None) -> Any:
                return Event()

        class Event:
            def __init__(self, *_: Any, **__: Any) -> None: ...
            def record(self, stream: Any = None) -> None: ...
            def wait(self, stream: Any = None) -> None: ...
            def synchronize(self) -> None: ...

            def query(self) -> bool:
                return True

        self.Stream, self.Event = Stream, Event
        self.default = self.current = Stream()

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def install(self) -> None:
        """In the place of those of torch.cpu and of DeepSpeed's accelerator."""
        import torch
        from deepspeed.accelerator import get_accelerator

        torch.cpu.Stream = self.Stream  # type: ignore[assignment, misc]
        torch.cpu.Event = self.Event  # type: ignore[assignment, attr-defined]
        torch.cpu.stream = self.on  # type: ignore[assignment]
        torch.cpu.current_stream = lambda device=None: self.current
        torch.accelerator.current_stream = lambda device=None: self.current  # type: ignore[assignment]
        torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign, assignment]
        accelerator: Any = type(get_accelerator())
        accelerator.Stream, accelerator.Event = self.Stream, self.Event
        accelerator.stream = lambda _, stream: self.on(stream)
        accelerator.current_stream = lambda _, device_index=None: self.current
        accelerator.default_stream = lambda _, device_index=None: self.default
        for name in ("is_synchronized_device", "resolves_data_dependency", "handles_memory_backpressure"):
            setattr(accelerator, name, lambda _: False)


def measure(options: dict[str, Any]) -> dict[str, dict[int, int]]:
    """Train two steps; return by stream how often it has allocated so many bytes in the second one."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    o2.import_libraries()
    o2._become_rank_zero(options["gpus"], options.get("nodes", 1))
    o2._do_without_native_optimizers()
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    recorder, streams = o2.Recorder(), _Streams()
    counted: dict[int, Counter[int]] = {}

    def count(nbytes: int) -> None:
        if nbytes > SMALL and recorder.step == 2 and streams.current is not streams.default:
            counted.setdefault(streams.current.number, Counter())[-(-nbytes // 512) * 512] += 1

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            before = {_address(each) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
            out = func(*args, **(kwargs or {}))
            made = {_address(each): each for each in tree_leaves(out) if isinstance(each, torch.Tensor)}
            for address, each in made.items():
                if address and address not in before:
                    count(each.untyped_storage().nbytes())
            return out

    recorder.scan = lambda: 0  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        stack.enter_context(o2._quiet())
        arguments = o2._arguments(options, Path(directory))
        streams.install()
        for module, name in (
            ("torch.distributed.fsdp._flat_param", "_alloc_storage"),
            ("torch.distributed.fsdp._fully_shard._fsdp_param", "alloc_storage"),
        ):
            _count_resized(module, name, count)
        stack.enter_context(Counting())
        o2._train(next(iter(CONFIGS["llama"].values())), options, arguments, recorder)
    # Streams that allocate nothing have no name.
    return {number: dict(sorted(sizes.items())) for number, sizes in sorted(counted.items())}


def _count_resized(module: str, name: str, count: Any) -> None:
    """FSDP's allocation of a storage that it has freed."""
    found = importlib.import_module(module)
    alloc = getattr(found, name)

    def counting(tensor: Any, *args: Any) -> None:
        if not tensor.untyped_storage().size():
            count(tensor.numel() * tensor.element_size())
        alloc(tensor, *args)

    setattr(found, name, counting)


def _address(tensor: Any) -> int:
    try:
        return int(tensor.untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):
        return 0  # a subclass without storage


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
        with context.Pool(1) as pool:
            result = pool.apply(measure, (options,))
        print(json.dumps(options), result, flush=True)  # noqa: T201
        found.append({"options": options, "streams": result})
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")}
    ARCHIVE.write_text(json.dumps({"versions": versions, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
