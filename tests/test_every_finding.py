"""Every finding that there is: files (or a script) of a run that have it, and the nearest that have not."""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, get_args

import pytest

pytest.importorskip("transformers")

import torch
import transformers
import yaml

import memplan
from memplan import answers, checks
from memplan.answers import Finding
from memplan.catalog import detect
from memplan.catalog.detect import Device
from memplan.units import MiB

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
Values: TypeAlias = dict[str, Any]
Ask: TypeAlias = Callable[[Path, pytest.MonkeyPatch], Iterable[Finding]]

AUTO: Values = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto")
DEEPSPEED: Values = {  # as transformers' documentation has it
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto", "total_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
    **AUTO,
}
ALONE: Values = {  # of deepspeed.initialize, without a Trainer
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000000},
}
ARGUMENTS: Values = {
    "model_name_or_path": "gpt2",
    "output_dir": "out",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 2e-5,
    "warmup_steps": 10,
    "bf16": True,
    "max_length": 64,
    "packing": True,
}
FSDP: Values = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "mixed_precision": "bf16",
    "num_machines": 1,
    "num_processes": 8,
    "fsdp_config": {
        "fsdp_version": 1,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_sharding_strategy": "FULL_SHARD",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_offload_params": False,
    },
}
CLUSTER: Values = {"gpu": "A100-80GB", "gpus": 2, "host_memory": "512GiB"}
LLAMA: Values = {"model_name_or_path": "meta-llama/Llama-2-7b", "gradient_checkpointing": True}
STAGE_2: Values = {"zero_optimization.stage": 2}
OFFLOADED: Values = {"optimizer": None, "scheduler": None, "zero_optimization.offload_optimizer": {"device": "cpu"}}


def changed(values: Values, changes: Values) -> Values:
    """A copy with values put at paths, as in ``bf16.enabled``; None takes away what is there."""
    found = copy.deepcopy(values)
    for path, value in changes.items():
        *sections, name = path.split(".")
        section = found
        for each in sections:
            section = section.setdefault(each, {})
        if value is None:
            section.pop(name, None)
        else:
            section[name] = value
    return found


def files(
    config: Values | str,
    *,
    deepspeed: Values | None = None,
    cluster: Values = CLUSTER,
    memory: Callable[[memplan.Estimate], int] | None = None,
    **asked: Any,
) -> Ask:
    """``memplan check`` of a file, beside which a DeepSpeed JSON may lie.

    ``memory`` makes of the estimate on a large GPU how much the GPU has.
    """

    def ask(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterable[Finding]:
        values = config
        if deepspeed is not None:
            (folder / "ds.json").write_text(json.dumps(deepspeed))
            assert isinstance(values, dict)
            values = {**values, "deepspeed": "ds.json"}
        path = folder / ("run.sh" if isinstance(values, str) else "run.yaml")
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        given = cluster
        if memory is not None:
            large = memplan.check(path, cluster={**cluster, "gpu_memory": "4TiB"}, **asked).estimate
            assert large is not None
            given = {**cluster, "gpu_memory": memory(large)}
        return memplan.check(path, cluster=given, **asked).findings

    return ask


def of_arguments(**changes: Any) -> Ask:
    return files(changed(ARGUMENTS, changes))


def of_deepspeed(changes: Values, arguments: Values | None = None, **asked: Any) -> Ask:
    """TrainingArguments that name a DeepSpeed JSON."""
    return files(changed(ARGUMENTS, arguments or {}), deepspeed=changed(DEEPSPEED, changes), **asked)


def alone(changes: Values) -> Ask:
    return files(changed(ALONE, changes), model="gpt2", training={"seq_len": 64})


def fsdp(changes: Values, **asked: Any) -> Ask:
    asked = {"model": "gpt2", "training": {"seq_len": 64}, "cluster": {"gpu": "A100-80GB"}} | asked
    return files(changed(FSDP, changes), **asked)


# -- from within a script ----------------------------------------------------------------------------------------------

TINY: Values = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SHORT: Values = {"seq_len": 64}


def script(
    model: Callable[[], Any] | str = "gpt2",
    args: Values | Callable[[Path], Any] | None = None,
    *,
    prepare: Callable[[pytest.MonkeyPatch], object] | None = None,
    **asked: Any,
) -> Ask:
    """``memplan.preflight``, given what a script has."""

    def ask(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterable[Finding]:
        with monkeypatch.context() as patched, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if prepare is not None:
                prepare(patched)
            given = args(folder) if callable(args) else args
            options = {"training": SHORT, "cluster": memplan.ClusterSpec(gpu="A100-80GB", gpus=2)} | asked
            made = model if isinstance(model, str) else model()
            return memplan.preflight(made, given, on_failure="warn", **options)

    return ask


def llama(**fields: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, **TINY | fields))


def partitioned(model: Any) -> Any:
    for number, weight in enumerate(model.parameters()):
        weight.ds_id, weight.ds_numel = number, weight.numel()
    return model


def with_another_head(partition: bool, change: bool) -> Any:
    model = llama()
    if change:
        model.lm_head = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 256))
    return partitioned(model) if partition else model


