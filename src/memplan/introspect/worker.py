"""Real training steps, watched: what ``memplan measure`` runs in a process of its own.

    python -m memplan.introspect.worker FOLDER

The folder holds the files that :mod:`memplan.configs.launch` writes, and ``job.json``; what was seen is written to
``record.json``. The run is the one of the folder's own ``train.py``, with random weights and data: its Trainer only
tells when a phase begins. Of several ranks it is the first, among others that a process group makes up (torch's "fake"
backend, whose collectives return at once).

torch and what trains with it are imported inside functions only.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import importlib.metadata
import json
import math
import os
import platform
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

__all__ = ["main"]

LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "liger-kernel", "flash-attn")
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
DECIDING_VARIABLES = ("CUBLAS_", "CUBLASLT_", "CUDA_", "NCCL_", "NVIDIA_TF32", "OMP_NUM_THREADS", "PYTORCH_", "TORCH_")
"""How variables of the environment begin that change what is allocated."""
OUT_OF_MEMORY = ("out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed")
"""In the message of a library that found none: torch's allocator, the driver, cuBLAS, cuDNN."""
WEIGHT_SCALE = 0.02
"""Standard deviation of the random weights: ``initializer_range`` of most configs."""


class Meter(Protocol):
    """Reads a device's counters."""

    def start(self) -> None:
        """Begin to watch, or begin anew."""

    def adopt(self, tensors: Any) -> None:
        """Count tensors that it may not have seen made."""

    def on_host(self) -> contextlib.AbstractContextManager[Any]:
        """What is made within is of the host."""

    def read(self) -> dict[str, int]:
        """Return the peaks since the last call, in bytes, and start them anew."""

    def level(self) -> dict[str, int]:
        """Return what is held now, in bytes."""

    def synchronize(self) -> None:
        """Wait until the device has done what it was asked to."""


