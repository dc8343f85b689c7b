"""The measurement campaign: the setups of campaign.json, on the GPU that is there.

    python benchmarks/campaign.py --seconds 560 --workers 6

The archive is measurements/<gpu>-<date>, the newest of this GPU that lacks rows or a new one, unless --out names it.

Every row is a line of rows.jsonl as soon as it is done; what is there is not run again, so that the campaign may be cut
at any time and taken up later. The list has the cheapest information first. A third of it, drawn by chance when a row
came in, is marked ``holdout`` and stays so: rules are not made from those.

Every run has a process of its own, forked from this one, which has imported all that takes long. Rows marked ``alone``
come first, one after the other: their times are of a GPU that nobody shares. The others run beside each other, as many
as ``--workers`` and the GPU's memory allow; a line says how many there were at once (``alongside``).

    python benchmarks/campaign.py --extend    adds to campaign.json what rows() has and the list has not
    python benchmarks/campaign.py --plan      says what there is to be run, and in which order
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import archived

from memplan import api, measuring
from memplan.catalog.detect import detect_cluster, host_memory
from memplan.errors import MemplanError, SpecError
from memplan.introspect import worker
from memplan.introspect.measure import MachineError, Start, visible
from memplan.introspect.measurement import Measured
from memplan.introspect.nvml import Driver
from memplan.specs.hardware import GPUSpec
from memplan.units import GiB

LIST = Path(__file__).with_name("campaign.json")
MEASUREMENTS = Path(__file__).with_name("measurements")
SEED = 2026

FAMILIES = {
    "openai-community/gpt2": 1024,
    "Qwen/Qwen2.5-0.5B": 2048,
    "HuggingFaceTB/SmolLM2-360M": 2048,
    "EleutherAI/pythia-410m": 2048,
    "facebook/opt-1.3b": 1024,
    "bigscience/bloom-560m": 1024,
    "microsoft/phi-1_5": 1024,
    "google/gemma-3-270m": 1024,
    "google/gemma-2-2b": 1024,
    "tiiuae/falcon-rw-1b": 1024,
    "stabilityai/stablelm-2-1_6b": 1024,
    "EleutherAI/gpt-neo-125m": 1024,
    "bigcode/starcoderbase-1b": 1024,
    "meta-llama/Llama-3.2-1B": 2048,
    "Qwen/Qwen3-0.6B": 2048,
    "google-bert/bert-base-uncased": 512,
    "google/gemma-2b": 512,
    "google-t5/t5-base": 512,
    "google/vit-base-patch16-224": 1,
}
"""Model -> the length at which it is measured."""
PRECISIONS: dict[str, dict[str, Any]] = {
    "autocast": {"dtype": "float32", "mixed_precision": "bf16"},
    "bf16": {"dtype": "bfloat16", "mixed_precision": "no"},
    "fp32": {"dtype": "float32", "mixed_precision": "no"},
    "fp16": {"dtype": "float32", "mixed_precision": "fp16"},
}
CHECKPOINTED = {"gradient_checkpointing": True}
SMALL, MIDDLE, LARGE = "Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-2-7b"


def rows() -> Iterator[dict[str, Any]]:
    """Yield the setups, the cheapest information first."""
    yield from _families()
    yield from _options()
    yield from _engines()
    yield from _boundaries()
    yield from _large()


def _row(model: str, gpus: int = 1, strategy: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
    if "bert" in model:  # whose own head, masked-lm, needs a collator that train.py has not
        training = {"head": "sequence-classification", **training}
    row: dict[str, Any] = {"model": model, "training": training}
    if gpus > 1:
        row["gpus"] = gpus
    return row if strategy is None else row | {"strategy": strategy}


ALONE = {"alone": True}
"""Rows whose step times and device memory are to be of a GPU that nobody shares."""


def _families() -> Iterator[dict[str, Any]]:
    for number, variant in enumerate(
        (
            {**PRECISIONS["autocast"], "micro_batch_size": 2},
            {**PRECISIONS["bf16"], "micro_batch_size": 4, **CHECKPOINTED},
            {**PRECISIONS["fp32"], "micro_batch_size": 1, "attn": "eager"},
            {**PRECISIONS["fp16"], "micro_batch_size": 2, "packed": False},
            {**PRECISIONS["autocast"], "micro_batch_size": 8, **CHECKPOINTED, "grad_accum_steps": 2},
        )
    ):
        for model, length in FAMILIES.items():
            images = "vit" in model
            kept = {name: value for name, value in variant.items() if not (images and name == "packed")}
            if images:
                kept["micro_batch_size"] *= 16
            yield _row(model, seq_len=length, **kept) | (ALONE if number == 0 else {})


def _options() -> Iterator[dict[str, Any]]:
    autocast, bf16 = PRECISIONS["autocast"], PRECISIONS["bf16"]
    for length, size in ((128, 1), (512, 1), (512, 16), (2048, 4), (4096, 2), (8192, 1), (3000, 3)):
        yield _row(SMALL, **autocast, seq_len=length, micro_batch_size=size)
        yield _row(MIDDLE, **bf16, **CHECKPOINTED, seq_len=length, micro_batch_size=size)
    for optim in ("adamw_torch", "sgd", "adafactor", "adagrad", "rmsprop", "adamw_bnb_8bit", "paged_adamw_8bit"):
        yield _row(MIDDLE, **autocast, seq_len=512, optim=optim)
        yield _row(SMALL, **bf16, seq_len=512, optim=optim)
    for lora in ({"rank": 8}, {"rank": 64, "targets": ["all-linear"]}, {"rank": 16, "dropout": 0.1}):
        for precision, checkpointing in itertools.product((autocast, bf16), ({}, CHECKPOINTED)):
            yield _row(MIDDLE, **precision, **checkpointing, seq_len=1024, micro_batch_size=2, lora=lora)
    for kind in ("nf4", "nf4-dq", "int8"):
        quantized = {"lora": {"rank": 16}, "quantization": {"kind": kind}}
        for checkpointing in ({}, CHECKPOINTED):
            yield _row(MIDDLE, **bf16 | {"mixed_precision": "bf16"}, **checkpointing, seq_len=1024, **quantized)
    for conf in ("expandable_segments:True", "roundup_power2_divisions:4"):
        yield _row(SMALL, **autocast, seq_len=1500, micro_batch_size=3, alloc_conf=conf)
        yield _row(MIDDLE, **autocast, **CHECKPOINTED, seq_len=1500, micro_batch_size=3, alloc_conf=conf)
    for precision, checkpointing in itertools.product((autocast, bf16), ({}, CHECKPOINTED)):
        flash = {"attn": "flash_attention_2", "seq_len": 2048, "micro_batch_size": 2}  # where flash-attn is installed
        yield _row(MIDDLE, **precision, **checkpointing, **flash)
    yield _row(SMALL, **autocast, seq_len=512, eval_batch_size=8)
    yield _row(SMALL, **autocast, seq_len=512, eval_batch_size=2, eval_accumulation_steps=4)
    yield _row("google-bert/bert-base-uncased", **autocast, seq_len=512, micro_batch_size=16, packed=False)
    for precision, checkpointing in itertools.product((autocast, bf16), ({}, CHECKPOINTED)):
        yield _row(MIDDLE, **precision, **checkpointing, seq_len=2048, micro_batch_size=2, liger=True)
    for precision in (autocast, bf16):
        yield _row(SMALL, **precision, seq_len=512) | {"run": {"save": True, "pretrained": True}}


def _engines() -> Iterator[dict[str, Any]]:
    for ranks in (8, 2, 64, 1):
        for kind, offloads in (
            ("zero2", {}), ("zero3", {}), ("fsdp", {}), ("zero1", {}),
            ("zero2", {"offload_optimizer": "cpu"}), ("zero3", {"offload_optimizer": "cpu", "offload_param": "cpu"}),
            ("fsdp", {"offload_param": "cpu"}), ("zero0", {}),
        ):  # fmt: skip
            strategy = {"kind": kind, **offloads}
            yield _row(MIDDLE, ranks, strategy, seq_len=1024, micro_batch_size=2) | (ALONE if ranks == 8 else {})
            if ranks in (8, 2):
                yield _row(SMALL, ranks, strategy, seq_len=2048, **CHECKPOINTED, grad_accum_steps=2)
    for ranks, weights in ((2, "none"), (8, "none"), (8, "nvme")):
        swapped = {"kind": "zero3", "offload_optimizer": "nvme", "offload_param": weights}
        yield _row(SMALL, ranks, swapped, seq_len=1024)
    for model in (SMALL, MIDDLE):
        for ranks in (2, 8):
            yield _row(model, ranks, {"kind": "ddp"}, seq_len=1024)
    for kind in ("zero2", "zero3"):
        yield _row(MIDDLE, 8, {"kind": kind}, seq_len=1024, mixed_precision="fp16")
        yield _row(MIDDLE, 8, {"kind": kind}, seq_len=1024, lora={"rank": 16})
        small = {"reduce_bucket_size": 10_000_000, "allgather_bucket_size": 10_000_000}
        yield _row(MIDDLE, 8, {"kind": kind, "zero": small}, seq_len=1024)
    for kind in ("zero2", "zero3", "fsdp"):
        yield _row(SMALL, 8, {"kind": kind}, seq_len=512) | {"run": {"save": True}}


def _boundaries() -> Iterator[dict[str, Any]]:
    setups: list[tuple[str, dict[str, Any]]] = [
        (MIDDLE, {**PRECISIONS["bf16"], **CHECKPOINTED, "seq_len": 2048}),
        (SMALL, {**PRECISIONS["autocast"], "seq_len": 1024}),
        (MIDDLE, {**PRECISIONS["bf16"], "seq_len": 1024, "lora": {"rank": 16}}),
        ("openai-community/gpt2", {**PRECISIONS["autocast"], "seq_len": 512}),
        ("EleutherAI/pythia-410m", {**PRECISIONS["bf16"], "seq_len": 1024}),
        ("microsoft/phi-1_5", {**PRECISIONS["bf16"], **CHECKPOINTED, "seq_len": 1024}),
        ("google/gemma-3-270m", {**PRECISIONS["autocast"], **CHECKPOINTED, "seq_len": 1024}),
    ]
    for model, training in setups:
        for cap in (24, 16, 40, 48, 80):
            yield _row(model, **training) | {"cap": cap, "boundary": "micro-batch"}
    for cap in (24, 40, 80):
        yield _row(MIDDLE, **PRECISIONS["bf16"], **CHECKPOINTED) | {"cap": cap, "boundary": "seq-len"}
        yield _row(SMALL, **PRECISIONS["autocast"]) | {"cap": cap, "boundary": "seq-len"}


def _large() -> Iterator[dict[str, Any]]:
    bf16 = PRECISIONS["bf16"]
    yield _row(LARGE, **bf16, **CHECKPOINTED, seq_len=2048, lora={"rank": 16})
    yield _row(LARGE, **bf16, **CHECKPOINTED, seq_len=2048)
    yield _row(LARGE, **bf16, **CHECKPOINTED, seq_len=2048, lora={"rank": 64}, quantization={"kind": "nf4-dq"})
    for kind, ranks in (("zero3", 8), ("fsdp", 8), ("zero2", 8), ("zero3", 64)):
        yield _row(LARGE, ranks, {"kind": kind}, seq_len=2048, **CHECKPOINTED)
    yield _row("mistralai/Mistral-7B-v0.1", **bf16, **CHECKPOINTED, seq_len=4096, lora={"rank": 16})
    yield _row("google/gemma-2-9b", **bf16, **CHECKPOINTED, seq_len=2048, lora={"rank": 16})
    yield _row("tiiuae/falcon-7b", **bf16, **CHECKPOINTED, seq_len=2048, lora={"rank": 16})


# -- the list ----------------------------------------------------------------------------------------------------------


def key(row: dict[str, Any]) -> str:
    """A text that equal rows share."""
    return json.dumps({name: value for name, value in row.items() if name not in ("holdout", "alone")}, sort_keys=True)


def load() -> list[dict[str, Any]]:
    """Return the rows of the list."""
    try:
        found: list[dict[str, Any]] = json.loads(LIST.read_text(encoding="utf-8"))
    except ValueError:
        raise SpecError(f"{LIST}: is not JSON. Name a list of setups with --list.") from None
    if not isinstance(found, list) or not all(
        isinstance(row, dict) and {"model", "training"} <= row.keys() for row in found
    ):
        raise SpecError(f"{LIST}: is no list of rows with a model and its training. Name one with --list.")
    return found


def positive(text: str) -> int:
    """A whole number from 1 on; of none at once nothing would ever be run."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def extend() -> None:
    """Write the list: rows keep their marks, and of new ones a third is drawn."""
    marks = {key(row): row["holdout"] for row in load()} if LIST.exists() else {}
    wanted = list({key(row): row for row in rows()}.values())
    new = [key(row) for row in wanted if key(row) not in marks]
    drawn = set(random.Random(SEED + len(marks)).sample(new, round(len(new) / 3)))
    listed = [row | {"holdout": marks.get(key(row), key(row) in drawn)} for row in wanted]
    LIST.write_text("[\n" + ",\n".join(json.dumps(row) for row in listed) + "\n]\n", encoding="utf-8")


