"""O2: the real engines, DeepSpeed and FSDP2, as rank 0 of N in one process on CPU, and what they hold in every phase.

A row trains a small transformers model for two optimizer steps by ``transformers.Trainer``, which configures DeepSpeed
or accelerate's FSDP2 itself. ``torch.distributed`` runs on the backend "fake", whose collectives return at once
without moving data, so any N fits in one process. What is alive is the running sum of the allocator's events in
``torch.profiler(profile_memory=True)``; its Python stacks tell which line allocated a block.

    python -m tests.oracles.o2 --all                   measures what the archives under benchmarks/measurements/o2 lack
    python -m tests.oracles.o2 --group zero2           one group of rows
    python -m tests.oracles.o2 --check 12 --seed 3     measures a stratified sample again and compares
    python -m tests.oracles.o2 --show KEY              prints the ledger of the rows whose key contains KEY

Host and device are one memory on CPU. Rows with offload therefore run under :class:`TwoSides`, which gives every
tensor a side: the accelerator answers to "cpu:0", the host to "cpu", and what crosses is copied, as on a GPU.

What the instrument does not see: buffers of a real communication library (NCCL's channels, gloo's staging), the memory
that streams keep alive (``record_stream``), pinned blocks' rounding to powers of two, and the CUDA context.
Kernels are CPU's: attention and the loss keep what they keep on CPU, as in O1. Under FSDP1 streams do nothing, so how
far the CPU runs ahead (``limit_all_gathers``) cannot be seen.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
import types
import unittest.mock
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.oracles import liger, nvme
from tests.oracles.families import CONFIGS, LORA_TARGETS
from tests.oracles.o1 import Archive, Row, Setup, same_versions, sampled

ARCHIVE = Path(__file__).parents[2] / "benchmarks" / "measurements" / "o2"
SCHEMA = 1
BLOCK = 512
"""Bytes that CUDA's caching allocator rounds a block up to."""
LARGEST = 30
"""Blocks listed at a peak."""
EVAL_BATCHES = 3
"""Batches of an evaluation that keeps no predictions; others have as many as are kept on the GPU."""
LIBRARIES = (
    "liger_kernel/",
    "deepspeed/",
    "transformers/",
    "accelerate/",
    "peft/",
    "torch/distributed/",
    "torch/optim/",
)

# ---------------------------------------------------------------------------------------------------------------------
# The ledger: allocator events, phases and the frames behind them


@dataclass
class Block:
    """One allocation: its size as asked for, where it came from, and on which side it lives."""

    nbytes: int
    site: str
    born: int
    address: int
    died: int | None = None
    side: str = "device"

    @property
    def rounded(self) -> int:
        """Its bytes as CUDA's allocator counts them."""
        return -(-self.nbytes // BLOCK) * BLOCK


@dataclass
class Level:
    """Bytes alive, rounded to blocks and as asked for."""

    rounded: int = 0
    raw: int = 0

    def to_list(self) -> list[int]:
        """``[rounded, raw]``."""
        return [self.rounded, self.raw]


@dataclass
class Phase:
    """One stretch between two marks, on one side.

    Attributes:
        start, peak, end: levels; the peak includes the level at the start.
        blocks: what is alive at the peak: ``(bytes, count, site)``, the largest sums first.
    """

    name: str
    start: Level
    peak: Level
    end: Level
    blocks: list[tuple[int, int, str]] = field(default_factory=list)


def phases_of(blocks: Sequence[Block], marks: Sequence[tuple[int, str]], side: str) -> list[Phase]:
    """Replay the blocks of one side; ``marks`` are ``(ns, name)``, each the start of a phase, the last one the end."""
    mine = [block for block in blocks if block.side == side]
    changes = sorted(
        [(block.born, 1, block) for block in mine]
        + [(block.died, -1, block) for block in mine if block.died is not None],
        key=lambda change: (change[0], change[1]),
    )
    found: list[tuple[Phase, int]] = []  # with the moment of the peak
    level, position = Level(), 0
    for (_, name), (until, _) in itertools.pairwise(marks):
        phase = Phase(name, dataclasses.replace(level), dataclasses.replace(level), level)
        moment = marks[len(found)][0]
        while position < len(changes) and changes[position][0] < until:
            at, sign, block = changes[position]
            level = Level(level.rounded + sign * block.rounded, level.raw + sign * block.nbytes)
            if level.rounded > phase.peak.rounded:
                phase.peak, moment = level, at
            position += 1
        phase.end = level
        found.append((phase, moment))
    for phase, moment in found:
        alive = Counter(
            (block.nbytes, block.site)
            for block in mine
            if block.born <= moment and (block.died is None or block.died > moment)
        )
        listed = [(nbytes, count, site) for (nbytes, site), count in alive.items()]
        phase.blocks = sorted(listed, key=lambda item: (-item[0] * item[1], item[2]))[:LARGEST]
    return [phase for phase, _ in found]


def read_profile(profiler: Any) -> tuple[list[Block], list[tuple[int, str]]]:
    """Return the blocks and the marks of a finished ``torch.profiler.profile``."""
    from torch._C._profiler import _EventType

    events: list[Any] = []
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == _EventType.Allocation or (event.tag == _EventType.TorchOp and event.name.startswith("o2:")):
            events.append(event)
    events.sort(key=lambda event: event.start_time_ns)
    blocks: list[Block] = []
    alive: dict[int, Block] = {}
    marks: list[tuple[int, str]] = []
    for event in events:
        if event.tag == _EventType.TorchOp:
            marks.append((event.start_time_ns, event.name.removeprefix("o2:")))
            continue
        size, address = event.extra_fields.alloc_size, event.extra_fields.ptr
        if size > 0:
            alive[address] = Block(size, _site(event), event.start_time_ns, address)
            blocks.append(alive[address])
        elif address in alive:
            alive.pop(address).died = event.start_time_ns
    return blocks, marks


def _site(event: Any) -> str:
    """``operator | innermost frames of the libraries | module``: where an allocation comes from.

    Without stacks the libraries' own operators stand for the frames.
    """
    from torch._C._profiler import _EventType

    operators: list[str] = []
    frames: list[str] = []
    module = ""
    at = event.parent
    while at is not None:
        if at.tag == _EventType.TorchOp:
            operators.append(at.name)
        elif at.tag in (_EventType.PyCall, _EventType.PyCCall):
            frame = _frame(at.extra_fields.caller)
            if frame and len(frames) < 3 and frame not in frames:
                frames.append(frame)
            called = getattr(at.extra_fields, "module", None)
            module = module or (called.cls_name if called is not None else "")
        at = at.parent
    autograd = [name.split(": ")[-1] for name in operators if name.startswith("autograd::")]
    kernel = operators[0] if operators else "-"
    frames = frames or [name for name in operators if not name.startswith(("aten::", "autograd::"))][:3]
    return " | ".join([" < ".join([kernel, *autograd[:1]]), " < ".join(frames), module])


def _frame(state: Any) -> str:
    """``stage3.py:123 name`` for a frame of the libraries, "" for others."""
    path = state.file_name.replace("\\", "/").split("site-packages/")[-1]
    if not path.startswith(LIBRARIES):
        return ""
    return f"{path}:{state.line_number} {state.function_name}"


# ---------------------------------------------------------------------------------------------------------------------
# One row: a run of the real engine


def engine_config(options: dict[str, Any], nvme_path: str = "") -> dict[str, Any]:
    """Return the DeepSpeed JSON that a user of the Trainer writes, with its "auto" values; knobs win."""
    stage = int(options["strategy"][-1])
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero["reduce_bucket_size"] = "auto"
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    for part in ("optimizer", "param"):
        device = options.get(f"offload_{part}", "none")
        if device != "none":
            zero[f"offload_{part}"] = {"device": device}
        if device == "nvme":
            zero[f"offload_{part}"]["nvme_path"] = nvme_path
    knobs = dict(options.get("zero", {}))
    config: dict[str, Any] = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", **options.get("fp16", {})},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        # DeepSpeedCPUAdam's states are AdamW's, made where AdamW's are.
        "zero_force_ds_cpu_optimizer": False,
        **options.get("deepspeed", {}),
    }
    if "grad_accum_dtype" in knobs:
        config["data_types"] = {"grad_accum_dtype": knobs.pop("grad_accum_dtype")}
    for name in ("aio", "communication_data_type", "zero_force_ds_cpu_optimizer"):
        if name in knobs:
            config[name] = knobs.pop(name)
    config["bf16"] |= {name: knobs.pop(name) for name in list(knobs) if name.startswith("bf16_")}
    for name, value in knobs.items():
        zero[name] = {**zero.get(name, {}), **value} if isinstance(value, dict) else value
    return config


os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported


