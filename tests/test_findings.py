"""Every finding: a config that has it, one that has not, and the library that behaves so."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import case, checks, findings, planning
from memplan.answers import Check, Finding
from memplan.catalog import detect
from memplan.configs import launch
from memplan.configs.arguments import switched_on
from memplan.errors import SpecError

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
GPT2 = "gpt2"
CLUSTER: dict[str, Any] = {"gpu": "A100-80GB", "gpus": 2, "host_memory": "512GiB"}
ARGUMENTS: dict[str, Any] = {"model_name_or_path": GPT2, "seq_len": 64, "packed": True, "bf16": True}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(detect, "read_nvml", lambda: ())


@pytest.fixture(autouse=True)
def without_zero3() -> Iterator[None]:
    yield
    from transformers.integrations import deepspeed as integration

    integration.unset_hf_deepspeed_config()


def zero(stage: int = 2, **keys: Any) -> dict[str, Any]:
    gather = {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
    return {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**6, **gather, **keys},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
    }


def run(config: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    return {**ARGUMENTS, **arguments} | ({} if config is None else {"deepspeed": config})


def check(values: Any, cluster: dict[str, Any] | None = None, **options: Any) -> Check:
    return checks.check(
        values, options.pop("model", None), options.pop("training", None), cluster or CLUSTER, **options
    )


def codes(values: Any, cluster: dict[str, Any] | None = None, **options: Any) -> list[str]:
    return [found.code for found in check(values, cluster, **options).findings]


def the(code: str, values: Any, cluster: dict[str, Any] | None = None, **options: Any) -> Finding:
    (found,) = [each for each in check(values, cluster, **options).findings if each.code == code]
    return found


def test_a_run_without_mistakes_has_no_findings() -> None:
    assert codes(run(zero(2))) == []
    assert codes(run(zero(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}))) == []
    assert codes(run(fsdp=True)) == []
    assert codes(run()) == []


# -- keys and batches --------------------------------------------------------------------------------------------------


def test_a_batch_that_is_not_the_product() -> None:
    from deepspeed import DeepSpeedConfig

    config = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    with pytest.raises(AssertionError, match="Check batch related parameters"):
        DeepSpeedConfig(dict(config))
    config |= {"zero_optimization": {"stage": 1, "reduce_bucket_size": 10**6}, "bf16": {"enabled": True}}
    training = {"seq_len": 64}
    found = the("batch-product", config, {**CLUSTER, "gpus": 1}, model=GPT2, training=training)
    assert found.severity == "error"
    assert "32 is not 4 sequences x 2 accumulation steps x 1 GPUs" in found.message
    assert codes({**config, "train_batch_size": 16}, model=GPT2, training=training) == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"zero_optimization": {"stage": 2, "reduce_bucket_sise": 1}}, "unknown-key"),
        ({"zero_optimization": {"stage": 2, "mics_shard_size": 2}}, "removed-key"),
        ({"curriculum_learning": {"enabled": True}}, "removed-key"),
        ({"bf16": {"enabled": True, "enabld": True}}, "unknown-key"),
    ],
)
def test_keys_that_deepspeed_refuses(change: dict[str, Any], code: str) -> None:
    from deepspeed import DeepSpeedConfig
    from deepspeed.runtime.config import DeepSpeedConfigError

    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    DeepSpeedConfig(dict(config))
    section, values = next(iter(change.items()))
    name = section if section not in config else list(values)[-1]
    with pytest.raises((ValueError, DeepSpeedConfigError), match=name):
        DeepSpeedConfig({**config, **change})
    found = the(code, {**config, **change}, model=GPT2, training={"seq_len": 64})
    assert (found.severity, found.path.endswith(name)) == ("error", True)


@pytest.mark.parametrize(
    ("change", "code", "remedy"),
    [
        ({"gradient_acumulation_steps": 4}, "misspelt-key", "Did you mean gradient_accumulation_steps"),
        ({"overlap_comm": True}, "misplaced-key", "Put it into zero_optimization."),
        ({"train_micro_batch_size": 4}, "misspelt-key", "Did you mean train_micro_batch_size_per_gpu"),
    ],
)
def test_keys_that_deepspeed_ignores(change: dict[str, Any], code: str, remedy: str) -> None:
    from deepspeed import DeepSpeedConfig

    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    config |= {"bf16": {"enabled": True}}
    real = [DeepSpeedConfig(json.loads(json.dumps({**config, **each}))) for each in ({}, change)]
    same = ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size")
    assert [[getattr(each, name) for name in same] for each in real] == [[1, 1, 1]] * 2
    assert real[0].zero_config.overlap_comm == real[1].zero_config.overlap_comm
    found = the(code, {**config, **change}, model=GPT2, training={"seq_len": 64})
    assert found.severity == "error"
    assert found.remedy.startswith(remedy)


def test_names_that_only_resemble_a_key_are_left_alone() -> None:
    config = zero() | {"comms_config": {}, "monitor_config": {}, "_comment": "x", "my_settings": 1}
    assert codes(run(config)) == []


# -- the Trainer -------------------------------------------------------------------------------------------------------


def real_mismatches(config: dict[str, Any], arguments: dict[str, Any], gpus: int) -> list[str]:
    """Keys for which the Trainer raises ValueError, by its own method; it is told how many processes there are."""
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    from memplan.configs.argument_keys import DEFAULTS

    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "learning_rate")
    names += ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
    values = {name: arguments.get(name, DEFAULTS[name]) for name in names}
    off = {name: bool(arguments.get(name)) for name in ("fp16", "bf16", "fp16_full_eval", "bf16_full_eval")}
    fake = SimpleNamespace(**values, **off, world_size=gpus, save_on_each_node=False)
    fake.warmup_steps = arguments.get("warmup_steps", 0)
    fake.get_warmup_steps = lambda steps: TrainingArguments.get_warmup_steps(fake, steps)
    real = HfTrainerDeepSpeedConfig(json.loads(json.dumps(config)))
    real.trainer_config_process(fake)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=64))
    try:
        real.trainer_config_finalize(fake, model, arguments["max_steps"])
    except ValueError as error:
        return re.findall(r"^- ds (\S+)=", str(error), re.MULTILINE)
    return []


@given(
    numbers=st.fixed_dictionaries(
        {},
        optional={
            "train_micro_batch_size_per_gpu": st.sampled_from(["auto", 1, 8]),
            "gradient_accumulation_steps": st.sampled_from(["auto", 1, 4]),
            "train_batch_size": st.sampled_from(["auto", 16, 64]),
            "gradient_clipping": st.sampled_from(["auto", 1.0, 0.5]),
            "bf16": st.sampled_from([{"enabled": "auto"}, {"enabled": True}, {"enabled": False}]),
            "optimizer": st.fixed_dictionaries(
                {"type": st.just("AdamW")},
                optional={
                    "params": st.fixed_dictionaries(
                        {}, optional={"lr": st.sampled_from(["auto", 5e-5, 1e-4]), "betas": st.just([0.9, 0.95])}
                    )
                },
            ),
            "scheduler": st.fixed_dictionaries(
                {"type": st.just("WarmupDecayLR")},
                optional={
                    "params": st.fixed_dictionaries(
                        {},
                        optional={
                            "warmup_num_steps": st.sampled_from([1, 10]),
                            "total_num_steps": st.sampled_from(["auto", 40]),
                        },
                    )
                },
            ),
        },
    ),
    asked=st.fixed_dictionaries(
        {},
        optional={
            "per_device_train_batch_size": st.sampled_from([1, 8]),
            "gradient_accumulation_steps": st.sampled_from([1, 4]),
            "learning_rate": st.sampled_from([5e-5, 1e-4]),
            "adam_beta2": st.just(0.95),
            "bf16": st.booleans(),
            "warmup_steps": st.sampled_from([0, 10, 0.1, 0.25]),
            "max_steps": st.sampled_from([40, 99]),  # without it, how many steps there are is not known
        },
    ),
    gpus=st.sampled_from([1, 2]),
)
@settings(max_examples=150, deadline=None)
def test_what_differs_from_the_arguments_is_what_the_trainer_refuses(
    numbers: dict[str, Any], asked: dict[str, Any], gpus: int
) -> None:
    from memplan.configs.run import read_run

    config = {"zero_optimization": {"stage": 2}, **numbers}
    values = {**ARGUMENTS, "bf16": False, "max_steps": 100, **asked}
    read = SimpleNamespace(raw={}, source="")
    read.raw = read_run({**values, "deepspeed": config}).raw
    checked: Any = SimpleNamespace(
        deepspeed=read.raw["deepspeed"].data,
        arguments=read.raw["arguments"].data,
        cluster=SimpleNamespace(gpus=gpus),
        counted=True,
        path=lambda kind, key: key,
    )
    found = findings.trainer_mismatch(checked)
    expected = real_mismatches(config, values, gpus)
    assert (found is not None) == bool(expected)
    if found is not None:
        assert all(key in found.message for key in expected)


@pytest.mark.parametrize(
    ("options", "precision", "errors"),
    [
        ("--use_peft --packing", "bf16", []),
        ("--packing --fp16", "fp16", []),
        ("--packing --bf16 False", "bf16", ["trainer-mismatch"]),  # said, and it is no
        ("", "bf16", ["trainer-mismatch"]),  # TrainingArguments alone
    ],
)
def test_trl_takes_bf16_where_nothing_is_said(
    options: str, precision: str, errors: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's sft.py with the config of accelerate that lies beside it, which says mixed_precision: bf16.

    ``self.bf16 = not self.fp16 if self.bf16 is None`` stands in ``__post_init__`` of TRL's configs.
    """
    monkeypatch.chdir(tmp_path)
    config = {"distributed_type": "DEEPSPEED", "num_processes": 8, "mixed_precision": "bf16"}
    section = {"zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": True}
    Path("zero3.yaml").write_text(json.dumps({**config, "deepspeed_config": section}))
    Path("run.sh").write_text(
        "accelerate launch --config_file=zero3.yaml sft.py --model_name_or_path gpt2 --dataset_name a/b "
        f"--max_length 64 --per_device_train_batch_size 2 --output_dir o {options}\n"
    )
    found = checks.check("run.sh", cluster=CLUSTER)
    assert found.estimate is not None
    assert found.estimate.setup["mixed_precision"] == precision
    assert [each.code for each in found.findings if each.severity == "error"] == errors
    ddp = {"model_name_or_path": GPT2, "max_length": 64, "output_dir": "o", "use_peft": True}
    assert check(ddp).estimate.setup["mixed_precision"] == "bf16"  # type: ignore[union-attr]
    of_llama_factory = {"stage": "sft", "do_train": True, "model_name_or_path": GPT2, "template": "a", "packing": True}
    assert not switched_on(of_llama_factory, "bf16")