class CudaMeter:
    """torch.cuda's counters, the driver's, and those of pinned host memory."""

    def __init__(self, elsewhere: int, driver: Any = None) -> None:
        self._elsewhere = elsewhere
        """Bytes that CUDA counts as in use and that are not this process's, as it began."""
        self._driver = driver
        """Tells what each process has; None where it does not, and what is in use is taken for this one's."""

    def start(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()
        if hasattr(torch.cuda, "reset_peak_host_memory_stats"):
            torch.cuda.reset_peak_host_memory_stats()

    def adopt(self, tensors: Any) -> None:
        pass

    def on_host(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def read(self) -> dict[str, int]:
        found = self._found("peak")
        if self._driver is None:
            found["device"] = self._on_device()
        self.start()
        return found

    def level(self) -> dict[str, int]:
        return self._found("current") | {"device": self._on_device()}

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def _found(self, which: str) -> dict[str, int]:
        import torch

        stats = torch.cuda.memory_stats()
        host = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}  # from torch 2.7 on
        names = {
            "allocated": "allocated_bytes",
            "requested": "requested_bytes",
            "reserved": "reserved_bytes",
            "active": "active_bytes",
            "inactive_split": "inactive_split_bytes",
        }
        found = {name: int(stats.get(f"{key}.all.{which}", 0)) for name, key in names.items()}
        found["pinned"] = int(host.get(f"allocated_bytes.{which}", 0))
        return found | {"retries": int(stats.get("num_alloc_retries", 0)), "host": resident(which)}

    def _on_device(self) -> int:
        """Of this process, now: neither keeps a peak. Only NVML can tell it from others; it is too slow for a step."""
        if self._driver is not None:
            return int((self._driver.processes() or {}).get(os.getpid(), 0))
        return used_by_cuda() - self._elsewhere


class CpuMeter:
    """The bytes of all tensors, by the same ledger that a trace keeps; for trying the instrument without a GPU."""

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker

    def start(self) -> None:
        self.tracker.phases = {}
        self.tracker.enter("now")

    def adopt(self, tensors: Any) -> None:
        self.tracker.adopt(tensors)

    def on_host(self) -> contextlib.AbstractContextManager[Any]:
        """The data loader has the next batch ready, which on a GPU's machine is not on the GPU yet."""
        from torch.utils._python_dispatch import _disable_current_modes

        return _disable_current_modes()

    def read(self) -> dict[str, int]:
        peak = max(self.tracker.phases.values(), default=self.tracker.live)
        self.start()
        return {"allocated": peak, "host": resident("peak")}

    def level(self) -> dict[str, int]:
        return {"allocated": self.tracker.live, "host": resident()}

    def synchronize(self) -> None:
        pass


class Recorder:
    """Cuts a run into phases, and notes the peaks of each.

    Phases bear the names that an estimate has; all of the first step is ``first_step``.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.step = 0
        self.phase = "load"
        self.peaks: dict[str, dict[str, int]] = {}
        self.seconds: list[float] = []
        self.skipped = 0
        """Steps that the optimizer did not make, since a gradient of float16 was not finite."""
        self._started = 0.0
        self._closed = False

    def enter(self, phase: str) -> None:
        """Begin a phase; what was since the last one belongs to that."""
        self._note(self.phase, self.meter.read())
        self.phase = phase

    def within_step(self, phase: str) -> None:
        """Begin a phase of a step."""
        self.enter(phase if self.step else "first_step")

    def begin_step(self) -> None:
        """The step begins; its inputs are there."""
        self.within_step("forward")
        self.meter.synchronize()
        self._started = time.perf_counter()

    def end_step(self) -> None:
        """Gradients are gone, and what is left stays until the next step."""
        self.meter.synchronize()
        self.seconds.append(time.perf_counter() - self._started)
        self.enter("idle")
        self._note("idle", self.meter.level())
        self.phase = "forward"  # fetching the next step's inputs
        self.step += 1

    def close(self) -> None:
        """The run is over; what comes after it is not noted."""
        if not self._closed:
            self._note(self.phase, self.meter.read())
            self._note(self.phase, self.meter.level())
        self._closed = True

    def _note(self, phase: str, found: dict[str, int]) -> None:
        known = self.peaks.setdefault(phase, {})
        for name, value in found.items():
            known[name] = max(known.get(name, 0), value)


# -- the process -------------------------------------------------------------------------------------------------------


def main(folder: str) -> int:
    """Run the job of a folder; return 0 if there is a record, whatever it says."""
    with_its_parent()
    os.chdir(folder)
    job = json.loads(Path("job.json").read_text(encoding="utf-8"))
    if job["device"] == "cuda":
        _be_alone_on_one_gpu()
    record: dict[str, Any] = {"status": "ok", "message": "", "versions": versions(), "machine": machine()}
    recorders: list[Recorder] = []
    started = time.perf_counter()
    try:
        _run(job, record, recorders)
    except BaseException as error:  # a run that dies is a result
        record |= _failure(error)
    if recorders:
        with contextlib.suppress(Exception):
            recorders[0].close()
        record |= {"phases": recorders[0].peaks, "step_seconds": recorders[0].seconds}
    record["seconds"] = time.perf_counter() - started
    partial = Path("record.partial")
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.replace("record.json")
    sys.stdout.flush()
    os._exit(0)  # engines leave threads and groups behind that nobody needs to wait for


def with_its_parent() -> None:
    """Have the kernel kill this process when its parent dies, or a run whose session is its own would go on without."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _failure(error: BaseException) -> dict[str, Any]:
    name = type(error).__name__
    text = str(error).lower()
    died = name in ("OutOfMemoryError", "MemoryError") or any(words in text for words in OUT_OF_MEMORY)
    places = [f"{Path(each.filename).name}:{each.lineno}" for each in traceback.extract_tb(error.__traceback__)[-4:]]
    message = f"{name}: {str(error).strip()[:2000]}"
    return {"status": "out-of-memory" if died else "failed", "message": message, "where": places}


def _run(job: dict[str, Any], record: dict[str, Any], recorders: list[Recorder]) -> None:
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path.cwd()))
    on_gpu = job["device"] == "cuda"
    # The context comes before all else, or a library that makes it would hide what it takes.
    meter: Meter = _cuda_meter(job, record) if on_gpu else _cpu_meter(job["snapshot"])
    if job["ranks"] > 1 or job["engine"] != "single":
        become_rank_zero(job)
    import torch

    train: Any = importlib.import_module("train")
    train.check = lambda _: None  # what does not fit is to be seen
    train.RandomData = padded(train.RandomData)
    transformers = train.transformers  # which need not be what an import finds here: it puts itself in its own place
    arguments = json.loads(Path("training_args.json").read_text(encoding="utf-8"))
    arguments |= _arguments(job)
    transformers.set_seed(0)
    recorder = Recorder(meter)
    recorders.append(recorder)
    model_class = getattr(transformers, arguments["model_class"])
    if job["pretrained"]:
        save_checkpoint(model_class, job)
        arguments["model_name_or_path"] = "checkpoint"
    else:
        model_class.from_pretrained = functools.partial(random_model, model_class, job, meter)
    if on_gpu and job["cap"] is not None:
        be_smaller(job["cap"], job["outside"], record)
    transformers.Trainer = _watched(transformers.Trainer, recorder)
    tracked: Any = getattr(meter, "tracker", None) or contextlib.nullcontext()
    gc.collect()
    if job["snapshot"] and on_gpu:
        torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python")
    try:
        with tracked:
            meter.start()
            trainer = train.main(arguments)
            recorder.close()
    finally:  # of a run that dies too
        if job["snapshot"]:
            with contextlib.suppress(Exception):  # why it died is what is to be told
                history = torch.cuda.memory._snapshot() if on_gpu else None
                record["blocks"] = tracked_blocks(tracked.events) if history is None else blocks_at_peak(history)
    record["ran"] = _facts(trainer) | {"skipped_steps": recorder.skipped}
    record["losses"] = losses(trainer.state.log_history)


