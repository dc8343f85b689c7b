"""memplan.preflight with the libraries' own objects, on CPU."""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import accelerate
import peft
import torch
import transformers
from tests.ranks import on_two_ranks
from transformers.integrations import HfDeepSpeedConfig

import memplan
from memplan import case, checks
from memplan.answers import Preflight
from memplan.catalog import detect
from memplan.catalog.detect import Device
from memplan.errors import PreflightError, SpecError
from memplan.integrations import live
from memplan.units import MiB

GiB = 2**30
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:memplan")

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
}
LARGE = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
ZERO_3: dict[str, Any] = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
}
TWO = "2xA100-80GB"


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher, no GPU, and what the libraries set in the environment is taken back."""
    before = dict(os.environ)
    for name in list(os.environ):
        of_a_launcher = name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK")
        if name.startswith(("ACCELERATE_", "FSDP_", "SLURM_")) or of_a_launcher:
            del os.environ[name]
    monkeypatch.setattr(detect, "read_nvml", lambda: ())
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref = None
    os.environ.clear()
    os.environ.update(before)


def arguments(folder: Path, **fields: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], **fields)


def llama(**fields: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | fields))


def setup_of(found: Preflight) -> dict[str, Any]:
    assert found.check is not None, str(found)
    assert found.check.estimate is not None, str(found)
    return found.check.estimate.setup


def codes(found: Preflight) -> set[str]:
    return {each.code for each in found}


def partitioned(model: Any) -> Any:
    """As ``zero.Init`` leaves a model: each weight knows its number and how many elements there are in all."""
    for number, weight in enumerate(model.parameters()):
        weight.ds_id, weight.ds_numel = number, weight.numel()
    return model


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.arange(16) + index
        return {"input_ids": tokens, "labels": tokens}


# -- it is the run that its files are ----------------------------------------------------------------------------------

FSDP = {
    "version": 2,
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bf16": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"bf16": True, "activation_checkpointing": True, "optim": "adamw_torch"},
        {"fp16": True, "deepspeed": {**ZERO_3, "bf16": {"enabled": False}, "fp16": {"enabled": "auto"}}},
        {"bf16": True, "deepspeed": ZERO_3},
        {"bf16": True, "fsdp": "full_shard", "fsdp_config": FSDP},
        {"bf16": True, "fsdp": "full_shard offload", "fsdp_config": FSDP},
        {"bf16": True, "eval_strategy": "steps", "per_device_eval_batch_size": 3, "eval_accumulation_steps": 2},
    ],
    ids=lambda fields: " ".join(fields) or "plain",
)
def test_arguments_are_what_their_file_is(fields: dict[str, Any], tmp_path: Path) -> None:
    config = {**transformers.LlamaConfig(**TINY).to_dict(), "architectures": ["LlamaForCausalLM"]}
    values = {"output_dir": str(tmp_path), "dtype": "float32", "attn_implementation": "sdpa", "seq_len": 128, **fields}
    (tmp_path / "training_args.json").write_text(json.dumps(values))
    installed = checks.installed_software()
    of_files = memplan.check(tmp_path / "training_args.json", config, cluster=TWO, software=installed)
    model = partitioned(llama()) if "deepspeed" in fields else llama()
    found = memplan.preflight(model, arguments(tmp_path, **fields), training={"seq_len": 128}, cluster=TWO)
    assert setup_of(found) == of_files.estimate.setup
    assert found.check.estimate.gpu == of_files.estimate.gpu
    assert found.check.estimate.host == of_files.estimate.host
    assert codes(found) - {"seq-len-unknown"} == {each.code for each in of_files.findings}


@pytest.mark.parametrize(
    ("strategy", "how"),
    [
        *[("zero3", "values"), ("zero3", "file"), ("zero3", "folder"), ("ddp", "values"), ("ddp", "file")],
        *[("fsdp", "values"), ("fsdp", "folder")],  # the file alone does not know what launches it
    ],
)
def test_what_a_plan_has_written_is_what_check_reads(
    strategy: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memplan.configs import launch

    model = case.model_spec("meta-llama/Llama-2-7b")
    spec = memplan.TrainingSpec(seq_len=512, lora={"rank": 4}, micro_batch_size=2)
    cluster = case.known_cluster(memplan.ClusterSpec(gpu="A100-80GB", gpus=2))
    files = launch.files(model, spec, cluster, memplan.Strategy(kind=strategy), checks.installed_software())
    launch.write(files, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    of_files = memplan.check(".", cluster=cluster, software=checks.installed_software())
    if strategy == "fsdp" and how != "folder":  # as accelerate launch says what is in accelerate.yaml
        words = ["--config_file", "accelerate.yaml"]
        for name, value in launched(*words).items():
            if name.startswith(("ACCELERATE_", "FSDP_")):
                monkeypatch.setenv(name, value)
    values = json.loads(Path("training_args.json").read_text())
    args = {"values": values, "file": "training_args.json", "folder": "."}[how]
    found = memplan.preflight(values["model_name_or_path"], args, cluster=cluster)
    assert setup_of(found) == of_files.estimate.setup
    assert found.check.estimate.gpu == of_files.estimate.gpu
    assert not found.errors


def test_a_deepspeed_file_is_what_its_values_are(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(ZERO_3))
    by_path = memplan.preflight(
        llama(), arguments(tmp_path, bf16=True, deepspeed=str(tmp_path / "ds.json")), cluster=TWO
    )
    by_values = memplan.preflight(llama(), arguments(tmp_path, bf16=True, deepspeed=ZERO_3), cluster=TWO)
    assert setup_of(by_path) == setup_of(by_values)
    assert setup_of(by_path)["strategy"] == "zero3"


def in_a_file(values: dict[str, Any]) -> Path:
    Path("ds.json").write_text(json.dumps(values))
    return Path("ds.json")


@pytest.mark.parametrize("give", [dict, HfDeepSpeedConfig, in_a_file, lambda values: str(in_a_file(values))])
def test_a_deepspeed_config_alone(give: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {**ZERO_3, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "train_batch_size": 12}
    values["bf16"] = {"enabled": True}
    found = setup_of(memplan.preflight(llama(), give(values), cluster=TWO))
    assert (found["strategy"], found["micro_batch_size"], found["grad_accum_steps"]) == ("zero3", 2, 3)
    assert found["mixed_precision"] == "bf16"


def test_a_config_object_is_its_class(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**TINY)
    of_model = memplan.preflight(llama(), arguments(tmp_path, bf16=True), training={"seq_len": 64}, cluster=TWO)
    of_config = memplan.preflight(config, arguments(tmp_path, bf16=True), training={"seq_len": 64}, cluster=TWO)
    assert of_config.check.estimate.gpu == of_model.check.estimate.gpu
    assert of_config.check.estimate.model.parameters == sum(p.numel() for p in llama().parameters())


def test_a_folder_and_a_hub_id(tmp_path: Path) -> None:
    transformers.LlamaConfig(**TINY, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert setup_of(memplan.preflight(str(tmp_path), arguments(tmp_path), cluster=TWO))["strategy"] == "ddp"
    known = memplan.preflight("meta-llama/Llama-2-7b", arguments(tmp_path), cluster="1xB200", on_failure="warn")
    assert known.check.estimate.model.id == "meta-llama/Llama-2-7b"


def test_a_model_that_nobody_knows_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="memplan: model: 'no/such-model'"):
        found = memplan.preflight("no/such-model", arguments(tmp_path), cluster=TWO)
    assert codes(found) == {"unknown-model"}


# -- the Trainer -------------------------------------------------------------------------------------------------------


def trainer(args: Any, model: Any = None, **fields: Any) -> Any:
    return transformers.Trainer(model=llama() if model is None else model, args=args, train_dataset=Rows(), **fields)


def test_a_trainer_has_both(tmp_path: Path) -> None:
    args = arguments(tmp_path, per_device_train_batch_size=2)
    assert setup_of(memplan.preflight(trainer(args), cluster=TWO)) == setup_of(
        memplan.preflight(llama(), args, cluster=TWO)
    )


def test_a_trainer_evaluates_what_it_is_given(tmp_path: Path) -> None:
    args = arguments(tmp_path, eval_strategy="steps", per_device_eval_batch_size=3, eval_accumulation_steps=2)
    losses = setup_of(memplan.preflight(trainer(args, eval_dataset=Rows()), cluster=TWO))
    assert (losses["eval_batch_size"], losses["eval_accumulation_steps"]) == (3, None)
    logits = setup_of(memplan.preflight(trainer(args, eval_dataset=Rows(), compute_metrics=lambda _: {}), cluster=TWO))
    assert (logits["eval_batch_size"], logits["eval_accumulation_steps"]) == (3, 2)


def test_a_trainer_on_cpu_is_judged_as_one(tmp_path: Path) -> None:
    found = memplan.preflight(trainer(arguments(tmp_path)))
    assert found.check.estimate.setup["gpu"] == "cpu"
    assert not [each for each in found if each.severity != "info"]


def test_defaults_of_a_subclass_are_asked_for(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class SFTConfig(transformers.TrainingArguments):
        """As trl has it: what it checkpoints by default nobody has to write."""

        activation_checkpointing: bool = True
        max_length: int | None = 1024
        packing: bool = False
        dataset_text_field: str = "text"
        warmup_ratios: float = 0.0

    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    found = memplan.preflight(llama(), args, cluster=TWO)
    setup = setup_of(found)
    assert (setup["gradient_checkpointing"], setup["seq_len"], setup["packed"]) == (True, 1024, False)
    assert not {"misspelt-argument", "removed-argument", "seq-len-unknown"} & codes(found)


# -- the model ---------------------------------------------------------------------------------------------------------


def test_what_was_done_to_the_model_is_seen(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.resize_token_embeddings(320)
    found = memplan.preflight(model, arguments(tmp_path, bf16=True), cluster=TWO)
    setup = setup_of(found)
    assert (setup["dtype"], setup["gradient_checkpointing"], setup["use_reentrant"]) == ("bfloat16", True, True)
    assert found.check.estimate.model.parameters == sum(p.numel() for p in model.parameters())


def test_weights_are_partitioned_as_they_are_made_only_after_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not by the class alone. ``get_init_context`` is what from_pretrained makes a model in."""
    import deepspeed

    made: list[object] = []

    def init(**options: object) -> contextlib.AbstractContextManager[None]:
        made.append(options)
        return contextlib.nullcontext()

    monkeypatch.setattr(deepspeed.zero, "Init", init)
    config = transformers.LlamaConfig(**TINY)

    def inits() -> list[int]:
        counts = []
        for make in (
            lambda: transformers.LlamaForCausalLM.get_init_context(torch.float32, False, False, None),
            lambda: transformers.LlamaForCausalLM(config),
        ):
            made.clear()
            make()
            counts.append(len(made))
        return counts

    assert inits() == [0, 0]
    there = HfDeepSpeedConfig(ZERO_3)  # as TrainingArguments have one
    assert inits() == [1, 0]
    del there