def test_steps_that_the_dataset_decides_differ_from_nothing() -> None:
    scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": 40, "warmup_num_steps": 7}}
    config = {**zero(), "scheduler": scheduler}
    assert codes(run(config, warmup_steps=0.1)) == []
    found = the("trainer-mismatch", run(config, warmup_steps=0.1, max_steps=99))
    assert "total_num_steps is 40, but max_steps is 99" in found.message
    assert "warmup_num_steps is 7, but warmup_steps is 10" in found.message


def test_a_mismatch_names_both_values() -> None:
    found = the("trainer-mismatch", run(zero() | {"gradient_accumulation_steps": 4}, gradient_accumulation_steps=2))
    assert "gradient_accumulation_steps is 4, but gradient_accumulation_steps of the arguments is 2" in found.message
    assert found.severity == "error"
    assert check(run(zero() | {"gradient_accumulation_steps": 4}, gradient_accumulation_steps=2)).has_errors


LAUNCHED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("bf16", {}, {}),
    ("bf16", {}, {"bf16": True}),
    ("no", {}, {"bf16": True}),
    ("bf16", {"gradient_accumulation_steps": 4}, {"bf16": True}),
    ("bf16", {"gradient_accumulation_steps": 4}, {"bf16": True, "gradient_accumulation_steps": 4}),
    ("bf16", {"gradient_clipping": 0.5}, {"bf16": True}),
    ("bf16", {"gradient_clipping": 1.0}, {"bf16": True}),
]