def _arguments(job: dict[str, Any]) -> dict[str, Any]:
    """What a measured run has in place of the user's."""
    values: dict[str, Any] = {
        "output_dir": "output",
        "dataset": None,
        "max_steps": job["steps"],
        "logging_steps": 1,
        "save_strategy": "steps" if job["save"] else "no",
        "save_steps": job["steps"],
        "report_to": [],
        "disable_tqdm": True,
        "learning_rate": 1e-6,  # from random weights: nothing shall overflow
    }
    if job["device"] == "cpu":
        values |= {"use_cpu": True, "dataloader_pin_memory": False}
    if job["evaluates"]:
        values |= {"eval_strategy": "steps", "eval_steps": job["steps"]}
    return values


def padded(data_class: Any) -> Any:
    """Rows whose mask hides something: one of ones alone makes no difference, and transformers drops it
    (masking_utils.py, ``_ignore_causal_mask_sdpa``, ``_ignore_bidirectional_mask_sdpa``).
    """

    class Padded(data_class):  # type: ignore[misc]
        def __getitem__(self, index: int) -> dict[str, Any]:
            row: dict[str, Any] = super().__getitem__(index)
            if "attention_mask" in row:
                row["attention_mask"][-1] = 0
            return row

    return Padded


def become_rank_zero(job: dict[str, Any]) -> None:
    """Be the first of ``ranks`` that are not there: the environment that a launcher sets, and a group without them."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    per_node = str(job["ranks"] // job["nodes"])
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(job["ranks"]),
        "LOCAL_WORLD_SIZE": per_node,
        "LOCAL_SIZE": per_node,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29511",
    }
    if Path("accelerate.yaml").exists():
        os.environ |= launched_by_accelerate()
    on_cpu = job["device"] == "cpu"
    if on_cpu:
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=job["ranks"])
    from accelerate import DistributedType, PartialState

    # It would ask a real backend for what this group has not; and CPU ranks would not get FSDP.
    kind = DistributedType.MULTI_CPU if on_cpu and job["engine"] == "ddp" else DistributedType.MULTI_GPU
    PartialState._prepare_backend = lambda *_, **__: ("fake", kind)
    if job["engine"] == "ddp":
        _let_ddp_reduce_alone()
    if job["engine"].startswith("zero"):
        if on_cpu:  # collectives of DeepSpeed's own, which it would compile and which wait for the other ranks
            importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
        importlib.import_module("deepspeed").init_distributed()


def _let_ddp_reduce_alone() -> None:
    """A bucket is reduced as soon as it is asked for; of the group that is not there DDP would get no result."""
    import torch

    ddp = torch.nn.parallel.DistributedDataParallel
    init = ddp.__init__

    def reduced(_: Any, bucket: Any) -> Any:
        result = torch.futures.Future()  # type: ignore[var-annotated]
        result.set_result(bucket.buffer())
        return result

    reduced.__annotations__.clear()  # or DDP wants them to name its own types

    def with_hook(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.register_comm_hook(None, reduced)

    ddp.__init__ = with_hook  # type: ignore[method-assign]


def launched_by_accelerate() -> dict[str, str]:
    """What ``accelerate launch --config_file accelerate.yaml`` adds to its script's environment."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch.launch_command_parser().parse_args(["--config_file", "accelerate.yaml", "train.py"])
    arguments, *_ = launch._validate_launch_command(arguments)
    kept = dict(os.environ)
    found = prepare_multi_gpu_env(arguments)
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in found.items() if kept.get(name) != value and name not in own}


