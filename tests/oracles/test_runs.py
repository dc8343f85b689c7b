"""O3: the written folder is run, unchanged, by `bash launch.sh --smoke` on 2 CPU ranks, under the planned engine.

Each run starts 2 processes and their launcher, 10 to 20 s on 2 cores: a run per engine always, and of the others a
sample. ``MEMPLAN_ALL_RUNS=1`` runs them all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.oracles import nvme

from memplan.case import model_spec
from memplan.catalog.gpus import find_gpu
from memplan.configs.launch import files, read, write
from memplan.estimator import estimate
from memplan.specs.hardware import ClusterSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import FsdpSpec, OffloadParamSpec, Strategy, ZeroSpec
from memplan.specs.training import TrainingSpec

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
TIMEOUT = 300
"""Seconds for a run on a busy machine."""
COMPILING = 1200
"""Seconds with DeepSpeed's aio to be compiled first."""
# torch's optimizer: DeepSpeedCPUAdam is compiled first, for minutes.
TORCH = {"zero_force_ds_cpu_optimizer": False, "reduce_bucket_size": 1_000_000}
ZERO = ["DeepSpeedOptimizerWrapper", "DeepSpeedZeroOptimizer", "AdamW"]
ZERO_3 = ["DeepSpeedOptimizerWrapper", "DeepSpeedZeroOptimizer_Stage3", "AdamW"]
PLAIN = ["AcceleratedOptimizer", "AdamW"]


@dataclass(frozen=True)
class Run:
    """A setup, and what has to run."""

    strategy: Strategy
    engine: str
    optimizer: list[str]
    training: dict[str, Any] = field(default_factory=dict)
    model: str = "meta-llama/Llama-2-7b"
    gpu: str = "A100-80GB"
    replaced: tuple[str, ...] = ()
    always: bool = False


def zero(stage: int, optimizer: str = "none", param: str = "none", **keys: Any) -> Strategy:
    return Strategy(
        kind=f"zero{stage}", offload_optimizer=optimizer, offload_param=param, zero=ZeroSpec(**TORCH, **keys)
    )


ON_NVME = {"sub_group_size": 1_000_000, "offload_param": OffloadParamSpec(buffer_size=2_000_000)}
NOT_SAVED = "FSDP1 cannot gather the model on CPU, so it is not saved"
RUNS: dict[str, Run] = {
    "single": Run(Strategy(), "LlamaForCausalLM", PLAIN, {"gradient_checkpointing": True}),
    "ddp": Run(Strategy(kind="ddp"), "DistributedDataParallel", PLAIN, {"grad_accum_steps": 2}, always=True),
    "zero0": Run(zero(0), "DeepSpeedEngine", ["DeepSpeedOptimizerWrapper", "FP16_UnfusedOptimizer", "AdamW"]),
    "zero1": Run(zero(1), "DeepSpeedEngine", ZERO, {"optim": "adamw_torch"}),
    "zero2": Run(zero(2), "DeepSpeedEngine", ZERO, {"grad_accum_steps": 2}),
    "zero2 optimizer on cpu": Run(zero(2, "cpu"), "DeepSpeedEngine", ZERO, always=True),
    "zero3": Run(zero(3), "DeepSpeedEngine", ZERO_3, {"gradient_checkpointing": True}),
    "zero3 parameters on cpu": Run(zero(3, "none", "cpu"), "DeepSpeedEngine", ZERO_3),
    "zero3 all on cpu": Run(zero(3, "cpu", "cpu"), "DeepSpeedEngine", ZERO_3, always=True),
    "fsdp2": Run(Strategy(kind="fsdp"), "FSDPLlamaForCausalLM", PLAIN, always=True),
    "fsdp2 on cpu": Run(
        Strategy(kind="fsdp", offload_param="cpu"), "FSDPLlamaForCausalLM", PLAIN, {"gradient_checkpointing": True}
    ),
    "fsdp2 with its own checkpointing": Run(
        Strategy(kind="fsdp", fsdp=FsdpSpec(activation_checkpointing=True)), "FSDPLlamaForCausalLM", PLAIN
    ),
    "fsdp1": Run(
        Strategy(kind="fsdp", fsdp=FsdpSpec(version=1)), "FullyShardedDataParallel", PLAIN, replaced=(NOT_SAVED,)
    ),
    "fsdp1 on cpu": Run(
        Strategy(kind="fsdp", offload_param="cpu", fsdp=FsdpSpec(version=1)), "FullyShardedDataParallel", PLAIN,
        replaced=(NOT_SAVED,),
    ),
    "lora under fsdp2": Run(Strategy(kind="fsdp"), "FSDPPeftModel", PLAIN, {"lora": 8}),
    "lora": Run(
        Strategy(kind="ddp"), "DistributedDataParallel", PLAIN, {"lora": 8, "gradient_checkpointing": True}
    ),
    "lora under zero3": Run(zero(3), "DeepSpeedEngine", ZERO_3, {"lora": 8}, always=True),
    "fp16": Run(
        zero(2), "DeepSpeedEngine", ZERO, gpu="T4",
        replaced=('fp16: true -> false', 'bf16: false -> true', 'dtype: "float16" -> "bfloat16"'),
    ),
    "evaluation": Run(
        Strategy(kind="ddp"), "DistributedDataParallel", PLAIN,
        {"eval_batch_size": 2, "eval_accumulation_steps": 1, "packed": False},
    ),
    "gpt2": Run(
        zero(2), "DeepSpeedEngine", ZERO,
        {"head": "sequence-classification", "micro_batch_size": 2, "packed": False}, model="openai-community/gpt2",
    ),
    "t5": Run(Strategy(kind="ddp"), "DistributedDataParallel", PLAIN, model="google-t5/t5-small"),
    "vit": Run(
        Strategy(kind="ddp"), "DistributedDataParallel", PLAIN, {"head": "image-classification"},
        model="google/vit-base-patch16-224",
    ),
    "masked": Run(zero(2), "DeepSpeedEngine", ZERO, {"packed": False}, model="google-bert/bert-base-uncased"),
    "bert": Run(
        Strategy(kind="ddp"), "DistributedDataParallel", PLAIN, {"head": "sequence-classification", "packed": False},
        model="google-bert/bert-base-uncased",
    ),
}  # fmt: skip
SEED, SAMPLE = 20, 4


