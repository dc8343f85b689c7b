"""TrainingArguments as they are read, beside what transformers and accelerate make of them."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import pytest

from memplan.answers import Finding
from memplan.configs.argument_keys import DEFAULTS, REMOVED_ARGUMENTS, SCRIPT_ARGUMENTS, TRAINING_ARGUMENTS
from memplan.configs.arguments import fsdp_config, parse_arguments
from memplan.errors import SpecError, UnsupportedError
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported


def fields() -> dict[str, Any]:
    from transformers import TrainingArguments

    return {field.name: field for field in dataclasses.fields(TrainingArguments)}


def test_the_table_is_the_dataclass() -> None:
    assert set(TRAINING_ARGUMENTS) == set(fields())


def test_the_defaults_are_the_dataclasses() -> None:
    found = {name: fields()[name].default for name in DEFAULTS}
    assert {**found, "optim": str(found["optim"])} == DEFAULTS


def test_types_are_the_dataclasses() -> None:
    """What a command line's text is made of; the parser splits unions the same way."""
    from transformers import TrainingArguments

    for name in fields():
        words = str(TrainingArguments.__annotations__[name])  # HfArgumentParser changes the fields' types
        expected = next((kind for kind in (bool, int, float) if kind.__name__ in words), None)
        if "str" not in words and "dict" not in words and expected is not None:
            assert (name, TRAINING_ARGUMENTS[name].takes) == (name, expected)


@pytest.mark.parametrize("name", REMOVED_ARGUMENTS)
def test_the_parser_refuses_what_is_removed(name: str) -> None:
    from transformers import HfArgumentParser, TrainingArguments

    with pytest.raises(ValueError, match=f"not used by the HfArgumentParser.*{name}"):
        HfArgumentParser(TrainingArguments).parse_dict({"output_dir": "x", "use_cpu": True, name: 1})
    findings: list[Finding] = []
    parse_arguments({name: "x"}, "args.json", findings)
    assert [(found.code, found.severity, found.path) for found in findings] == [
        ("removed-argument", "error", f"args.json: {name}")
    ]


@pytest.mark.parametrize("name", ["per_device_train_batchsize", "gradient-accumulation-steps", "learning_rates"])
def test_the_parser_refuses_what_is_misspelt(name: str) -> None:
    from transformers import HfArgumentParser, TrainingArguments

    with pytest.raises(ValueError, match="not used by the HfArgumentParser"):
        HfArgumentParser(TrainingArguments).parse_dict({"output_dir": "x", "use_cpu": True, name: 1})
    findings: list[Finding] = []
    parse_arguments({name: 1, "per_device_train_batch_size": 2}, "args.json", findings)
    assert [found.code for found in findings] == ["misspelt-argument"]


def test_what_others_read_is_noted() -> None:
    findings: list[Finding] = []
    config = parse_arguments({"image_folder": "x", "seq_len": 8}, "args.json", findings)
    assert (findings, config.notes) == ([], ("args.json: image_folder are not read",))


def test_what_is_left_open_is_the_trainers_default() -> None:
    training = TrainingSpec(**parse_arguments({"output_dir": "x"}, "args.json").training)
    assert (training.micro_batch_size, training.grad_accum_steps, training.mixed_precision) == (8, 1, "no")
    assert (training.optim, training.gradient_checkpointing, training.liger) == ("adamw_torch_fused", False, False)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"bf16": True, "model_max_length": 512}, {"mixed_precision": "bf16", "seq_len": 512, "packed": False}),
        ({"block_size": 1024}, {"seq_len": 1024, "packed": True}),
        ({"max_length": 64, "packing": True}, {"seq_len": 64, "packed": True}),
        ({"packing": True}, {"packed": True}),
        ({"packing": False}, {"packed": False}),
        ({}, {"packed": False}),
        ({"torch_dtype": "torch.bfloat16"}, {"dtype": "bfloat16"}),
        ({"dtype": "auto", "use_flash_attn": True}, {"dtype": "auto", "attn": "flash_attention_2"}),
        ({"gradient_checkpointing": True, "use_liger": True}, {"gradient_checkpointing": True, "liger": True}),
        ({"eval_strategy": "steps"}, {"eval_batch_size": 8}),
        ({"evaluation_strategy": "no", "per_device_eval_batch_size": 4}, {"eval_batch_size": None}),
        ({"do_eval": True, "per_device_eval_batch_size": 4}, {"eval_batch_size": None}),
    ],
)
def test_arguments_of_known_scripts(values: dict[str, Any], expected: dict[str, Any]) -> None:
    training = TrainingSpec(**parse_arguments(values, "args.json").training)
    assert {name: getattr(training, name) for name in expected} == expected