def random_model(model_class: Any, job: dict[str, Any], meter: Meter, _: str, **options: Any) -> Any:
    """What ``from_pretrained`` would return, with random weights; what making them took is forgotten."""
    import torch
    import transformers

    from memplan.introspect.trace import untie_head

    config = transformers.AutoConfig.for_model(**job["config"])
    dtype = options.pop("dtype")
    if dtype == "auto":
        dtype = job["dtype"]
    # On a CPU billions of weights take minutes; what is not touched here takes no memory either.
    on_gpu = job["device"] == "cuda"
    with _not_initialized() if on_gpu else contextlib.nullcontext():
        model = model_class.from_config(config, dtype=getattr(torch, dtype), **options)
    model.tie_weights()  # which is a part of what was left out
    untie_head(model, job["config"])
    if on_gpu:
        if job["engine"] in ("single", "ddp"):
            model.memplan_draws = list(model.parameters())  # once the Trainer has moved them
        else:
            for parameter in model.parameters():
                _fill(parameter)
        torch.cuda.empty_cache()
    meter.start()
    return model


def _not_initialized() -> Any:
    """Models are made without drawing their weights; where transformers had that before version 5, from there."""
    for module in ("transformers.initialization", "transformers.modeling_utils"):
        with contextlib.suppress(ImportError, AttributeError):
            return importlib.import_module(module).no_init_weights()
    return contextlib.nullcontext()


def save_checkpoint(model_class: Any, job: dict[str, Any]) -> None:
    """Write random weights, for ``from_pretrained`` to load."""
    import torch
    import transformers

    from memplan.introspect.trace import untie_head

    config = transformers.AutoConfig.for_model(**job["config"])
    with torch.device(job["device"]):
        model = model_class.from_config(config, dtype=getattr(torch, job["dtype"]))
    untie_head(model, job["config"])
    model.save_pretrained("checkpoint")
    del model
    gc.collect()
    if job["device"] == "cuda":
        torch.cuda.empty_cache()


def _fill(parameter: Any) -> None:
    """Draw a weight on the GPU, whether it is whole or ZeRO-3 has its shard alone; weights of norms are 1."""
    import torch

    target = getattr(parameter, "ds_tensor", parameter).data
    drawn = target if target.is_cuda else torch.empty(target.shape, dtype=target.dtype, device="cuda")
    if parameter.ndim == 1 and not hasattr(parameter, "ds_tensor"):
        drawn.fill_(1)
    else:
        drawn.normal_(std=WEIGHT_SCALE)
    if drawn is not target:
        target.copy_(drawn)