def test_a_model_that_was_made_before_the_arguments_is_whole_on_every_rank(tmp_path: Path) -> None:
    args = arguments(tmp_path, bf16=True, deepspeed=ZERO_3)
    asked: dict[str, Any] = {"training": {"seq_len": 64}, "cluster": memplan.ClusterSpec(gpu="A100-80GB", gpus=2)}
    early, late = memplan.preflight(llama(), args, **asked), memplan.preflight(partitioned(llama()), args, **asked)
    assert ("made-whole" in codes(early), "made-whole" in codes(late)) == (True, False)
    assert early.check.estimate.host.peak > late.check.estimate.host.peak
    other = {**ZERO_3, "zero_optimization": {"stage": 2}}
    assert "made-whole" not in codes(
        memplan.preflight(llama(), arguments(tmp_path, bf16=True, deepspeed=other), **asked)
    )
    with torch.device("meta"):
        assert not live.made_whole(llama())


def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    found = memplan.preflight(model, arguments(tmp_path), cluster=TWO)
    assert found.check.estimate.model.parameters == sum(p.numel() for p in model.parameters())
    assert found.check.estimate.model.source == "mapping"


def test_frozen_weights_are_traced(tmp_path: Path) -> None:
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    found = memplan.preflight(model, arguments(tmp_path), training={"seq_len": 32}, cluster="1xA100-80GB")
    assert found.check.estimate.model.source == "module"
    assert found.check.estimate.model.trainable_parameters == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_weights_of_several_types_are_traced(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    model.lm_head.float()
    found = memplan.preflight(model, arguments(tmp_path, bf16=True), training={"seq_len": 32}, cluster="1xA100-80GB")
    assert found.check.estimate.model.source == "module"


def test_another_head_than_the_config_says_is_traced(tmp_path: Path) -> None:
    model = llama()
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 256))
    found = memplan.preflight(model, arguments(tmp_path), training={"seq_len": 32}, cluster="1xA100-80GB")
    assert found.check.estimate.model.source == "module"
    assert found.check.estimate.model.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "codes_of_it"),
    [
        (peft.LoraConfig(r=4, target_modules=r"(?:\w+\.)+q_proj"), set()),
        (peft.LoraConfig(r=4, use_dora=True), set()),
        (peft.LoraConfig(r=4, layers_to_transform=[0], target_modules=["q_proj"]), set()),
        (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), set()),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8), None),
    ],
    ids=["repeated group", "dora", "some layers", "ia3", "prompt tuning"],
)
def test_what_peft_can_and_memplan_has_no_words_for(options: Any, codes_of_it: set[str] | None, tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), options)
    found = memplan.preflight(model, arguments(tmp_path), training={"seq_len": 32}, cluster="1xA100-80GB")
    if codes_of_it is None and found.check is None:
        assert codes(found) == {"not-modelled"}
        return
    assert found.check.estimate.model.source == "module"
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert found.check.estimate.model.trainable_parameters == trained
    sharded = arguments(tmp_path, bf16=True, deepspeed=ZERO_3)
    assert not memplan.preflight(model, sharded, training={"seq_len": 32}, cluster=TWO).errors