@pytest.mark.parametrize("name", ["activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"])
@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        (None, None),
        ({}, None),
        ({"use_reentrant": True}, True),
        ('{"use_reentrant": false}', False),
        ({"preserve_rng_state": False}, True),  # torch's own default
        ({"use_reentrant": None}, True),
        ({"every_n_layers": 1, "offload": False}, None),
    ],
)
def test_what_checkpointing_is_handed(name: str, kwargs: Any, expected: bool | None) -> None:
    assert parse_arguments({name: kwargs}, "args.json").training["use_reentrant"] is expected


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ("yes", SpecError, "gradient_checkpointing_kwargs: 'yes' is not an object"),
        ([True], SpecError, "is not an object"),
        ({"use_reentrant": "false"}, SpecError, "use_reentrant: 'false' is not true or false"),
        ({"every_n_layers": 2}, UnsupportedError, "every_n_layers: 2 is not modelled"),
        ({"offload": True}, UnsupportedError, "offload: True is not modelled"),
    ],
)
def test_what_checkpointing_cannot_be_handed(kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_arguments({"gradient_checkpointing_kwargs": kwargs}, "args.json")


def test_whether_checkpointing_is_reentrant_is_decided_by_the_version() -> None:
    """modeling_utils.py: ``{"use_reentrant": True}`` up to 4.57, False from 5.0.0 on."""
    new, old = SoftwareSpec(), SoftwareSpec(transformers="4.57.1")
    assert (TrainingSpec().reentrant(new), TrainingSpec().reentrant(old)) == (False, True)
    assert TrainingSpec(use_reentrant=True).reentrant(new)
    assert not TrainingSpec(use_reentrant=False).reentrant(old)


def test_lora_and_quantization_as_scripts_say_them() -> None:
    values = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "load_in_4bit": True}
    training = TrainingSpec(**parse_arguments(values | {"use_bnb_nested_quant": True}, "args.json").training)
    assert training.lora is not None
    assert (training.lora.rank, training.lora.targets) == (4, ("all-linear",))
    assert training.quantization is not None
    assert training.quantization.kind == "nf4-dq"
    without = parse_arguments(values | {"use_peft": False, "load_in_4bit": False}, "args.json").training
    assert {"lora", "quantization"}.isdisjoint(without)


@pytest.mark.parametrize(
    "values",
    [
        {"label_smoothing_factor": 0.1},
        {"torch_compile": True},
        {"use_cpu": True},
        {"bf16_full_eval": True, "eval_strategy": "epoch"},
        {"use_dora": True, "use_peft": True},
        {"beta": 0.1},
        {"vision_tower": "clip"},
    ],
)
def test_what_is_not_modelled_is_refused_by_name(values: dict[str, Any]) -> None:
    name = next(iter(values))
    with pytest.raises(UnsupportedError, match=f"args.json: {name}: .*not modelled"):
        parse_arguments(values, "args.json")


def test_a_full_eval_without_evaluation_does_not_matter() -> None:
    parse_arguments({"bf16_full_eval": True}, "args.json")


# -- fsdp --------------------------------------------------------------------------------------------------------------