@pytest.mark.parametrize(("precision", "section", "arguments"), LAUNCHED)
def test_what_accelerate_launches_differs_from_the_arguments(
    precision: str, section: dict[str, Any], arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.configs.test_accelerate import launched
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import propagate_args_to_deepspeed

    from memplan.configs.run import read_run

    yaml = {"distributed_type": "DEEPSPEED", "num_processes": 2, "mixed_precision": precision}
    yaml["deepspeed_config"] = {"zero_stage": 2, **section}  # type: ignore[assignment]
    launched(monkeypatch, tmp_path, yaml)  # the environment of a process
    args = TrainingArguments(output_dir="x", use_cpu=True, **arguments)
    propagate_args_to_deepspeed(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=args.deepspeed_plugin)), args)
    config = args.deepspeed_plugin.hf_ds_config
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=64))
    try:
        config.trainer_config_finalize(args, model, 100)
        refused = []
    except ValueError as error:
        refused = re.findall(r"^- ds (\S+)=", str(error), re.MULTILINE)
    (tmp_path / "a.yaml").write_text(json.dumps(yaml))
    (tmp_path / "run.sh").write_text(
        "accelerate launch --config_file a.yaml train.py --model_name_or_path gpt2 --max_length 64 --packed True "
        + " ".join(f"--{name} {value}" for name, value in arguments.items())
    )
    read = read_run(tmp_path / "run.sh")
    assert set(read.raw) == {"accelerate", "arguments"}
    found = [each for each in check(tmp_path / "run.sh").findings if each.code == "trainer-mismatch"]
    assert len(found) == bool(refused)
    assert all(name in each.message for each in found for name in refused)