def test_adapters_by_a_regular_expression_need_no_trace(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=r".*\.(q|v)_proj"))
    found = memplan.preflight(model, arguments(tmp_path), training={"seq_len": 32}, cluster="1xA100-80GB")
    assert found.check.estimate.model.source == "mapping"
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert found.check.estimate.model.trainable_parameters == trained


def test_a_model_without_a_loss_is_no_error(tmp_path: Path) -> None:
    model = transformers.LlamaModel(transformers.LlamaConfig(**TINY))  # of a Trainer with a compute_loss
    assert codes(memplan.preflight(model, arguments(tmp_path), cluster=TWO)) == {"not-modelled"}


def test_a_head_that_memplan_does_not_have_is_traced(tmp_path: Path) -> None:
    config = transformers.BertConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.BertForTokenClassification(config)
    found = memplan.preflight(model, arguments(tmp_path), training={"seq_len": 32}, cluster="1xA100-80GB")
    assert found.check is None or found.check.estimate.model.source == "module"
    assert not found.errors


def test_an_optimizer_that_the_trainer_is_given(tmp_path: Path) -> None:
    model = llama()
    for optimizer, optim in (
        (torch.optim.AdamW(model.parameters(), fused=False), "adamw_torch"),
        (torch.optim.SGD(model.parameters()), "sgd"),
    ):
        given = trainer(arguments(tmp_path), model, optimizers=(optimizer, None))
        found = memplan.preflight(given, cluster=TWO)
        assert (setup_of(found)["optim"], "not-read" in codes(found)) == (optim, False)
    rprop = torch.optim.Rprop(model.parameters())
    found = memplan.preflight(trainer(arguments(tmp_path), model, optimizers=(rprop, None)), cluster=TWO)
    assert "not-read" in codes(found)


def test_where_it_cannot_be_traced_the_difference_is_said(tmp_path: Path) -> None:
    model = llama()
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 256))
    args = arguments(tmp_path, bf16=True, deepspeed=ZERO_3)
    with pytest.warns(UserWarning, match="weights, .* of them trained; what was estimated has"):
        found = memplan.preflight(model, args, training={"seq_len": 32}, cluster=TWO)
    assert "other-model" in codes(found)