def measure(values: dict[str, Any], options: dict[str, Any], *, with_stack: bool = True) -> dict[str, Any]:
    """Train two steps as rank 0 of N and return the row's result; the process is spent afterwards.

    Args:
        values: of config.json.
        options: see :func:`groups`; names are the command line's.
        with_stack: record Python's calls, which tell where each block is from. There are millions of them: without, a
            row of ZeRO-3 takes 3 seconds and 0.5 GB instead of up to 150 and 24.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    import_libraries()
    if options.get("liger"):
        liger.stand_in_triton(zeroing=True)
    if "quantization" in options:
        torch.backends.mkldnn.enabled = False  # its products take scratch memory
    places = {options.get(name, "none") for name in ("offload_optimizer", "offload_param")}
    told_apart = places != {"none"} or any(options.get(name) for name in ("two_sides", "pretrained", "save"))
    sides = TwoSides() if told_apart else None
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu" if sides is None else "cpu:0"
    _become_rank_zero(options["gpus"], options.get("nodes", 1))
    _do_without_native_optimizers()
    _do_without_quantizer()
    recorder = Recorder()
    warnings.simplefilter("ignore")
    gc.collect()
    gc.disable()
    with (
        tempfile.TemporaryDirectory() as directory,
        _quiet(),
    ):
        if "pretrained" in options or "quantization" in options:  # TrainingArguments would make it under zero.Init
            _save_checkpoint(values, options, Path(directory) / "pretrained")
        recorder.swapping = nvme.Swapping(Path(directory) / "nvme", sides) if "nvme" in places else None
        with recorder.swapping or contextlib.nullcontext():
            arguments = _arguments(options, Path(directory))
            with (
                profile(activities=[ProfilerActivity.CPU], profile_memory=True, with_stack=with_stack) as profiler,
                sides or contextlib.nullcontext(),
            ):
                facts = _train(values, options, arguments, recorder)
                recorder.mark("end")
    blocks, marks = read_profile(profiler)
    if sides is not None:
        sides.assign(blocks)
    if recorder.swapping is not None:
        blocks += recorder.swapping.blocks
        facts["nvme"] = recorder.files
    if options.get("liger"):
        facts["liger_kernel"] = importlib.metadata.version("liger-kernel")
    if "quantization" in options:
        facts["bitsandbytes"] = importlib.metadata.version("bitsandbytes")
    found = {side: phases_of(blocks, marks, side) for side in ("device", "host")}
    return {
        **facts,
        "idle_scan": recorder.scans,
        "phases": {
            side: {
                phase.name: {
                    "start": phase.start.to_list(),
                    "peak": phase.peak.to_list(),
                    "end": phase.end.to_list(),
                    "blocks": [list(block) for block in phase.blocks],
                }
                for phase in phases
            }
            for side, phases in found.items()
            if side == "device" or sides is not None
        },
    }


class Recorder:
    """Marks in the profile, and scans of the storages that Python can reach between steps."""

    def __init__(self) -> None:
        self.step = 1
        self.micro = 0
        self.scans: dict[str, int] = {}
        self.swapping: nvme.Swapping | None = None
        self.files: dict[str, dict[str, int]] = {}
        """Bytes in the NVMe's folder at each idle moment, by what they are."""

    def idle(self, name: str) -> None:
        """Look at everything between two steps."""
        self.scans[name] = self.scan()
        if self.swapping is not None:
            self.files[name] = self.swapping.written()

    def mark(self, name: str) -> None:
        """Start a phase."""
        import torch

        with torch.profiler.record_function(f"o2:{name}"):
            pass

    def in_step(self, name: str) -> None:
        """Start a phase of the current step: ``2.backward1`` is the first micro-batch's of step 2."""
        numbered = f"{name}{self.micro}" if name in ("forward", "backward", "between") else name
        self.mark(f"{self.step}.{numbered}")

    def scan(self) -> int:
        """Bytes of all storages under Python's tensors, rounded to blocks."""
        import torch

        gc.collect()
        kinds = {torch.Tensor}
        while more := {child for kind in kinds for child in kind.__subclasses__()} - kinds:
            kinds |= more
        storages: dict[int, int] = {}
        # Calls of builtin functions, such as isinstance of a million objects, would all be in the profile.
        for tensor in [thing for thing in gc.get_objects() if type(thing) in kinds]:
            with contextlib.suppress(Exception):
                _add_storages(tensor, storages)
        return sum(-(-nbytes // BLOCK) * BLOCK for nbytes in storages.values())


def _add_storages(tensor: Any, storages: dict[int, int]) -> None:
    for each in (tensor, tensor.grad if tensor.is_leaf else None):
        if each is not None:
            local = getattr(each, "_local_tensor", each)
            storage = local.untyped_storage()
            if storage.data_ptr():  # on the meta device there is no memory
                storages[storage.data_ptr()] = storage.nbytes()


def _become_rank_zero(gpus: int, nodes: int) -> None:
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(gpus),
        "LOCAL_WORLD_SIZE": str(gpus // nodes),
        "LOCAL_SIZE": str(gpus // nodes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29511",
    }
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    from accelerate import DistributedType, PartialState
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda _: True  # oneDNN's answer, for speed; PyTorch computes it anyway

    # Without it accelerate takes CPU ranks for plain data parallelism and ignores FSDP.
    PartialState._prepare_backend = lambda *_, **__: ("fake", DistributedType.MULTI_GPU)
    # DeepSpeed's own collectives through shared memory would wait for the other ranks; a GPU has none of them.
    # (`import deepspeed.comm.torch` as a name would give the torch that deepspeed.comm imports.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    gather = torch.distributed.all_gather_into_tensor

    def all_gather_into_tensor(output_tensor: Any, input_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        flat = input_tensor.dim() > output_tensor.dim()  # as accelerate gathers, whose shapes only this backend minds
        return gather(output_tensor, input_tensor.view(-1) if flat else input_tensor, *args, **kwargs)

    torch.distributed.all_gather_into_tensor = all_gather_into_tensor
    importlib.import_module("deepspeed").init_distributed()  # as TrainingArguments does, but with use_cpu it does not


def _do_without_native_optimizers() -> None:
    """The C++ of DeepSpeedCPUAdam and its like works in place, and would have to be compiled."""

    class Does:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None

    for name in ("adam.cpu_adam.CPUAdam", "adagrad.cpu_adagrad.CPUAdagrad", "lion.cpu_lion.CPULion"):
        module, kind = name.rsplit(".", 1)
        builder = getattr(importlib.import_module(f"deepspeed.ops.{module}"), f"{kind}Builder")
        builder.load = lambda *_, **__: Does()


def _do_without_quantizer() -> None:
    """ZeRO++'s CUDA kernels, for their results' sizes: csrc/quantization/pt_binding.cpp."""
    import torch

    def quantize(values: Any, groups: int, bits: int, kind: str) -> tuple[Any, Any]:
        *sizes, last = values.shape
        scales = torch.empty((groups, 1), dtype=torch.float32, device=values.device)
        return torch.empty((*sizes, last * bits // 8), dtype=torch.int8, device=values.device), scales

    def dequantize(quantized: Any, scales: Any, groups: int, bits: int, kind: str) -> Any:
        *sizes, last = quantized.shape
        return torch.zeros((*sizes, last * 8 // bits), dtype=torch.half, device=quantized.device)

    def swizzle_quant(values: Any, groups: int, bits: int, *_: Any) -> tuple[Any, Any]:
        scales = torch.empty((groups, 1), dtype=torch.float32, device=values.device)
        return torch.empty((values.numel() * bits // 8,), dtype=torch.int8, device=values.device), scales

    def quantized_reduction(
        values: Any, scales: Any, groups: int, out_groups: int, bits: int, kind: str, devices: int
    ) -> tuple[Any, Any]:
        *sizes, last = values.shape
        sums = torch.empty((*sizes, last // devices), dtype=torch.int8, device=values.device)
        return sums, torch.empty((out_groups, 1), dtype=torch.float32, device=values.device)

    module = types.SimpleNamespace(
        quantize=quantize,
        dequantize=dequantize,
        swizzle_quant=swizzle_quant,
        quantized_reduction=quantized_reduction,
        Symmetric="Symmetric",
    )
    builder = importlib.import_module("deepspeed.ops.op_builder").QuantizerBuilder
    builder.load = lambda *_, **__: module


def import_libraries() -> None:
    """Import what a row needs, so that neither the profile nor every forked row does it again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (
            "torch.profiler",
            "torch.distributed.fsdp",
            "torch.testing._internal.distributed.fake_pg",
            "transformers.trainer",
            "transformers.models.llama.modeling_llama",
            "transformers.integrations.deepspeed",
            "accelerate.utils.deepspeed",
            "accelerate.utils.fsdp_utils",
            "deepspeed",
            "peft",
            # imported by the first initialize() or step(), at the cost of a million profiled calls
            "torch._inductor.compile_fx",
            "torch.export",
            "torch.utils.flop_counter",
            "torch.distributed._tools",
        ):
            importlib.import_module(name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress lines of the libraries among a report's."""
    import logging

    logging.disable(logging.WARNING)
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):  # noqa: PTH123
        yield


def _train(values: dict[str, Any], options: dict[str, Any], arguments: Any, recorder: Recorder) -> dict[str, Any]:
    import torch

    values = {**values, **options.get("values", {})}
    classifies = values["architectures"][0].endswith("Classification")

    class Rows(torch.utils.data.Dataset[dict[str, Any]]):
        def __init__(self, batches: int, size: int) -> None:
            self.length = batches * size * options["gpus"]

        def __len__(self) -> int:
            return self.length

        def __getitem__(self, index: int) -> dict[str, Any]:
            if "image_size" in values:
                return {"pixel_values": torch.randn(3, *[values["image_size"]] * 2), "labels": torch.tensor(1)}
            tokens = torch.randint(5, values["vocab_size"], (options["seq_len"],))
            return {"input_ids": tokens, "labels": torch.tensor(1) if classifies else tokens.clone()}

    recorder.mark("load")
    model = _model(values, options, Path(arguments.output_dir) / "pretrained")
    recorder.mark("init")
    keeps = options.get("eval_accumulation_steps")
    trainer = _trainer_class(recorder)(
        model=model,
        args=arguments,
        train_dataset=Rows(4 * options.get("grad_accum_steps", 1), options["micro_batch_size"]),
        eval_dataset=Rows(keeps or EVAL_BATCHES, options.get("eval_batch_size", 1)),
        compute_metrics=None if keeps is None else lambda prediction: {"n": float(len(prediction.predictions))},
        callbacks=[_idle_marks(recorder)],
    )
    del model
    trainer.train()
    return _facts(trainer)


def _arguments(options: dict[str, Any], directory: Path) -> Any:
    import transformers

    mixed = options["mixed_precision"]
    arguments: dict[str, Any] = {
        "output_dir": str(directory),
        "use_cpu": True,
        "bf16": mixed == "bf16",
        "fp16": mixed == "fp16",
        "per_device_train_batch_size": options["micro_batch_size"],
        "gradient_accumulation_steps": options.get("grad_accum_steps", 1),
        "gradient_checkpointing": options.get("gradient_checkpointing", False),
        "gradient_checkpointing_kwargs": {"use_reentrant": options.get("use_reentrant", False)},
        "optim": options.get("optim", "adamw_torch_fused"),
        "use_liger_kernel": options.get("liger", False),
        "max_steps": 2,
        "logging_steps": 1000,
        "save_strategy": "steps" if options.get("save") else "no",
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if "eval_batch_size" in options:
        arguments |= {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "per_device_eval_batch_size": options["eval_batch_size"],
            "eval_accumulation_steps": options.get("eval_accumulation_steps"),
        }
    if options.get("checkpoints_calls"):
        _checkpoint_calls()
    if options["strategy"] == "fsdp":
        knobs = dict(options.get("fsdp", {}))
        if options.get("offload_param", "none") != "none":
            knobs["cpu_offload"] = True
        if replicas := knobs.pop("dp_replicate_size", None):
            sizes = {"dp_replicate_size": replicas, "dp_shard_size": knobs.pop("dp_shard_size", None)}
            arguments["parallelism_config"] = _parallelism(**sizes, gpus=options["gpus"])
        if knobs.get("version") == 1:
            _let_fsdp1_run_on_cpu(options["gpus"] // options.get("nodes", 1))
            if options.get("checkpoints_wrappers"):
                _checkpoint_wrappers(options["use_reentrant"])
            # Of accelerate's own configuration; it does not look at what the Trainer passes on (reshard_after_forward).
            os.environ["FSDP_SHARDING_STRATEGY"] = knobs.pop("sharding_strategy", "FULL_SHARD")
        return transformers.TrainingArguments(**arguments, fsdp=True, fsdp_config=knobs)
    if options["strategy"] in ("single", "ddp"):
        return transformers.TrainingArguments(**arguments)
    return transformers.TrainingArguments(**arguments, deepspeed=engine_config(options, str(directory / "nvme")))


def _parallelism(dp_replicate_size: int, dp_shard_size: int | None, gpus: int) -> Any:
    """accelerate's, with all other ranks to shard over unless it is said how many."""
    import accelerate

    return accelerate.ParallelismConfig(
        dp_replicate_size=dp_replicate_size, dp_shard_size=dp_shard_size or gpus // dp_replicate_size
    )


def _let_fsdp1_run_on_cpu(devices: int) -> None:
    """sync_module_states, the Trainer's default, asks for an accelerator; its broadcast does without one. Hybrid
    sharding takes the devices that torch sees for those of a node.
    """
    import torch

    torch.cpu.device_count = lambda: devices

    dataclasses_of_accelerate = importlib.import_module("accelerate.utils.dataclasses")
    dataclasses_of_accelerate.is_cuda_available = lambda: True  # type: ignore[attr-defined]
    torch.cuda.current_device = lambda: 0  # where an empty model would be made
    torch.cpu.Stream.synchronize = lambda _: None  # type: ignore[attr-defined]
    init = importlib.import_module("torch.distributed.fsdp._init_utils")
    init._check_module_states_for_sync_module_states = lambda _: None  # type: ignore[attr-defined]


def _checkpoint_wrappers(use_reentrant: bool) -> None:
    """As transformers before 4.53: the model checkpoints what stands in a block's place, which FSDP1 has wrapped."""
    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    own = FullyShardedDataParallel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.module, GradientCheckpointingLayer):
            return own(self, *args, **kwargs)
        self.module.gradient_checkpointing = False
        run = functools.partial(own, self, **kwargs)
        if not (self.training and torch.is_grad_enabled()):
            return run(*args)
        return checkpoint(run, *args, use_reentrant=use_reentrant)

    FullyShardedDataParallel.forward = forward  # type: ignore[method-assign]


def _checkpoint_calls() -> None:
    """As transformers from 4.53 to 5.22: a block checkpoints its call, in which DeepSpeed's and FSDP2's hooks are."""
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

    own = GradientCheckpointingLayer.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (self.gradient_checkpointing and self.training):
            return own(self, *args, **kwargs)
        return self._gradient_checkpointing_func(functools.partial(own, self, **kwargs), *args)

    GradientCheckpointingLayer.__call__ = call  # type: ignore[method-assign]
    GradientCheckpointingLayer.__init_subclass__ = classmethod(lambda _: None)  # type: ignore[assignment]
    for layer in (LlamaDecoderLayer, MistralDecoderLayer):
        layer.forward = layer.forward.__wrapped__  # type: ignore[attr-defined,method-assign]


def _config(values: dict[str, Any], options: dict[str, Any]) -> Any:
    import transformers

    values = {**values, **options.get("values", {})}
    if "num_layers" in options:
        values["num_hidden_layers"] = options["num_layers"]
    return transformers.AutoConfig.for_model(**values)


def _save_checkpoint(values: dict[str, Any], options: dict[str, Any], directory: Path) -> None:
    """Write what ``from_pretrained`` will load."""
    import torch
    import transformers

    wanted = dict(options.get("pretrained", {"dtype": options["dtype"]}))
    dtype = getattr(torch, wanted.pop("dtype"))
    model = getattr(transformers, values["architectures"][0])._from_config(_config(values, options), dtype=dtype)
    model.save_pretrained(directory, **wanted)


def _model(values: dict[str, Any], options: dict[str, Any], pretrained: Path) -> Any:
    import torch
    import transformers

    kind = getattr(transformers, values["architectures"][0])
    wanted = {"dtype": getattr(torch, options["dtype"]), "attn_implementation": options.get("attn", "sdpa")}
    with _without_zero_init() if not options.get("zero_init", True) else contextlib.nullcontext():
        if "quantization" in options:
            model = _quantized(kind, options, pretrained, wanted)
        elif "pretrained" in options:
            model = kind.from_pretrained(pretrained, **wanted)
        else:
            model = kind._from_config(_config(values, options), **wanted)
    if "lora" not in options:
        return model
    import peft

    lora = options["lora"]
    targets = lora.get("targets", LORA_TARGETS.get(values["model_type"], ["q_proj", "v_proj"]))
    config = peft.LoraConfig(
        r=lora["rank"], lora_alpha=16, target_modules=targets, modules_to_save=lora.get("modules_to_save")
    )
    model = peft.get_peft_model(model, config)
    if options.get("quantization", {}).get("bf16_adapters"):  # as TRL does it
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.to(torch.bfloat16)
    return model


def _quantized(kind: Any, options: dict[str, Any], pretrained: Path, wanted: dict[str, Any]) -> Any:
    """Loaded and prepared as QLoRA's scripts do it; needs bitsandbytes."""
    import peft
    import torch
    import transformers

    quantization = options["quantization"]
    computes_in = {"bf16": "bfloat16", "fp16": "float16", "no": options["dtype"]}[options["mixed_precision"]]
    four_bit = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": quantization["kind"] == "nf4-dq",
        "bnb_4bit_compute_dtype": getattr(torch, quantization.get("compute_dtype", computes_in)),
        "bnb_4bit_quant_storage": getattr(torch, quantization.get("quant_storage", "uint8")),
    }
    in_8_bit = quantization["kind"] == "int8"
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=in_8_bit, load_in_4bit=not in_8_bit, **({} if in_8_bit else four_bit)
    )
    device = {"": os.environ["ACCELERATE_TORCH_DEVICE"]}  # transformers would ask torch.cuda for it
    quantizers = importlib.import_module("transformers.quantizers.auto").AUTO_QUANTIZER_MAPPING
    quantizer = quantizers["bitsandbytes_8bit" if in_8_bit else "bitsandbytes_4bit"]
    with unittest.mock.patch.object(quantizer, "update_device_map", lambda _, device_map: device_map or device):
        model = kind.from_pretrained(pretrained, quantization_config=config, **wanted)
    if not quantization.get("prepare_for_kbit_training", True):
        return model
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


@contextlib.contextmanager
def _without_zero_init() -> Iterator[None]:
    """As if the model had been made before TrainingArguments: transformers does not see ZeRO-3."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def _trainer_class(recorder: Recorder) -> Any:
    import transformers

    class MarkedTrainer(transformers.Trainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            recorder.micro += 1
            if self.is_deepspeed_enabled and "step" not in vars(self.deepspeed):
                step = self.deepspeed.step

                def marked(*step_args: Any, **step_kwargs: Any) -> Any:
                    recorder.in_step("step")
                    return step(*step_args, **step_kwargs)

                self.deepspeed.step = marked
            recorder.in_step("forward")
            loss = super().training_step(*args, **kwargs)
            if not self.is_deepspeed_enabled and self.accelerator.sync_gradients:
                recorder.in_step("step")
            elif not self.accelerator.sync_gradients:
                recorder.in_step("between")
            return loss

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if self.model.training:
                recorder.in_step("backward")
            return loss

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            recorder.mark("eval")
            metrics = super().evaluate(*args, **kwargs)
            recorder.mark("evaluated")
            return metrics

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            recorder.mark("save")
            super()._save_checkpoint(*args, **kwargs)
            recorder.mark("saved")

    return MarkedTrainer


def _idle_marks(recorder: Recorder) -> Any:
    import transformers

    class IdleMarks(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            gc.collect()
            recorder.idle("0.idle")
            recorder.mark("0.idle")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            recorder.idle(f"{recorder.step}.idle")
            recorder.in_step("idle")
            recorder.step, recorder.micro = recorder.step + 1, 0

    return IdleMarks()


def _facts(trainer: Any) -> dict[str, Any]:
    """What the engine made of the setup: classes, resolved knobs, numbers of elements."""
    engine = trainer.model_wrapped
    if not trainer.is_deepspeed_enabled:
        return {"engine": type(engine).__name__, "optimizer": type(trainer.optimizer.optimizer).__name__}
    knobs = engine._config.zero_config
    names = (
        "reduce_bucket_size",
        "allgather_bucket_size",
        "prefetch_bucket_size",
        "param_persistence_threshold",
        "max_live_parameters",
        "max_reuse_distance",
        "sub_group_size",
        "overlap_comm",
    )
    inner = engine.optimizer
    return {
        "engine": type(inner).__name__,
        "optimizer": type(getattr(inner, "optimizer", inner)).__name__,
        "resolved": {name: getattr(knobs, name) for name in names},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Host and device on one memory


class TwoSides:
    """Gives every tensor a side, so that a CPU run tells the host from the device as a GPU run does.

    While it is entered, DeepSpeed's accelerator calls itself "cpu:0" and the host is "cpu". A factory's or a
    ``.to``'s device decides the side of what it makes; what crosses is copied, where CPU would return the same tensor;
    other results live where their arguments do. Pinning a tensor copies it, as on a GPU, and ``tensor.device`` tells
    the side, since DeepSpeed decides by comparing devices.
    """

    def __init__(self) -> None:
        self._sides: dict[int, str] = {}
        self._log: dict[int, list[tuple[int, str]]] = {}
        self.distributes = False
        """accelerate cuts a whole state_dict into shards, on the device of their mesh."""
        self.mapped: list[tuple[int, int]] = []
        """When files were mapped: that is page cache, which the kernel takes back, although the profiler sees it."""
        self._stack = contextlib.ExitStack()

    # ---- what is where

    def side_of(self, tensor: Any) -> str:
        """``"host"`` or ``"device"``; what was never told is the device's."""
        return self._sides.get(_address(tensor), "device")

    def put(self, tensor: Any, side: str) -> None:
        """Note the side of a tensor's storage from now on."""
        address = _address(tensor)
        if address:
            self._sides[address] = side
            self._log.setdefault(address, []).append((time.time_ns(), side))

    def pinned(self, tensor: Any) -> Any:
        """A copy in page-locked memory, were there any."""
        copy = tensor.clone()
        self.put(copy, "host")
        return copy

    def assign(self, blocks: Sequence[Block]) -> None:
        """Set the side of every block of the profile from the notes made while it was alive."""
        for block in blocks:
            if any(before <= block.born <= after for before, after in self.mapped):
                block.side = "file"
                continue
            for moment, side in self._log.get(block.address, ()):
                if block.born <= moment and (block.died is None or moment <= block.died):
                    block.side = side

    # ---- being entered

    def __enter__(self) -> TwoSides:
        import torch
        from deepspeed.accelerator import get_accelerator

        answers = {
            "current_device_name": lambda _: "cpu:0",
            "device_name": lambda *_: "cpu:0",
            "pin_memory": lambda _, tensor, *args, **kwargs: self.pinned(tensor),
            "is_pinned": lambda _, tensor: self.side_of(tensor) == "host",
            "on_accelerator": lambda _, tensor: self.side_of(tensor) == "device",
        }
        self._stack.enter_context(unittest.mock.patch.multiple(type(get_accelerator()), **answers))
        self._stack.enter_context(unittest.mock.patch.object(get_accelerator(), "_name", "cpu:0"))
        fully_shard = importlib.import_module("torch.distributed.fsdp._fully_shard._fully_shard")
        mesh_device = {"_get_device_from_mesh": lambda mesh: torch.device("cpu:0")}
        self._stack.enter_context(unittest.mock.patch.multiple(fully_shard, **mesh_device))
        self._stack.enter_context(unittest.mock.patch.object(torch.cpu, "current_device", return_value="cpu:0"))
        for module, name in (("_fully_shard._fsdp_param", "alloc_storage"), ("_flat_param", "_alloc_storage")):
            self._follow_resizing(importlib.import_module(f"torch.distributed.fsdp.{module}"), name)
        # Where tensors are packed they are "cpu", where they are recomputed "cpu:0": torch compares them.
        metadata = {"default": lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype}}
        checks = importlib.import_module("torch.utils.checkpoint")._allowed_determinism_checks_to_fns
        self._stack.enter_context(unittest.mock.patch.dict(checks, metadata))
        dispatch, functions = _side_modes(self)
        self._stack.enter_context(functions)
        run_backward = torch.autograd._engine_run_backward

        def with_functions(*args: Any, **kwargs: Any) -> Any:  # a mode is off while it handles a call: backward()
            with functions:
                return run_backward(*args, **kwargs)

        self._stack.enter_context(unittest.mock.patch.object(torch.autograd, "_engine_run_backward", with_functions))
        for patch in _reading_and_writing(self):
            self._stack.enter_context(patch)
        self._stack.enter_context(dispatch)
        return self

    def _follow_resizing(self, module: Any, name: str) -> None:
        """resize_ of a storage is no operation that a mode sees; both versions of FSDP gather into such storages."""
        allocate = getattr(module, name)

        def alloc_storage(tensor: Any, *size: Any) -> None:
            allocate(tensor, *size)
            self.put(tensor, "device")

        self._stack.enter_context(unittest.mock.patch.object(module, name, alloc_storage))

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _reading_and_writing(sides: TwoSides) -> list[Any]:
    """Patches for files: what is read is a mapped file, and what is written from the device comes to the host first.

    The libraries decide both by ``device.type``, which is "cpu" on either side. The rest of what they do is theirs.
    """
    import torch
    from safetensors import safe_open
    from transformers import modeling_utils

    class Opened:
        """safe_open, whose tensors lie on the host."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            before = time.time_ns()
            self._file = safe_open(*args, **kwargs)
            sides.mapped.append((before, time.time_ns()))

        def __enter__(self) -> Opened:
            return self

        def __exit__(self, *error: object) -> None:
            self._file.__exit__(None, None, None)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def get_tensor(self, name: str) -> Any:
            return mapped(self._file.get_tensor(name))

        def get_slice(self, name: str) -> Any:
            return Slice(self._file.get_slice(name))

    class Slice:
        def __init__(self, slice_: Any) -> None:
            self._slice = slice_

        def __getattr__(self, name: str) -> Any:
            return getattr(self._slice, name)

        def __getitem__(self, index: Any) -> Any:
            return mapped(self._slice[index])

    def mapped(tensor: Any) -> Any:
        sides.put(tensor, "host")
        return tensor

    context_device = modeling_utils.get_torch_context_manager_or_global_device

    def device_in_context() -> Any:  # asked of an empty tensor, which has no side
        found = context_device()
        return None if found == torch.device("cpu:0") else found

    accelerates = importlib.import_module("accelerate.utils.fsdp_utils")
    load_full = accelerates.fsdp2_load_full_state_dict

    def load_full_state_dict(*args: Any, **kwargs: Any) -> Any:
        sides.distributes = True
        try:
            return load_full(*args, **kwargs)
        finally:
            sides.distributes = False

    safetensors = importlib.import_module("safetensors.torch")
    to_ndarray = safetensors._to_ndarray
    serialization = importlib.import_module("torch.serialization")
    storage_of = torch.storage.UntypedStorage
    device_of, to_cpu = storage_of.device, storage_of.cpu
    writes, saving = serialization._save, [False]

    def save(*args: Any, **kwargs: Any) -> None:
        saving[0] = True
        try:
            writes(*args, **kwargs)
        finally:
            saving[0] = False

    def device(storage: Any) -> Any:
        on_device = saving[0] and sides._sides.get(storage.data_ptr(), "device") == "device"
        return torch.device("cuda:0") if on_device and storage.data_ptr() else device_of.__get__(storage)

    def cpu(storage: Any) -> Any:
        if not saving[0]:
            return to_cpu(storage)
        copy = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu")
        sides.put(copy, "host")
        return copy.untyped_storage()

    def ndarray(tensor: Any) -> Any:
        return to_ndarray(tensor.to("cpu") if sides.side_of(tensor) == "device" else tensor)

    return [
        unittest.mock.patch.object(modeling_utils, "safe_open", Opened),
        unittest.mock.patch.object(modeling_utils, "get_torch_context_manager_or_global_device", device_in_context),
        unittest.mock.patch.object(safetensors, "_to_ndarray", ndarray),
        unittest.mock.patch.object(accelerates, "fsdp2_load_full_state_dict", load_full_state_dict),
        # Of N ranks' plans there is one.
        unittest.mock.patch.object(
            importlib.import_module("torch.distributed.checkpoint.default_planner"),
            "_validate_global_plan",
            return_value=[],
        ),
        unittest.mock.patch.object(serialization, "_save", save),
        unittest.mock.patch.object(storage_of, "device", property(device)),
        unittest.mock.patch.object(storage_of, "cpu", cpu),
        # Modes belong to a thread; the threads would read the same tensors, all of them ahead.
        unittest.mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"),
    ]


def _address(tensor: Any) -> int:
    try:
        return int(getattr(tensor, "_local_tensor", tensor).untyped_storage().data_ptr())
    except Exception:
        return 0


def _side_modes(sides: TwoSides) -> tuple[Any, Any]:
    """The modes that see every operation: one its results, one the devices that Python names."""
    import torch
    from torch.distributed.tensor import DTensor
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def named(device: Any) -> str | None:
        if device is None:
            return None
        device = torch.device(device)
        return None if device.type != "cpu" else ("device" if device.index == 0 else "host")

    wanted: list[str | None] = [None]
    device_of, host, device = torch.Tensor.device.__get__, torch.device("cpu"), torch.device("cpu:0")  # type: ignore[attr-defined]

    class Results(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if DTensor in types:
                return NotImplemented  # its shards pass by here
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            before = {_address(tensor) for tensor in given}
            if func is torch.ops.aten.isinf.default:  # what it makes inside is where its argument is, too
                absolute = args[0].abs()
                sides.put(absolute, sides.side_of(args[0]))
                out = absolute == float("inf")
            else:
                out = func(*args, **(kwargs or {}))
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            # Without a device and without arguments it is PyTorch's default device, the host; scalars may be there too.
            on_device = any(sides.side_of(tensor) == "device" for tensor in given if _address(tensor))
            side = wanted[-1] or ("device" if on_device else "host")
            for tensor in made:
                if _address(tensor) not in before:
                    sides.put(tensor, side)
            return out

    class Devices(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func == device_of:
                return device if sides.side_of(args[0]) == "device" and func(*args) == host else func(*args)
            name = getattr(func, "__name__", "")
            if name == "pin_memory":
                return sides.pinned(args[0])
            if name == "is_pinned":
                return sides.side_of(args[0]) == "host"
            target = kwargs.get("device")
            if name == "to" and target is None:
                target = next((arg for arg in args[1:] if isinstance(arg, str | torch.device)), None)
                other = next((arg for arg in args[1:] if isinstance(arg, torch.Tensor)), None)
                side = named(target) if other is None else sides.side_of(other)
                if target == "cpu" and (sides.distributes or isinstance(args[0], DTensor)):  # its mesh's device type
                    side = "device"
            elif name == "cpu":
                side = "host"
            elif name == "scaled_dot_product_attention":  # a mask that it makes has the device of the query
                side = sides.side_of(args[0])
            else:
                side = named(target)
            if side is None and name in ("tensor", "from_numpy"):
                side = "host"
            if side is None:
                return func(*args, **kwargs)
            if name == "to":  # PyTorch would copy from "cpu" to "cpu:0"
                args = tuple(host if arg is target else arg for arg in args)
                kwargs = {key: host if key == "device" else value for key, value in kwargs.items()}
            wanted.append(side)
            try:
                out = func(*args, **kwargs)
                crossing = name in ("to", "cpu") and sides.side_of(args[0]) != side
                if crossing and _address(out) == _address(args[0]) and out.numel():
                    out = out.clone()
                if isinstance(out, torch.Tensor):  # torch.tensor(...) fills its memory where no mode looks
                    sides.put(out, side)
                return out
            finally:
                wanted.pop()

    return Results(), Devices()  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------------------------------------------------------------
# The grid

BASE: dict[str, Any] = {
    "gpus": 4,
    "dtype": "bfloat16",
    "mixed_precision": "bf16",
    "micro_batch_size": 1,
    "seq_len": 16,
    "num_layers": 2,
}
FP32 = {"dtype": "float32", "mixed_precision": "no"}
FP16 = {"dtype": "float16", "mixed_precision": "fp16"}
LORA = {"lora": {"rank": 8}}
LORA_AND_HEAD = {"lora": {"rank": 8, "targets": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}}
REENTRANT = {"gradient_checkpointing": True, "use_reentrant": True}
WORLDS = (1, 2, 4, 8, 64)
STAGES = ("zero0", "zero1", "zero2", "zero3")


def groups() -> dict[str, list[Setup]]:
    """Return the rows to measure by group, each group one file; the first rows of a group matter most.

    An option is the command line's of that name. ``zero`` and ``fsdp`` hold the engine's own keys, as the JSON does;
    ``zero_init`` false makes the model before the engine's config is known; ``values`` replace some of the config's.
    """
    made: dict[str, list[Setup]] = {}
    for stage in STAGES:
        made[stage] = [_setup("small", stage, **variant) for variant in _variants(stage)]
        made[stage] += [_setup("wide", stage, **variant) for variant in _wide_variants(stage)]
    made["offload"] = [_setup("small", **variant) for variant in _offload_variants()]
    made["nvme"] = [_setup("small", "zero3", **{**_NVME, **variant}) for variant in _nvme_variants()]
    made["nvme"] += [_setup("wide", "zero3", offload_param="nvme", zero=zero) for zero in _wide_nvme_keys()]
    made["nvme"] += _other_nvme_setups()
    made["fsdp"] = [_setup("small", "fsdp", **variant) for variant in _fsdp_variants()]
    made["checkpoint"] = [_setup("small", **variant) for variant in _checkpoint_variants()]
    made["fsdp"] += [_setup("wide", "fsdp", **variant) for variant in ({}, {"gpus": 64}, {"grad_accum_steps": 3})]
    made["fsdp"] += [_setup("small", "fsdp", **variant) for variant in (*_fsdp_wraps(), *_fsdp_optimizers())]
    made["fsdp1"] = [_fsdp1("small", **variant) for variant in _fsdp1_variants()]
    for family, config, options in _fsdp_held_out():
        group = "fsdp1" if options["fsdp"].get("version") == 1 else "fsdp"
        made[group].append(Setup(family, config, _setup(config, "fsdp", **options).options))
    made["checkpoint"] += [Setup(family, config, _setup(config, **o).options) for family, config, o in _read_variants()]
    for group, options in _untied_variants():
        made[group].append(Setup("qwen2", "small", _setup("small", **options).options))
    made["fsdp"].append(Setup("t5", "small", {**BASE, "dtype": "float32", "num_layers": 4, "strategy": "fsdp"}))
    for gpus in (4, 5):  # rows that four ranks share evenly, and five do not
        options = {**BASE, "dtype": "float32", "attn": "eager", "strategy": "fsdp", "gpus": gpus}
        made["fsdp"].append(Setup("gemma2", "small", options))
    made["grid"] = _grid()
    made["full"] = _full()
    made["eval"] = [Setup(family, config, _setup(config, **o).options) for family, config, o in _eval_variants()]
    made["knobs"] = _knobs()
    made["hybrid"] = [_row(*row) for row in _hybrid()]
    made["twinflow"] = [_row(*row) for row in _twin_flow()]
    made["zeropp"] = [_row(*row) for row in _zero_plus_plus()]
    rows = [("llama", "small", options) for options in _quantized_variants()] + _quantized_held_out()
    made["quantized"] = [Setup(family, config, _qlora(config, **options).options) for family, config, options in rows]
    made["liger"] = [Setup(f, config, _setup(config, **o).options) for f, config, o in _liger_variants()]
    made["reentrant"] = [_row(*row) for row in _reentrant()]
    made["modules"] = [_row(*row) for row in _modules()]
    made["unmixed"] = [_row(*row) for row in _unmixed()]
    made["external"] = [Setup(f, config, _setup(config, "zero3", **o).options) for f, config, o in _external_held_out()]
    return made


def _unmixed() -> list[tuple[str, str, dict[str, Any]]]:
    """FSDP without mixed precision: each weight is gathered in its own type, and adapters are float32."""
    own = {"strategy": "fsdp", "dtype": "bfloat16", "mixed_precision": "no", "seq_len": 48, **LORA}
    version_1 = {**own, "fsdp": {"version": 1}}
    checkpointed = {"gradient_checkpointing": True, "gpus": 8}
    flat = {"fsdp": {"version": 1, "use_orig_params": False}}

    def packed(**options: Any) -> dict[str, Any]:
        return {**own, "quantization": {"kind": "nf4", **options}}

    trl = {"bf16_adapters": True, "quant_storage": "bfloat16"}
    mixed = {"mixed_precision": "bf16"}
    unprepared = {"quant_storage": "bfloat16", "prepare_for_kbit_training": False}
    return [
        ("llama", "small", own),
        ("llama", "small", version_1),
        ("mistral", "small", {**version_1, **checkpointed}),
        ("qwen2", "small", {**own, "gpus": 8, "grad_accum_steps": 2}),
        ("llama", "small", {**own, "offload_param": "cpu"}),
        ("llama", "small", {**version_1, "offload_param": "cpu"}),
        ("llama", "wide", {**own, **LORA_AND_HEAD}),
        ("llama", "wide", {**version_1, **LORA_AND_HEAD}),
        ("gemma", "small", {**own, "gpus": 1}),
        ("qwen3", "small", {**own, **flat, "gpus": 3, "grad_accum_steps": 2}),
        ("llama", "wide", {**own, **checkpointed, "optim": "sgd"}),
        ("llama", "small", {**version_1, **REENTRANT}),
        ("llama", "small", {**own, "lora": {"rank": 8, "modules_to_save": ["mlp.up_proj"]}}),
        ("llama", "small", {**version_1, "lora": {"rank": 8, "modules_to_save": ["mlp.up_proj"]}}),
        ("llama", "small", packed(**unprepared)),
        ("llama", "small", {**packed(**unprepared), "fsdp": {"version": 1}}),
        ("llama", "small", packed(quant_storage="bfloat16")),
        ("qwen2", "small", {**packed(quant_storage="float32"), "gpus": 3}),
        ("qwen2", "small", {**packed(quant_storage="uint8"), "gpus": 2, "grad_accum_steps": 2}),
        # What TRL makes 16 bit accelerate makes float32 again under version 1, and leaves under version 2.
        ("llama", "small", {**packed(**unprepared, bf16_adapters=True), "fsdp": {"version": 1}}),
        ("llama", "small", {**packed(**unprepared, bf16_adapters=True), **mixed, "fsdp": {"version": 1}}),
        ("llama", "small", {**packed(**trl), **mixed}),
        ("qwen3", "small", {**packed(**trl), **mixed, "gpus": 8, "offload_param": "cpu"}),
    ]


def _modules() -> list[tuple[str, str, dict[str, Any]]]:
    """What ZeRO-3 takes for modules: blocks of experts whole, and of an adapted model what stands around and within.

    All but the last four were drawn at random, before there was a rule; estimates of theirs were 1 to 10 % low.
    """
    zero3, offloaded = {"strategy": "zero3"}, {"strategy": "zero3", "offload_optimizer": "cpu"}
    forced, not_forced = {"zero_force_ds_cpu_optimizer": True}, {"zero_force_ds_cpu_optimizer": False}
    adapters = {"lora": {"rank": 8, "targets": ["q_proj", "v_proj"]}}
    adapted = {**zero3, **adapters, "gradient_checkpointing": True, "grad_accum_steps": 2, "num_layers": 3}
    adapted |= {"micro_batch_size": 3, "seq_len": 16}
    stays = {"stage3_param_persistence_threshold": 100_000}
    kept_short = {"stage3_max_live_parameters": 500_000, "stage3_max_reuse_distance": 0}
    one_by_one = {**stays, "stage3_max_reuse_distance": 100_000, "stage3_allgather_sequential": True}
    return [
        (
            *("mixtral", "wide"),
            {
                **offloaded,
                "gpus": 2,
                "grad_accum_steps": 3,
                "seq_len": 48,
                "num_layers": None,
                "zero": {"overlap_comm": False, "stage3_max_reuse_distance": 0, **forced},
            },
        ),
        (
            *("qwen3_moe", "small"),
            {
                **offloaded,
                "gpus": 3,
                "grad_accum_steps": 2,
                "micro_batch_size": 2,
                "seq_len": 100,
                "num_layers": 3,
                "zero": {"communication_data_type": "fp32", "contiguous_gradients": True, **not_forced},
            },
        ),
        (
            *("mixtral", "small"),
            {
                **zero3,
                **FP32,
                "gpus": 5,
                "gradient_checkpointing": True,
                "micro_batch_size": 3,
                "seq_len": 100,
                "zero": {"contiguous_gradients": False, "stage3_prefetch_bucket_size": 5_000_000},
            },
        ),
        (
            *("qwen2_moe", "small"),
            {
                **offloaded,
                "gpus": 4,
                "micro_batch_size": 2,
                "seq_len": 100,
                "zero": {"reduce_bucket_size": 200_000, "stage3_max_live_parameters": 100_000, **not_forced},
            },
        ),
        (
            *("qwen2_moe", "small"),
            {
                **offloaded,
                **adapters,
                "offload_param": "cpu",
                "gpus": 8,
                "micro_batch_size": 2,
                "seq_len": 48,
                "optim": "rmsprop",
                "zero": {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, **forced},
            },
        ),
        ("olmo2", "wide", {**adapted, "gpus": 1, "optim": "rmsprop", "zero": one_by_one}),
        ("olmo2", "wide", {**adapted, "gpus": 3, "zero": {**stays, "stage3_max_reuse_distance": 0}}),
        ("gemma", "small", {**adapted, "gpus": 4, "zero": {"stage3_prefetch_bucket_size": 20_000}}),
        ("qwen3", "small", {**adapted, "gpus": 2, "zero": {"stage3_prefetch_bucket_size": 20_000, **kept_short}}),
        ("qwen3_moe", "wide", {**zero3, "gpus": 3, "micro_batch_size": 2, "seq_len": 100, "grad_accum_steps": 2}),
    ]


def _reentrant() -> list[tuple[str, str, dict[str, Any]]]:
    """Checkpointed blocks that run a backward of their own; with ``checkpoints_wrappers`` FSDP1's wrappers run again
    too. All but the first six were first looked at when the rules had been written.
    """
    long, deep = {"micro_batch_size": 2, "seq_len": 100}, {"num_layers": 8, "values": {"vocab_size": 128}}
    version_1 = {"strategy": "fsdp", "fsdp": {"version": 1}}
    wrapped = {**version_1, "checkpoints_wrappers": True}
    no_copies = {"version": 1, "use_orig_params": False}
    graded = {"version": 1, "sharding_strategy": "SHARD_GRAD_OP"}
    both, more = {"offload_optimizer": "cpu", "offload_param": "cpu"}, {"grad_accum_steps": 3}
    rows: list[tuple[str, str, dict[str, Any]]] = [
        ("llama", "wide", {"strategy": "zero3", **long}),
        ("llama", "wide", {"strategy": "fsdp", **LORA, **long}),
        ("llama", "wide", {**version_1, **long}),
        ("llama", "small", {**version_1, **LORA, **deep, **long}),
        ("llama", "small", {**wrapped, **LORA, **deep, **long}),
        ("llama", "small", {**wrapped, **LORA, **deep, **long, "grad_accum_steps": 2}),
        ("qwen2", "small", {"strategy": "zero0", "gpus": 3, **more, **long}),
        ("qwen2", "small", {"strategy": "zero2", "gpus": 8, **LORA, **deep, **long}),
        ("mistral", "small", {"strategy": "zero3", "gpus": 2, **LORA, **deep, **long, "zero": _ZERO3_KNOBS[0]}),
        ("mistral", "small", {"strategy": "zero3", **both, **FP16, **more, "seq_len": 300}),
        ("qwen3", "small", {"strategy": "fsdp", "gpus": 64, **more, **long}),
        ("gemma", "small", {"strategy": "fsdp", "offload_param": "cpu", **LORA, **deep, **long}),
        ("llama", "small", {"strategy": "zero3", "checkpoints_calls": True, **LORA, **deep, **long}),
        ("mistral", "small", {"strategy": "zero3", "checkpoints_calls": True, "gpus": 2, **deep, **long}),
        ("mistral", "small", {"strategy": "fsdp", "checkpoints_calls": True, **LORA, **deep, **long}),
        ("llama", "small", {"strategy": "fsdp", "checkpoints_calls": True, "gpus": 8, **more, "seq_len": 200}),
        ("qwen2", "small", {**version_1, "gpus": 3, **deep, **long, "offload_param": "cpu"}),
        ("qwen2", "small", {**wrapped, "gpus": 2, **LORA, **deep, **long, "fsdp": no_copies}),
        ("mistral", "small", {**wrapped, "gpus": 8, **LORA, **deep, "seq_len": 300, "fsdp": graded, **more}),
        ("qwen3", "small", {**wrapped, "gpus": 4, **deep, **long}),
        ("gemma", "small", {**wrapped, "gpus": 64, **LORA, "seq_len": 400, "use_reentrant": False}),
        ("llama", "small", {**wrapped, **LORA, **deep, **long, "attn": "eager", "offload_param": "cpu"}),
    ]
    return [(family, config, {**REENTRANT, **options}) for family, config, options in rows]


def _liger_variants() -> list[tuple[str, str, dict[str, Any]]]:
    """Liger's loss reads the head's weight where the head does not run; needs liger-kernel. Held out but for the
    first two.
    """
    exact = {"dtype": "float32", "mixed_precision": "no", "liger": True}
    zero3: dict[str, Any] = {"strategy": "zero3", "liger": True}
    fsdp: dict[str, Any] = {"strategy": "fsdp", "dtype": "float32", "liger": True}
    offload = {"offload_optimizer": "cpu", "offload_param": "cpu"}
    linear = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "Linear"]}
    by_size = {"version": 1, "auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 5_000_000}
    saves_head = {"lora": {"rank": 8, "modules_to_save": ["lm_head"]}}
    return [
        ("llama", "small", {**zero3, **exact, "gpus": 3}),
        ("llama", "small", {**fsdp, **exact, "gpus": 3}),
        ("llama", "small", {**fsdp, "fsdp": linear}),
        ("qwen2", "wide", {**fsdp, **exact, "fsdp": by_size}),
        ("llama", "tied", {**zero3, **exact, "gpus": 5, "grad_accum_steps": 3}),
        ("llama", "tied", {**fsdp, **exact, "gpus": 8}),
        ("llama", "small", {**fsdp, **exact, **saves_head, "fsdp": {"version": 1}}),
        ("mistral", "small", {**zero3, **offload, "gpus": 2}),
        ("qwen3", "small", {**zero3, **exact, "gradient_checkpointing": True, "gpus": 8, "zero": _ZERO3_KNOBS[0]}),
        ("mistral", "small", {**fsdp, "gpus": 64, "gradient_checkpointing": True}),
        ("qwen2", "small", {**zero3, **LORA, "gpus": 64}),
        ("llama", "wide", {**fsdp, **exact, "gpus": 3, "fsdp": by_size}),
    ]


def _external_held_out() -> list[tuple[str, str, dict[str, Any]]]:
    """Modules that look at weights of others, which ZeRO-3 then gathers with them. First looked at when that was in."""
    long, whole = {"micro_batch_size": 3, "seq_len": 90}, {"num_layers": None}
    offload = {"offload_optimizer": "cpu", "offload_param": "cpu"}
    gated = {**whole, "values": {"feed_forward_proj": "gated-gelu", "num_layers": 2, "num_decoder_layers": 2}}
    rank_128 = {"lora": {"rank": 128, "targets": ["q_proj", "v_proj", "down_proj"]}}
    eager = {**whole, "attn": "eager"}
    return [
        ("t5", "small", {**whole, "gpus": 3}),
        ("t5", "small", {**whole, "gpus": 1, "zero": _ZERO3_KNOBS[0]}),
        ("t5", "wide", {**whole, "gpus": 5, "gradient_checkpointing": True, **long}),
        ("t5", "small", {**whole, "lora": {"rank": 64, "targets": ["q", "v", "wo"]}, **long}),
        ("t5", "small", {**gated, "gpus": 8, "grad_accum_steps": 3}),
        ("t5", "small", {**gated, "gpus": 2, **offload}),
        ("t5", "small", {**gated, "gpus": 64, "offload_param": "cpu", "zero": _ZERO3_KNOBS[1]}),
        ("llama", "small", {**rank_128, "gpus": 8, "grad_accum_steps": 3}),
        ("llama", "small", {**rank_128, **offload, "gpus": 3}),
        ("llama", "wide", {**rank_128, "gradient_checkpointing": True, "gpus": 64}),
        ("deberta-v2", "variant v3-masked-lm", eager),
        ("deberta-v2", "variant own-position-keys", {**eager, "gpus": 64, "grad_accum_steps": 2}),
        ("deberta-v2", "variant v3-classifier", {**eager, "gpus": 3, "offload_param": "cpu"}),
    ]


def _eval_variants() -> list[tuple[str, str, dict[str, Any]]]:
    """Evaluation after the second step: losses alone, or predictions that pile up."""
    losses, kept = {"eval_batch_size": 2}, {"eval_batch_size": 2, "eval_accumulation_steps": 3, "two_sides": True}
    offload = {"offload_optimizer": "cpu", "offload_param": "cpu"}
    unkept = {"stage3_max_reuse_distance": 0}
    fsdp1: dict[str, Any] = {"strategy": "fsdp", "fsdp": {"version": 1}}
    grad_op = {"version": 1, "sharding_strategy": "SHARD_GRAD_OP"}
    long = {"eval_batch_size": 4, "seq_len": 120}
    options: list[dict[str, Any]] = [
        *({"strategy": stage, **losses} for stage in STAGES),
        {"strategy": "fsdp", **losses},
        {**fsdp1, **losses},
        *({"strategy": stage, **kept} for stage in ("zero1", "zero3", "fsdp")),
        {"strategy": "zero1", "zero": {"grad_accum_dtype": "fp32"}, **kept},
        {"strategy": "zero2", "offload_optimizer": "cpu", **kept},
        {"strategy": "zero3", **offload, **losses},
        {"strategy": "zero3", **offload, **kept},
        {"strategy": "fsdp", "offload_param": "cpu", **kept},
        {**fsdp1, "offload_param": "cpu", **kept},
        {"strategy": "zero3", "zero": unkept, **losses},
        {"strategy": "zero3", "zero": {**unkept, "stage3_prefetch_bucket_size": 0}, **losses},
        {"strategy": "zero3", "zero": {"stage3_prefetch_bucket_size": 50_000_000}, **losses},
        {"strategy": "zero3", "gradient_checkpointing": True, "zero": unkept, **long},
        {"strategy": "zero3", **LORA, **losses},
        {"strategy": "zero3", **FP32, "gpus": 1, **losses},
        {"strategy": "fsdp", "fsdp": {"auto_wrap_policy": "NO_WRAP"}, **losses},
        {"strategy": "fsdp", "fsdp": {"reshard_after_forward": False}, **losses},
        {"strategy": "fsdp", "gpus": 1, **kept},
        {"strategy": "fsdp", **long, "num_layers": 4},
        {"strategy": "fsdp", "fsdp": grad_op, **losses},
        {**fsdp1, **FP32, "grad_accum_steps": 3, **kept},
        {**fsdp1, "gradient_checkpointing": True, **long},
        {"strategy": "fsdp", "fsdp": {"version": 1, "forward_prefetch": True}, "num_layers": 4, **losses},
    ]
    return [*(("llama", "small", each) for each in options), *_eval_held_out()]


def _eval_held_out() -> list[tuple[str, str, dict[str, Any]]]:
    """Rows that were first looked at when the others were understood."""

    def kept(size: int, steps: int) -> dict[str, Any]:
        return {"eval_batch_size": size, "eval_accumulation_steps": steps, "two_sides": True}

    both = {"offload_optimizer": "cpu", "offload_param": "cpu"}
    away = {"stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}
    wrapped = {**_wrapping("Qwen2DecoderLayer"), "reshard_after_forward": False}
    checkpointed = {"gradient_checkpointing": True, "micro_batch_size": 2, "seq_len": 100}
    no_shard = {"version": 1, "sharding_strategy": "NO_SHARD"}
    few = {"stage3_max_live_parameters": 400_000}
    return [
        ("qwen2", "small", {"strategy": "zero0", "gpus": 3, "grad_accum_steps": 2, **FP16, **kept(3, 5)}),
        ("llama", "wide", {"strategy": "zero2", "gpus": 8, **LORA, **kept(1, 2)}),
        ("qwen2", "small", {"strategy": "zero3", "gpus": 5, "num_layers": 3, "zero": away, **kept(4, 2)}),
        ("llama", "tied", {"strategy": "zero3", "gpus": 2, **both, "grad_accum_steps": 3, **kept(3, 4)}),
        ("llama", "wide", {"strategy": "zero3", "gpus": 64, **LORA, **checkpointed, **kept(2, 2)}),
        ("qwen2", "small", {"strategy": "zero3", "gpus": 2, "zero": few, "num_layers": 4, "eval_batch_size": 6}),
        ("llama", "tied", {"strategy": "zero3", "offload_param": "cpu", "gpus": 1, **FP16, "eval_batch_size": 5}),
        ("qwen2", "small", {"strategy": "zero1", "offload_optimizer": "cpu", "gpus": 7, **FP32, **kept(2, 3)}),
        ("qwen2", "small", {"strategy": "fsdp", "gpus": 2, "num_layers": 3, "fsdp": wrapped, **kept(3, 2)}),
        ("llama", "tied", {"strategy": "fsdp", "gpus": 8, "grad_accum_steps": 2, **kept(1, 6)}),
        ("llama", "wide", {"strategy": "fsdp", "offload_param": "cpu", **LORA, **checkpointed, **kept(2, 2)}),
        ("qwen3", "small", {"strategy": "fsdp", "dtype": "bfloat16", "mixed_precision": "no", **kept(2, 3)}),
        ("qwen2", "small", {"strategy": "fsdp", "gpus": 3, "fsdp": {"version": 1}, **LORA, **kept(5, 2)}),
        (
            "llama",
            "tied",
            {
                "strategy": "fsdp",
                "gpus": 2,
                "offload_param": "cpu",
                "grad_accum_steps": 2,
                "fsdp": {"version": 1, "sharding_strategy": "SHARD_GRAD_OP"},
                **kept(2, 4),
            },
        ),
        ("qwen2", "small", {"strategy": "fsdp", "gpus": 8, "fsdp": no_shard, "eval_batch_size": 7, "seq_len": 90}),
    ]


def _hybrid() -> list[tuple[str, str, dict[str, Any]]]:
    """FSDP's hybrid sharding: version 2 on a mesh of accelerate's ParallelismConfig, version 1 by nodes."""
    more, offload = {"grad_accum_steps": 3}, {"offload_param": "cpu"}
    bf16, loads = {"dtype": "bfloat16", "mixed_precision": "no"}, {"cpu_ram_efficient_loading": True}

    def version_2(replicas: int = 2, **options: Any) -> dict[str, Any]:
        keys = {"dp_replicate_size": replicas, **options.pop("fsdp", {})}
        return {"strategy": "fsdp", "gpus": 8, "nodes": 2, **options, "fsdp": keys}

    def version_1(name: str = "HYBRID_SHARD", **options: Any) -> dict[str, Any]:
        keys = {"version": 1, "sharding_strategy": name, **options.pop("fsdp", {})}
        return {"strategy": "fsdp", "gpus": 8, "nodes": 2, **options, "fsdp": keys}

    rows = [
        *(version_2(**each) for each in ({}, more, FP32, bf16, LORA, offload, {"two_sides": True, "fsdp": loads})),
        *(version_1(**each) for each in ({}, more, offload, {"gpus": 2})),
        version_1("HYBRID_SHARD_ZERO2"),
        version_1("SHARD_GRAD_OP", gpus=4, nodes=1),  # of 16-bit weights, of which the others have none
        version_2(gpus=2),  # refused
        version_2(fsdp={"dp_shard_size": 2}),
        version_1("FULL_SHARD", fsdp={"dp_replicate_size": 2}),
    ]
    # First looked at when the rules had been written.
    long, saved = {"micro_batch_size": 2, "seq_len": 120}, {"save": True, "pretrained": {"dtype": "bfloat16"}}
    kept = {"eval_batch_size": 2, "eval_accumulation_steps": 3, "two_sides": True}
    return [
        *(("llama", "small", row) for row in rows),
        ("qwen2", "small", version_2(4, gpus=12, nodes=3, num_layers=3, **more)),
        ("llama", "wide", version_2(8, gpus=64, nodes=8, gradient_checkpointing=True, **long)),
        ("qwen2", "small", version_2(**LORA, **offload, **more)),
        ("llama", "tied", version_2(2, gpus=4, optim="sgd", fsdp={"reshard_after_forward": False})),
        ("qwen2", "small", version_2(**saved)),
        ("llama", "small", version_2(3, gpus=6, nodes=3, **saved, fsdp=loads)),
        ("llama", "wide", version_2(**kept)),
        ("qwen2", "small", version_1(gpus=6, num_layers=3, grad_accum_steps=2, fsdp={"backward_prefetch": _PRE})),
        ("llama", "tied", version_1("HYBRID_SHARD_ZERO2", gpus=16, nodes=4, **LORA, **long)),
        ("qwen2", "small", version_1("HYBRID_SHARD_ZERO2", **offload, **more)),
        ("llama", "wide", version_1(gpus=3, nodes=3, gradient_checkpointing=True, fsdp=_FLAT_POST, **long)),
        ("qwen2", "small", version_1(gpus=64, nodes=8, dtype="float32", **kept)),
    ]


def _twin_flow() -> list[tuple[str, str, dict[str, Any]]]:
    """An offloaded optimizer's ``ratio``, which leaves the first sub-groups on the GPU."""

    def row(ratio: float, sub_group_size: int = 200_000, **options: Any) -> dict[str, Any]:
        keys = {"offload_optimizer": {"ratio": ratio}, "sub_group_size": sub_group_size}
        keys |= {"zero_force_ds_cpu_optimizer": True, **options.pop("zero", {})}
        return {"strategy": "zero3", **_OFFLOAD, **options, "zero": keys}

    more, both = {"grad_accum_steps": 3}, {"offload_param": "cpu"}
    saved = {"save": True, "pretrained": {"dtype": "bfloat16"}}
    rows = [row(0.5), row(0.3, **more), row(0.5, **both), row(0.0), row(0.5, 10**9), row(0.5, gpus=1)]
    rows += [row(0.5, **saved), row(0.5, zero={"zero_force_ds_cpu_optimizer": False})]  # the last is refused
    # First looked at when the rule had been written.
    in_fp32 = {"grad_accum_dtype": "fp32"}
    pageable = {"offload_optimizer": {"ratio": 0.25, "pin_memory": False}}
    return [
        *(("llama", "small", each) for each in rows),
        ("qwen2", "small", row(0.7, 100_000, gpus=3, num_layers=4, **more, zero=in_fp32)),
        ("llama", "wide", row(0.4, 1_000_000, gpus=8, **LORA, micro_batch_size=2, seq_len=120)),
        ("qwen2", "small", row(0.25, 50_000, gpus=2, **both, **more, zero=pageable)),
        ("llama", "tied", row(0.1, 300_000, gpus=64, **FP16, gradient_checkpointing=True)),
        ("gpt2", "small", row(0.6, 150_000, gpus=5, **FP32)),
        ("llama", "wide", row(0.5, 2_000_000, gpus=2, **both, **saved)),
        ("qwen2", "small", row(0.9, 60_000, gpus=1, **both, **saved, zero={"communication_data_type": "fp32"})),
    ]


def _zero_plus_plus() -> list[tuple[str, str, dict[str, Any]]]:
    """ZeRO++: second partitions within a node, weights and gradients that travel quantized."""
    second, weights, gradients = (
        {"zero_hpz_partition_size": 4},
        {"zero_quantized_weights": True},
        {"zero_quantized_gradients": True},
    )

    def row(zero: dict[str, Any], **options: Any) -> dict[str, Any]:
        return {"strategy": "zero3", "gpus": 8, "nodes": 2, **options, "zero": zero}

    more, param = {"grad_accum_steps": 3}, {"offload_param": "cpu"}
    saved = {"save": True, "pretrained": {"dtype": "bfloat16"}}
    rows = [
        *(row(zero) for zero in (second, weights, gradients, {**second, **weights, **gradients})),
        row(second, **param, **_OFFLOAD),
        row(weights, **param),
        row(gradients, **_OFFLOAD, **more),
        row(gradients, **more),
        row(second, **LORA),
        row(second, **saved),
        row(weights, **FP16),
        row(gradients, **FP32),
        row(second, gpus=1, nodes=1),
        row({"zero_hpz_partition_size": 3}),  # this and the next two are refused
        row({**gradients, "reduce_scatter": False}),
        row(weights, gpus=64, nodes=8),
        row({"zero_quantized_nontrainable_weights": True}, **LORA),
    ]
    # First looked at when the rules had been written.
    one_by_one = {"stage3_allgather_sequential": True, "stage3_prefetch_bucket_size": 500_000}
    large, two = {"reduce_bucket_size": 20_000_000, "stage3_max_live_parameters": 0}, {"zero_hpz_partition_size": 2}
    away = {"stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}
    kept = {"eval_batch_size": 2, "eval_accumulation_steps": 3, "two_sides": True}
    return [
        *(("llama", "small", each) for each in rows),
        ("qwen2", "small", row({**gradients, **large}, gpus=4, num_layers=3, grad_accum_steps=2)),
        ("llama", "small", row({**gradients, **large, "communication_data_type": "fp32"}, nodes=4, **more)),
        ("qwen2", "small", row({**weights, **two, **one_by_one}, gpus=4, **FP16, **param)),
        ("llama", "wide", row({**weights, **away}, gpus=16, nodes=2, gradient_checkpointing=True, seq_len=90)),
        ("gpt2", "small", row({**two, **away}, gpus=6, nodes=3, **more)),
        ("llama", "tied", row({**second, **weights}, **LORA, **param, micro_batch_size=2, seq_len=120)),
        ("llama", "wide", row({"zero_hpz_partition_size": 8}, gpus=16, **saved, **param)),
        ("qwen2", "small", row(two, gpus=4, **kept)),
        ("olmoe", "small", row({**gradients, **large, **two}, gpus=4, dtype="float32", mixed_precision="bf16")),
    ]


def _knobs() -> list[Setup]:
    """Keys and combinations beyond those of each stage's own group."""
    scarce = {"stage3_max_live_parameters": 400_000, "stage3_max_reuse_distance": 0}
    rows: list[tuple[str, str, dict[str, Any]]] = [
        # Modules without weights prefetch, and a view of a weight is saved as it is gathered.
        ("gpt2", "small", {"strategy": "zero3", "num_layers": None, "zero": scarce}),
        ("falcon", "small", {"strategy": "zero3", "gpus": 2}),
        ("olmoe", "small", {"strategy": "zero3", "zero": scarce, "grad_accum_steps": 2}),
        ("mixtral", "small", {"strategy": "zero3", "gpus": 2, "gradient_checkpointing": True, "seq_len": 100}),
        (
            "qwen2",
            "small",
            {"strategy": "zero3", "gpus": 8, "num_layers": 3, "zero": {**scarce, "reduce_bucket_size": 1}},
        ),
    ]
    rows += [("llama", "small", options) for options in _optimizers() + _types()]
    # First looked at when the rules had been written.
    bf16 = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True, "sub_group_size": 300_000}
    torchs = {"zero_force_ds_cpu_optimizer": False}
    reduced = {"communication_data_type": "fp32", "overlap_comm": True}
    rows += [
        ("qwen2", "small", {"strategy": "zero2", "gpus": 3, "grad_accum_steps": 2, "zero": reduced}),
        ("gpt2", "small", {"strategy": "zero3", "gpus": 5, "seq_len": 90, "zero": {**bf16, **reduced}}),
        ("qwen2", "small", {"strategy": "zero1", **_OFFLOAD, "gpus": 3, "optim": "rmsprop", "zero": torchs}),
        ("gpt2", "small", {"strategy": "zero3", **_OFFLOAD, "gpus": 3, "zero": {**reduced, "sub_group_size": 400_000}}),
    ]
    # Others' gradients live until the next bucket is reduced (previous_reduced_grads).
    held = {"overlap_comm": True, "contiguous_gradients": False}
    rows += [
        ("llama", "small", {"strategy": "zero2", "gpus": 4, "zero": held}),
        ("llama", "small", {"strategy": "zero2", "gpus": 4, "zero": {**held, "reduce_bucket_size": 100_000}}),
        ("gpt2", "small", {"strategy": "zero2", "zero": {**held, "reduce_bucket_size": 1000}, "grad_accum_steps": 2}),
        ("qwen2", "small", {"strategy": "zero2", "zero": {**held, "grad_accum_dtype": "fp32"}, "grad_accum_steps": 2}),
        (
            "qwen2",
            "small",
            {"strategy": "zero2", "gpus": 3, "zero": {"grad_accum_dtype": "fp32", "reduce_scatter": False}},
        ),
        ("gpt2", "small", {"strategy": "zero1", "gpus": 3, "zero": {**held, "reduce_bucket_size": 100_000}}),
        # What offloads reduces by buffers all the same.
        ("llama", "small", {"strategy": "zero2", **_OFFLOAD, "gpus": 2, "zero": {"contiguous_gradients": False}}),
        ("gpt2", "small", {"strategy": "zero1", **_OFFLOAD, "gpus": 4, "zero": held, "grad_accum_steps": 2}),
        ("llama", "small", {"strategy": "zero3", **_OFFLOAD, "gpus": 2, "zero": {"contiguous_gradients": False}}),
        # Without zero.Init the engine casts adapters too.
        ("llama", "small", {"strategy": "zero3", "gpus": 1, "zero_init": False, "seq_len": 100, **LORA}),
        ("qwen2", "small", {"strategy": "zero3", **_OFFLOAD, "gpus": 3, "zero_init": False, **FP16, **LORA}),
        # accelerate makes float32 of float16 weights, so that they can be trained under fp16.
        *(("llama", "small", {"strategy": "fsdp", "gpus": 2, **FP16, "fsdp": {"version": n}}) for n in (1, 2)),
    ]
    return [_row(family, config, options) for family, config, options in rows]


_OFFLOAD = {"offload_optimizer": "cpu"}


def _optimizers() -> list[dict[str, Any]]:
    """Other optimizers than AdamW, on flat partitions and on the host: DeepSpeed's own there, and torch's."""
    in_fp32 = {"grad_accum_dtype": "fp32"}
    forced, as_given = ({"zero_force_ds_cpu_optimizer": value} for value in (True, False))
    offload = {"offload_optimizer": "cpu"}
    rows: list[dict[str, Any]] = [
        {"strategy": "zero1", "optim": "sgd"},
        {"strategy": "zero2", "optim": "adagrad"},
        {"strategy": "zero3", "optim": "adafactor"},
        {"strategy": "zero0", "optim": "adafactor"},
        {"strategy": "zero1", "optim": "adafactor", "zero": in_fp32},
        {"strategy": "zero2", **offload, "optim": "sgd", "zero": forced},
        {"strategy": "zero2", **offload, "optim": "adagrad", "zero": forced},
        {"strategy": "zero2", **offload, "optim": "adagrad", "zero": as_given},
        {"strategy": "zero3", **offload, "optim": "adafactor", "zero": as_given},
        {"strategy": "zero3", **offload, "optim": "rmsprop", "zero": forced},
        {"strategy": "zero3", "optim": "adagrad"},
        {"strategy": "zero3", "optim": "rmsprop", "zero": {"sub_group_size": 500_000}},
        {"strategy": "zero2", "optim": "adamw_torch"},
        {"strategy": "zero2", "optim": "adafactor", **FP32},
        {"strategy": "zero0", "optim": "adagrad", "two_sides": True},
        {"strategy": "zero1", "optim": "adagrad", "two_sides": True, "zero": in_fp32},
        {"strategy": "zero2", "optim": "adagrad", "two_sides": True, **LORA},
        {"strategy": "zero1", **offload, "optim": "sgd", "zero": as_given},
        {"strategy": "zero3", **offload, "offload_param": "cpu", "optim": "adagrad", "zero": forced},
    ]
    return rows


def _types() -> list[dict[str, Any]]:
    """What gradients are reduced in, what masters and states are kept in, and the weights that stay gathered."""
    in_fp32 = {"communication_data_type": "fp32"}
    forced = {"zero_force_ds_cpu_optimizer": True}
    masters = {"bf16_master_weights_and_grads": True}
    states = {**masters, "bf16_optimizer_states": True}
    offload, more = {"offload_optimizer": "cpu"}, {"grad_accum_steps": 3}
    few = {"stage3_param_persistence_threshold": 100_000, "stage3_model_persistence_threshold": 90_000}
    return [
        *({"strategy": stage, "zero": in_fp32} for stage in STAGES),
        {"strategy": "zero3", **more, "zero": {**in_fp32, "reduce_bucket_size": 5_000_000}},
        {"strategy": "zero2", "zero": {**in_fp32, "contiguous_gradients": False}},
        {"strategy": "zero2", "zero": {**in_fp32, "reduce_scatter": False}},
        {"strategy": "zero3", "zero": {**in_fp32, "reduce_scatter": False}},
        {"strategy": "zero3", "zero": {**in_fp32, "contiguous_gradients": False}},
        {"strategy": "zero2", **more, "zero": {**in_fp32, "grad_accum_dtype": "fp32"}},
        {"strategy": "zero3", "zero": {**in_fp32, "grad_accum_dtype": "fp32"}},
        {"strategy": "zero1", "zero": {**in_fp32, "grad_accum_dtype": "fp32"}},
        {"strategy": "zero2", **offload, "zero": in_fp32},
        {"strategy": "zero3", **offload, "zero": in_fp32},
        {"strategy": "zero3", **FP32, "zero": {"communication_data_type": "bf16"}},
        {"strategy": "zero3", "zero": few},
        *({"strategy": stage, "zero": keys} for keys in (masters, states) for stage in ("zero2", "zero3")),
        {"strategy": "zero1", **more, "zero": states},
        *({"strategy": stage, **offload, "zero": {**masters, **forced}} for stage in ("zero2", "zero3")),
        {"strategy": "zero2", **offload, **more, "zero": {**masters, **forced}},
        {"strategy": "zero2", **offload, "zero": {**states, **forced}},
    ]


def _row(family: str, config: str, options: dict[str, Any]) -> Setup:
    """On top of the base; None takes an option away."""
    return Setup(family, config, {name: value for name, value in {**BASE, **options}.items() if value is not None})


def _qlora(config: str, strategy: str, kind: str, **options: Any) -> Setup:
    quantization = {"kind": kind, **options.pop("quantization", {})}
    return _setup(config, strategy, **{"dtype": "bfloat16", **LORA, "quantization": quantization, **options})


def _quantized_variants() -> list[dict[str, Any]]:
    """Needs bitsandbytes. oneDNN is off, as in quantized.py. Where nothing casts an embedding, as in float32, it would
    be a view of the mapped checkpoint but for the two sides.
    """
    more, long = {"grad_accum_steps": 3}, {"micro_batch_size": 2, "seq_len": 200}
    checkpointed = {**long, "gradient_checkpointing": True}
    saved = {"two_sides": True, "save": True}
    packed, floats, plain = ({"quantization": {"quant_storage": name}} for name in ("bfloat16", "float32", "uint8"))
    unprepared = {"quantization": {"quant_storage": "bfloat16", "prepare_for_kbit_training": False}}
    version_1 = {"fsdp": {"version": 1}}
    both = {"offload_optimizer": "cpu", "offload_param": "cpu"}
    return [
        {"strategy": "zero0", "kind": "nf4"},
        {"strategy": "zero0", "kind": "int8"},
        {"strategy": "zero0", "kind": "nf4-dq", **more},
        {"strategy": "zero1", "kind": "nf4-dq"},
        {"strategy": "zero1", "kind": "nf4", "gpus": 1},
        {"strategy": "zero1", "kind": "nf4", "gpus": 64, **more},
        {"strategy": "zero1", "kind": "int8", "dtype": "float32", **saved},
        {"strategy": "zero1", "kind": "nf4", "offload_optimizer": "cpu"},
        {"strategy": "zero2", "kind": "nf4"},
        {"strategy": "zero2", "kind": "nf4", **saved},
        {"strategy": "zero2", "kind": "nf4", "offload_optimizer": "cpu", **more},
        {"strategy": "zero2", "kind": "int8", **checkpointed, **more, "seq_len": 60},
        {"strategy": "zero2", "kind": "nf4", **FP32, "two_sides": True},
        {"strategy": "zero2", "kind": "nf4-dq", **FP16, "two_sides": True},
        {"strategy": "zero2", "kind": "nf4", **packed, **checkpointed},
        {"strategy": "zero2", "kind": "nf4", **unprepared, "two_sides": True},
        {"strategy": "zero3", "kind": "nf4"},
        {"strategy": "zero3", "kind": "nf4", "gpus": 1},
        {"strategy": "zero3", "kind": "nf4", "gpus": 64},
        {"strategy": "zero3", "kind": "nf4", **checkpointed},
        {"strategy": "zero3", "kind": "nf4-dq", **packed, **more},
        {"strategy": "zero3", "kind": "int8"},
        {"strategy": "zero3", "kind": "int8", "gradient_checkpointing": True, "grad_accum_steps": 2},
        {"strategy": "zero3", "kind": "nf4", "num_layers": 4, "zero": _ZERO3_KNOBS[0]},
        {"strategy": "zero3", "kind": "nf4", **both, **saved},
        {"strategy": "zero3", "kind": "int8", **both, **more},
        {"strategy": "fsdp", "kind": "nf4"},
        {"strategy": "fsdp", "kind": "nf4", **packed},
        {"strategy": "fsdp", "kind": "nf4", **packed, "gpus": 1},
        {"strategy": "fsdp", "kind": "nf4", **packed, "gpus": 64},
        {"strategy": "fsdp", "kind": "nf4-dq", **packed, **saved},
        {"strategy": "fsdp", "kind": "nf4", **saved},
        {"strategy": "fsdp", "kind": "nf4", **packed, **checkpointed, **more, "seq_len": 60, "offload_param": "cpu"},
        {"strategy": "fsdp", "kind": "nf4", "offload_param": "cpu"},
        {"strategy": "fsdp", "kind": "int8"},
        {"strategy": "fsdp", "kind": "nf4", **version_1, **plain},
        {"strategy": "fsdp", "kind": "nf4", **version_1, **packed},
        *({"strategy": strategy, "kind": "nf4", **floats} for strategy in ("fsdp", "zero2", "zero3")),
    ]


def _quantized_held_out() -> list[tuple[str, str, dict[str, Any]]]:
    """Rows that were first looked at when the rules had been written."""
    packed, prefetch = {"quantization": {"quant_storage": "bfloat16"}}, {"zero": _ZERO3_KNOBS[0]}
    long = {"micro_batch_size": 3, "seq_len": 120}
    return [
        ("qwen2", "small", {"strategy": "zero2", "kind": "nf4", "gpus": 3, **long}),
        ("qwen2", "small", {"strategy": "zero3", "kind": "int8", "gpus": 8, "num_layers": 3, **prefetch}),
        ("qwen2", "small", {"strategy": "fsdp", "kind": "nf4", "gpus": 3, "grad_accum_steps": 2, **packed}),
        ("llama", "wide", {"strategy": "zero3", "kind": "nf4", "grad_accum_steps": 2}),
        ("mistral", "small", {"strategy": "fsdp", "kind": "nf4-dq", "gpus": 8, "gradient_checkpointing": True, **long}),
        ("qwen3", "small", {"strategy": "zero1", "kind": "int8", "gpus": 64, "grad_accum_steps": 3}),
        ("llama", "tied", {"strategy": "zero3", "kind": "nf4-dq", "gpus": 2, "offload_param": "cpu", **long}),
        ("gemma", "small", {"strategy": "zero2", "kind": "nf4", "gpus": 2, "offload_optimizer": "cpu", **long}),
        ("gpt2", "small", {"strategy": "zero3", "kind": "nf4", "num_layers": None, "gpus": 5, **long}),
        ("gpt2", "small", {"strategy": "fsdp", "kind": "nf4-dq", "num_layers": None, **packed, "offload_param": "cpu"}),
        ("mistral", "small", {"strategy": "zero3", "kind": "nf4-dq", "gradient_checkpointing": True, "num_layers": 3}),
        ("qwen3", "small", {"strategy": "zero0", "kind": "nf4", "gradient_checkpointing": True, **long}),
    ]


def _grid() -> list[Setup]:
    """Every engine and offload on every number of ranks; model, precision, accumulation and buckets by turns."""
    optimizer, both = {"offload_optimizer": "cpu"}, {"offload_optimizer": "cpu", "offload_param": "cpu"}
    engines: list[dict[str, Any]] = [
        *({"strategy": stage} for stage in STAGES),
        *({"strategy": stage, **optimizer} for stage in STAGES[1:]),
        {"strategy": "zero3", **both},
        {"strategy": "fsdp"},
        {"strategy": "fsdp", "offload_param": "cpu"},
    ]
    models: list[tuple[str, str, dict[str, Any]]] = [
        ("gpt2", "small", {}),  # biases, LayerNorms, weights transposed
        ("llama", "wide", {"num_layers": 2}),  # a large vocabulary
        ("gpt2", "small", LORA),
        ("t5", "small", {}),  # an encoder's layers and a decoder's
    ]
    buckets: list[dict[str, Any]] = [{}, {"reduce_bucket_size": 1000}, {"reduce_bucket_size": 50_000_000}]
    rows = []
    for number, (gpus, engine) in enumerate(itertools.product(WORLDS, engines)):
        fsdp = engine["strategy"] == "fsdp"
        family, config, options = models[number % (3 if fsdp or "offload_param" in engine else 4)]
        precision = (BASE, FP16 | {"fp16": {"initial_scale_power": 4}}, FP32)[number // 2 % 3]
        if fsdp:
            precision = {"dtype": "float32", "mixed_precision": precision["mixed_precision"]}
        elif family == "t5" and "fp16" in precision:  # overflows whatever the scale
            precision = BASE
        zero = {"zero": buckets[number % 3]} if engine["strategy"] not in ("zero0", "fsdp") else {}
        shape = {"micro_batch_size": 1 + number % 2, "seq_len": 16 + 50 * (number // 3 % 2), "num_layers": None}
        accumulation = {"grad_accum_steps": 3} if number // 5 % 2 else {}
        merged = {**BASE, **precision, **shape, **options, **engine, **zero, **accumulation, "gpus": gpus}
        rows.append(Setup(family, config, {name: value for name, value in merged.items() if value is not None}))
    return rows


def _full() -> list[Setup]:
    """Every engine and offload x number of ranks x precision x accumulation x bucket sizes, on three models.

    In an order that makes the first rows of it a sample. T5 overflows in float16 whatever the scale, and FSDP2 refuses
    its embedding; NVMe is a group of its own.
    """
    optimizer, param = {"offload_optimizer": "cpu"}, {"offload_param": "cpu"}
    engines: list[dict[str, Any]] = [
        *({"strategy": stage} for stage in STAGES),
        *({"strategy": stage, **optimizer} for stage in STAGES[1:]),
        {"strategy": "zero3", **param},
        {"strategy": "zero3", **optimizer, **param},
        {"strategy": "fsdp"},
        {"strategy": "fsdp", **param},
    ]
    models: list[tuple[str, str, dict[str, Any]]] = [
        ("llama", "wide", {"num_layers": 2}),  # a large vocabulary
        ("t5", "small", {}),  # an encoder's layers and a decoder's
        ("gpt2", "small", LORA),
    ]
    precisions = ({}, FP16 | {"fp16": {"initial_scale_power": 4}}, FP32)
    accumulations = ({}, {"grad_accum_steps": 3})
    buckets: list[dict[str, Any]] = [{"zero": {"reduce_bucket_size": size}} for size in (1000, 50_000_000)]
    rows = []
    for engine, model, gpus, precision, accumulation in itertools.product(
        engines, models, WORLDS, precisions, accumulations
    ):
        family, config, options = model
        fsdp = engine["strategy"] == "fsdp"
        if family == "t5" and (fsdp or "fp16" in precision):
            continue
        dtype = {"dtype": "float32"} if fsdp else {}
        for zero in [{}] if fsdp or engine["strategy"] == "zero0" else buckets:
            merged = {**BASE, "num_layers": None, **precision, **dtype, **options, **engine, **zero, **accumulation}
            merged["gpus"] = gpus
            rows.append(Setup(family, config, {name: value for name, value in merged.items() if value is not None}))
    random.Random(0).shuffle(rows)
    return rows


def _untied_variants() -> list[tuple[str, dict[str, Any]]]:
    """On a model whose embedding is not its head, with biases."""
    no_wrap = {"fsdp": {"auto_wrap_policy": "NO_WRAP"}}
    return [
        ("zero1", {"strategy": "zero1", "gpus": 7, "num_layers": 3, "zero": {"grad_accum_dtype": "fp32"}}),
        ("zero3", {"strategy": "zero3", "gpus": 3, "zero": {"reduce_scatter": False}}),
        ("zero3", {"strategy": "zero3", "gpus": 5, "zero": {"contiguous_gradients": False}, "grad_accum_steps": 2}),
        ("fsdp", {"strategy": "fsdp", "gpus": 2, "num_layers": 3, "grad_accum_steps": 2, **no_wrap}),
    ]


def _setup(config: str, strategy: str, **options: Any) -> Setup:
    if strategy == "fsdp":
        options = {"dtype": "float32"} | options
    merged = {**BASE, "strategy": strategy, **options}
    return Setup("llama", config, {name: value for name, value in merged.items() if value is not None})


def _variants(stage: str) -> list[dict[str, Any]]:
    large = {"zero": {"reduce_bucket_size": 500_000_000 // 100}}
    rows: list[dict[str, Any]] = [
        {},
        {"grad_accum_steps": 3},
        {"gpus": 1},
        {"gpus": 64},
        LORA,
        {"gradient_checkpointing": True, "micro_batch_size": 2, "seq_len": 200},
        {"micro_batch_size": 2, "seq_len": 200},
        FP32,
        FP16,
        {"gpus": 2},
        {"gpus": 8},
        {**LORA, "grad_accum_steps": 3},
    ]
    if stage != "zero0":
        rows += [
            large,
            {**large, "grad_accum_steps": 3},
            {"zero": {"reduce_bucket_size": 1000}},
            {"zero": {"overlap_comm": stage != "zero3"}},
            {"zero": {"contiguous_gradients": False}},
            {"zero": {"grad_accum_dtype": "fp32"}, "grad_accum_steps": 3},
            {"zero": {"grad_accum_dtype": "fp32"}},
            {"zero": {"reduce_scatter": False}},
        ]
    if stage in ("zero1", "zero2"):
        rows += [
            {"zero": {"overlap_comm": True}, "grad_accum_steps": 3},
            {"zero": {"round_robin_gradients": True}},
            {"zero": {"allgather_bucket_size": 1000}},
        ]
    if stage == "zero3":
        rows += [{"zero": knobs} for knobs in _ZERO3_KNOBS] + [{"zero_init": False}, {"num_layers": 4}]
    return rows


_ZERO3_KNOBS: list[dict[str, Any]] = [
    {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0},
    {"stage3_prefetch_bucket_size": 0},
    {"stage3_max_reuse_distance": 0},
    {"stage3_max_live_parameters": 600_000},
    {"stage3_max_live_parameters": 600_000, "stage3_max_reuse_distance": 0},
    {"stage3_param_persistence_threshold": 0},
    {"stage3_param_persistence_threshold": 100_000},
    {"sub_group_size": 500_000},
    {"sub_group_size": 10_000},
    {"stage3_prefetch_bucket_size": 50_000_000},
    {"stage3_allgather_sequential": True},
]


def _wide_variants(stage: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{}, {"gpus": 64}, {"grad_accum_steps": 3}]
    if stage == "zero3":
        rows += [{"zero": {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}}]
    return rows


def _offload_variants() -> list[dict[str, Any]]:
    optimizer = {"offload_optimizer": "cpu"}
    both = {**optimizer, "offload_param": "cpu"}
    engines: list[dict[str, Any]] = [
        {"strategy": "zero2", **optimizer},
        {"strategy": "zero3", **both},
        {"strategy": "zero3", **optimizer},
        {"strategy": "fsdp", "offload_param": "cpu"},
        {"strategy": "zero1", **optimizer},
    ]
    fp32 = {"zero": {"grad_accum_dtype": "fp32"}}
    return [
        *engines,
        *({"strategy": stage, "two_sides": True} for stage in ("zero2", "zero3")),
        *({**engine, "grad_accum_steps": 3} for engine in engines),
        {"strategy": "zero3", "offload_param": "cpu"},
        *({"strategy": stage, **optimizer, **fp32} for stage in ("zero2", "zero3")),
        *({**engine, **more} for more in (LORA, {"gpus": 64}, {"gpus": 1}) for engine in engines),
    ]


_NVME: dict[str, Any] = {
    "values": {
        "hidden_size": 1040,
        "intermediate_size": 2821,
        "vocab_size": 5003,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
}
"""Weights whose partitions are above and below the 1 MiB that DeepSpeed swaps, most of them no multiples of 1 KiB."""


def _nvme_variants() -> list[dict[str, Any]]:
    optimizer = {"gpus": 2, "offload_optimizer": "nvme"}
    param = {"gpus": 2, "offload_param": "nvme"}
    both = {**optimizer, **param}
    away = {"offload_param": {"buffer_size": 3_000_000, "max_in_cpu": 0}}
    unkept = {"stage3_max_reuse_distance": 0}
    many = {"sub_group_size": 5_000_000}
    return [
        optimizer,
        {**both, "zero": {**away, **unkept}},
        both,
        {**optimizer, "zero": many},
        {**optimizer, "zero": {**many, "offload_optimizer": {"pipeline_read": True, "buffer_count": 8}}},
        {**optimizer, "zero": {**many, "offload_optimizer": {"pipeline_write": True, "buffer_count": 8}}},
        {
            **optimizer,
            "zero": {
                **many,
                "offload_optimizer": {"pipeline_read": True, "pipeline_write": True, "buffer_count": 12},
            },
        },
        {**optimizer, "grad_accum_steps": 3},
        {**optimizer, "zero": {"grad_accum_dtype": "fp32"}},
        {**optimizer, "gpus": 8},
        {**optimizer, "values": {**_NVME["values"], "hidden_size": 1024, "intermediate_size": 2816}},
        {**param, "zero": {**away, **unkept}},
        {**param, "offload_optimizer": "cpu", "zero": {**away, **unkept}},
        {**both, "zero": {**away, **unkept, "stage3_prefetch_bucket_size": 0}},
        {**both, "zero": away},
        {**both, "zero": {**many, **unkept, "offload_param": {"buffer_size": 3_000_000, "max_in_cpu": 12_000_000}}},
        {
            **both,
            "zero": {
                **many,
                **unkept,
                "offload_param": {"buffer_size": 8_000_000, "max_in_cpu": 0},
                "offload_optimizer": {"fast_init": True},
            },
        },
        {**both, **LORA, "zero": {**away, **unkept}},
        {**both, "gpus": 1, "zero": {"offload_param": {"buffer_size": 6_000_000, "max_in_cpu": 0}, **unkept}},
        {**both, **FP32, "zero": {**away, **unkept}},
        {**both, **FP16, "zero": {**away, **unkept}},
        {**both, "gradient_checkpointing": True, "zero": {**away, **unkept}},
        {**both, "zero": {**away, **unkept, "aio": {"block_size": 2097152, "intra_op_parallelism": 2}}},
        {**both, "zero": {**away, **unkept, "offload_optimizer": {"pin_memory": False}}},
        {**both, "gpus": 64, "zero": {**away, **unkept}},
        # What DeepSpeed asserts against: too few buffers, or too small ones.
        {**optimizer, "zero": {**many, "offload_optimizer": {"pipeline_read": True, "buffer_count": 7}}},
        {
            **optimizer,
            "zero": {
                **many,
                "offload_optimizer": {"pipeline_read": True, "pipeline_write": True, "buffer_count": 11},
            },
        },
        {**both, "zero": {**unkept, "offload_param": {"buffer_size": 2_600_000, "max_in_cpu": 0}}},
        {**both, "zero": {**many, **unkept, **away, "offload_optimizer": {"fast_init": True}}},
    ]


def _wide_nvme_keys() -> list[dict[str, Any]]:
    """Embedding and head alone are on NVMe, which prefetching the rest may ask for twice."""
    away = {"offload_param": {"buffer_size": 4_000_000, "max_in_cpu": 0}, "stage3_max_reuse_distance": 0}
    return [{**away, "stage3_prefetch_bucket_size": size} for size in (0, 1_000_000)]


def _other_nvme_setups() -> list[Setup]:
    """Other shapes: tied weights, biases, buckets above a layer and below a weight."""
    both = {"offload_optimizer": "nvme", "offload_param": "nvme"}
    read: dict[str, Any] = {"pretrained": {"dtype": "bfloat16"}}
    narrow = {
        "hidden_size": 1216,
        "intermediate_size": 3100,
        "vocab_size": 7001,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }
    odd = {
        "hidden_size": 1152,
        "intermediate_size": 3001,
        "vocab_size": 9001,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    }
    some_in_cpu = {
        "stage3_max_reuse_distance": 0,
        "sub_group_size": 4_000_000,
        "offload_param": {"buffer_size": 3_000_000, "max_in_cpu": 6_000_000},
        "offload_optimizer": {"pipeline_write": True, "buffer_count": 9},
    }
    in_float32 = {"grad_accum_dtype": "fp32", "sub_group_size": 6_000_000}
    seven = {
        "stage3_max_reuse_distance": 0,
        "offload_param": {"buffer_size": 6_000_000, "max_in_cpu": 0, "buffer_count": 7},
    }
    small_bucket = {
        "reduce_bucket_size": 1000,
        "stage3_max_reuse_distance": 3_000_000,
        "offload_param": {"buffer_size": 5_000_000, "max_in_cpu": 0, "buffer_count": 12},
    }
    thirty = {"offload_param": {"buffer_size": 9_000_000, "max_in_cpu": 0, "buffer_count": 30}}
    biased = _setup("small", "zero3", values=narrow, gpus=3, **both, grad_accum_steps=2, zero=some_in_cpu)
    mixed = {
        "stage3_max_reuse_distance": 0,
        "sub_group_size": 2_000_000,
        "offload_param": {"buffer_size": 3_000_000, "max_in_cpu": 9_000_000},
    }
    twelve = {
        "hidden_size": 1344,
        "intermediate_size": 2700,
        "vocab_size": 6007,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    }
    checkpointed = {"gradient_checkpointing": True, "micro_batch_size": 2, "seq_len": 100, "grad_accum_steps": 3}
    return [
        Setup("qwen2", "small", biased.options),
        _setup(
            "small",
            "zero3",
            values=odd,
            num_layers=3,
            gpus=4,
            offload_optimizer="nvme",
            grad_accum_steps=2,
            zero=in_float32,
        ),
        _setup("small", "zero3", values=odd, gpus=2, **both, zero_init=False, zero=seven),
        _setup(
            "small",
            "zero3",
            values=narrow,
            gpus=2,
            offload_optimizer="nvme",
            zero={"reduce_bucket_size": 20_000_000},
        ),
        _setup("tied", "zero3", values=narrow, gpus=2, **both, micro_batch_size=2, seq_len=200, zero=small_bucket),
        _setup("small", "zero3", values=odd, gpus=2, **both, **checkpointed, zero=thirty),
        _setup("small", "zero3", values=twelve, gpus=3, offload_optimizer="cpu", offload_param="nvme", zero=mixed),
        _setup("wide", "zero3", gpus=3, **both, save=True, zero=_whole(12_500_000, 0) | {"sub_group_size": 2_000_000}),
        _setup("tied", "zero3", gpus=2, offload_param="nvme", save=True, **read, zero=_whole(12_500_000, 9_000_000)),
    ]


def _whole(buffer_size: int, max_in_cpu: int) -> dict[str, Any]:
    """Keys of weights on NVMe, with a model that is saved whole."""
    return {
        "offload_param": {"buffer_size": buffer_size, "max_in_cpu": max_in_cpu},
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }


def _checkpoint_variants() -> list[dict[str, Any]]:
    """A model that is read by from_pretrained and saved after the second step."""
    bf16, fp32 = ({"pretrained": {"dtype": dtype}, "save": True} for dtype in ("bfloat16", "float32"))
    gather = {"zero": {"stage3_gather_16bit_weights_on_model_save": True}}
    both = {"offload_optimizer": "cpu", "offload_param": "cpu"}
    sharded = {"fsdp": {"state_dict_type": "SHARDED_STATE_DICT"}}
    return [
        {"strategy": "single", "gpus": 1, "dtype": "float32", **bf16},
        *({"strategy": stage, **fp32} for stage in STAGES),
        {"strategy": "zero1", **bf16, "zero": {"grad_accum_dtype": "fp32"}},
        {"strategy": "zero2", "dtype": "float32", **bf16},
        {"strategy": "zero2", **fp32, **LORA},
        {"strategy": "zero2", **fp32, "gpus": 1},
        {"strategy": "zero2", **fp32, "offload_optimizer": "cpu"},
        {"strategy": "zero3", **fp32, **gather},
        {"strategy": "zero3", **bf16, **gather, "gpus": 64},
        {"strategy": "zero3", **bf16, **gather, "gpus": 1},
        {"strategy": "zero3", **bf16, **LORA},
        {"strategy": "zero3", **fp32, "zero_init": False, "gpus": 64},
        {"strategy": "zero3", **bf16, **both},
        {"strategy": "zero3", **fp32, **both, **gather, "zero_init": False},
        {"strategy": "fsdp", "dtype": "float32", **bf16},
        {"strategy": "fsdp", "dtype": "bfloat16", **bf16, "gpus": 64},
        {"strategy": "fsdp", "dtype": "float32", **fp32, **LORA},
        {"strategy": "fsdp", "dtype": "float32", **bf16, "offload_param": "cpu"},
        {"strategy": "fsdp", "dtype": "float32", **bf16, **sharded},
        {"strategy": "fsdp", "dtype": "float32", **bf16, "fsdp": {"cpu_ram_efficient_loading": True}},
    ]


def _read_variants() -> list[tuple[str, str, dict[str, Any]]]:
    """The same of models with tied weights, biases, stacked experts, and of checkpoints in several files."""
    fp32 = {"pretrained": {"dtype": "float32"}, "save": True}
    bf16 = {"pretrained": {"dtype": "bfloat16"}, "save": True}
    files = {"pretrained": {"dtype": "float32", "max_shard_size": "2MB"}, "save": True}
    gather = {"zero": {"stage3_gather_16bit_weights_on_model_save": True}}
    return [
        ("llama", "tied", {"strategy": "zero2", "gpus": 3, **fp32}),
        ("llama", "tied", {"strategy": "fsdp", "gpus": 2, **bf16}),
        ("llama", "tied", {"strategy": "fsdp", "gpus": 2, **bf16, "fsdp": {"cpu_ram_efficient_loading": True}}),
        ("mixtral", "small", {"strategy": "zero2", **bf16}),
        ("qwen2", "small", {"strategy": "zero3", "gpus": 5, **files, **gather}),
        ("qwen2", "small", {"strategy": "fsdp", "gpus": 3, **bf16, "offload_param": "cpu", "num_layers": 3}),
        ("llama", "wide", {"strategy": "zero1", "gpus": 8, **bf16, "offload_optimizer": "cpu"}),
        ("llama", "tied", {"strategy": "zero3", "gpus": 8, **bf16, **gather, "offload_optimizer": "cpu"}),
        ("qwen2", "small", {"strategy": "zero0", "gpus": 2, **bf16, "dtype": "float32", **LORA}),
        ("gpt2", "small", {"strategy": "single", "gpus": 1, **bf16, "dtype": "float32"}),
        ("mixtral", "small", {"strategy": "single", "gpus": 1, **bf16, "dtype": "bfloat16"}),
        ("mixtral", "small", {"strategy": "zero3", **bf16, **gather}),
        ("qwen3_moe", "small", {"strategy": "fsdp", "gpus": 2, **bf16, "dtype": "bfloat16"}),
        # a large vocabulary, where the embedding and the head are what is fullest when they are sharded
        ("llama", "wide", {"strategy": "fsdp", **fp32}),
        ("llama", "wide", {"strategy": "fsdp", "gpus": 3, **fp32, "offload_param": "cpu"}),
        ("stablelm", "wide", {"strategy": "fsdp", "gpus": 2, **bf16, **LORA, "dtype": "bfloat16"}),
        # a copy of a 16-bit head is 16 bit, where adapters are float32
        ("llama", "wide", {"strategy": "zero2", **bf16, **LORA_AND_HEAD, "two_sides": True}),
        ("llama", "wide", {"strategy": "zero3", **fp32, **LORA_AND_HEAD, "two_sides": True, "zero_init": False}),
        ("llama", "wide", {"strategy": "fsdp", **fp32, **LORA_AND_HEAD, "dtype": "bfloat16"}),
    ]


def _fsdp_variants() -> list[dict[str, Any]]:
    return [
        {},
        {"grad_accum_steps": 3},
        {"gpus": 1},
        {"gpus": 64},
        {"fsdp": {"reshard_after_forward": False}},
        LORA,
        {"dtype": "bfloat16"},
        FP32,
        {"dtype": "bfloat16", "mixed_precision": "no"},
        {"num_layers": 4},
        {"gpus": 2},
        {"gpus": 8},
        {"micro_batch_size": 2, "seq_len": 200},
        {"gradient_checkpointing": True, "micro_batch_size": 2, "seq_len": 200},
        {"fsdp": {"activation_checkpointing": True}, "micro_batch_size": 2, "seq_len": 200},
        {**LORA, "grad_accum_steps": 3},
        {"fsdp": {"auto_wrap_policy": "NO_WRAP"}},
    ]


def _fsdp_wraps() -> list[dict[str, Any]]:
    """Units other than the blocks."""
    long = {"micro_batch_size": 2, "seq_len": 200}
    return [
        {"fsdp": {"transformer_layer_cls_to_wrap": ["LlamaMLP"]}},
        {"fsdp": {"transformer_layer_cls_to_wrap": ["LlamaAttention", "LlamaMLP"]}, "grad_accum_steps": 3},
        {"fsdp": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "LlamaMLP"]}, **long},
        {"fsdp": {"auto_wrap_policy": "SIZE_BASED_WRAP"}},
        {"fsdp": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 100_000}},
        {"fsdp": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 10_000_000}},
    ]


def _fsdp_optimizers() -> list[dict[str, Any]]:
    return [{"optim": name} for name in ("adamw_torch", "sgd", "rmsprop", "adafactor")]


def _fsdp1(config: str, **options: Any) -> Setup:
    return _setup(config, "fsdp", **{**options, "fsdp": {"version": 1, **options.get("fsdp", {})}})


def _fsdp1_variants() -> list[dict[str, Any]]:
    more, offload = {"grad_accum_steps": 3}, {"offload_param": "cpu"}
    grad_op, no_shard = ({"fsdp": {"sharding_strategy": name}} for name in ("SHARD_GRAD_OP", "NO_SHARD"))
    flat = {"fsdp": {"use_orig_params": False}}
    long = {"micro_batch_size": 2, "seq_len": 200}
    return [
        {},
        more,
        *({"gpus": gpus} for gpus in (1, 2, 8, 64)),
        grad_op,
        {**grad_op, **more},
        no_shard,
        {**no_shard, **more},
        flat,
        {**flat, **more},
        LORA,
        {**LORA, **more},
        {"dtype": "bfloat16"},
        FP32,
        {**FP32, **more},
        {"dtype": "bfloat16", "mixed_precision": "no"},
        {"num_layers": 4, "fsdp": {"backward_prefetch": "BACKWARD_PRE"}},
        {"num_layers": 4, "fsdp": {"backward_prefetch": "BACKWARD_POST"}},
        {"num_layers": 4, "fsdp": {"forward_prefetch": True}},
        long,
        {**long, "gradient_checkpointing": True},
        {**long, "fsdp": {"activation_checkpointing": True}},
        offload,
        {**offload, **more},
        {**offload, "gpus": 1},
        {**offload, "gpus": 64},
        {**offload, **FP32},
        {**offload, **LORA},
        {"two_sides": True},
        {"two_sides": True, "fsdp": {"sync_module_states": False}},
        {"fsdp": {"auto_wrap_policy": "NO_WRAP"}},
        {"fsdp": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 100_000}},
        {"fsdp": {"transformer_layer_cls_to_wrap": ["LlamaAttention", "LlamaMLP"]}},
        *({"optim": name} for name in ("adamw_torch", "sgd", "adafactor")),
        {**FP32, "gpus": 1, **more},
    ]


def _fsdp_held_out() -> list[tuple[str, str, dict[str, Any]]]:
    """Rows that were first looked at when FSDP1 and the wrap policies had been written."""
    first = {"backward_prefetch": _PRE, "forward_prefetch": True}
    long, more = {"micro_batch_size": 3, "seq_len": 120}, {"grad_accum_steps": 3}
    rows: list[tuple[str, str, dict[str, Any]]] = [
        ("qwen2", "small", {"gpus": 3, "num_layers": 3, "grad_accum_steps": 2, "fsdp": {"backward_prefetch": _PRE}}),
        ("llama", "small", {"gpus": 8, **long, **LORA, "gradient_checkpointing": True}),
        ("qwen2", "small", {"gpus": 2, "dtype": "bfloat16", "mixed_precision": "no", "fsdp": _strategy("NO_SHARD")}),
        (
            "llama",
            "small",
            {"gpus": 5, "offload_param": "cpu", "grad_accum_steps": 2, "fsdp": _strategy("SHARD_GRAD_OP")},
        ),
        ("llama", "tied", {"gpus": 4}),
        ("qwen2", "small", {"gpus": 7, "num_layers": 3, "optim": "adamw_torch", "fsdp": _FLAT_POST}),
        ("qwen2", "small", {"fsdp": {"transformer_layer_cls_to_wrap": ["Qwen2MLP"], "forward_prefetch": True}}),
        ("llama", "small", {**LORA, "grad_accum_steps": 3, "fsdp": _strategy("SHARD_GRAD_OP")}),
        ("llama", "small", {**LORA, **FP32, **long, "offload_param": "cpu", "fsdp": {"backward_prefetch": _PRE}}),
        ("llama", "small", {"gpus": 64, "num_layers": 4, "dtype": "bfloat16", "gradient_checkpointing": True, **long}),
        ("llama", "small", {"optim": "adagrad"}),
        # once more, after the first had shown that PEFT sees sharded adapters
        ("llama", "wide", {**LORA, "grad_accum_steps": 2, "fsdp": {"backward_prefetch": "BACKWARD_POST"}}),
        ("qwen2", "small", {**LORA, "gpus": 2, "offload_param": "cpu", **more, "fsdp": _strategy("SHARD_GRAD_OP")}),
        ("llama", "small", {**FP32, **long, "gradient_checkpointing": True, "fsdp": _wrapping("LlamaAttention")}),
        ("qwen2", "small", {"gpus": 2, "offload_param": "cpu", "grad_accum_steps": 2, "fsdp": _strategy("NO_SHARD")}),
        ("llama", "small", {"gpus": 3, **more, "optim": "sgd", "fsdp": {**_FLAT_POST, "auto_wrap_policy": "NO_WRAP"}}),
        ("qwen2", "small", {"num_layers": 3, **more, "fsdp": {**_strategy("SHARD_GRAD_OP"), "forward_prefetch": True}}),
        ("qwen3", "small", {"gpus": 8, "num_layers": 5, **long, "fsdp": {"backward_prefetch": _PRE}}),
        # drawn at random: attention in float32 tells whether autocast is on, which under version 2 it is not
        ("gptj", "small", {"attn": "eager", "gpus": 3, "grad_accum_steps": 2, **long, "fsdp": {"version": 2}}),
        ("gptj", "small", {"attn": "eager", "gpus": 3, **long, "fsdp": {"version": 1}}),
        # what PEFT copies stays 16 bit until it is sharded; a block's backward frees the weights of its unit
        ("llama", "small", {**LORA_AND_HEAD, "dtype": "bfloat16", "gpus": 2, "offload_param": "cpu", **more}),
        ("llama", "small", {**REENTRANT, "gpus": 2, "num_layers": 3, "fsdp": {"auto_wrap_policy": "NO_WRAP"}}),
        ("llama", "small", {**REENTRANT, "gpus": 2, "num_layers": 3, "fsdp": _wrapping("LlamaMLP")}),
        # and a last time
        ("qwen2", "small", {**LORA, **FP32, **long, "gpus": 8, "gradient_checkpointing": True, "fsdp": first}),
        ("llama", "wide", {"gpus": 2, "grad_accum_steps": 2, "gradient_checkpointing": True, "fsdp": _FLAT_POST}),
        ("mistral", "small", {"gpus": 64, "dtype": "bfloat16", "fsdp": {**_strategy("SHARD_GRAD_OP"), **first}}),
        ("qwen2", "small", {**LORA, **more, "offload_param": "cpu", "fsdp": first}),
        ("gemma", "small", {"gpus": 2, "grad_accum_steps": 2, "seq_len": 200}),
        ("llama", "small", {**long, "gradient_checkpointing": True, "fsdp": {**_wrapping("LlamaMLP"), **first}}),
        ("qwen2", "small", {**more, "offload_param": "cpu", "fsdp": _sized(200_000)}),
    ]
    rows = [(*model, {**own, "fsdp": {"version": 1, **own.get("fsdp", {})}}) for *model, own in rows]
    attention = _wrapping("Qwen2Attention")
    return [
        *rows,
        ("qwen2", "small", {"gpus": 8, "num_layers": 3, "grad_accum_steps": 2, "fsdp": attention}),
        ("qwen2", "small", {"gpus": 2, "offload_param": "cpu", "optim": "rmsprop", "fsdp": attention}),
        ("llama", "tied", {"gpus": 2, "fsdp": {"auto_wrap_policy": "SIZE_BASED_WRAP"}}),
        ("qwen3", "small", {"gpus": 2, "num_layers": 1, "offload_param": "cpu", **more, "fsdp": _wrapping("Qwen3MLP")}),
    ]


_PRE = "BACKWARD_PRE"
_FLAT_POST = {"use_orig_params": False, "backward_prefetch": "BACKWARD_POST"}


def _wrapping(name: str) -> dict[str, Any]:
    return {"transformer_layer_cls_to_wrap": [name]}


def _sized(elements: int) -> dict[str, Any]:
    return {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": elements}


def _strategy(name: str) -> dict[str, Any]:
    return {"sharding_strategy": name}


# ---------------------------------------------------------------------------------------------------------------------
# Running and archiving


def run(setup: Setup, *, with_stack: bool = True) -> Row:
    """Measure one setup in a process of its own, since an engine leaves its state behind; return its row."""
    import_libraries()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_into, args=(sender, setup, with_stack))
    child.start()
    sender.close()
    try:
        result, refusal = receiver.recv()
    except EOFError:
        result, refusal = None, "the process died"
    child.join()
    return Row(setup, result, refusal)


def _measure_into(sender: Any, setup: Setup, with_stack: bool) -> None:
    warnings.simplefilter("ignore")
    gc.freeze()  # a collection, or a scan for tensors, then leaves out what the libraries have imported
    try:
        sender.send((measure(setup.values, setup.options, with_stack=with_stack), None))
    except Exception as error:  # a library's refusal is a fact about the setup; it must not end a long run
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = place.filename.split("site-packages/")[-1]
        sender.send((None, f"{type(error).__name__}: {str(error)[:200]} ({where}:{place.lineno})"))


def versions() -> dict[str, str]:
    """The versions of the libraries that a row depends on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "accelerate", "deepspeed", "peft")}


def run_group(setups: Sequence[Setup], path: Path, group: str) -> Archive:
    """Measure the setups that ``path`` lacks, and those that were refused, again.

    The file is written after each row, so that an interrupted run is taken up where it stopped.
    """
    known = load_archive(path) if path.exists() else Archive(group)
    rows: dict[str, Row] = {}
    if same_versions(known.versions, versions()):
        rows = {row.setup.key: row for row in known.rows if row.result is not None}
    for setup in setups:
        if setup.key not in rows:
            started = time.perf_counter()
            rows[setup.key] = _brief(run(setup, with_stack=False)) if group in BRIEF else run(setup)
            write_archive(Archive(group, versions(), list(rows.values())), path)
            note = rows[setup.key].unsupported or "measured"
            sys.stdout.write(f"{time.perf_counter() - started:4.0f} s {setup.key}: {note}\n")
            sys.stdout.flush()
    wanted = {setup.key for setup in [*setups, *groups().get(group, [])]}
    archive = Archive(group, versions(), [row for key, row in rows.items() if key in wanted])
    write_archive(archive, path)
    return archive


BRIEF = ("full", "modules")
"""Groups whose blocks are not archived, but for those of :data:`CPUS_OWN`."""
CPUS_OWN = (
    # oneDNN's bfloat16 products take a workspace of their own, which is not an ATen tensor.
    "aten::mm < LinearFunctionForZeroStage3Backward |",
    "aten::mm |",  # a product of the forward, which does likewise
    "fully_sharded_data_parallel.py:2119 <listcomp>",  # in float32 of 16-bit gradients CPU's vector_norm casts first
    "chunk_cat",  # pads into a tensor of its own; CUDA has one kernel (TensorShape.cu)
)
"""In the sites of what is allocated on CPU only."""


def _brief(row: Row) -> Row:
    """The row with its levels, and of the blocks those that CPU alone allocates."""
    if row.result is None:
        return row
    phases = {
        side: {
            name: {**phase, "blocks": [block for block in phase["blocks"] if any(own in block[2] for own in CPUS_OWN)]}
            for name, phase in named.items()
        }
        for side, named in row.result["phases"].items()
    }
    return dataclasses.replace(row, result={**row.result, "phases": phases})


def write_archive(archive: Archive, path: Path) -> None:
    """Write an archive as JSON with one row per line; sites are numbered once per file."""
    sites: dict[str, int] = {}
    lines = []
    for row in archive.rows:
        head = {"family": row.setup.family, "config": row.setup.config, "options": row.setup.options}
        if row.result is None:
            body: dict[str, Any] = {"unsupported": row.unsupported}
        else:
            body = {"result": _with_sites(row.result, lambda site: sites.setdefault(site, len(sites)))}
        lines.append(json.dumps(head | body, separators=(",", ":")))
    configs = {f"{row.setup.family} {row.setup.config}": row.setup.values for row in archive.rows}
    top = {"schema": SCHEMA, "group": archive.family, "versions": archive.versions, "configs": configs}
    text = json.dumps(top)[:-1] + ', "rows": [\n' + ",\n".join(lines) + '\n], "sites": '
    text += json.dumps(list(sites), indent=0) + "}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def load_archive(path: Path) -> Archive:
    """Read an archive; rows whose config has changed since are left out."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for row in stored["rows"]:
        setup = Setup(row["family"], row["config"], row["options"])
        if CONFIGS[setup.family].get(setup.config) != stored["configs"][f"{setup.family} {setup.config}"]:
            continue
        result = row.get("result")
        rows.append(Row(setup, result and _with_sites(result, stored["sites"].__getitem__), row.get("unsupported")))
    return Archive(stored["group"], stored["versions"], rows)


def load_archives(directory: Path = ARCHIVE) -> dict[str, Archive]:
    """Read every group's archive."""
    return {path.stem: load_archive(path) for path in sorted(directory.glob("*.json"))}


def _with_sites(result: dict[str, Any], replace: Callable[[Any], Any]) -> dict[str, Any]:
    phases = {
        side: {
            name: {**phase, "blocks": [[size, count, replace(site)] for size, count, site in phase["blocks"]]}
            for name, phase in named.items()
        }
        for side, named in result["phases"].items()
    }
    return {**result, "phases": phases}


def differences(row: Row) -> dict[str, tuple[Any, Any]]:
    """Measure a row again; return the levels that differ as ``side phase -> (archived, now)``."""
    again = run(row.setup, with_stack=False)
    old, new = (levels(each.result) for each in (row, again))
    return {name: (old.get(name), new.get(name)) for name in old.keys() | new.keys() if old.get(name) != new.get(name)}


def levels(result: dict[str, Any] | None) -> dict[str, tuple[list[int], ...]]:
    """``side phase -> (start, peak, end)``, each ``[rounded, raw]``."""
    return {
        f"{side} {name}": (phase["start"], phase["peak"], phase["end"])
        for side, named in (result or {"phases": {}})["phases"].items()
        for name, phase in named.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure groups, show or check the archive; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracles.o2", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--group", action="append", choices=sorted(groups()), help="may be given several times")
    parser.add_argument("--all", action="store_true", help="every group")
    parser.add_argument("--first", type=int, metavar="N", help="only the first N rows of each group")
    parser.add_argument("--out", type=Path, default=ARCHIVE, help="directory of the archive")
    parser.add_argument("--show", metavar="TEXT", help="print the ledgers of rows whose key contains TEXT")
    parser.add_argument("--blocks", type=int, default=0, metavar="N", help="of --show: the N largest at each peak")
    parser.add_argument("--check", type=int, metavar="N", help="measure N archived rows again and compare")
    parser.add_argument("--seed", type=int, default=0, help="of --check")
    options = parser.parse_args(arguments)
    if options.show is not None:
        return _show(options.out, options.show, options.blocks)
    if options.check is not None:
        return _check(options.out, options.check, options.seed)
    names = list(groups()) if options.all else options.group
    if not names:
        parser.error("give --group or --all")
    for name in names:
        run_group(groups()[name][: options.first], options.out / f"{name}.json", name)
    return 0


def _show(directory: Path, text: str, count: int) -> int:
    for archive in load_archives(directory).values():
        for row in archive.rows:
            if text in row.setup.key and row.result is not None:
                sys.stdout.write(f"{row.setup.key}\n  {row.result['engine']} scans {row.result['idle_scan']}\n")
                for side, phases in row.result["phases"].items():
                    for name, phase in phases.items():
                        start, peak, end = (phase[each][0] for each in ("start", "peak", "end"))
                        sys.stdout.write(f"  {side:6} {name:12} {start:>12,} {peak:>12,} {end:>12,}\n")
                        for size, times, site in phase["blocks"][:count]:
                            sys.stdout.write(f"      {size:>10} x{times:<3} {site}\n")
    return 0


def _check(directory: Path, count: int, seed: int) -> int:
    rows = {row.setup.key: row for archive in load_archives(directory).values() for row in archive.rows if row.result}
    wrong = 0
    for setup in sampled([row.setup for row in rows.values()], count, seed):
        found = differences(rows[setup.key])
        wrong += bool(found)
        if found:
            sys.stdout.write(f"{setup.key}\n  {found}\n")
    sys.stdout.write(f"{min(count, len(rows))} rows measured again, {wrong} differ\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
