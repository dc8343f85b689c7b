"""Files of a run: told apart by what is in them, and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import memplan
from memplan.configs.read import read_engine_config
from memplan.configs.run import Run, read_run, setup_of
from memplan.errors import SpecError, UnsupportedError
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

AUTO = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto"}
ARGUMENTS = {"model_name_or_path": "gpt2", "output_dir": "o", "bf16": True, "seq_len": 64}


def setup(config: object, gpus: int = 2, **options: Any) -> tuple[TrainingSpec, Strategy, list[str]]:
    training, strategy, notes = setup_of(read_run(config), TrainingSpec(**options), {}, gpus, [])
    return training, strategy, [note.source for note in notes]


@pytest.mark.parametrize(
    ("values", "raw"),
    [
        (AUTO, ["deepspeed"]),
        ({"fp16": {"enabled": True}, "train_batch_size": 8}, ["deepspeed"]),
        ({"bf16": {"enabled": True}, "gradient_accumulation_steps": 1, "steps_per_print": 1}, ["deepspeed"]),
        ({"zero_optimization": {"stage": 3}, "output_dir": "stray"}, ["deepspeed"]),
        ({"distributed_type": "FSDP", "fsdp_config": {}}, ["accelerate"]),
        ({"distributed_type": "NO", "mixed_precision": "bf16"}, ["accelerate"]),
        (ARGUMENTS, ["arguments"]),
        ({"per_device_train_batch_size": 4}, ["arguments"]),
        ({**ARGUMENTS, "deepspeed": AUTO}, ["arguments", "deepspeed"]),
        ({**ARGUMENTS, "fsdp": True, "fsdp_config": {"version": 2}}, ["arguments"]),
        ({"stage": "sft", "do_train": True, "finetuning_type": "full", "model_name_or_path": "gpt2"}, ["arguments"]),
        (
            ["--model_name_or_path", "gpt2", "--bf16", "True", "--deepspeed", json.dumps(AUTO)],
            ["arguments", "deepspeed"],
        ),
    ],
)
def test_kinds(values: Any, raw: list[str]) -> None:
    assert sorted(read_run(values).raw) == sorted(raw)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"a": 1, "b": 2}, SpecError, "values: holds a, b, which is no config of a run. Give a DeepSpeed JSON"),
        ({}, SpecError, "holds nothing, which is no config"),
        ({"model_type": "llama", "architectures": ["A"]}, SpecError, "is a model's config, not a run's"),
        ({"fsdp_transformer_layer_cls_to_wrap": "A"}, SpecError, "is a Trainer's fsdp_config"),
        ({"base_model": "a", "sequence_len": 4}, UnsupportedError, "an axolotl config is not read"),
        ({"compute_environment": "LOCAL_MACHINE"}, SpecError, "distributed_type: missing"),
        ({"zero_optimisation": {}}, SpecError, "is none of DeepSpeed's keys"),
        ({**ARGUMENTS, "deepspeed": 3}, SpecError, "deepspeed: 3 is neither a path nor an object"),
        ({**ARGUMENTS, "deepspeed": "none.json"}, SpecError, "deepspeed: 'none.json' does not exist"),
        ({**ARGUMENTS, "deepspeed": AUTO, "fsdp": True}, SpecError, "fsdp: true stands beside deepspeed"),
        ({**ARGUMENTS, "fp16": True}, SpecError, "fp16: true cannot go with bf16"),
        ({1: 2}, SpecError, "is a key that is not text"),
        (3, SpecError, "is nothing that a run is started with"),
    ],
)
def test_what_is_no_run_is_refused_with_a_remedy(values: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        read_run(values)
    assert message in str(raised.value)


def test_arguments_fill_what_deepspeed_leaves_to_them() -> None:
    config = {**AUTO, "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    training, strategy, notes = setup(
        {**ARGUMENTS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "deepspeed": config}
    )
    assert (training.micro_batch_size, training.grad_accum_steps, training.mixed_precision) == (4, 3, "bf16")
    assert (strategy.kind, strategy.zero.reduce_bucket_size) == ("zero2", "auto")
    assert notes == []


def test_deepspeeds_optimizer_wins_over_the_arguments() -> None:
    config = {**AUTO, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    training, strategy, _ = setup({**ARGUMENTS, "optim": "adafactor", "deepspeed": config})
    assert (training.optim, strategy.zero.ds_optimizer) == ("adamw_torch", True)


def test_an_option_wins_over_the_arguments_with_a_note() -> None:
    training, _, notes = setup({**ARGUMENTS, "per_device_train_batch_size": 4}, micro_batch_size=2)
    assert training.micro_batch_size == 2
    assert notes == ["micro_batch_size 2, as asked, in place of 4 in values"]


def test_without_an_engine_it_is_what_a_launcher_starts() -> None:
    assert setup(ARGUMENTS, gpus=1)[1].kind == "single"
    training, strategy, _ = setup({**ARGUMENTS, "ddp_bucket_cap_mb": 50}, gpus=4)
    assert (strategy.kind, strategy.ddp.bucket_cap_mb, training.mixed_precision) == ("ddp", 50, "bf16")


def test_files_that_others_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples" / "train").mkdir(parents=True)
    (tmp_path / "examples" / "ds.json").write_text(json.dumps(AUTO))
    path = tmp_path / "examples" / "train" / "args.json"
    path.write_text(json.dumps({**ARGUMENTS, "deepspeed": "examples/ds.json"}))
    run = read_run(path)
    assert run.raw["deepspeed"].source.endswith("ds.json")
    assert len(run.notes) == 1
    monkeypatch.chdir(tmp_path)
    assert read_run(path).notes == ()


def test_an_accelerate_launch_brings_its_config(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "distributed_type: FSDP\nnum_processes: 4\nnum_machines: 2\nmixed_precision: bf16\n"
        "fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP}\n"
    )
    path = tmp_path / "run.sh"
    path.write_text("accelerate launch --config_file a.yaml train.py --model_name_or_path gpt2 --max_length 32\n")
    run = read_run(path)
    assert (run.launcher, run.model, dict(run.cluster)) == ("accelerate", "gpt2", {"gpus": 4, "nodes": 2})
    training, strategy, _ = setup_of(run, TrainingSpec(), {}, 4, [])
    assert (strategy.kind, training.mixed_precision, training.seq_len) == ("fsdp", "bf16", 32)
    path.write_text("accelerate launch --use_megatron_lm train.py --model_name_or_path gpt2\n")
    with pytest.raises(UnsupportedError, match="distributed_type: 'MEGATRON_LM' is not modelled"):
        read_run(path)
    words = "accelerate launch --config_file a.yaml --num_processes $((NODES * 8)) train.py --max_length 32"
    path.write_text(f"{words} --model_name_or_path gpt2 --packing True\n")
    with pytest.raises(SpecError, match=r"num_processes: '\$\(\(NODES \* 8\)\)' is a variable of the shell"):
        memplan.check(path, cluster={"gpu": "A100-80GB"})
    assert memplan.check(path, cluster="2x8xA100-80GB").estimate.cluster["gpus"] == 16  # type: ignore[union-attr]
    path.write_text("accelerate launch train.py --model_name_or_path gpt2 --max_length 32\n")
    assert any("default config" in note for note in read_run(path).notes)


def test_llama_factory_takes_a_yaml_and_what_wins_over_it(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(
        "stage: sft\ndo_train: true\nmodel_name_or_path: gpt2\nbf16: true\ncutoff_len: 128\n"
    )
    (tmp_path / "run.sh").write_text("llamafactory-cli train sft.yaml cutoff_len=64 lora_rank=4\n")
    run = read_run(tmp_path / "run.sh")
    training, _, _ = setup_of(run, TrainingSpec(), {}, 1, [])
    assert (training.seq_len, training.lora and training.lora.rank) == (64, 4)


def test_a_fixed_batch_with_automatic_parts_says_what_the_trainer_is_asked_for() -> None:
    found: list[Any] = []
    config = {**AUTO, "train_batch_size": 32, "gradient_accumulation_steps": "auto"}
    training, _, _ = setup_of(read_run(config), TrainingSpec(), {}, 8, found)
    assert (training.micro_batch_size, training.grad_accum_steps, found) == (4, 1, [])
    setup_of(read_run(config), TrainingSpec(micro_batch_size=3), {}, 8, found)
    assert [each.code for each in found] == ["batch-product"]


def test_arguments_are_no_engines_config(tmp_path: Path) -> None:
    path = tmp_path / "args.json"
    path.write_text(json.dumps(ARGUMENTS))
    with pytest.raises(SpecError, match="holds TrainingArguments, which are no engine's config"):
        read_engine_config(path)
    with pytest.raises(SpecError, match="Use memplan check FILE"):
        read_engine_config(ARGUMENTS)


def test_values_are_not_changed() -> None:
    values = {**ARGUMENTS, "fsdp": True, "fsdp_config": {"fsdp_version": 2}}
    before = json.dumps(values)
    assert isinstance(read_run(values), Run)
    assert json.dumps(values) == before


_RECIPE = "model_name_or_path: gpt2\noutput_dir: out\nbf16: true\nmax_length: 64\nper_device_train_batch_size: 2\n"


@pytest.mark.parametrize(
    ("given", "batch"),
    [
        ("--config recipe.yaml", 2),
        ("--config=recipe.yaml --per_device_train_batch_size 3", 3),
        ("recipe.yaml per_device_train_batch_size=4", 4),
    ],
)
def test_a_script_is_given_a_file_of_arguments(given: str, batch: int, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(_RECIPE)
    path = tmp_path / "run.sh"
    path.write_text(f"#!/bin/bash\ntorchrun --nproc_per_node 2 sft.py {given}\n")
    run = read_run(path)
    assert run.arguments is not None
    assert (run.model, run.arguments.training["micro_batch_size"]) == ("gpt2", batch)
    assert run.cluster == {"gpus": 2, "nodes": 1}
    assert run.notes == ()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("base_model: gpt2\nsequence_len: 64\nadapter: lora\n", UnsupportedError, "an axolotl config is not read"),
        ("distributed_type: MULTI_GPU\n", SpecError, "holds no arguments of a script, but accelerate launch's config"),
        ("zero_optimization: {stage: 2}\n", SpecError, "holds no arguments of a script, but DeepSpeed's config"),
    ],
)
@pytest.mark.parametrize("given", ["-m axolotl.cli.train other.yml", "train.py --config other.yml"])
def test_a_file_that_holds_no_arguments_is_not_read_as_some(
    given: str, text: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "other.yml").write_text(text)
    path = tmp_path / "run.sh"
    path.write_text(f"#!/bin/bash\naccelerate launch --num_processes 2 {given}\n")
    with pytest.raises(error, match=message):
        read_run(path)