class Plain(torch.nn.Module):
    """No config, no transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, 32)
        self.head = torch.nn.Linear(32, 256)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.head(self.embed(input_ids))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return types.SimpleNamespace(loss=loss, logits=logits)


def test_a_module_of_ones_own_never_ends_the_script(tmp_path: Path) -> None:
    found = memplan.preflight(Plain(), arguments(tmp_path), training={"seq_len": 32}, cluster="1xA100-80GB")
    assert not found.errors
    assert found.check is not None or codes(found) == {"not-modelled"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_adapters(dtype: Any, autocast: bool, tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    model = peft.get_peft_model(llama().to(dtype), lora, autocast_adapter_dtype=autocast)
    found = memplan.preflight(model, arguments(tmp_path, bf16=True), training={"seq_len": 64}, cluster=TWO)
    setup = setup_of(found)
    assert found.check.estimate.model.trainable_parameters == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert (setup["lora_rank"], setup["lora_dropout"]) == (8, 0.1)
    kept_in_16_bits = live.read(model).said.get("autocast_adapter_dtype") is False
    assert kept_in_16_bits is (not autocast and dtype is torch.bfloat16)


def test_adapters_of_several_ranks_are_traced(tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 32})
    model = peft.get_peft_model(llama(), lora)
    found = memplan.preflight(model, arguments(tmp_path), training={"seq_len": 32}, cluster="1xA100-80GB")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.check.estimate.model.trainable_parameters == trained


def quantized(prepared: bool) -> Any:
    """What bitsandbytes leaves of a model: 4-bit weights in bytes, which know their shape."""
    model = llama().to(torch.float32 if prepared else torch.bfloat16)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            packed = torch.nn.Parameter(
                torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False
            )
            packed.quant_state = types.SimpleNamespace(shape=module.weight.shape)
            module.weight = packed
    model.requires_grad_(False)
    model.config.quantization_config = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    return model


@pytest.mark.parametrize("prepared", [True, False])
def test_quantized_weights_and_adapters(prepared: bool, tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    model = quantized(prepared)
    whole = live.counted(model)[0]
    assert whole == sum(p.numel() for p in llama().parameters())
    for each in model.model.layers:
        for name in ("q_proj", "v_proj"):  # peft asks bitsandbytes for its layers, which are not there
            layer = getattr(each.self_attn, name)
            layer.weight = torch.nn.Parameter(torch.zeros(layer.out_features, layer.in_features), requires_grad=False)
    model = peft.get_peft_model(model, lora)
    for each in model.base_model.model.model.layers:
        for name in ("q_proj", "v_proj"):
            layer = getattr(each.self_attn, name).base_layer
            packed = torch.nn.Parameter(
                torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False
            )
            packed.quant_state = types.SimpleNamespace(shape=(layer.out_features, layer.in_features))
            layer.weight = packed
    found = memplan.preflight(model, arguments(tmp_path, bf16=True), training={"seq_len": 64}, cluster=TWO)
    setup = setup_of(found)
    assert (setup["quantization"], setup["lora_rank"]) == ("nf4-dq", 8)
    assert live.read(model).said["prepare_for_kbit_training"] is prepared
    assert "other-model" not in codes(found)


def test_quantized_without_adapters_is_what_the_trainer_refuses(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="no adapters"):
        memplan.preflight(quantized(True), arguments(tmp_path, bf16=True), cluster=TWO)


def test_a_model_on_several_devices_is_not_modelled(tmp_path: Path) -> None:
    model = llama()
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    found = memplan.preflight(model, arguments(tmp_path), cluster=TWO)
    assert codes(found) == {"not-modelled"}


def test_attention_that_memplan_does_not_have_is_no_error(tmp_path: Path) -> None:
    model = llama()
    model.config._attn_implementation_internal = "flex_attention"
    assert codes(memplan.preflight(model, arguments(tmp_path), cluster=TWO)) == {"not-modelled"}


def test_wrapped_models_are_looked_into(tmp_path: Path) -> None:
    wrapped = torch.nn.DataParallel(llama())
    found = memplan.preflight(wrapped, arguments(tmp_path), cluster=TWO)
    assert found.check.estimate.model.source == "mapping"


# -- accelerate --------------------------------------------------------------------------------------------------------


def test_an_accelerator(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    setup = setup_of(memplan.preflight(llama(), accelerator, cluster=TWO))
    assert (setup["strategy"], setup["mixed_precision"], setup["grad_accum_steps"]) == ("ddp", "bf16", 4)
    assert (setup["micro_batch_size"], setup["dtype"]) == (1, "float32")


def test_an_accelerator_with_a_plugin() -> None:
    """As a launcher's process has it; making one asks for the process group."""
    deepspeed = accelerate.DeepSpeedPlugin(zero_stage=3, offload_optimizer_device="cpu", gradient_accumulation_steps=2)
    fsdp = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    for plugins, kind in (({"deepspeed_plugin": deepspeed}, "zero3"), ({"fsdp_plugin": fsdp}, "fsdp")):
        state = types.SimpleNamespace(**{"deepspeed_plugin": None, "fsdp_plugin": None, **plugins})
        accelerator = types.SimpleNamespace(state=state, mixed_precision="bf16", gradient_accumulation_steps=2)
        setup = setup_of(memplan.preflight(llama(), accelerator, training={"seq_len": 64}, cluster=TWO))
        assert (setup["strategy"], setup["mixed_precision"], setup["grad_accum_steps"]) == (kind, "bf16", 2)


def test_plugins(tmp_path: Path) -> None:
    plugin = accelerate.DeepSpeedPlugin(zero_stage=2, offload_optimizer_device="cpu", gradient_accumulation_steps=2)
    setup = setup_of(memplan.preflight(llama(), plugin, cluster=TWO))
    assert (setup["strategy"], setup["offload_optimizer"], setup["grad_accum_steps"]) == ("zero2", "cpu", 2)
    fsdp = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_offload=True, reshard_after_forward=False
    )
    setup = setup_of(memplan.preflight(llama(), fsdp, cluster=TWO))
    assert (setup["strategy"], setup["offload_param"]) == ("fsdp", "cpu")