# -- running -----------------------------------------------------------------------------------------------------------


class Forked:
    """A copy of this process, which has imported what takes long: it runs the worker."""

    def __init__(self, folder: Path, log: Path, outside: int | None = None) -> None:
        """``outside`` are bytes outside of torch's allocator, which others on the GPU would hide."""
        self._code: int | None = None
        if outside is not None:
            job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
            (folder / "job.json").write_text(json.dumps(job | {"outside": outside}), encoding="utf-8")
        self.pid = os.fork()
        if self.pid == 0:
            try:
                worker.with_its_parent()
                os.setsid()
                output = os.open(log, os.O_WRONLY | os.O_CREAT)
                os.dup2(output, 1)
                os.dup2(output, 2)
                worker.main(str(folder))
            finally:
                os._exit(1)

    def wait(self, timeout: float | None = None) -> int:
        """As :meth:`subprocess.Popen.wait`."""
        until = time.monotonic() + (timeout or float("inf"))
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("worker", timeout or 0)
            time.sleep(0.05)
        assert self._code is not None
        return self._code

    def poll(self) -> int | None:
        """As :meth:`subprocess.Popen.poll`."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code


PRELOADED = ("torch", "transformers", "transformers.trainer", "accelerate", "peft", "deepspeed")
"""What takes long to import, in this order."""


def preload() -> None:
    """Import what runs need, without a CUDA context, which a copy of this process could not use."""
    os.environ |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in worker.ALLOCATOR_VARIABLES:
        os.environ.pop(name, None)
    for name in PRELOADED:
        try:
            with nullcontext() if name == "torch" else asking_the_driver():
                __import__(name)
        except Exception as error:  # a library that is broken on this machine fails its own rows only
            sys.stderr.write(f"{name}: {type(error).__name__}: {error}\n")


@contextmanager
def asking_the_driver() -> Iterator[None]:
    """Have NVML tell the compute capability: for torch's answer there has to be a context.

    bitsandbytes asks as it is imported (cuda_specs.py 0.50, ``get_compute_capabilities``), which transformers' Trainer
    does by way of peft (helpers.py 0.21).
    """
    import torch

    asked = torch.cuda.get_device_capability

    def told(device: Any = None) -> tuple[int, int]:
        with suppress(SpecError, OSError, RuntimeError):
            return Driver().capability()
        return asked(device)

    torch.cuda.get_device_capability = told
    try:
        yield
    finally:
        torch.cuda.get_device_capability = asked


def copies_reach_the_gpu() -> bool:
    """Whether a copy of this process can use the GPU: not where an import has made a context, or as much as asked."""
    pid = os.fork()
    if pid == 0:
        try:
            import torch

            torch.zeros(1, device="cuda")
            Driver().used()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"copies of this process do not reach the GPU, so that runs are slower: {error}\n")
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


COMPILED = "cpu_adam"
"""DeepSpeed's op for an offloaded optimizer."""


