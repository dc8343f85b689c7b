"""The measurement campaign: the setups of campaign.json, on the GPU that is there, one after the other.

    python benchmarks/campaign.py --out benchmarks/measurements/h200-2026-11 --seconds 540

Every run is a line of rows.jsonl as soon as it is done; what is there is not run again, so that the campaign may be cut
at any time and taken up later. The list has the cheapest information first. A third of it, drawn by chance when a row
came in, is marked ``holdout`` and stays so: rules are not made from those.

    python benchmarks/campaign.py --extend    adds to campaign.json what rows() has and the list has not
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memplan import measuring
from memplan.errors import MemplanError
from memplan.introspect import worker
from memplan.units import GiB

LIST = Path(__file__).with_name("campaign.json")
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
    row: dict[str, Any] = {"model": model, "training": training}
    if gpus > 1:
        row["gpus"] = gpus
    return row if strategy is None else row | {"strategy": strategy}


def _families() -> Iterator[dict[str, Any]]:
    for variant in (
        {**PRECISIONS["autocast"], "micro_batch_size": 2},
        {**PRECISIONS["bf16"], "micro_batch_size": 4, **CHECKPOINTED},
        {**PRECISIONS["fp32"], "micro_batch_size": 1, "attn": "eager"},
        {**PRECISIONS["fp16"], "micro_batch_size": 2, "packed": False},
        {**PRECISIONS["autocast"], "micro_batch_size": 8, **CHECKPOINTED, "grad_accum_steps": 2},
    ):
        for model, length in FAMILIES.items():
            images = "vit" in model
            kept = {name: value for name, value in variant.items() if not (images and name == "packed")}
            if images:
                kept["micro_batch_size"] *= 16
            yield _row(model, seq_len=length, **kept)


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
    yield _row(SMALL, **autocast, seq_len=512, eval_batch_size=8)
    yield _row(SMALL, **autocast, seq_len=512, eval_batch_size=2, eval_accumulation_steps=4)
    yield _row("google-bert/bert-base-uncased", **autocast, seq_len=512, micro_batch_size=16, packed=False)


def _engines() -> Iterator[dict[str, Any]]:
    for ranks in (8, 2, 64, 1):
        for kind, offloads in (
            ("zero2", {}), ("zero3", {}), ("fsdp", {}), ("zero1", {}),
            ("zero2", {"offload_optimizer": "cpu"}), ("zero3", {"offload_optimizer": "cpu", "offload_param": "cpu"}),
            ("fsdp", {"offload_param": "cpu"}),
        ):  # fmt: skip
            strategy = {"kind": kind, **offloads}
            yield _row(MIDDLE, ranks, strategy, seq_len=1024, micro_batch_size=2)
            if ranks in (8, 2):
                yield _row(SMALL, ranks, strategy, seq_len=2048, **CHECKPOINTED, grad_accum_steps=2)
    for model in (SMALL, MIDDLE):
        for ranks in (2, 8):
            yield _row(model, ranks, {"kind": "ddp"}, seq_len=1024)
    for kind in ("zero2", "zero3"):
        yield _row(MIDDLE, 8, {"kind": kind}, seq_len=1024, mixed_precision="fp16")
        yield _row(MIDDLE, 8, {"kind": kind}, seq_len=1024, lora={"rank": 16})
        small = {"reduce_bucket_size": 10_000_000, "allgather_bucket_size": 10_000_000}
        yield _row(MIDDLE, 8, {"kind": kind, "zero": small}, seq_len=1024)


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
    return json.dumps({name: value for name, value in row.items() if name != "holdout"}, sort_keys=True)


def load() -> list[dict[str, Any]]:
    """Return the rows of the list."""
    found: list[dict[str, Any]] = json.loads(LIST.read_text(encoding="utf-8"))
    return found


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

    def __init__(self, folder: Path, log: Path) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
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


def preload() -> None:
    """Import what runs need, without a CUDA context, which a copy of this process could not use."""
    os.environ |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in ("torch", "transformers", "transformers.trainer", "accelerate", "peft", "deepspeed"):
        try:
            __import__(name)
        except ImportError as error:
            sys.stderr.write(f"{name}: {error}\n")


def measured(row: dict[str, Any], timeout: float, gpu: str | None = None) -> dict[str, Any]:
    """Run a row, and return what is archived of it."""
    cluster: dict[str, Any] = {"gpus": row.get("gpus", 1)} | ({"gpu": gpu} if gpu else {})
    options: dict[str, Any] = {"timeout": timeout, "start": Forked}
    if "cap" in row:
        options["cap"] = row["cap"] * GiB
    specs = (row["model"], row["training"], cluster, row.get("strategy"))
    try:
        if "boundary" in row:
            return {"boundary": measuring.measure_boundary(*specs, boundary=row["boundary"], **options).to_dict()}
        return {"measurement": measuring.measure(*specs, **options).measurement.to_dict()}
    except MemplanError as error:
        return {"refused": str(error)}


def run(out: Path, seconds: float, timeout: float, gpu: str | None, only: str) -> int:
    """Run what ``out`` lacks, until the time is up; return how many rows were run."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "rows.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = {key(json.loads(line)["row"]) for line in lines}
    started, number = time.monotonic(), 0
    with path.open("a", encoding="utf-8") as file:
        for row in load():
            if key(row) in done or only not in key(row):
                continue
            left = seconds - (time.monotonic() - started)
            if left <= 0:
                break
            began = time.monotonic()
            found = measured(row, min(timeout, left), gpu)
            if time.monotonic() - started >= seconds and found.get("measurement", {}).get("status") == "failed":
                break  # it was cut short
            file.write(json.dumps({"row": row, **found}) + "\n")
            file.flush()
            os.fsync(file.fileno())
            number += 1
            said = found.get("refused") or found.get("measurement", {}).get("message") or "measured"
            sys.stdout.write(f"{time.monotonic() - began:5.1f} s {key(row)}: {str(said)[:300]}\n")
            sys.stdout.flush()
    return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the archive")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--timeout", type=float, default=120, help="of one run, in seconds")
    parser.add_argument("--gpu", help="as in memplan measure: this machine's, unless it is cpu")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose key contains it")
    parser.add_argument("--extend", action="store_true", help="add rows to the list")
    options = parser.parse_args()
    if options.extend:
        extend()
        return 0
    if options.out is None:
        parser.error("give --out or --extend")
    preload()
    run(options.out, options.seconds, options.timeout, options.gpu, options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