FSDP: list[dict[str, Any]] = [
    {"fsdp": True},
    {"fsdp": "full_shard auto_wrap"},
    {"fsdp": "shard_grad_op"},
    {"fsdp": ["full_shard", "offload"]},
    {"fsdp": True, "fsdp_config": {"reshard_after_forward": False, "cpu_offload": True}},
    {"fsdp": True, "fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}},
    {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 2000}},
    {"fsdp": True, "fsdp_config": {"activation_checkpointing": "true", "state_dict_type": "SHARDED_STATE_DICT"}},
    {"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}},
    {"fsdp": "full_shard", "fsdp_config": {"version": 1}},
    {"fsdp": "shard_grad_op", "fsdp_config": {"version": 1, "backward_prefetch": "backward_pre"}},
    {"fsdp": "hybrid_shard", "fsdp_config": {"version": 1, "use_orig_params": "false", "forward_prefetch": True}},
]


@pytest.mark.parametrize("values", FSDP, ids=lambda values: json.dumps(values)[:80])
def test_fsdp_is_what_the_trainer_asks_accelerate_for(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from accelerate.utils import FullyShardedDataParallelPlugin, dataclasses
    from transformers import TrainingArguments

    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(dataclasses, "is_cuda_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # TrainingArguments set it
    own = Strategy(**fsdp_config(json.loads(json.dumps(values)), "args.json"))
    arguments = TrainingArguments(output_dir="x", use_cpu=True, **json.loads(json.dumps(values)))
    real = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    assert own.fsdp.version == real.fsdp_version
    if own.fsdp.version == 2:
        assert own.fsdp.reshard_after_forward is real.reshard_after_forward
    else:
        # accelerator.py, prepare_model: "fsdp_plugin.sharding_strategy or fsdp_plugin.reshard_after_forward"
        assert own.fsdp.sharding_strategy == (real.sharding_strategy or real.reshard_after_forward).name
        assert own.fsdp.backward_prefetch == (real.backward_prefetch.name if real.backward_prefetch else "NO_PREFETCH")
        assert own.fsdp.use_orig_params == real.use_orig_params
        assert own.fsdp.forward_prefetch == real.forward_prefetch
    assert own.fsdp.state_dict_type == real.state_dict_type.name
    assert own.fsdp.activation_checkpointing == real.activation_checkpointing
    assert own.fsdp.cpu_ram_efficient_loading == real.cpu_ram_efficient_loading
    offloads = getattr(real.cpu_offload, "offload_params", type(real.cpu_offload).__name__ == "CPUOffloadPolicy")
    assert own.offload_param == ("cpu" if offloads else "none")
    wraps = {"TRANSFORMER_BASED_WRAP": "transformer_auto_wrap_policy", "SIZE_BASED_WRAP": "size_based_auto_wrap_policy"}
    assert wraps.get(own.fsdp.auto_wrap_policy) == getattr(real.auto_wrap_policy, "__name__", None)
    assert list(own.fsdp.transformer_layer_cls_to_wrap) == (real.transformer_cls_names_to_wrap or [])
    if own.fsdp.auto_wrap_policy == "SIZE_BASED_WRAP":
        assert own.fsdp.min_num_params == real.min_num_params


def test_sharding_asked_of_fsdp1_by_the_trainer_has_no_effect() -> None:
    """The plugins above shard fully whatever the Trainer is asked for: that is a finding."""
    findings: list[Finding] = []
    fsdp_config({"fsdp": "shard_grad_op", "fsdp_config": {"version": 1}}, "args.json", findings)
    assert [(found.code, found.severity) for found in findings] == [("fsdp1-sharding-ignored", "warning")]
    for version, sharding in ((2, "shard_grad_op"), (1, "full_shard")):
        findings = []
        fsdp_config({"fsdp": sharding, "fsdp_config": {"version": version}}, "args.json", findings)
        assert findings == []


def test_a_key_of_fsdp_that_the_trainer_ignores_is_a_finding() -> None:
    findings: list[Finding] = []
    fsdp_config({"fsdp": True, "fsdp_config": {"auto_wrap_polcy": "NO_WRAP"}}, "args.json", findings)
    assert [(found.code, found.remedy) for found in findings] == [("misspelt-key", "Did you mean auto_wrap_policy?")]


@pytest.mark.parametrize("values", [{"fsdp": "hybrid_shard"}, {"fsdp": "fully"}])
def test_what_the_trainer_refuses_of_fsdp(values: dict[str, Any]) -> None:
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="fsdp"):
        TrainingArguments(output_dir="x", use_cpu=True, **values)
    with pytest.raises(SpecError, match=r"args\.json: fsdp"):
        fsdp_config(values, "args.json")


def test_every_argument_of_a_script_is_one_of_no_trainer() -> None:
    assert set(SCRIPT_ARGUMENTS) & set(TRAINING_ARGUMENTS) == {"use_liger_kernel"}