def launched(*words: str) -> dict[str, str]:
    """What ``accelerate launch`` sets."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    parsed = launch_command_parser().parse_args([*words, "--num_processes", "2", "--num_machines", "1", "train.py"])
    parsed, _, _ = _validate_launch_command(parsed)
    if not parsed.use_deepspeed:
        return dict(prepare_multi_gpu_env(parsed))
    parsed.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(parsed)
    return dict(environment)


def test_what_accelerate_launch_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = launched("--mixed_precision", "bf16")
    words = ["--use_fsdp", "--fsdp_version", "2", "--mixed_precision", "bf16"]
    words += ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    sharded = launched(*words, "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer")
    words = ["--use_deepspeed", "--zero_stage", "3", "--offload_optimizer_device", "cpu", "--mixed_precision", "bf16"]
    zero = launched(*words, "--zero3_init_flag", "true", "--gradient_clipping", "1.0")
    for environment, kind in ((plain, "ddp"), (sharded, "fsdp"), (zero, "zero3")):
        args = arguments(tmp_path, bf16=kind == "zero3")  # which the Trainer compares with the launcher's
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                if name.startswith(("ACCELERATE_", "FSDP_")):
                    patched.setenv(name, value)
            patched.setenv("WORLD_SIZE", "2")
            found = memplan.preflight(llama(), args, cluster=memplan.ClusterSpec(gpu="A100-80GB"))
        setup = setup_of(found)
        assert (setup["strategy"], setup["mixed_precision"]) == (kind, "bf16")
        assert setup["offload_optimizer"] == ("cpu" if kind == "zero3" else "none")
        assert found.check.estimate.cluster["gpus"] == 2
        assert not found.errors


OPTIONS = (
    "--mixed_precision bf16",
    "--multi_gpu --mixed_precision fp16",
    "--multi_gpu --mixed-precision bf16",
    "--use_fsdp --fsdp_version 2 --mixed_precision bf16 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP",
    "--use_fsdp --fsdp_version 1 --fsdp_sharding_strategy SHARD_GRAD_OP --fsdp_offload_params true",
    "--use_deepspeed --zero_stage 3 --offload_param_device cpu --zero3_save_16bit_model true",
    "--use_deepspeed --offload_optimizer_device cpu --gradient_accumulation_steps 1",
    "--use_deepspeed --deepspeed_config_file ds.json",
    "--config_file fsdp.yaml --fsdp_auto_wrap_policy SIZE_BASED_WRAP --mixed_precision no",
    "--config_file fsdp.yaml --multi_gpu",
)


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_accelerate_launch_are_what_it_sets(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ds.json").write_text(json.dumps(ZERO_3))
    fsdp = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "NO_WRAP", "fsdp_offload_params": True}
    yaml = {"distributed_type": "FSDP", "mixed_precision": "bf16", "num_processes": 2, "fsdp_config": fsdp}
    Path("fsdp.yaml").write_text(json.dumps(yaml))
    bf16 = "deepspeed" in options
    arguments = {"output_dir": "x", "max_length": 64, "packing": True, "bf16": bf16}
    said = " ".join(f"--{name} {value}" for name, value in arguments.items())
    Path("run.sh").write_text(f"accelerate launch --num_processes 2 {options} train.py {said}")
    values = transformers.LlamaConfig(**TINY, architectures=["LlamaForCausalLM"])
    asked = {"training": {"dtype": "float32"}, "cluster": memplan.ClusterSpec(gpu="A100-80GB", host_memory=2**40)}
    of_files = memplan.check("run.sh", values.to_dict(), software=checks.installed_software(), **asked)
    for name, value in launched(*options.split()).items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = memplan.preflight(values, arguments, on_failure="warn", **asked)
    assert setup_of(found) == of_files.estimate.setup
    assert found.check.estimate.gpu == of_files.estimate.gpu


# -- where it runs -----------------------------------------------------------------------------------------------------


def test_ranks_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert live.world({}) is None
    assert live.world({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}) == (16, 8)
    assert live.world({"WORLD_SIZE": "4"}) == (4, 4)
    assert live.world({"WORLD_SIZE": "many"}) is None
    for odd in ("²", "９", "-1", "1.5", "9" * 5000):
        assert live.world({"WORLD_SIZE": odd}) is None
        assert live.world({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": odd}) == (4, 4)
        assert live.rank({"RANK": odd}) == 0
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    found = memplan.preflight(llama(), cluster=memplan.ClusterSpec(gpu="A100-80GB"))
    assert found.check.estimate.cluster["gpus"] == 16
    assert found.check.estimate.cluster["nodes"] == 2


@pytest.mark.parametrize(
    ("variables", "nodes"),
    [
        ({"WORLD_SIZE": "16", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}, 2),
        ({"WORLD_SIZE": "16", "SLURM_JOB_NUM_NODES": "4"}, 4),
        ({"WORLD_SIZE": "16", "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8"}, 2),
        ({"WORLD_SIZE": "16", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}, 1),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "SLURM_NNODES": "4"}, 2),
        ({"WORLD_SIZE": "12", "LOCAL_WORLD_SIZE": "8"}, 2),
        ({"WORLD_SIZE": "9", "LOCAL_WORLD_SIZE": "8"}, 3),
        ({"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "8"}, 1),
    ],
)
def test_nodes_of_the_launcher(variables: dict[str, str], nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun says on how many nodes it starts ranks, and no LOCAL_WORLD_SIZE."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    found = memplan.preflight(llama(), cluster=memplan.ClusterSpec(gpu="A100-80GB"))
    cluster = found.check.estimate.cluster
    assert (cluster["gpus"], cluster["nodes"]) == (int(variables["WORLD_SIZE"]), nodes)


def test_a_rank_that_is_no_number_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "²")
    assert not memplan.preflight(llama(), cluster=memplan.ClusterSpec(gpu="A100-80GB")).errors


def test_the_process_group_knows_best(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    try:
        assert live.world({"WORLD_SIZE": "1"}) == (4, 4)
        assert live.world({"LOCAL_WORLD_SIZE": "2"}) == (4, 2)
        assert live.rank({}) == 3
    finally:
        torch.distributed.destroy_process_group()


def device(uuid: str = "GPU-1", free: int = (81920 - 600) * MiB, *, mig: bool = False) -> Device:
    return Device("NVIDIA A100-SXM4-80GB", uuid, 81920 * MiB, 600 * MiB, free=free, mig=mig)


A100 = device()


def seen(monkeypatch: pytest.MonkeyPatch, *devices: Device) -> None:
    monkeypatch.setattr(detect, "read_nvml", lambda: devices)
    monkeypatch.setattr(checks, "detect_cluster", lambda: detect.detect_cluster(nvml=lambda: devices))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_only_what_is_free_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = device("GPU-2", 10 * GiB)
    seen(monkeypatch, A100, busy)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = memplan.preflight(llama(), training={"seq_len": 64})
    assert found.check.estimate.gpu.capacity == 10 * GiB
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    found = memplan.preflight(llama(), training={"seq_len": 64})
    assert found.check.estimate.gpu.capacity == 81920 * MiB - 600 * MiB


def test_what_the_process_has_itself_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 5 * GiB)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)
    busy = device(free=10 * GiB)
    assert live.free_memory(busy, 400 * MiB) == 15 * GiB + 400 * MiB
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 0.1)
    assert live.free_memory(busy, 400 * MiB) == int((81920 - 600) * MiB * 0.1) + 400 * MiB


def test_a_mig_instance_has_its_own_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen(monkeypatch, device(mig=True))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1a2b")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9 * GiB, 10 * GiB))
    found = memplan.preflight(llama(), training={"seq_len": 64})
    assert found.check.estimate.gpu.capacity == 9 * GiB
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert codes(memplan.preflight(llama(), training={"seq_len": 64})) == {"not-modelled"}


def test_a_containers_limit_is_the_hosts_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 268435456 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/job\n")
    (tmp_path / "sys" / "fs" / "cgroup" / "job").mkdir(parents=True)
    (tmp_path / "sys" / "fs" / "cgroup" / "job" / "memory.max").write_text(f"{2 * GiB}\n")
    seen(monkeypatch, A100)
    monkeypatch.setattr(checks, "host_memory", lambda: detect.host_memory(tmp_path))
    config = {**ZERO_3, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    config["zero_optimization"] = {**ZERO_3["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
    large = transformers.LlamaConfig(**TINY | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8})
    with pytest.raises(PreflightError, match=r"host memory of a node.* there are 2\.00 GiB") as raised:
        memplan.preflight(large, config, training={"seq_len": 64})
    assert raised.value.report.host.capacity == 2 * GiB


@pytest.mark.parametrize("free", [4 * GiB, 4096 * GiB])
def test_what_is_free_on_the_disk_is_what_may_be_offloaded(
    free: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The folder is not there yet: DeepSpeed makes it, on the disk of the one above."""
    seen(monkeypatch, A100)
    asked: list[str] = []

    def usage(path: str) -> Any:
        asked.append(path)
        return types.SimpleNamespace(total=2 * free, used=free, free=free)

    monkeypatch.setattr(detect.shutil, "disk_usage", usage)
    monkeypatch.setattr(checks, "host_memory", lambda: 512 * GiB)
    nvme = {"device": "nvme", "nvme_path": str(tmp_path / "swap" / "here")}
    config = {**ZERO_3, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    config["zero_optimization"] = {**ZERO_3["zero_optimization"], "offload_optimizer": nvme}
    large = transformers.LlamaConfig(**TINY | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8})
    found = memplan.preflight(large, config, training={"seq_len": 64}, on_failure="warn")
    assert asked == [str(tmp_path)]
    assert found.check.estimate.nvme.capacity == free
    assert ("does-not-fit" in codes(found)) == (free < 5 * GiB)
    assert free > 5 * GiB or "NVMe of a node, and there are 4.00 GiB" in str(found)
    elsewhere = memplan.preflight(large, config, training={"seq_len": 64}, cluster="1xA100-80GB", on_failure="warn")
    assert elsewhere.check.estimate.nvme.capacity is None