def compile_ahead() -> None:
    """Begin to compile, in a copy of this process, what DeepSpeed would compile within the first run that needs it.

    That takes a minute, and a run that is killed meanwhile leaves a lock for which every other would wait until it is
    killed too.
    """
    from torch.utils.cpp_extension import _get_build_directory

    lock = Path(_get_build_directory(COMPILED, verbose=False)) / "lock"
    if is_abandoned(lock):
        lock.unlink(missing_ok=True)
    if os.fork() == 0:
        try:
            worker.with_its_parent()
            from deepspeed.ops.op_builder import CPUAdamBuilder

            CPUAdamBuilder().load(verbose=False)
        except BaseException as error:  # the rows that need it will say so
            sys.stderr.write(f"{COMPILED} is not compiled: {error}\n")
        finally:
            os._exit(0)


def is_abandoned(lock: Path) -> bool:
    """Whether no process has a lock open, as torch has it as long as it compiles (utils/file_baton.py)."""
    for each in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if each.readlink() == lock.resolve():
                return False
    return True


MOST_BLOCKS = 200
"""Kinds of blocks of a snapshot that are archived, the largest sums first: the others are scalars."""


@dataclass(frozen=True)
class How:
    """How rows are run."""

    timeout: float = 120
    """Seconds of one run."""
    gpu: str | None = None
    """``cpu``, or None for this machine's."""
    start: Start | None = Forked
    workers: int = 1
    """How many rows run at once."""
    host_memory: int | None = None
    """Bytes of the host, where the kernel does not tell what there can be; None is what it tells."""
    grace: float = 25
    """Seconds after the time is up, in which what has begun may end."""
    snapshots: bool = False
    """Whether blocks at the peak are kept, so that a miss can be explained later: not of rows whose time counts."""