def _watched(trainer_class: Any, recorder: Recorder) -> Any:
    """The Trainer, which tells the recorder what it does."""
    import transformers

    trainer: list[Any] = []

    class Steps(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            recorder.begin_step()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            with contextlib.suppress(AttributeError):  # not every optimizer of DeepSpeed has an overflow
                recorder.skipped += trainer[0].accelerator.optimizer_step_was_skipped
            recorder.end_step()

    class Watched(trainer_class):  # type: ignore[misc]
        def __init__(self, *args: Any, model: Any, **kwargs: Any) -> None:
            recorder.meter.adopt([*model.parameters(), *model.buffers()])  # those of a file are mapped, not made
            _mark_loss(model, recorder)
            super().__init__(*args, model=model, **kwargs)
            _draw(model)
            trainer.append(self)
            self.add_callback(Steps())

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            if recorder.phase == "load":  # inputs are of the step
                recorder.within_step("forward")
            with recorder.meter.on_host():
                found = super().get_batch_samples(*args, **kwargs)
            recorder.meter.adopt([tensor for batch in found[0] for tensor in batch.values()])
            return found

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.is_deepspeed_enabled and "step" not in vars(self.deepspeed):
                # The engine steps within what the Trainer takes for the backward.
                self.deepspeed.step = _before(self.deepspeed.step, lambda: recorder.within_step("step"))
            recorder.within_step("forward")
            loss = super().training_step(*args, **kwargs)
            if not self.is_deepspeed_enabled and self.accelerator.sync_gradients:
                recorder.within_step("step")
            return loss

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if self.model.training:
                recorder.within_step("backward")
            return loss

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            recorder.enter("eval")
            return super().evaluate(*args, **kwargs)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            recorder.enter("save")
            super()._save_checkpoint(*args, **kwargs)

    return Watched


def _draw(model: Any) -> None:
    """Draw the weights that :func:`random_model` has left, of the model itself or of what peft has wrapped."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    there = {id(parameter) for parameter in model.parameters()}
    for parameter in vars(base).pop("memplan_draws", ()):
        if id(parameter) in there:
            _fill(parameter)


def _mark_loss(model: Any, recorder: Recorder) -> None:
    """Tell when the loss begins, of models that have transformers' loss functions."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(type(base), "loss_function"):
        base.loss_function = _before(
            base.loss_function, lambda: recorder.within_step("loss") if base.training else None
        )


def _before(function: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        act()
        return function(*args, **kwargs)

    return call


# -- the device --------------------------------------------------------------------------------------------------------


def _cpu_meter(events: bool) -> CpuMeter:
    from memplan.introspect.trace import real_tracker

    return CpuMeter(real_tracker(events))


def _cuda_meter(job: dict[str, Any], record: dict[str, Any]) -> CudaMeter:
    """Make the context, one piece after the other, and note what each takes outside of torch's allocator."""
    import torch

    from memplan.introspect.nvml import Driver
    from memplan.introspect.probe import small_step

    driver = Driver()
    before, others = driver.used(), driver.processes()
    if job["alloc_conf"] is not None:
        use_allocator(job["alloc_conf"])
    torch.cuda.init()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    processes = driver.processes() or {}
    told = os.getpid() in processes
    outside = {"context": processes[os.getpid()] if told else driver.used() - before}
    elsewhere = used_by_cuda() - outside["context"]
    properties = torch.cuda.get_device_properties(0)
    record["device"] = {
        "name": properties.name,
        "total_memory": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": driver.version(),
        "used_before": before,
        "other_processes": None if others is None else len(others),
        "counted": "process" if told else "difference",
    }
    record["versions"] |= cuda_versions()
    meter = CudaMeter(elsewhere, driver if told else None)

    def beside() -> int:
        torch.cuda.synchronize()
        return meter.level()["device"] - torch.cuda.memory_reserved()

    one = torch.ones((64, 64), device="cuda", dtype=torch.bfloat16)
    one + one
    outside["first_kernel"] = beside() - outside["context"]
    one @ one
    outside["first_matmul"] = beside() - outside["context"] - outside["first_kernel"]
    del one
    small_step()  # whose kernels most runs load
    gc.collect()
    outside["small_step"] = beside() - sum(outside.values())
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    record["outside"] = outside
    return meter


def _be_alone_on_one_gpu() -> None:
    """Of several GPUs the first is seen, or the Trainer would use them all; and torch's allocator has its defaults."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    for name in ALLOCATOR_VARIABLES:
        os.environ.pop(name, None)


def use_allocator(settings: str) -> None:
    """What PYTORCH_ALLOC_CONF would do, also where torch has been imported before."""
    import torch

    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = settings
    if hasattr(torch._C, "_accelerator_setAllocatorSettings"):
        torch._C._accelerator_setAllocatorSettings(settings)
    else:
        torch.cuda.memory._set_allocator_settings(settings)


def be_smaller(cap: int, outside: int | None, record: dict[str, Any]) -> None:
    """Leave torch's allocator what a smaller GPU would: it has as much less; what is outside of it stays."""
    import torch

    if outside is None:
        outside = sum(record["outside"].values())
    fraction = max(0, cap - outside) / record["device"]["total_memory"]
    torch.cuda.set_per_process_memory_fraction(min(fraction, 1.0))
    record["cap"] = cap


def used_by_cuda() -> int:
    """Bytes of the GPU that are in use, by whomever, as CUDA tells within a context."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def cuda_versions() -> dict[str, str]:
    """What torch was built with and has loaded, by the names of :class:`~memplan.specs.software.SoftwareSpec`."""
    import torch

    found = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    number = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    if number:
        major, rest = divmod(number, 10_000) if number >= 90_000 else divmod(number, 1_000)  # as in cudnn_version.h
        found["cudnn"] = f"{major}.{rest // 100}.{rest % 100}"
    with contextlib.suppress(Exception):
        numbers: Any = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        found["nccl"] = ".".join(map(str, numbers))
    return found


def resident(which: str = "current") -> int:
    """Bytes of this process in the host's memory: now, or at their ``peak`` since that was asked for the last time."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").split("\n"):
            name, _, value = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                found[name] = int(value.split()[0]) * 1024
    if which == "peak":
        try:  # proc(5), clear_refs: 5 resets the high water mark
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:  # what the mark says may be of long ago
            return found.get("VmRSS", 0)
        return found.get("VmHWM", found.get("VmRSS", 0))
    return found.get("VmRSS", 0)


def blocks_at_peak(snapshot: dict[str, Any]) -> list[list[Any]]:
    """The blocks alive when most was allocated: [bytes, how many, where], the largest sums first.

    ``snapshot`` is torch.cuda.memory._snapshot()'s; its trace has what was asked for, of which blocks are multiples of
    512 bytes (CUDACachingAllocator.cpp, ``record_trace`` and ``kMinBlockSize``).
    """
    events = [
        Event(event["action"] == "alloc", event["addr"], (event["size"] + 511) & -512, _site(event.get("frames", ())))
        for event in snapshot["device_traces"][0]
        if event["action"] in ("alloc", "free_completed")
    ]
    return alive_at_peak(events)


def tracked_blocks(events: list[Any]) -> list[list[Any]]:
    """As :func:`blocks_at_peak`, of the events of :func:`~memplan.introspect.trace.real_tracker`."""
    return alive_at_peak(
        [Event(each.kind == "alloc", each.storage, each.bytes, each.where or each.op) for each in events]
    )


class Event(NamedTuple):
    """A block is taken or given back."""

    is_taken: bool
    block: int
    nbytes: int
    site: str


def alive_at_peak(events: Sequence[Event]) -> list[list[Any]]:
    """What is alive after the event that leaves the most: [bytes, how many, where], the largest sums first."""
    level = peak = moment = 0
    sizes: dict[int, int] = {}  # what was there before the first event is not known
    for number, event in enumerate(events):
        if event.is_taken:
            sizes[event.block] = event.nbytes
            level += event.nbytes
        else:
            level -= sizes.pop(event.block, 0)
        if level > peak:
            peak, moment = level, number
    alive: dict[int, tuple[int, str]] = {}
    for event in events[: moment + 1]:
        if event.is_taken:
            alive[event.block] = (event.nbytes, event.site)
        else:
            alive.pop(event.block, None)
    rows = [[size, count, site] for (size, site), count in Counter(alive.values()).items()]
    return sorted(rows, key=lambda row: -row[0] * row[1])


def _site(frames: Any) -> str:
    """The innermost frame of a library that trains."""
    for frame in frames:
        for library in ("/transformers/", "/deepspeed/", "/accelerate/", "/peft/", "/torch/optim/", "/bitsandbytes/"):
            if library in frame["filename"]:
                file = library[1:] + frame["filename"].rsplit(library, 1)[1]
                return f"{file}:{frame['line']} {frame['name']}"
    return frames[0]["name"] if frames else "no line of Python: autograd's thread"


def losses(history: Sequence[dict[str, Any]]) -> list[float | None]:
    """Of each step; None of one that is no number, which JSON does not have."""
    found = [float(entry["loss"]) for entry in history if "loss" in entry]
    return [loss if math.isfinite(loss) else None for loss in found]


def _facts(trainer: Any) -> dict[str, Any]:
    """What ran: the engine, and the optimizer with what wraps it, outermost first."""
    optimizers: list[Any] = []
    wrapper = trainer.optimizer
    while wrapper is not None and wrapper not in optimizers:
        optimizers.append(wrapper)
        wrapper = getattr(wrapper, "optimizer", None)
    return {
        "engine": type(trainer.model_wrapped).__name__,
        "optimizer": [type(each).__name__ for each in optimizers],
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters()),
        "attention": getattr(trainer.model.config, "_attn_implementation", None),
    }


def versions() -> dict[str, str]:
    """Versions of the libraries that are installed."""
    found: dict[str, str] = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """The host."""
    deciding = {name: value for name, value in os.environ.items() if name.startswith(DECIDING_VARIABLES)}
    return {"system": platform.platform(), "processors": os.cpu_count(), "environment": deciding}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