def spread(*devices: int) -> Any:
    model = llama()
    model.hf_device_map = {f"model.layers.{number}": device for number, device in enumerate(devices)}
    return model


def arguments(folder: Path, **fields: Any) -> Any:
    return transformers.TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], **fields)


def zero3(folder: Path) -> Any:
    changes = {"optimizer": None, "scheduler": None}
    return arguments(folder, bf16=True, deepspeed=changed(DEEPSPEED, changes))


def trained_by(optimizer: Callable[..., torch.optim.Optimizer]) -> Any:
    model = llama()
    args = arguments(Path("out"), save_strategy="no")
    return transformers.Trainer(model=model, args=args, optimizers=(optimizer(model.parameters()), None))


def two_gpus(ranks: int | None) -> Callable[[pytest.MonkeyPatch], None]:
    def prepare(monkeypatch: pytest.MonkeyPatch) -> None:
        free = (81920 - 600) * MiB
        devices = [
            Device("NVIDIA A100-SXM4-80GB", f"GPU-{index}", 81920 * MiB, 600 * MiB, free=free) for index in (0, 1)
        ]
        monkeypatch.setattr(detect, "read_nvml", lambda: devices)
        monkeypatch.setattr(checks, "detect_cluster", lambda: detect.detect_cluster(nvml=lambda: devices))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if ranks is not None:
            monkeypatch.setenv("WORLD_SIZE", str(ranks))

    return prepare


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(checks, "_checked", raising)


def on_a_gpu(memory: str) -> Ask:
    return script(cluster=memplan.ClusterSpec(gpu="A100-80GB", gpus=2, gpu_memory=memory))


def between(estimate: memplan.Estimate) -> int:
    """Less than the save needs, and more than the training."""
    phases = {phase.name: phase.allocated for phase in estimate.gpu.phases}
    others = max(size for name, size in phases.items() if name != "save")
    return estimate.gpu.low - (phases["save"] - others) // 2


def just_too_small(estimate: memplan.Estimate) -> int:
    return estimate.gpu.low - MiB


_REENTRANT = {"use_peft": True, "lora_r": 8, "gradient_checkpointing": True, "use_reentrant": True}
_SAVED = {"model": "meta-llama/Llama-2-7b", "training": {"seq_len": 64, "gradient_checkpointing": True}}
SMALL: Values = {**CLUSTER, "gpu": "RTX3090"}
_TEXTS = {"lengths": [40] * 99 + [1000]}