def specs(row: dict[str, Any], gpu: str | None) -> tuple[Any, ...]:
    """Model, training, cluster and strategy of a row."""
    cluster: dict[str, Any] = {"gpus": row.get("gpus", 1)} | ({"gpu": gpu} if gpu else {})
    if "nvme" in row.get("strategy", {}).values():
        cluster["nvme_path"] = tempfile.gettempdir()
    return row["model"], row["training"], cluster, row.get("strategy")


def measured(row: dict[str, Any], how: How) -> dict[str, Any]:
    """Run a row, and return what is archived of it, with a word on it."""
    options: dict[str, Any] = {"timeout": how.timeout, "start": how.start}
    if "cap" in row:
        options["cap"] = row["cap"] * GiB
    try:
        if "boundary" in row:
            options["steps"] = 2
            found = measuring.measure_boundary(*specs(row, how.gpu), boundary=row["boundary"], **options)
            said = f"{found.option} {found.measured} lives, {found.predicted} was predicted, {len(found.tried)} runs"
            return {"boundary": found.to_dict(), "said": said}
        options["snapshot"] = how.snapshots and not row.get("alone", False)
        result = measuring.measure(*specs(row, how.gpu), **options | row.get("run", {}))
        kept = result.measurement.to_dict()
        kept["blocks"] = kept["blocks"] and kept["blocks"][:MOST_BLOCKS]
        return {"measurement": kept, "said": in_words(result)}
    except MachineError as error:
        return {"lacking": str(error), "said": f"not here: {error}"}
    except MemplanError as error:
        return {"refused": str(error), "said": f"refused: {error}"}