def test_without_a_launcher_several_gpus_are_no_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen(monkeypatch, A100, device("GPU-2"))
    args = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[])
    with pytest.warns(UserWarning, match=r"nn\.DataParallel"):
        found = memplan.preflight(llama(), args, training={"seq_len": 64})
    assert found.check.estimate.cluster["gpus"] == 1
    assert "data-parallel" in codes(found)
    real = trainer(arguments(tmp_path))
    assert not isinstance(real._wrap_model(real.model), torch.nn.DataParallel)
    real.args._n_gpu = 2  # what _setup_devices counts without a launcher
    assert isinstance(real._wrap_model(real.model), torch.nn.DataParallel)


# -- what becomes of it ------------------------------------------------------------------------------------------------


def too_large(tmp_path: Path, **options: Any) -> Preflight:
    args = arguments(tmp_path, bf16=True, per_device_train_batch_size=4, optim="adamw_torch")
    config = transformers.LlamaConfig(
        **LARGE | {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32}
    )
    return memplan.preflight(config, args, training={"seq_len": 2048}, cluster="1xRTX 3090", **options)


def test_what_does_not_fit_is_raised_with_what_does(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="This run is stopped before it starts") as raised:
        too_large(tmp_path)
    assert raised.value.findings[0].code == "does-not-fit"
    assert raised.value.report.verdict == "does-not-fit"
    assert "per_device_train_batch_size=1, gradient_accumulation_steps=4" in str(raised.value)
    assert "gradient_checkpointing=True" in str(raised.value)