ROWS: dict[str, tuple[Ask, Ask]] = {
    "batch-product": (alone({"train_batch_size": 32}), alone({})),
    "trainer-mismatch": (of_deepspeed({"gradient_accumulation_steps": 8}), of_deepspeed({})),
    "unknown-key": (alone({"zero_optimization.reduce_bucket_sise": 1000000}), alone({})),
    "removed-key": (alone({"zero_optimization.mics_shard_size": 2}), alone({"zero_optimization.stage": 1})),
    "misspelt-key": (alone({"gradient_acumulation_steps": 2}), alone({})),
    "misplaced-key": (alone({"overlap_comm": True}), alone({"zero_optimization.overlap_comm": True})),
    "removed-argument": (of_arguments(warmup_ratio=0.1), of_arguments(warmup_steps=0.1)),
    "misspelt-argument": (of_arguments(per_device_train_batch_sise=4), of_arguments()),
    "scheduler-total-steps": (of_deepspeed({"scheduler.params.total_num_steps": None}), of_deepspeed({})),
    "scheduler-warmup-steps": (
        of_deepspeed({"scheduler.params.warmup_num_steps": 0}, {"warmup_steps": 0}),
        of_deepspeed({"scheduler.params.warmup_num_steps": 1}, {"warmup_steps": 0}),
    ),
    "nvme-below-stage-3": (
        of_deepspeed(STAGE_2 | {"zero_optimization.offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}),
        of_deepspeed(STAGE_2 | {"zero_optimization.offload_optimizer": {"device": "cpu"}}),
    ),
    "quantized-full": (of_arguments(load_in_4bit=True), of_arguments(load_in_4bit=True, use_peft=True, lora_r=8)),
    "device-map": (of_deepspeed({}, {"device_map": "auto"}), of_deepspeed({})),
    "host-memory": (
        of_deepspeed(STAGE_2 | OFFLOADED, cluster={**CLUSTER, "host_memory": "2GiB"}),
        of_deepspeed(STAGE_2 | OFFLOADED),
    ),
    "save-needs-more": (
        fsdp({"fsdp_config.fsdp_state_dict_type": "FULL_STATE_DICT"}, memory=between, **_SAVED),
        fsdp({}, memory=just_too_small, **_SAVED),
    ),
    "optimizer-replaced": (
        of_deepspeed(STAGE_2 | OFFLOADED, {"optim": "sgd"}),
        of_deepspeed(STAGE_2 | OFFLOADED | {"zero_force_ds_cpu_optimizer": False}, {"optim": "sgd"}),
    ),
    "offload-param-ignored": (
        of_deepspeed(STAGE_2 | {"zero_optimization.offload_param": {"device": "cpu"}}),
        of_deepspeed(STAGE_2),
    ),
    "no-weights-saved": (
        of_deepspeed({"zero_optimization.stage3_gather_16bit_weights_on_model_save": None}),
        of_deepspeed({}),
    ),
    "frozen-weights-held": (
        of_deepspeed({}, _REENTRANT, software="transformers=5.22"),
        of_deepspeed({}, _REENTRANT, software="transformers=5.23"),
    ),
    "bf16-emulated": (
        files(ARGUMENTS, cluster={**CLUSTER, "gpu": "V100-32GB"}),
        files(changed(ARGUMENTS, {"bf16": None, "fp16": True}), cluster={**CLUSTER, "gpu": "V100-32GB"}),
    ),
    "bf16-in-fp16": (
        of_arguments(model_name_or_path="Qwen/Qwen2.5-0.5B", bf16=None, fp16=True),
        of_arguments(model_name_or_path="Qwen/Qwen2.5-0.5B"),
    ),
    "default-buckets": (
        of_deepspeed(
            OFFLOADED | {"zero_optimization.reduce_bucket_size": 500000000}, LLAMA, cluster=SMALL, memory=just_too_small
        ),
        of_deepspeed(OFFLOADED, LLAMA, cluster=SMALL, memory=just_too_small),
    ),
    "fsdp-wraps-nothing": (fsdp({"fsdp_config.fsdp_auto_wrap_policy": None}), fsdp({})),
    "fsdp1-sharding-ignored": (
        of_arguments(fsdp="shard_grad_op", fsdp_config={"version": 1}),
        of_arguments(fsdp="full_shard", fsdp_config={"version": 1}),
    ),
    "padding": (of_arguments(packing=False), of_arguments()),
    "longest-batch": (files(changed(ARGUMENTS, {"packing": False}), **_TEXTS), files(ARGUMENTS, **_TEXTS)),
    "geforce-p2p": (
        files(ARGUMENTS, cluster={**CLUSTER, "gpu": "RTX4090"}),
        files(ARGUMENTS, cluster={**CLUSTER, "gpu": "RTX3090"}),
    ),
    "seq-len-unknown": (of_arguments(max_length=None), of_arguments()),
    # of a script
    "does-not-fit": (on_a_gpu("1GiB"), on_a_gpu("16GiB")),
    "tight": (
        script(cluster=memplan.ClusterSpec(gpu="A100-80GB", gpus=2, gpu_memory="4GiB"), training={"seq_len": 512}),
        on_a_gpu("16GiB"),
    ),
    "memory-unknown": (script(cluster=memplan.ClusterSpec(gpus=2)), on_a_gpu("16GiB")),
    "refused": (script(args={"zero_optimization": {"stage": 5}}), script(args=ALONE)),
    "not-modelled": (script(lambda: spread(0, 1), arguments), script(lambda: spread(0, 0), arguments)),
    "unknown-model": (script("no/such-model"), script("gpt2")),
    "other-model": (
        script(lambda: with_another_head(partition=True, change=True), zero3),
        script(lambda: with_another_head(partition=True, change=False), zero3),
    ),
    "made-whole": (script(llama, zero3), script(lambda: partitioned(llama()), zero3)),
    "not-read": (script(lambda: trained_by(torch.optim.Rprop)), script(lambda: trained_by(torch.optim.AdamW))),
    "data-parallel": (
        script(args=ARGUMENTS, prepare=two_gpus(None), cluster=None),
        script(args=ARGUMENTS, prepare=two_gpus(2), cluster=None),
    ),
    "memplan-error": (script(prepare=broken), script()),
}


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher, no GPU, no hub, and what the libraries set in the environment is taken back."""
    from accelerate.state import AcceleratorState
    from transformers.integrations import deepspeed as integration

    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")) or name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"):
            del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"
    monkeypatch.setattr(detect, "read_nvml", lambda: ())
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    integration.unset_hf_deepspeed_config()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("code", ROWS)
def test_a_run_that_has_it_and_the_nearest_that_has_not(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    raises, passes = ROWS[code]
    found = {each.code: each for each in raises(tmp_path, monkeypatch)}
    others = {each.code for each in passes(tmp_path, monkeypatch)}
    assert code in found, found
    assert code not in others
    assert not [each for each in others if each in found and found[each].severity == "error"]
    finding = found[code]
    assert finding.path
    assert finding.message.endswith((".", ")"))
    assert finding.remedy.endswith((".", "?")), finding


def test_every_code_has_a_row_and_its_heading_on_the_page() -> None:
    """A finding cannot be made with another code: its type holds them all."""
    codes = set(get_args(answers.Code))
    assert set(ROWS) == codes
    page = (Path(__file__).parents[1] / "docs" / "checks.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^### `([a-z0-9-]+)`$", page, re.MULTILINE)) == sorted(codes)
    with pytest.raises(ValueError, match="code"):
        Finding(code="new", severity="info", path="p", message="m", remedy="r")  # type: ignore[arg-type]