def in_words(result: Measured) -> str:
    """How far off the estimate is."""
    if result.measurement.status != "ok":
        return f"{result.measurement.status}: {result.measurement.message}"
    told = ("steady_allocated", "peak_allocated", "peak_reserved", "peak_device")
    return ", ".join(f"{row.name} {row.relative or 0:+.2%}" for row in result.differences if row.name in told)


@dataclass
class Running:
    """A row that a process of its own is at."""

    row: dict[str, Any]
    pid: int
    result: Path
    began: float
    gpu: int
    """Bytes that it is expected to need."""
    host: int
    alongside: int = 0
    """The most others that ran while it did."""

    @classmethod
    def begin(cls, row: dict[str, Any], how: How, folder: Path, need: tuple[int, int]) -> Running:
        result = folder / f"{hashlib.sha256(key(row).encode()).hexdigest()[:16]}.json"
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            try:
                worker.with_its_parent()
                found = measured(row, how)
                result.with_suffix(".partial").write_text(json.dumps(found), encoding="utf-8")
                result.with_suffix(".partial").replace(result)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(0)
        return cls(row, pid, result, time.monotonic(), *need)

    def ended(self) -> bool:
        """Whether the process is gone."""
        return os.waitpid(self.pid, os.WNOHANG)[0] != 0

    def stop(self) -> None:
        """End it; what it has started ends with it."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def found(self) -> dict[str, Any] | None:
        """What it has written; None if it died before."""
        if not self.result.exists():
            return None
        found: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        self.result.unlink()
        return found


def needs(row: dict[str, Any], gpu: str | None) -> tuple[int, int]:
    """Bytes that a row may take of the GPU and of the host: generous, for it is not to disturb another."""
    model, training, cluster, strategy = specs(row, gpu)
    if "boundary" in row:
        return row["cap"] * GiB, 24 * GiB
    try:
        found = api.estimate(model, training, cluster, strategy, replay=False)
    except MemplanError:
        return 0, 0  # it will be refused
    # The model is made on the host, one copy whatever the engine, before anything moves.
    weights = 4 * found.model.parameters
    host = weights + found.host.peak // max(1, found.host.ranks) + 4 * GiB
    return int(found.gpu.peak_allocated * 1.25) + 2 * GiB, int(host)


def is_done(line: dict[str, Any], again: bool) -> bool:
    """Whether a row needs no other run; with ``again`` those that failed do."""
    failed = "refused" in line or line.get("measurement", {}).get("status") == "failed"
    return not (again and failed)


def pending(path: Path, only: str, again: bool) -> list[dict[str, Any]]:
    """Rows of the list that an archive lacks, those first that want the GPU for themselves."""
    done = {key(line["row"]) for line in archived.read(path) if is_done(line, again)}
    left = [row for row in load() if key(row) not in done and only in key(row)]
    return sorted(left, key=lambda row: not row.get("alone", False))


def run(out: Path, seconds: float, how: How, only: str = "", limit: int | None = None, again: bool = False) -> int:
    """Run what ``out`` lacks, until the time is up; return how many rows were archived.

    What this machine lacks the libraries for is not archived: another one may have them. Raises MachineError without
    a GPU, before anything is written.
    """
    visible(how.gpu or "cuda")
    path = out / "rows.jsonl"
    lines = archived.mended(path)
    waiting = pending(path, only, again)[:limit]
    out.mkdir(parents=True, exist_ok=True)
    room = (_gpu_memory(how.gpu), int((how.host_memory or host_memory() or 8 * GiB) * 0.85))
    until, running, number = time.monotonic() + seconds, list[Running](), 0
    retried: set[str] = set()
    lacking: list[str] = []
    with tempfile.TemporaryDirectory(prefix="memplan-campaign-") as folder, path.open("a", encoding="utf-8") as file:
        while waiting or running:
            now = time.monotonic()
            if now < until:
                _admit(waiting, running, how, Path(folder), room, lines)
            for each in [each for each in running if each.ended()]:
                running.remove(each)
                found = each.found() or {"refused": "its process died", "said": "its process died"}
                if _disturbed(found, each) and key(each.row) not in retried:
                    retried.add(key(each.row))
                    waiting.insert(0, {**each.row, "alone": True})
                    continue
                said = str(found.pop("said"))
                if "lacking" in found:
                    lacking.append(found["lacking"])
                    continue
                line = {"row": each.row, "alongside": each.alongside, **found}
                lines.append(line)
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
                number += 1
                sys.stdout.write(f"{time.monotonic() - each.began:5.1f} s {_short(each.row)}: {said[:200]}\n")
                sys.stdout.flush()
            if now > until + how.grace or (now > until and not running):
                break
            time.sleep(0.05)
        for each in running:  # they will be run again
            each.stop()
    left = len(pending(path, only, again))
    sys.stdout.write(f"{number} rows archived, {left} left\n")
    sys.stdout.write("".join(f"not on this machine, {n} rows: {why}\n" for why, n in Counter(lacking).items()))
    return number


def _gpu_memory(gpu: str | None) -> int:
    if gpu == "cpu":
        return 1 << 60
    here = detect_cluster()
    memory = here.gpu_memory or (here.gpu.memory_bytes if isinstance(here.gpu, GPUSpec) else 0)
    return int(memory * 0.93)


def known_outside(found: Iterable[dict[str, Any]]) -> int | None:
    """What processes alone on the GPU had of it outside of torch's allocator; None if no line tells."""
    told = [
        sum(line["measurement"]["outside"].values())
        for line in found
        if line.get("alongside") == 0 and line.get("measurement", {}).get("outside")
    ]
    return round(statistics.median(told)) if told else None