def test_a_remedy_that_is_named_fits(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"LoRA of rank 16: [\d.]+ GiB, fits") as raised:
        too_large(tmp_path)
    named = raised.value.findings[0].remedy
    assert named.count("GiB, fits") == 3


@pytest.mark.parametrize(
    ("batch", "remedy"),
    [
        (1, {"per_device_eval_batch_size": 1}),
        (8, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "per_device_eval_batch_size": 1}),
    ],
)
def test_an_evaluation_that_does_not_fit_has_its_own_remedy(batch: int, remedy: dict[str, int]) -> None:
    values = {"output_dir": "out", "bf16": True, "eval_strategy": "epoch", "per_device_train_batch_size": batch}
    here: dict[str, Any] = {"training": {"seq_len": 2048}, "cluster": "1xRTX 3090"}
    with pytest.raises(PreflightError) as raised:
        memplan.preflight("Qwen/Qwen2.5-0.5B", values, **here)
    named = ", ".join(f"{name}={value}" for name, value in remedy.items())
    assert f"What fits: {named}: " in raised.value.findings[0].remedy
    mended = memplan.preflight("Qwen/Qwen2.5-0.5B", {**values, **remedy}, **here)
    assert mended.check is not None
    assert mended.check.verdict == "fits"


def test_warn(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="memplan: memory: The run needs"):
        assert too_large(tmp_path, on_failure="warn").errors