def test_a_schedule_without_its_end() -> None:
    import torch
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(TypeError, match="total_num_steps"):
        WarmupDecayLR(optimizer, warmup_num_steps=10)
    scheduler = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto"}}
    # The Trainer fills in what is there, and leaves what is missing.
    assert "total_num_steps" not in filled(zero() | {"scheduler": scheduler})["scheduler"]["params"]
    assert the("scheduler-total-steps", run(zero() | {"scheduler": scheduler})).severity == "error"
    scheduler = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"}}
    assert codes(run(zero() | {"scheduler": scheduler})) == []


def filled(config: dict[str, Any]) -> dict[str, Any]:
    """A config as the Trainer has it once it knows the model."""
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir="x", use_cpu=True, deepspeed=json.loads(json.dumps(config)))
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=64))
    arguments.hf_deepspeed_config.trainer_config_finalize(arguments, model, 100)
    values: dict[str, Any] = arguments.hf_deepspeed_config.config
    return values


def test_a_warm_up_of_no_steps() -> None:
    import torch
    from deepspeed.runtime.lr_schedules import WarmupLR

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="must be a positive integer"):
        WarmupLR(optimizer, warmup_num_steps=0)
    WarmupLR(optimizer, warmup_num_steps=1)
    config = zero() | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}}
    assert the("scheduler-warmup-steps", config, model=GPT2, training={"seq_len": 64}).severity == "error"
    before = {"deepspeed": "0.18.0"}
    assert codes(config, model=GPT2, training={"seq_len": 64}, software=before) == []


# -- optimizers that are offloaded -------------------------------------------------------------------------------------