def tells_processes(found: Iterable[dict[str, Any]]) -> bool:
    """Whether the driver says what each process has, so that others hide nothing."""
    return any(line.get("measurement", {}).get("device", {}).get("counted") == "process" for line in found)


def _admit(
    waiting: list[dict[str, Any]],
    running: list[Running],
    how: How,
    folder: Path,
    room: tuple[int, int],
    lines: list[dict[str, Any]],
) -> None:
    """Begin rows for which there is room, in their order; one that runs alone waits for the others to end."""
    while waiting and len(running) < how.workers:
        row, outside = waiting[0], None
        if "cap" in row and how.workers > 1 and how.gpu != "cpu" and not tells_processes(lines):
            outside = None if how.start is None else known_outside(lines)  # a new process cannot be told
            if outside is None:
                row = {**row, "alone": True}
        if running and (row.get("alone") or running[0].row.get("alone")):
            return
        need = needs(row, how.gpu)
        used = [sum(each.gpu for each in running), sum(each.host for each in running)]
        if running and any(have + asked > most for have, asked, most in zip(used, need, room, strict=True)):
            return
        begun = how if outside is None else replace(how, start=partial(Forked, outside=outside))
        del waiting[0]
        running.append(Running.begin(row, begun, folder, need))
        for each in running:
            each.alongside = max(each.alongside, len(running) - 1)


