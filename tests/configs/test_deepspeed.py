"""DeepSpeed configs beside DeepSpeed's and transformers' own classes: what they refuse, take and resolve."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memplan.answers import Finding
from memplan.configs import keys
from memplan.configs.deepspeed import DTYPES, parse_deepspeed, to_deepspeed
from memplan.configs.setup import with_cluster, with_training
from memplan.engines.zero import AUTO, resolved
from memplan.errors import SpecError, UnsupportedError
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.strategy import OffloadOptimizerSpec, OffloadParamSpec, Strategy, ZeroSpec
from memplan.specs.training import TrainingSpec

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
CONFIGS = Path(__file__).parents[1] / "oracles" / "configs"
BASE = {"train_micro_batch_size_per_gpu": 1}


def strategy_of(config: Mapping[str, Any], **options: Any) -> Strategy:
    return with_training(parse_deepspeed(config, "ds.json"), TrainingSpec(), options, 1)[1]


def training_of(config: Mapping[str, Any], gpus: int = 1, **options: Any) -> TrainingSpec:
    return with_training(parse_deepspeed(config, "ds.json"), TrainingSpec(**options), {}, gpus)[0]


def zero(**values: Any) -> dict[str, Any]:
    return {**BASE, "zero_optimization": values}


OFFLOADED = {"device": "cpu"}
TAKEN: list[dict[str, Any]] = [
    {**BASE},
    zero(stage=0),
    zero(stage=1),
    zero(stage="3"),
    zero(stage=2.0),
    zero(stage=True),
    {**BASE, "zero_optimization": True},
    {**BASE, "zero_optimization": False},
    zero(stage=2, reduce_bucket_size=5e8),
    zero(stage=2, reduce_bucket_size="500"),
    zero(stage=3, overlap_comm="yes"),
    zero(stage=3, overlap_comm=0),
    zero(stage=3, overlap_comm=None),
    zero(stage=3, prefetch_bucket_size=5, max_live_parameters=7, allgather_sequential=True),
    zero(stage=3, stage3_prefetch_bucket_size=0, sub_group_size=1e9, stage3_max_reuse_distance=0),
    zero(stage=2, cpu_offload=True),
    zero(stage=2, cpu_offload=False),
    zero(stage=3, cpu_offload_param=True),
    zero(stage=2, cpu_offload_use_pin_memory=True),
    zero(stage=3, stage3_gather_fp16_weights_on_model_save=True),
    zero(stage=3, offload_param=OFFLOADED, offload_optimizer={"device": "cpu", "pin_memory": False}),
    zero(stage=3, offload_param=None, offload_optimizer={"device": "none", "nvme_path": None}),
    zero(stage=3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
    zero(stage=3, offload_param={"device": "nvme", "nvme_path": "/nvme", "buffer_size": 1e8, "max_in_cpu": 10}),
    zero(stage=2, offload_param=OFFLOADED),
    zero(stage=1, round_robin_gradients=True, contiguous_gradients=False, reduce_scatter=False),
    {**zero(stage=2), "bf16": {"enabled": True}},
    {**zero(stage=2), "bfloat16": {"enabled": True}},
    {**zero(stage=2), "bf16": None},
    {**zero(stage=2), "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 12}},
    {**zero(stage=2), "train_batch_size": 8},
    {"train_batch_size": 8, "zero_optimization": {"stage": 1}},
    {"train_batch_size": 8, "gradient_accumulation_steps": 2},
    {**zero(stage=1), "gradient_accumulation_steps": None},
    {**zero(stage=1), "train_micro_batch_size_per_gpu": 4.0},
    {**zero(stage=1), "communication_data_type": "FP32"},
    {**zero(stage=1), "data_types": {"grad_accum_dtype": "float32"}},
    {**zero(stage=1), "aio": None, "checkpoint": {"tag_validation": "Warn"}},
    {**zero(stage=1), "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}},
    {**zero(stage=0), "optimizer": {"type": "Adam", "params": {"torch_adam": True, "foreach": False}}},
    {**zero(stage=2), "optimizer": {"type": "Adagrad"}},
    {**zero(stage=1), "wandb": {"enabled": False}, "steps_per_print": 10, "gradient_clipping": 1.0},
]
"""What DeepSpeed takes, and so does memplan: to the same values."""

REFUSED: list[dict[str, Any]] = [
    zero(stage=4),
    zero(stage=-1),
    {**BASE, "zero_optimization": None},
    {**BASE, "zero_optimization": [1]},
    zero(reduce_bucket_size="5e8"),
    zero(reduce_bucket_size=0),
    zero(reduce_bucket_size=-1),
    zero(reduce_bucket_size=1.5),
    zero(reduce_bucket_size=1e30),
    zero(reduce_bucket_size=float("nan")),
    zero(reduce_bucket_size=None),
    zero(overlap_comm=2),
    zero(contiguous_gradients=None),
    zero(stage=3, prefetch_bucket_size=5, stage3_prefetch_bucket_size=6),
    zero(stage=2, cpu_offload=True, offload_optimizer=OFFLOADED),
    zero(stage=3, stage3_gather_fp16_weights_on_model_save=True, stage3_gather_16bit_weights_on_model_save=True),
    zero(stage=3, reduce_bucketsize=3),
    zero(mics_shard_size=2),
    {**BASE, "nebula": {}},
    {**BASE, "amp": {"enabled": True}},
    {**BASE, "elasticity": {}},
    {**BASE, "sparse_gradients": False},
    {**BASE, "curriculum_learning": {"enabled": False}},
    zero(stage=3, offload_param="cpu"),
    zero(stage=3, offload_param={"device": "disk"}),
    zero(stage=3, offload_param={"device": "CPU"}),
    zero(stage=3, offload_param={"device": None}),
    zero(stage=3, offload_param={"device": "cpu", "fast_init": True}),
    zero(stage=2, offload_optimizer={"device": "cpu", "ratio": 0.5}),
    zero(stage=3, offload_optimizer={"device": "cpu", "ratio": 1.5}),
    zero(stage=3, compute_grad_norm=False),
    {**BASE, "bf16": {"enabled": True}, "fp16": {"enabled": True}},
    {**BASE, "bf16": {"enabled": True, "foo": 1}},
    {**BASE, "bf16": True},
    {**BASE, "fp16": None},
    {**BASE, "fp16": {"enabled": "maybe"}},
    {**BASE, "train_batch_size": 9, "gradient_accumulation_steps": 2},
    {**BASE, "train_micro_batch_size_per_gpu": "4"},
    {**BASE, "train_micro_batch_size_per_gpu": 0},
    {**BASE, "gradient_accumulation_steps": 0},
    {},
    {"gradient_accumulation_steps": 2},
    {**BASE, "communication_data_type": "bfloat16"},
    {**BASE, "data_types": None},
    {**BASE, "optimizer": "AdamW"},
    {**BASE, "optimizer": None},
    {**BASE, "activation_checkpointing": None},
    {**zero(stage=3), "gradient_allreduce_op": "sum"},
    {**BASE, "compile": {"foo": True}},
]
"""What DeepSpeedConfig refuses, and so does memplan."""


def shown(config: object) -> str:
    return json.dumps(config)[:70]


@pytest.mark.parametrize("config", TAKEN, ids=shown)
def test_what_deepspeed_takes_means_the_same(config: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    real = DeepSpeedConfig(json.loads(json.dumps(config)))
    strategy, training = strategy_of(config), training_of(config)
    assert strategy.zero_stage == real.zero_config.stage
    assert training.micro_batch_size == real.train_micro_batch_size_per_gpu
    assert training.grad_accum_steps == real.gradient_accumulation_steps
    expected = "bf16" if real.bfloat16_config.enabled else "fp16" if real.float16_config.enabled else "no"
    assert training.mixed_precision == expected
    dumped = real.zero_config.model_dump(by_alias=True)
    own = strategy.zero.to_dict()
    for part, device in (("offload_optimizer", strategy.offload_optimizer), ("offload_param", strategy.offload_param)):
        there, details = dumped.pop(part), own.pop(part)
        ignored = part == "offload_param" and real.zero_config.stage != 3
        assert device == ("none" if there is None or ignored else there["device"])
        if device != "none":
            assert details == {name: there[name] for name in details}
    own.pop("aio"), own.pop("zero3_init_flag")
    assert own.pop("ds_optimizer") == (real.optimizer_name is not None)
    assert own.pop("zero_force_ds_cpu_optimizer") == real.zero_force_ds_cpu_optimizer
    for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        assert own.pop(name) == getattr(real.bfloat16_config, name)
    own["overlap_comm"] = real.zero_config.stage == 3 if own["overlap_comm"] is None else own["overlap_comm"]
    assert own.pop("grad_accum_dtype") == DTYPES.get(str(real.grad_accum_dtype))
    assert own.pop("communication_data_type") == DTYPES.get(str(real.communication_data_type))
    assert own == {name: dumped[name] for name in own}


@pytest.mark.parametrize("config", REFUSED, ids=shown)
def test_what_deepspeed_refuses_is_refused(config: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    with pytest.raises((ValueError, AssertionError, TypeError, AttributeError, DeepSpeedConfigError)):
        DeepSpeedConfig(json.loads(json.dumps(config)))
    with pytest.raises(SpecError, match=r"^ds\.json: "):
        training_of(config), strategy_of(config)


def test_the_tables_are_those_of_the_library() -> None:
    from deepspeed.compile.config import CompileConfig
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    for path, model in {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "compile": CompileConfig,
    }.items():
        table = keys.DEEPSPEED[path]
        assert table.keys() == {field.alias or name for name, field in model.model_fields.items()}
        for name, field in model.model_fields.items():
            key = table[field.alias or name]
            if key.only and (path, name) != ("zero_optimization", "leaf_module"):
                assert field.default in key.only, name
    renamed = {name: field.alias for name, field in DeepSpeedZeroConfig.model_fields.items() if field.alias}
    assert renamed == keys.RENAMED
    removed = {*_REMOVED_TOP_LEVEL_CONFIG_KEYS, *(f"zero_optimization.{name}" for name in _REMOVED_ZERO_CONFIG_KEYS)}
    assert removed == keys.REMOVED.keys()


def test_defaults_are_those_of_the_library() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    for own, model in (
        (ZeroSpec(), DeepSpeedZeroConfig),
        (OffloadOptimizerSpec(), DeepSpeedZeroOffloadOptimizerConfig),
        (OffloadParamSpec(), DeepSpeedZeroOffloadParamConfig),
    ):
        real = {field.alias or name: field.default for name, field in model.model_fields.items()}
        data = own.to_dict()
        nested = (
            "offload_optimizer",
            "offload_param",
            "grad_accum_dtype",
            "communication_data_type",
            "aio",
            "zero3_init_flag",
            "ds_optimizer",
            "zero_force_ds_cpu_optimizer",
            "bf16_master_weights_and_grads",
            "bf16_optimizer_states",
        )
        same = {name: value for name, value in data.items() if name in real and name not in nested}
        assert same == {name: real[name] for name in same}
        assert data.keys() <= {*real, *nested}


def test_keys_at_the_top_are_those_that_deepspeed_reads() -> None:
    import deepspeed.runtime.config as module
    from deepspeed.runtime import constants

    read: set[str] = set()

    class Watched(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            read.add(str(key))
            return super().__contains__(key)

        def keys(self) -> Any:
            return _Keys(self)

        def __copy__(self) -> Watched:
            return self

    class _Keys:
        def __init__(self, watched: Watched) -> None:
            self._watched = watched

        def __contains__(self, key: object) -> bool:
            return key in self._watched

    module.DeepSpeedConfig(Watched(BASE))
    assert constants.TRAIN_BATCH_SIZE in read
    assert read - keys.REMOVED.keys() <= keys.DEEPSPEED[""].keys()


# -- auto ------------------------------------------------------------------------------------------------------------


def arguments(**values: Any) -> SimpleNamespace:
    """What HfTrainerDeepSpeedConfig reads of TrainingArguments."""
    defaults = {
        "world_size": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_grad_norm": 1.0,
        "learning_rate": 5e-5, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.0,
        "save_on_each_node": False, "fp16": False, "fp16_full_eval": False, "bf16": False, "bf16_full_eval": False,
    }  # fmt: skip
    return SimpleNamespace(**defaults | values, get_warmup_steps=lambda steps: 0)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_auto_becomes_what_the_trainer_makes_of_it(path: Path) -> None:
    import transformers
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    values = json.loads(path.read_text())
    values = next(iter(values.values())) if "model_type" not in values else values
    model_config = transformers.AutoConfig.for_model(**values)
    model = ModelSpec(id="a", model_type=values["model_type"], architecture="A", config=values, source="test")
    for stage in (1, 2, 3):
        written = {
            "train_micro_batch_size_per_gpu": "auto",
            "zero_optimization": {"stage": stage, **dict.fromkeys(AUTO, "auto")},
        }
        real = HfTrainerDeepSpeedConfig(written)
        real.trainer_config_process(arguments())
        real.trainer_config_finalize(arguments(), SimpleNamespace(config=model_config), 10)
        strategy = strategy_of(written)
        for key in AUTO if stage == 3 else ("reduce_bucket_size",):
            expected = real.config["zero_optimization"][key]
            assert resolved(strategy.zero, key, model.hidden_size) == expected


_STATES = (None, "auto", True, False)


@pytest.mark.parametrize(
    ("bf16", "fp16", "asked"),
    [
        (bf16, fp16, asked)
        for bf16, fp16, asked in itertools.product(_STATES, _STATES, ("no", "bf16", "fp16"))
        if (bf16, fp16) != (True, True)
    ],
)
def test_precision_is_what_the_trainer_resolves(bf16: Any, fp16: Any, asked: str) -> None:
    """The option stands for TrainingArguments; where both are explicit and differ, the Trainer refuses."""
    from accelerate import DeepSpeedPlugin
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    written: dict[str, Any] = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}
    written |= {name: {"enabled": state} for name, state in (("bf16", bf16), ("fp16", fp16)) if state is not None}
    real = HfTrainerDeepSpeedConfig(written)
    real.trainer_config_process(arguments(bf16=asked == "bf16", fp16=asked == "fp16"))
    if real.mismatches:
        return
    plugin = DeepSpeedPlugin(hf_ds_config=real)
    try:
        plugin.set_mixed_precision(asked)
    except ValueError:
        return
    enabled = [name for name in ("bf16", "fp16") if plugin.deepspeed_config[name]["enabled"]]
    assert len(enabled) <= 1
    parsed = parse_deepspeed(written, "ds.json")
    training, _, notes = with_training(parsed, TrainingSpec(mixed_precision=asked), {}, 1)
    assert training.mixed_precision == (enabled[0] if enabled else "no") == asked
    assert not notes
    open_ones = {"no", "bf16", "fp16"} if "mixed_precision" not in parsed.training else {asked}
    assert asked in open_ones


def test_without_an_option_a_single_open_section_decides() -> None:
    written = {"train_micro_batch_size_per_gpu": "auto", "fp16": {"enabled": "auto"}, "bf16": {"enabled": False}}
    assert training_of({**written, "zero_optimization": {"stage": 2}}).mixed_precision == "fp16"


def test_the_trainers_batch_is_that_of_the_options() -> None:
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    written = {**dict.fromkeys(names, "auto"), "zero_optimization": {"stage": 1}}
    real = HfTrainerDeepSpeedConfig(written)
    real.trainer_config_process(arguments())
    training = training_of(written, 2, micro_batch_size=4, grad_accum_steps=3)
    found = (training.micro_batch_size, training.grad_accum_steps, training.micro_batch_size * 3 * 2)
    assert found == tuple(real.config[name] for name in names)


@pytest.mark.parametrize(
    ("micro", "steps", "train"), list(itertools.product((None, 2, 3), (None, 1, 2), (None, 8, 12, 9)))
)
@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_batches_are_deepspeeds(
    monkeypatch: pytest.MonkeyPatch, micro: int | None, steps: int | None, train: int | None, gpus: int
) -> None:
    from deepspeed import comm
    from deepspeed.runtime.config import DeepSpeedConfig

    monkeypatch.setattr(comm, "get_rank", lambda: 0)
    monkeypatch.setattr(comm, "get_world_size", lambda: gpus)
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    written = {name: value for name, value in zip(names, (micro, steps, train), strict=True) if value is not None}
    try:
        real = DeepSpeedConfig(dict(written))
    except AssertionError:
        with pytest.raises(SpecError):
            training_of(written, gpus)
        return
    training = training_of(written, gpus)
    assert training.micro_batch_size == real.train_micro_batch_size_per_gpu
    assert training.grad_accum_steps == real.gradient_accumulation_steps


# -- what memplan does with it ---------------------------------------------------------------------------------------


def notes_of(config: Mapping[str, Any], **options: Any) -> list[str]:
    parsed = parse_deepspeed(config, "ds.json")
    notes = with_training(parsed, TrainingSpec(**options), {}, 1)[2]
    return [note.source for note in (*notes, *parsed.assumptions)]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (zero(stage=2, cpu_offload=True), "cpu_offload is deprecated"),
        (zero(stage=2, offload_param=OFFLOADED), "offload_param cpu has no effect at stage 2"),
        ({**BASE, "zero_optimization": True}, "is deprecated: DeepSpeed makes it stage 1 or 0"),
        ({**BASE}, "no zero_optimization: stage 0"),
        ({**zero(stage=1), "_comment": "mine"}, "ds.json: DeepSpeed does not know _comment, and ignores it"),
        (zero(stage="auto"), '"auto" as a stage: accelerate makes it 2'),
        (zero(stage=1), "neither bf16 nor fp16 is there: DeepSpeed trains weights in the type they are loaded in"),
        ({**zero(stage=1), "activation_checkpointing": {"cpu_checkpointing": True}}, "gradient_checkpointing is what"),
    ],
    ids=shown,
)
def test_what_the_text_does_not_say_is_noted(config: dict[str, Any], said: str) -> None:
    assert any(said in note for note in notes_of(config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {**BASE, "zero_optimisation": {"stage": 3}},
            "DeepSpeed does not have, and would ignore. Did you mean zero_optimization?",
        ),
        (zero(stage=3, stage3_max_live_paramters=5), "does not have. Did you mean stage3_max_live_parameters?"),
        (
            zero(mics_shard_size=4),
            "zero_optimization.mics_shard_size: 4 is given to a key that DeepSpeed 0.19 has removed",
        ),
        (
            zero(stage=2, offload_optimizer={"device": "nvme", "nvme_path": "/nvme"}),
            "at stage 2 DeepSpeed keeps the states in host memory. Use cpu, or stage 3.",
        ),
        (zero(stage=3, legacy_stage1=True), "is refused by DeepSpeed since 0.5.9"),
        ({**zero(stage=1), "optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1}}}, "Use gradient_clipping"),
        ({**zero(stage=1), "optimizer": {"type": "AdanW"}}, "Did you mean AdamW"),
        ({**zero(stage=1), "optimizer": {"type": "SGD"}}, "as untested with ZeRO. Add"),
        ({**zero(stage=1), "data_types": {"grad_accum_dtype": "fp8"}}, "Use fp32, bf16 or fp16."),
        ({**zero(stage=1), "bf16": {"enabled": True}, "data_types": {"param_dtype": "fp16"}}, "conflicts with"),
        ({"bf16": {"enabled": "auto"}, **BASE}, "zero_optimization: missing, which accelerate refuses"),
        ({**zero(stage=3), "optimizer": {"type": "Muon"}}, "is refused by DeepSpeed at stage 3 with reduce_scatter"),
        ({**zero(stage=1), "train_batch_size": 10, "gradient_accumulation_steps": 4}, "10 is not 1 sequences x 4"),
    ],
    ids=shown,
)
def test_refusals_name_the_remedy(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        training_of(config), strategy_of(config)
    assert message in str(caught.value)


UNMODELLED = [
    zero(stage=3, zenflow={}),
    zero(stage=1, parameter_alignment=True),
    zero(stage=2, compute_grad_norm=False),
    zero(stage=3, memory_efficient_linear=False),
    zero(stage=3, leaf_module={"classes": ["Block"]}),
    zero(stage=3, stage3_use_all_reduce_for_fetch_params=True),
    zero(stage=3, stage3_module_granularity_threshold=5),
    zero(stage=3, offload_optimizer={"device": "cpu", "super_offload": True}),
    zero(
        stage=3,
        offload_optimizer={"device": "nvme", "nvme_path": "/a"},
        offload_param={"device": "nvme", "nvme_path": "/b"},
    ),
    {**zero(stage=2), "fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
    {**zero(stage=2), "torch_autocast": {"enabled": True}},
    {**zero(stage=2), "compile": {"deepcompile": True}},
    {**zero(stage=2), "tensor_parallel": {"autotp_size": 2}},
    {**zero(stage=2), "sequence_parallel_size": 2},
    {**zero(stage=2), "expert_parallel": {"enabled": True}},
    {**zero(stage=2), "data_efficiency": {"enabled": True}},
    {**zero(stage=2), "optimizer": {"type": "Lamb"}},
    {**zero(stage=2), "optimizer": {"type": "Muon"}},
    {**zero(stage=3, reduce_scatter=False), "optimizer": {"type": "muon"}},
    {**zero(stage=2), "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "amsgrad": True}}},
    {**zero(stage=0), "bf16": {"enabled": True}, "optimizer": {"type": "AdamW"}},
]


@pytest.mark.parametrize("config", UNMODELLED, ids=shown)
def test_what_is_not_modelled_is_refused_by_name(config: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig(json.loads(json.dumps(config)))
    with pytest.raises(UnsupportedError, match=r"^ds\.json: .+\. (Leave|Use|Add)"):
        training_of(config)


def test_keys_of_another_stage_do_not_matter() -> None:
    config = zero(stage=1, stage3_use_all_reduce_for_fetch_params=True, memory_efficient_linear=False)
    assert strategy_of(config) == strategy_of(zero(stage=1))


@pytest.mark.parametrize(
    ("optimizer", "offloaded", "optim"),
    [
        ({"type": "AdamW", "params": {"lr": "auto"}}, False, "adamw_torch_fused"),
        ({"type": "adam"}, True, "adamw_torch_fused"),
        ({"type": "AdamW", "params": {"torch_adam": True}}, False, "adamw_torch"),
        ({"type": "AdamW", "params": {"torch_adam": True, "foreach": False}}, False, "adamw_torch_loop"),
        ({"type": "Adagrad"}, False, "adagrad"),
    ],
)
def test_optimizers(optimizer: dict[str, Any], offloaded: bool, optim: str) -> None:
    offload = {"offload_optimizer": OFFLOADED} if offloaded else {}
    assert training_of({**zero(stage=2, **offload), "optimizer": optimizer}).optim == optim


def test_an_option_wins_with_a_note() -> None:
    config = {**zero(stage=3), "train_micro_batch_size_per_gpu": 8, "bf16": {"enabled": True}}
    parsed = parse_deepspeed(config, "ds.json")
    asked = TrainingSpec(micro_batch_size=2, mixed_precision="fp16")
    training, strategy, notes = with_training(parsed, asked, {"kind": "zero2"}, 4)
    assert (training.micro_batch_size, training.mixed_precision, strategy.kind) == (2, "fp16", "zero2")
    assert [note.source for note in notes] == [
        "mixed_precision fp16, as asked, in place of bf16 in ds.json",
        "micro_batch_size 2, as asked, in place of 8 in ds.json",
        "strategy zero2, as asked, in place of zero3 in ds.json",
    ]


def test_an_option_takes_the_place_of_what_is_refused() -> None:
    config = {**zero(stage=2), "optimizer": {"type": "Lion"}}
    assert training_of(config, optim="lion_32bit").optim == "lion_32bit"


def test_an_option_changes_the_global_batch_with_a_note() -> None:
    config = {**zero(stage=1), "train_micro_batch_size_per_gpu": 4, "train_batch_size": 8}
    parsed = parse_deepspeed(config, "ds.json")
    training, _, notes = with_training(parsed, TrainingSpec(micro_batch_size=3), {}, 2)
    assert training.grad_accum_steps == 1
    assert "train_batch_size 6 (3 sequences x 1 accumulation steps x 2 GPUs), in place of 8" in notes[-1].source


def test_nvme_without_a_folder() -> None:
    parsed = parse_deepspeed(zero(stage=3, offload_optimizer={"device": "nvme"}), "ds.json")
    with pytest.raises(SpecError, match=r"^ds\.json: .*offload_optimizer\.nvme_path: missing\. Add the folder"):
        with_cluster(parsed, ClusterSpec())
    assert with_cluster(parsed, ClusterSpec(nvme_path="/fast"))[0].nvme_path == "/fast"


def test_aio_goes_with_nvme() -> None:
    on_nvme = zero(stage=3, offload_param={"device": "nvme", "nvme_path": "/fast"})
    assert strategy_of({**on_nvme, "aio": {"block_size": 262144, "use_gds": True}}).zero.aio.block_size == 262144
    assert strategy_of({**zero(stage=3), "aio": {"block_size": 262144}}) == strategy_of(zero(stage=3))


def test_the_nvme_folder_goes_to_the_cluster() -> None:
    config = zero(stage=3, offload_optimizer={"device": "nvme", "nvme_path": "/fast", "buffer_count": 5})
    parsed = parse_deepspeed(config, "ds.json")
    assert with_cluster(parsed, ClusterSpec())[0].nvme_path == "/fast"
    cluster, notes = with_cluster(parsed, ClusterSpec(nvme_path="/other"))
    assert (cluster.nvme_path, len(notes)) == ("/other", 1)
    assert strategy_of(config).zero.offload_optimizer.buffer_count == 5


@pytest.mark.parametrize("config", TAKEN, ids=shown)
def test_a_setup_has_a_config_of_its_own(config: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    parsed = parse_deepspeed(config, "ds.json")
    training, strategy, _ = with_training(parsed, TrainingSpec(), {}, 1)
    emitted = json.loads(json.dumps(to_deepspeed(strategy, training, parsed.cluster.get("nvme_path"))))
    again = parse_deepspeed(emitted, "again.json")
    assert with_training(again, TrainingSpec(), {}, 1)[:2] == (training, strategy)
    assert again.cluster == parsed.cluster
    DeepSpeedConfig(emitted)


def test_a_setup_of_another_engine_has_none() -> None:
    with pytest.raises(SpecError, match="strategy: 'fsdp' is not DeepSpeed's"):
        to_deepspeed(Strategy(kind="fsdp"), TrainingSpec())


def test_a_file_without_any_key_of_deepspeed_is_not_its_config() -> None:
    fsdp_config = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "backward_prefetch": "backward_pre"}
    with pytest.raises(SpecError, match=r"is none of DeepSpeed's keys, .*--strategy fsdp"):
        parse_deepspeed(fsdp_config, "fsdp.json")


# -- what DeepSpeed hands on -------------------------------------------------------------------------------------------


def test_params_are_those_of_the_optimizers_that_deepspeed_makes() -> None:
    import inspect

    import torch
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
    from deepspeed.runtime import lr_schedules

    from memplan.configs.keys import OPTIMIZER_PARAMS, SCHEDULERS, TORCH_SCHEDULERS

    def taken(cls: type) -> set[str]:
        return set(list(inspect.signature(cls.__init__).parameters)[2:])

    read = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}  # by the engine, which hands them on by itself
    real = {
        "torch_adam": taken(torch.optim.AdamW) | read,
        "cpu_adam": taken(DeepSpeedCPUAdam) - {"adamw_mode"} | read,
        "adam": taken(FusedAdam) | read,
        "cpu_adagrad": taken(DeepSpeedCPUAdagrad),
        "adagrad": taken(torch.optim.Adagrad),
        "cpu_lion": taken(DeepSpeedCPULion),
        "lion": taken(FusedLion),
        "SGD": taken(torch.optim.SGD),
        "RMSprop": taken(torch.optim.RMSprop),
    }
    assert {name: set(params) for name, params in OPTIMIZER_PARAMS.items()} == real
    assert {name: set(params) for name, params in SCHEDULERS.items()} == {
        name: taken(getattr(lr_schedules, name)) for name in SCHEDULERS
    }
    scheduler = torch.optim.lr_scheduler
    assert {name for name in scheduler.__all__ if name not in TORCH_SCHEDULERS} == set()


def made_by_deepspeed(config: dict[str, Any]) -> None:
    """The two methods of the engine that hand a config's params on, with an optimizer of torch's on the CPU."""
    from types import SimpleNamespace

    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

    optimizer, scheduler = config.get("optimizer", {}), config.get("scheduler", {})
    engine: Any = SimpleNamespace(
        optimizer_params=lambda: optimizer.get("params"),
        optimizer_name=lambda: str(optimizer.get("type")).lower(),
        scheduler_name=lambda: scheduler.get("type"),
        scheduler_params=lambda: scheduler.get("params"),
        zero_use_cpu_optimizer=lambda: False,
    )
    engine.get_optimizer_configuration = lambda *args, **kwargs: DeepSpeedEngine.get_optimizer_configuration(
        engine, *args, **kwargs
    )
    weights = [torch.nn.Parameter(torch.zeros(2))]
    if optimizer:
        made = DeepSpeedEngine._configure_basic_optimizer(engine, weights)
    else:
        made = torch.optim.AdamW(weights)
    DeepSpeedEngine._scheduler_from_config(engine, made)


OF_TORCH = {"torch_adam": True}


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"optimizer": {"type": "AdamW", "params": {**OF_TORCH, "lr": 1e-4}}}, None),
        ({"optimizer": {"type": "AdamW", "params": {**OF_TORCH, "learning_rate": 1e-4}}}, "params.learning_rate"),
        ({"optimizer": {"type": "AdamW", "params": {**OF_TORCH, "fused": True, "_comment": 1}}}, "params._comment"),
        ({"optimizer": {"type": "Adagrad", "params": {"lr": 1e-4, "betas": [0.9, 0.99]}}}, "params.betas"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}, None),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 10}}}, "params.warmup_steps"),
        ({"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 10}}}, "params.total_num_steps"),
        ({"scheduler": {"type": "WarmupLr", "params": {"warmup_num_steps": 10}}}, "scheduler.type"),
        ({"scheduler": {"type": "StepLR", "params": {"step_size": 10}}}, None),
    ],
)  # fmt: skip
def test_what_is_handed_on_has_names_that_are_taken(change: dict[str, Any], path: str | None) -> None:
    config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1, **change}
    found: list[Finding] = []
    parse_deepspeed(config, "ds.json", findings=found)
    assert [each.code for each in found] == ([] if path is None else ["unknown-key"])
    if path is None:
        made_by_deepspeed(config)
        parse_deepspeed(config, "ds.json")
        return
    assert found[0].path.endswith(path)
    with pytest.raises((TypeError, AssertionError)):
        made_by_deepspeed(config)
    with pytest.raises(SpecError, match=path):
        parse_deepspeed(config, "ds.json")