@pytest.mark.filterwarnings("ignore:memplan")
def test_exit(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        too_large(tmp_path, on_failure="exit")
    assert ended.value.code == 1


def test_other_ranks_are_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert too_large(tmp_path).errors


def test_what_the_library_refuses_is_an_error(tmp_path: Path) -> None:
    args = arguments(tmp_path, bf16=True)
    args.deepspeed = {"zero_optimization": {"stage": 5}}
    with pytest.raises(PreflightError) as raised:
        memplan.preflight(llama(), args, cluster=TWO)
    assert raised.value.findings[0].code == "refused"


@pytest.mark.parametrize(
    "options", [{"cluster": "1xNonsense"}, {"cluster": memplan.ClusterSpec(gpu="Nonsense")}, {"training": {"seq": 1}}]
)
def test_a_wrong_argument_of_preflight_is_said(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        memplan.preflight(llama(), **options)
    with pytest.raises(SpecError, match="on_failure: 'shout' is not known"):
        memplan.preflight(llama(), on_failure="shout")  # type: ignore[arg-type]


def test_arguments_beside_a_trainer_are_its_own(tmp_path: Path) -> None:
    own = arguments(tmp_path)
    trainer = transformers.Trainer(llama(), own)
    assert memplan.preflight(trainer, own, cluster=TWO) == memplan.preflight(trainer, cluster=TWO)
    with pytest.raises(PreflightError, match=r"args: are given beside a Trainer, which has its own\. Leave them out\."):
        memplan.preflight(trainer, arguments(tmp_path), cluster=TWO)


def test_a_mistake_of_memplan_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(checks, "_checked", broken)
    with pytest.warns(UserWarning, match=r"not checked: ZeroDivisionError: by zero \(test_preflight\.py:\d+\)"):
        found = memplan.preflight(llama(), cluster=TWO)
    assert codes(found) == {"memplan-error"}
    assert gc.isenabled()


class Hostile:
    """An object whose every attribute raises."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


@pytest.mark.parametrize(
    "thing", [Hostile, object(), 3, None, b"x", [], argparse.Namespace()], ids=lambda thing: type(thing).__name__
)
def test_no_object_ends_a_training(thing: Any) -> None:
    thing = thing() if thing is Hostile else thing
    for model, args in ((thing, None), (llama(), thing)):
        found = memplan.preflight(model, args, cluster=TWO, on_failure="warn")
        assert isinstance(found, Preflight)


def test_a_length_that_nobody_says_is_named(tmp_path: Path) -> None:
    found = memplan.preflight(llama(max_position_embeddings=512), arguments(tmp_path), cluster=TWO)
    assert setup_of(found)["seq_len"] == 512
    assert "seq-len-unknown" in codes(found)
    told = memplan.preflight(llama(), arguments(tmp_path), training={"seq_len": 64}, cluster=TWO)
    assert "seq-len-unknown" not in codes(told)


def test_a_large_model_takes_no_time(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**LARGE)
    args = arguments(
        tmp_path, bf16=True, per_device_train_batch_size=1, activation_checkpointing=True, deepspeed=ZERO_3
    )
    memplan.preflight(transformers.LlamaConfig(**TINY), args, cluster=TWO)  # imports
    start = time.process_time()
    with pytest.raises(PreflightError, match="LoRA of rank 16"):
        memplan.preflight(config, args, training={"seq_len": 4096}, cluster="8xA100-80GB")
    assert time.process_time() - start < 3  # a third of it on a machine that does nothing else


ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"deepspeed": {**ZERO_3, "zero_optimization": {"stage": 2}}},
    "fsdp": {"fsdp": True, "fsdp_config": FSDP},
}


TRAINING = """
import json, sys
import torch
import transformers
import memplan

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16
    def __getitem__(self, index):
        tokens = torch.arange(24) + index
        return {"input_ids": tokens, "labels": tokens}

folder, fields, asked = sys.argv[1:]
args = transformers.TrainingArguments(
    output_dir=folder, use_cpu=True, report_to=[], max_steps=3, disable_tqdm=True, save_strategy="no",
    **json.loads(fields),
)
config = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256, max_position_embeddings=64,
)
before = memplan.preflight(config, args, training={"seq_len": 24, "packed": True}, **json.loads(asked))
if args.world_size > 1:
    torch.distributed.barrier()  # waits for all ranks
print("LOADED")
trainer = transformers.Trainer(
    model=transformers.LlamaForCausalLM(config), args=args, train_dataset=Rows(), callbacks=[memplan.MemoryCallback()]
)
assert not memplan.preflight(trainer, training={"seq_len": 24, "packed": True}).errors
trainer.train()
if trainer.is_world_process_zero():
    print("SETUP", json.dumps({"before": before.check.estimate.setup, "gpus": before.check.estimate.cluster["gpus"]}))
"""


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("ddp", {}),
        ("zero2", {"deepspeed": {**ZERO_3, "zero_optimization": {"stage": 2}, "zero_force_ds_cpu_optimizer": False}}),
        ("fsdp", {"fsdp": True, "fsdp_config": FSDP}),
    ],
    ids=["ddp", "zero2", "fsdp"],
)
def test_a_script_is_checked_trains_and_is_recorded(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    from memplan.integrations.watch import RECORD
    from memplan.introspect.measurement import Measured

    fields = {"per_device_train_batch_size": 2, **fields}
    ended = on_two_ranks(TRAINING, tmp_path, str(tmp_path), json.dumps(fields), "{}")
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = json.loads(next(line for line in ended.stdout.split("\n") if line.startswith("SETUP"))[6:])
    assert (said["before"]["strategy"], said["gpus"]) == (kind, 2)
    assert ended.stdout.count("memplan, after step 2:") == 1
    measured = Measured.from_json((tmp_path / RECORD).read_text())
    assert measured.to_dict()["estimate"]["setup"] == said["before"]
    assert measured.measurement.phases["run"]["host"] > 100 * MiB
    assert measured.measurement.ran["steps"] == 3


TOO_LARGE = {"per_device_train_batch_size": 2**18, "bf16": True}


def stopped(ended: subprocess.CompletedProcess[str]) -> None:
    """Before a weight was loaded, with one message that says what would fit."""
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.count("GiB of the memory of each GPU") == 1
    assert "LOADED" not in ended.stdout


@pytest.mark.parametrize(("kind", "on_failure"), [("ddp", "raise"), ("zero2", "exit"), ("fsdp", "raise")])
def test_the_same_script_under_torchrun_stops_if_it_cannot_fit(kind: str, on_failure: str, tmp_path: Path) -> None:
    asked = {"cluster": {"gpu": "T4", "host_memory": "64GiB"}, "on_failure": on_failure}  # not what is free now
    stopped(on_two_ranks(TRAINING, tmp_path, str(tmp_path), json.dumps(TOO_LARGE | ENGINES[kind]), json.dumps(asked)))


@pytest.mark.parametrize("on_failure", ["raise", "exit"])
def test_the_same_script_in_one_process_stops_if_it_cannot_fit(on_failure: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TRAINING)
    asked = {"cluster": {"gpu": "T4", "host_memory": "64GiB"}, "on_failure": on_failure}  # not what is free now
    ended = subprocess.run(
        [sys.executable, "script.py", str(tmp_path), json.dumps(TOO_LARGE), json.dumps(asked)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    stopped(ended)
    assert re.search(r"What fits: .*per_device_train_batch_size=", ended.stderr), ended.stderr


# -- the dtype that nothing says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_name_is_loaded_as_from_pretrained_loads_it(dtype: str, tmp_path: Path) -> None:
    """transformers 5 takes the checkpoint's dtype where nothing is said, None among it; 4 took float32."""
    llama().to(getattr(torch, dtype)).save_pretrained(tmp_path)
    real = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert real.dtype is transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=None).dtype
    values = {"output_dir": "o", "per_device_train_batch_size": 1, "bf16": True}
    cluster = {"gpu": "A100-80GB", "gpus": 1}

    def taken(**options: Any) -> str:
        found = memplan.preflight(str(tmp_path), values, training={"seq_len": 64}, cluster=cluster, **options)
        return str(setup_of(found)["dtype"])

    assert taken() == str(real.dtype).removeprefix("torch.")
    assert taken(software={"transformers": "4.57"}) == "float32"
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert setup_of(memplan.preflight(config, values, training={"seq_len": 64}, cluster=cluster))["dtype"] == dtype
    asked = {"seq_len": 64, "dtype": "float32"}
    assert setup_of(memplan.preflight(str(tmp_path), values, training=asked, cluster=cluster))["dtype"] == "float32"
    said = {**values, "model_name_or_path": str(tmp_path), "max_length": 64}
    for change, expected in (({}, dtype), ({"torch_dtype": "float32"}, "float32"), ({"use_peft": True}, "float32")):
        found = memplan.check({**said, **change}, cluster=cluster)
        assert found.estimate is not None
        assert found.estimate.setup["dtype"] == expected