@pytest.fixture
def cpu_optimizers(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Stand in for DeepSpeed's, which compile themselves when they are made."""
    import deepspeed.ops.adagrad
    import deepspeed.ops.adam

    made = {}
    for module, name in ((deepspeed.ops.adam, "DeepSpeedCPUAdam"), (deepspeed.ops.adagrad, "DeepSpeedCPUAdagrad")):
        made[name] = type(name, (), {"__init__": lambda self, groups, **options: None})
        monkeypatch.setattr(module, name, made[name])
    return made


@pytest.mark.parametrize(("optim", "replaced"), [("sgd", True), ("rmsprop", True), ("adamw_torch", False)])
def test_accelerate_puts_its_own_optimizer_in_place_of_others(
    optim: str, replaced: bool, cpu_optimizers: dict[str, type]
) -> None:
    import torch
    from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed

    kinds: dict[str, Callable[..., Any]] = {
        "sgd": torch.optim.SGD,
        "rmsprop": torch.optim.RMSprop,
        "adamw_torch": torch.optim.AdamW,
    }
    made = map_pytorch_optim_to_deepspeed(kinds[optim]([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    assert type(made) is cpu_optimizers["DeepSpeedCPUAdam"]
    offloaded = zero(2, offload_optimizer={"device": "cpu"})
    assert codes(run(offloaded, optim=optim)) == ["optimizer-replaced"] * replaced
    assert codes(run(offloaded | {"zero_force_ds_cpu_optimizer": False}, optim=optim)) == []
    assert codes(run(zero(2), optim=optim)) == []


@pytest.mark.parametrize("optim", sorted(findings._REPLACED_BY_ADAM))
def test_what_keeps_an_optimizer_can_be_done(optim: str) -> None:
    config = zero(2, offload_optimizer={"device": "cpu"})
    found = the("optimizer-replaced", run(config, optim=optim))
    if "zero_force_ds_cpu_optimizer" in found.remedy:
        assert codes(run({**config, "zero_force_ds_cpu_optimizer": False}, optim=optim)) == []
    assert codes(run(config, optim="adamw_torch")) == []


def test_deepspeed_refuses_its_own_adagrad_on_the_cpu(cpu_optimizers: dict[str, type]) -> None:
    """So it is refused for it: what accelerate makes is none that DeepSpeedEngine takes."""
    import torch
    from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    torch_own = torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(1))])
    assert type(map_pytorch_optim_to_deepspeed(torch_own)) is cpu_optimizers["DeepSpeedCPUAdagrad"]
    engine: Any = SimpleNamespace(
        _supported_optims=lambda: [torch.optim.Optimizer],
        zero_use_cpu_optimizer=lambda: True,
        zero_force_ds_cpu_optimizer=lambda: True,
    )
    with pytest.raises(ZeRORuntimeException, match="ZeRO-Offload with a client provided optimizer"):
        DeepSpeedEngine._configure_optimizer(engine, torch_own, None)
    with pytest.raises(SpecError, match="'adagrad' fails in accelerate with an offloaded optimizer"):
        check(run(zero(2, offload_optimizer={"device": "cpu"}), optim="adagrad"))


def test_adafactor_is_not_offloaded_as_accelerate_would() -> None:
    """Its groups keep their two eps, of which DeepSpeedCPUAdam's step takes one."""
    import torch
    import transformers
    from accelerate.utils import deepspeed as mapping

    own = transformers.Adafactor([torch.nn.Parameter(torch.zeros(1))], lr=1e-3, relative_step=False)
    made: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam", lambda groups, **_: made.extend(groups))
        mapping.map_pytorch_optim_to_deepspeed(own)
    assert [len(group["eps"]) for group in made] == [2]
    offload = {"offload_optimizer": {"device": "cpu"}}
    with pytest.raises(SpecError, match="'adafactor' fails in accelerate with an offloaded optimizer"):
        check(run(zero(2, **offload), optim="adafactor"))
    check(run(zero(2, **offload) | {"zero_force_ds_cpu_optimizer": False}, optim="adafactor"))


# -- quantized weights, device maps ------------------------------------------------------------------------------------


def test_quantized_weights_without_adapters() -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    quantizer = SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    model = SimpleNamespace(is_quantized=True, _hf_peft_config_loaded=False, hf_quantizer=quantizer)
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        validate_quantization_for_training(model)
    found = check(run(load_in_4bit=True))
    assert (found.estimate, found.verdict, [each.code for each in found.findings]) == (
        None,
        "unknown",
        ["quantized-full"],
    )
    assert Check.from_json(found.to_json()) == found
    assert codes(run(load_in_4bit=True, use_peft=True, lora_r=8)) == []
    assert codes(run(load_in_4bit=True), training={"lora": 8}) == []


def test_a_device_map_under_zero3_and_in_a_distributed_run() -> None:
    import torch
    from accelerate import Accelerator
    from transformers.integrations import deepspeed as integration
    from transformers.integrations.accelerate import check_and_set_device_map

    zero3 = integration.HfDeepSpeedConfig(zero(3))
    with pytest.raises(ValueError, match="not compatible with passing a `device_map`"):
        check_and_set_device_map("auto")
    del zero3
    assert check_and_set_device_map("auto") == "auto"
    model = torch.nn.Linear(1, 1)
    model.hf_device_map = {"a": 0, "b": 1}  # type: ignore[assignment]
    # prepare refuses what this says of, unless distributed_type is NO.
    assert Accelerator.verify_device_map(SimpleNamespace(), model)
    assert the("device-map", run(zero(3), device_map="auto")).message.startswith("'auto' is refused by from_pretrained")
    assert codes(run(device_map="auto")) == ["device-map"]
    assert codes(run(device_map="auto"), {**CLUSTER, "gpus": 1}) == []
    assert codes(run(device_map=None)) == []


# -- what has no effect, or costs something ----------------------------------------------------------------------------


def test_parameters_are_offloaded_at_stage_3_only() -> None:
    import inspect

    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    takes = [
        "offload_param_config" in inspect.signature(each.__init__).parameters
        for each in (DeepSpeedZeroOptimizer_Stage3, DeepSpeedZeroOptimizer)
    ]
    assert takes == [True, False]
    assert codes(run(zero(2, offload_param={"device": "cpu"}))) == ["offload-param-ignored"]
    assert codes(run(zero(2, offload_param={"device": "none"}))) == []
    plugin = {"zero_stage": 2, "offload_param_device": "cpu"}
    yaml = {"distributed_type": "DEEPSPEED", "num_processes": 2, "mixed_precision": "bf16", "deepspeed_config": plugin}
    found = the("offload-param-ignored", yaml, {"gpu": "A100-80GB"}, model=GPT2, training={"seq_len": 64})
    assert found.path == "values: deepspeed_config.offload_param_device"


def test_nvme_below_stage_3_is_host_memory() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    nvme = {"device": "nvme", "nvme_path": "/nvme"}
    real = DeepSpeedZeroConfig(stage=2, offload_optimizer=nvme)
    assert str(real.offload_optimizer.device).endswith("nvme")  # it is taken, and means "not on the GPU" (cpu_offload)
    found = check(run(zero(2, offload_optimizer=nvme)))
    assert [each.code for each in found.findings] == ["nvme-below-stage-3"]
    assert found.estimate is not None
    assert found.estimate.setup["offload_optimizer"] == "cpu"
    assert found.estimate.nvme.bytes == 0


def test_weights_that_are_not_gathered_are_not_saved() -> None:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, deepspeed_config={"zero_optimization": {"stage": 3}}, is_fsdp2=False
    )
    engine = SimpleNamespace(zero_gather_16bit_weights_on_model_save=lambda: False)
    with pytest.raises(ValueError, match="Cannot get 16bit model weights"):
        Accelerator.get_state_dict(accelerator, engine)
    off = zero(3, stage3_gather_16bit_weights_on_model_save=False)
    assert codes(run(off)) == ["no-weights-saved"]
    assert codes(run(zero(3))) == []
    assert codes(run(zero(2))) == []
    # deepspeed.initialize without a Trainer: save_checkpoint is what saves there.
    alone = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 10**6}, "train_micro_batch_size_per_gpu": 1}
    assert codes(alone | {"bf16": {"enabled": True}}, model=GPT2, training={"seq_len": 64}) == []