def _disturbed(found: dict[str, Any], ran: Running) -> bool:
    """Whether a run may have died of those beside it: it is repeated alone."""
    died = found.get("measurement", {}).get("status") == "out-of-memory"
    return ran.alongside > 0 and died and "cap" not in ran.row


def _short(row: dict[str, Any]) -> str:
    """A row in a few words."""
    model = row["model"] if isinstance(row["model"], str) else row["model"].get("model_type", "?")
    words = [str(model).split("/")[-1], *(f"{name}={value}" for name, value in row.items() if name in ("cap", "gpus"))]
    words += [str(value) for value in row.get("strategy", {}).values() if isinstance(value, str)]
    training = {name: value for name, value in row["training"].items() if name not in ("dtype", "head")}
    words += [f"{name}={value}" for name, value in training.items()]
    return " ".join(words)[:110] + (" *" if row.get("holdout") else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the archive: measurements/<gpu>-<date> unless it is said")
    parser.add_argument("--list", type=Path, default=LIST, help="the setups")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so long")
    parser.add_argument("--timeout", type=float, default=120, help="of one run, in seconds")
    parser.add_argument("--workers", type=positive, default=1, help="rows that run at once")
    parser.add_argument(
        "--host-memory", type=float, metavar="GIB", help="of this machine, where it is given more as it uses it"
    )
    parser.add_argument("--limit", type=positive, help="rows to be run at most")
    parser.add_argument("--gpu", help="as in memplan measure: this machine's, unless it is cpu")
    parser.add_argument("--no-snapshots", action="store_true", help="keep no blocks at the peak")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose key contains it")
    parser.add_argument("--again", action="store_true", help="run again what has failed")
    parser.add_argument("--extend", action="store_true", help="add rows to the list")
    parser.add_argument("--plan", action="store_true", help="say what there is to be run")
    options, began = parser.parse_args(), time.monotonic()
    globals()["LIST"] = options.list
    try:
        return campaign(options, began)
    except MemplanError as error:
        sys.stderr.write(f"{error}\n")
    except OSError as error:
        name = error.filename or options.out or "the archive"  # a full disk has no name
        sys.stderr.write(f"{name}: {error.strerror}. Name another with --out or --list.\n")
    return 2


def campaign(options: argparse.Namespace, began: float) -> int:
    """Do what the command line asks. Raises MemplanError and OSError."""
    if options.extend:
        extend()
        return 0
    if options.plan:
        for row in pending(Path(options.out or "") / "rows.jsonl", options.only, options.again)[: options.limit]:
            sys.stdout.write(f"{'alone ' if row.get('alone') else ''}{_short(row)}\n")
        return 0
    visible(options.gpu or "cuda")  # before what takes long, and before anything is written
    out = options.out or folder_of(options.gpu)
    archived.read(out / "rows.jsonl")
    sys.stdout.write(f"{out}\n")
    preload()
    start = Forked if options.gpu == "cpu" or copies_reach_the_gpu() else None
    left = pending(out / "rows.jsonl", options.only, options.again)[: options.limit]
    if options.gpu != "cpu" and any("offload_optimizer" in row.get("strategy", {}) for row in left):
        compile_ahead()
    snapshots = options.gpu != "cpu" and not options.no_snapshots
    host = None if options.host_memory is None else int(options.host_memory * GiB)
    how = How(options.timeout, options.gpu, start, options.workers, host, snapshots=snapshots)
    seconds = options.seconds - (time.monotonic() - began)  # libraries took their time
    run(out, seconds, how, options.only, options.limit, options.again)
    return 0


def folder_of(gpu: str | None, within: Path | None = None) -> Path:
    """Return the newest archive of this GPU that lacks rows of the list, or a new one, ``<gpu>-<date>``."""
    here = gpu or detect_cluster().gpu
    name = re.sub(r"[^a-z0-9]+", "-", (here.name if isinstance(here, GPUSpec) else str(here)).lower()).strip("-")
    within = within or MEASUREMENTS
    date = re.compile(rf"{re.escape(name)}-\d{{4}}-\d\d-\d\d")
    for folder in sorted(within.glob(f"{name}-*"), reverse=True):
        if date.fullmatch(folder.name) and pending(folder / "rows.jsonl", "", again=False):
            return folder
    return within / f"{name}-{datetime.now(timezone.utc):%Y-%m-%d}"


if __name__ == "__main__":
    sys.exit(main())