def chosen() -> list[str]:
    others = [name for name, run in RUNS.items() if not run.always]
    sample = others if os.environ.get("MEMPLAN_ALL_RUNS") else random.Random(SEED).sample(others, SAMPLE)
    return [name for name, run in RUNS.items() if run.always or name in sample]


def setup_of(run: Run, nvme_path: str | None = None) -> tuple[Any, TrainingSpec, ClusterSpec, Strategy, SoftwareSpec]:
    ranks = 1 if run.strategy.kind == "single" else 2
    cluster = ClusterSpec(gpu=find_gpu(run.gpu), gpus=ranks, nvme_path=nvme_path)
    training = TrainingSpec(**{"seq_len": 32, **run.training})
    return model_spec(run.model), training, cluster, run.strategy, SoftwareSpec()


def rehearse(run: Run, folder: Path, timeout: float = TIMEOUT, **environment: str) -> dict[str, Any]:
    """Write the folder, run it, and return its smoke.json."""
    write(files(*setup_of(run, str(folder / "nvme"))), folder / "plan")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_", "DS_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kept |= {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MASTER_PORT": port, **environment}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR"):
        kept.pop(name, None)
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "launch.sh", "--smoke"],
            cwd=folder / "plan", env=kept, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = -1
        if status != 0:  # its ranks too, if there are any left
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert status == 0, log.read_text()[-6000:]
    report: dict[str, Any] = json.loads((folder / "plan" / "smoke.json").read_text())
    return report


def check(run: Run, report: dict[str, Any]) -> None:
    strategy = run.strategy
    assert report["engine"] == run.engine
    assert report["optimizer"] == run.optimizer
    assert report["ranks"] == (1 if strategy.kind == "single" else 2)
    assert report["device"].startswith("cpu")
    assert report.get("stage") == strategy.zero_stage
    if strategy.is_deepspeed:
        assert report["offload_optimizer"] == strategy.offload_optimizer
    if strategy.shards:
        assert report["offload_param"] == strategy.offload_param
    if strategy.kind == "fsdp":
        assert report["fsdp_version"] == strategy.fsdp.version
    assert report["replaced"] == list(run.replaced)
    assert len(report["losses"]) == 3
    assert all(map(math.isfinite, report["losses"]))


@pytest.mark.oracle
@pytest.mark.parametrize("name", chosen())
def test_what_is_written_runs_as_planned(name: str, tmp_path: Path) -> None:
    check(RUNS[name], rehearse(RUNS[name], tmp_path))


@pytest.mark.oracle
@pytest.mark.skipif(nvme.unavailable() is not None, reason=str(nvme.unavailable()))
def test_what_is_on_nvme_runs_as_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(zero(3, "nvme", "nvme", **ON_NVME), "DeepSpeedEngine", ZERO_3)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    nvme.prepare()
    libraries = sorted({str(path.parent) for path in (nvme._unpacked() or Path("/nonexistent")).rglob("libaio.so*")})
    known = os.environ.get("LD_LIBRARY_PATH", "")
    path = os.pathsep.join([*libraries, known]).strip(os.pathsep)
    check(run, rehearse(run, tmp_path, COMPILING, LD_LIBRARY_PATH=path))
    swapped = [path.relative_to(tmp_path / "nvme" / "zero_stage_3") for path in (tmp_path / "nvme").rglob("*.swp")]
    assert {path.parts[:2] for path in swapped} == {
        (kind, rank) for kind in ("bfloat16params", "optimizer") for rank in ("rank0", "rank1")
    }


@pytest.mark.oracle
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_quantized_weights_run_as_planned(tmp_path: Path) -> None:
    run = Run(
        Strategy(kind="ddp"),
        "DistributedDataParallel",
        PLAIN,
        {"lora": 8, "quantization": "nf4-dq", "gradient_checkpointing": True},
    )
    check(run, rehearse(run, tmp_path))


@pytest.mark.parametrize("name", RUNS)
def test_what_is_written_is_estimated_as_the_setup_is(name: str, tmp_path: Path) -> None:
    model, training, cluster, strategy, software = setup_of(RUNS[name])
    write(files(model, training, cluster, strategy, software), tmp_path / "plan")
    again = read(tmp_path / "plan")
    asked, got = (
        estimate(model, each, cluster, kind, software, replay=False)
        for each, kind in ((training, strategy), (again.training, again.strategy))
    )
    level = [(phase.name, phase.allocated) for phase in asked.gpu.phases if phase.name != "save"]
    assert level == [(phase.name, phase.allocated) for phase in got.gpu.phases if phase.name != "save"]
    assert asked.host.peak <= got.host.peak  # saving gathers the model under ZeRO-3, which is not DeepSpeed's default