@pytest.fixture
def t4(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch sees of a T4."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=7, minor=5))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)


def test_bf16_runs_where_it_is_emulated(t4: None) -> None:
    import torch
    from transformers.utils import is_torch_bf16_gpu_available

    assert is_torch_bf16_gpu_available()  # what TrainingArguments ask, and DeepSpeed's cuda_accelerator
    assert not torch.cuda.is_bf16_supported(including_emulation=False)
    assert "bf16-emulated" in codes(run(), {**CLUSTER, "gpu": "T4"})
    assert "bf16-emulated" in codes(run(), {**CLUSTER, "gpu": "V100-32GB"})
    assert codes(run(bf16=False, fp16=True), {**CLUSTER, "gpu": "T4"}) == []
    assert codes(run()) == []


@pytest.mark.parametrize(
    ("arguments", "remedy", "mended"),
    [
        ({"bf16": True}, "Use fp16, and load the weights in float32.", {"fp16": True, "dtype": "float32"}),
        ({"bf16": True, "dtype": "float32"}, "Use fp16.", {"fp16": True, "dtype": "float32"}),
        ({"fp16": True}, "Load the weights in float32.", {"fp16": True, "dtype": "float32"}),
        ({}, "Load the weights in float32.", {"dtype": "float32"}),
        ({"bf16": True, "deepspeed": zero()}, "Use fp16.", {"fp16": True, "deepspeed": zero()}),
        ({"bf16": True, "fsdp": True}, "Use fp16.", {"fp16": True, "fsdp": True}),
    ],
)
def test_a_bfloat16_checkpoint_where_it_is_emulated(
    arguments: dict[str, Any], remedy: str, mended: dict[str, Any]
) -> None:
    """Under DeepSpeed and FSDP nothing of what is loaded stays in its type."""
    values = {"model_name_or_path": "Qwen/Qwen2.5-0.5B", "output_dir": "out", "max_length": 64, "packing": True}
    of_trl, on_t4 = values | {"dtype": "bfloat16"}, {**CLUSTER, "gpu": "T4"}
    assert the("bf16-emulated", {**of_trl, "bf16": False, **arguments}, on_t4).remedy == remedy
    assert "bf16-emulated" not in codes({**of_trl, "bf16": False, **mended}, on_t4)


def test_a_bfloat16_checkpoint_in_float16() -> None:
    import torch

    assert torch.tensor(1e5, dtype=torch.bfloat16).half().isinf()
    model = {**dict(case.model_spec(GPT2).config), "dtype": "bfloat16", "model_type": "gpt2"}
    values = run(zero(2), bf16=False, fp16=True)
    assert codes(values, model=model) == ["bf16-in-fp16"]
    assert codes(values, model={**model, "dtype": "float32"}) == []
    assert codes(run(zero(2)), model=model) == []


def test_the_default_bucket_on_a_small_gpu() -> None:
    """Where it is at the peak: under stage 2 that is the step, whose float32 copies are larger."""
    config = zero(3, offload_optimizer={"device": "cpu"})
    del config["zero_optimization"]["reduce_bucket_size"]
    one = {"per_device_train_batch_size": 1, "activation_checkpointing": True}
    llama = {**run(config, **one), "model_name_or_path": "meta-llama/Llama-2-7b"}
    there = check(llama, {**CLUSTER, "gpu": "RTX3090"})
    assert there.estimate is not None
    assert (there.verdict, there.findings) == ("fits", ())
    small = {**CLUSTER, "gpu": "RTX3090", "gpu_memory": there.estimate.gpu.low - 2**20}
    found = the("default-buckets", llama, small)
    assert (found.severity, "GiB" in found.message) == ("warning", True)
    config["zero_optimization"]["reduce_bucket_size"] = "auto"
    assert "default-buckets" not in codes(llama, small)


def test_a_model_that_is_one_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin of a process has no policy; what is gathered then is measured by tests/oracles (NO_WRAP)."""
    import torch
    from tests.configs.test_accelerate import launched

    yaml = {"distributed_type": "FSDP", "num_processes": 2, "mixed_precision": "bf16", "fsdp_config": {}}
    with monkeypatch.context() as patched:
        plugin = launched(patched, tmp_path, yaml)
        plugin.set_auto_wrap_policy(torch.nn.Linear(1, 1))
    assert plugin.auto_wrap_policy is None
    options: dict[str, Any] = {"cluster": {"gpu": "A100-80GB"}, "model": GPT2, "training": {"seq_len": 64}}
    assert codes(yaml, **options) == ["fsdp-wraps-nothing"]
    wrapped = {**yaml, "fsdp_config": {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    assert codes(wrapped, **options) == []


def test_host_memory_that_is_too_small() -> None:
    values = run(zero(2, offload_optimizer={"device": "cpu"}))
    found = the("host-memory", values, {**CLUSTER, "host_memory": "2GiB"})
    assert (found.severity, "without a message" in found.message) == ("error", True)
    assert codes(values) == []


def test_a_checkpoint_that_takes_more_than_training() -> None:
    yaml = {
        "distributed_type": "FSDP",
        "num_processes": 8,
        "mixed_precision": "bf16",
        "fsdp_config": {
            "fsdp_version": 1,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_state_dict_type": "FULL_STATE_DICT",
        },
    }
    model, training = "meta-llama/Llama-2-7b", {"seq_len": 64, "gradient_checkpointing": True}
    found = check(yaml, {"gpu": "A100-40GB"}, model=model, training=training)
    assert found.estimate is not None
    phases = {phase.name: phase.allocated for phase in found.estimate.gpu.phases}
    others = max(size for name, size in phases.items() if name != "save")
    if phases.get("save", 0) <= others:
        pytest.fail("this setup was chosen because saving gathers the model")
    between = found.estimate.gpu.low - (phases["save"] - others) // 2
    small = {"gpu": "A100-40GB", "gpu_memory": between}
    assert "save-needs-more" in codes(yaml, small, model=model, training=training)
    sharded = {**yaml, "fsdp_config": {**yaml["fsdp_config"], "fsdp_state_dict_type": "SHARDED_STATE_DICT"}}  # type: ignore[dict-item]
    assert "save-needs-more" not in codes(sharded, small, model=model, training=training)


def test_padding_is_to_the_longest_of_a_batch() -> None:
    import tokenizers
    from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "a": 1}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    rows = [{"input_ids": [1] * length, "attention_mask": [1] * length} for length in (2, 2, 50)]
    assert DataCollatorWithPadding(tokenizer)(rows)["input_ids"].shape == (3, 50)
    assert the("padding", run(packed=False)).severity == "info"
    assert not check(run(packed=False)).has_errors
    images = {"model_name_or_path": "google/vit-base-patch16-224", "output_dir": "out", "bf16": True, "max_steps": 3}
    assert codes(images) == []


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("CUDA_VISIBLE_DEVICES=0,1 python", ["data-parallel"]),
        ("CUDA_VISIBLE_DEVICES=1 python", []),
        ("python", []),
        ("CUDA_VISIBLE_DEVICES=$1 python", []),
        ("CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node gpu", []),
    ],
)
def test_a_trainer_with_several_gpus_takes_data_parallel(command: str, expected: list[str], tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    arguments = f"--model_name_or_path {GPT2} --bf16 True --output_dir out --max_length 64 --packing True"
    script.write_text(f"{command} train.py {arguments}\n")
    assert [found.code for found in checks.check(script, cluster="A100-80GB").findings] == expected


@pytest.mark.parametrize(
    ("name", "driver", "supported"),
    [
        ("NVIDIA GeForce RTX 4090", "535.10", False),
        ("NVIDIA GeForce RTX 4090", "555.10", True),
        ("NVIDIA GeForce RTX 3090", "535.10", True),
    ],
)
def test_geforce_boards_of_the_40_series(
    name: str, driver: str, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.utils import environment

    monkeypatch.setattr(environment, "get_gpu_info", lambda: ([name, name], 2))
    monkeypatch.setattr(environment, "get_driver_version", lambda: driver)
    assert environment.check_cuda_p2p_ib_support() is supported
    gpu = {**CLUSTER, "gpu": name.removeprefix("NVIDIA GeForce ").replace(" ", "")}
    assert codes(run(zero(2)), gpu) == (["geforce-p2p"] if "4090" in name else [])
    assert codes(run(zero(2)), {**gpu, "gpus": 1}) == []


def test_a_plans_folder_has_no_findings(tmp_path: Path) -> None:
    """What memplan writes itself is without mistakes, on a board that needs care too."""
    for target, gpu in (("deepspeed", "T4"), ("fsdp", "RTX4090"), ("deepspeed", "RTX4090")):
        cluster = {**CLUSTER, "gpu": gpu}
        plan = planning.plan(GPT2, {"seq_len": 64}, cluster, target=target)  # type: ignore[arg-type]
        folder = tmp_path / f"{target}-{gpu}"
        plan.write(folder)
        found = checks.check(folder, cluster={**cluster})
        assert found.findings == ()
        assert plan.best is not None
        assert launch.read(folder).gpus == 2


# -- advice that no longer holds ---------------------------------------------------------------------------------------


def test_outdated_the_trainers_schedule_goes_with_deepspeeds_optimizer() -> None:
    """And DeepSpeed's schedule with the Trainer's optimizer: ``deepspeed_optim_sched`` makes both."""
    import torch
    from accelerate.utils import DummyOptim, DummyScheduler
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, deepspeed_optim_sched

    own = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    trainer = SimpleNamespace(create_optimizer=lambda: own)
    optimizer = {"optimizer": {"type": "AdamW", "params": {}}}
    scheduler = {"scheduler": {"type": "WarmupLR", "params": {}}}
    made = [
        deepspeed_optim_sched(trainer, HfDeepSpeedConfig(zero(2) | extra), None, 10, [])
        for extra in (optimizer, scheduler, optimizer | scheduler)
    ]
    assert [isinstance(each[0], DummyOptim) for each in made] == [True, False, True]
    assert all(isinstance(each[1], DummyScheduler) for each in made)
    assert made[0][1].lr_scheduler_callable is not None
    assert codes(run(zero(2) | optimizer)) == []
    assert codes(run(zero(2) | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}})) == []


def test_outdated_overlap_comm_needs_one_more_bucket_not_four_and_a_half() -> None:
    """Two measured rows of the real engine that differ in overlap_comm alone, with buckets of 65,536 elements."""
    from tests.oracles import o2

    peaks: dict[tuple[str, bool], int] = {}
    alike = {"gpus": 4, "micro_batch_size": 1, "mixed_precision": "bf16", "num_layers": 2, "seq_len": 16}
    for row in (row for archive in o2.load_archives().values() for row in archive.rows):
        options = dict(row.setup.options)
        asked = options.pop("zero", {})
        same = {**alike, "dtype": "bfloat16", "strategy": options.get("strategy")}
        alone = (row.setup.family, row.setup.config, options) == ("llama", "small", same)
        if alone and not asked.keys() - {"overlap_comm"} and row.result and same["strategy"] in ("zero2", "zero3"):
            key = options["strategy"], row.result["resolved"]["overlap_comm"]
            peaks[key] = row.result["phases"]["device"]["2.backward1"]["peak"][0]
            bucket = row.result["resolved"]["reduce_bucket_size"] * 2
    assert peaks["zero2", True] - peaks["zero2", False] == bucket
    assert peaks["zero3", True] == peaks["zero3", False]


def test_outdated_int8_weights_find_their_gpu_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert Bnb8BitHfQuantizer.update_device_map(SimpleNamespace(), None) == {"": 1}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_outdated_adapters_of_unprepared_weights_have_gradients() -> None:
    """With reentrance transformers itself has the input require one; without it none is needed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    for reentrant in (False, True):
        model = LlamaForCausalLM(config)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.is_quantized = True  # as bitsandbytes' weights: peft leaves the inputs as they are then
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        adapted.train()
        ids = torch.zeros(1, 4, dtype=torch.long)
        adapted(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_B" in name)


def test_a_precision_is_named_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: bf16\n")
    rest = "--model_name_or_path gpt2 --output_dir o --model_max_length 64"
    launched = f"accelerate launch --config_file a.yaml t.py {rest}"
    for command, path in (
        (launched, "a.yaml: mixed_precision"),
        (f"torchrun --nproc_per_node 2 t.py {rest} --torch_dtype bfloat16", "run.sh: torch_dtype"),
        (f"torchrun --nproc_per_node 2 t.py {rest} --bf16 True", "run.sh: bf16"),
    ):
        Path("run.sh").write_text(command + "\n")
        found = checks.check("run.sh", cluster={"gpu": "V100-32GB", "gpus": 2})
        assert [each.path for each in found.findings if each.code == "bf16-emulated"] == [path]
    Path("a.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: fp16\n")
    Path("run.sh").write_text(launched + " --dtype float32\n")
    model = {**dict(case.model_spec(GPT2).config), "dtype": "bfloat16", "model_type": "gpt2"}
    found = checks.check("run.sh", model, cluster={"gpu": "V100-32GB", "gpus": 2})
    assert [each.path for each in found.findings if each.code == "bf16-in-fp16"] == ["a.yaml: mixed_precision"]


def test_a_default_that_no_file_has_is_said_to_be_one() -> None:
    values = {"stage": "sft", "do_train": True, "finetuning_type": "lora", "model_name_or_path": GPT2, "bf16": True}
    with pytest.raises(SpecError, match=r"^values: cutoff_len: 2048, LLaMA-Factory's default, is longer"):
        check(values)
    with pytest.raises(SpecError, match=r"^values: cutoff_len: 4096 is longer"):
        check({**values, "cutoff_len": 4096})
