"""accelerate configs beside what ``accelerate launch`` and its plugins make of them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from memplan.configs import keys
from memplan.configs.accelerate import parse_accelerate
from memplan.configs.read import read_engine_config
from memplan.configs.setup import EngineConfig, with_cluster, with_training
from memplan.errors import SpecError, UnsupportedError
from memplan.specs.hardware import ClusterSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported


def parsed(config: Mapping[str, Any]) -> EngineConfig:
    return parse_accelerate({"num_processes": 2, **config}, "a.yaml")


def strategy_of(config: Mapping[str, Any]) -> Strategy:
    return with_training(parsed(config), TrainingSpec(), {}, 2)[1]


def launched(monkeypatch: pytest.MonkeyPatch, folder: Path, config: Mapping[str, Any]) -> Any:
    """The plugin that a process started by ``accelerate launch`` makes of its environment."""
    import torch
    from accelerate.commands import launch
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, dataclasses
    from accelerate.utils import launch as prepare

    path = folder / "a.yaml"
    path.write_text(yaml.safe_dump({"num_processes": 2, "num_machines": 1, **config}))
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(prepare, "is_port_in_use", lambda port: False)
    monkeypatch.setattr(dataclasses, "is_cuda_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    # As __main__ does; actions note what the command line itself says.
    arguments = launch.launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    arguments, defaults, from_config = launch._validate_launch_command(arguments)
    if arguments.use_deepspeed:
        fields = list(defaults.deepspeed_config) + (["mixed_precision"] if from_config else [])
        arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
        environment = prepare.prepare_deepspeed_cmd_env(arguments)[1]
    else:
        environment = prepare.prepare_multi_gpu_env(arguments)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return DeepSpeedPlugin() if arguments.use_deepspeed else FullyShardedDataParallelPlugin()


FSDP: list[dict[str, Any]] = [
    {},
    {"fsdp_version": 2},
    {"fsdp_version": 2, "fsdp_reshard_after_forward": False},
    {"fsdp_version": 2, "fsdp_reshard_after_forward": "false", "fsdp_auto_wrap_policy": "transformer_based_wrap"},
    {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_offload_params": True},
    {"fsdp_version": 2, "fsdp_backward_prefetch": "BACKWARD_PRE", "fsdp_use_orig_params": False},
    {"fsdp_version": 2, "fsdp_activation_checkpointing": True, "fsdp_cpu_ram_efficient_loading": False},
    {"fsdp_version": 2, "fsdp_forward_prefetch": True},
    {"fsdp_version": 1, "fsdp_sharding_strategy": "SHARD_GRAD_OP"},
    {"fsdp_version": 1, "fsdp_sharding_strategy": 2, "fsdp_backward_prefetch": "1"},
    {"fsdp_version": 1, "fsdp_sharding_strategy": "full_shard", "fsdp_backward_prefetch": "BACKWARD_POST"},
    {"fsdp_version": 1, "fsdp_reshard_after_forward": "SHARD_GRAD_OP"},
    {"fsdp_version": 1, "fsdp_sharding_strategy": "NO_SHARD"},
    {"fsdp_version": 1, "fsdp_sharding_strategy": "hybrid_shard_zero2"},
    {"fsdp_version": 1, "fsdp_reshard_after_forward": False},
    {"fsdp_version": 1, "fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_forward_prefetch": True},
    {"fsdp_version": 1, "fsdp_backward_prefetch": "NO_PREFETCH", "fsdp_use_orig_params": False},
    {"fsdp_version": 1, "fsdp_cpu_ram_efficient_loading": False, "fsdp_sync_module_states": False},
    {"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"},
    {"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP", "fsdp_min_num_params": 5000},
    {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer,B"},
    {"version": 2, "offload_params": True, "auto_wrap_policy": "NO_WRAP"},
]


@pytest.mark.parametrize("values", FSDP, ids=lambda values: json.dumps(values)[:80])
def test_fsdp_is_what_accelerate_launches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: dict[str, Any]
) -> None:
    config = {"distributed_type": "FSDP", "mixed_precision": "bf16", "fsdp_config": values}
    real = launched(monkeypatch, tmp_path, config)
    strategy = strategy_of(config)
    own = strategy.fsdp
    assert own.version == real.fsdp_version
    if own.version == 1:
        assert own.sharding_strategy == real.sharding_strategy.name.lstrip("_")
        assert own.backward_prefetch == (real.backward_prefetch.name if real.backward_prefetch else "NO_PREFETCH")
        assert own.forward_prefetch == real.forward_prefetch
        assert own.use_orig_params == real.use_orig_params
        assert own.sync_module_states == real.sync_module_states
    else:
        assert own.reshard_after_forward is real.reshard_after_forward
    assert own.state_dict_type == real.state_dict_type.name
    assert own.activation_checkpointing == real.activation_checkpointing
    assert own.cpu_ram_efficient_loading == real.cpu_ram_efficient_loading
    offloads = getattr(real.cpu_offload, "offload_params", type(real.cpu_offload).__name__ == "CPUOffloadPolicy")
    assert strategy.offload_param == ("cpu" if offloads else "none")
    wraps = {"TRANSFORMER_BASED_WRAP": "transformer_auto_wrap_policy", "SIZE_BASED_WRAP": "size_based_auto_wrap_policy"}
    assert wraps.get(own.auto_wrap_policy) == getattr(real.auto_wrap_policy, "__name__", None)
    if own.auto_wrap_policy == "SIZE_BASED_WRAP":
        assert own.min_num_params == real.min_num_params
    if own.auto_wrap_policy == "TRANSFORMER_BASED_WRAP":
        assert list(own.transformer_layer_cls_to_wrap) == (real.transformer_cls_names_to_wrap or [])


PARALLEL: list[dict[str, Any]] = [
    {"parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 4},
    {"parallelism_config_dp_shard_size": 8},
    {"parallelism_config_dp_replicate_size": 2},
    {"parallelism_config_tp_size": 1},
]


@pytest.mark.parametrize("values", PARALLEL, ids=lambda values: json.dumps(values)[:80])
def test_hybrid_sharding_is_what_accelerate_launches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: dict[str, Any]
) -> None:
    from accelerate import ParallelismConfig

    config = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}, "parallelism_config": values}
    launched(monkeypatch, tmp_path, config)
    real, own = ParallelismConfig(), strategy_of(config).fsdp
    assert (own.dp_replicate_size, own.dp_shard_size) == (real.dp_replicate_size, real.dp_shard_size)


def test_version_1_with_a_parallelism_config_is_refused() -> None:
    sizes = {"parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 1}
    config = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}, "parallelism_config": sizes}
    with pytest.raises(SpecError, match=r"fsdp_version: 1 is refused by accelerate with a parallelism_config\. Leave"):
        parsed(config)


DEEPSPEED: list[dict[str, Any]] = [
    {},
    {"zero_stage": 1},
    {"zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": True},
    {"zero_stage": 2, "offload_optimizer_device": "cpu", "gradient_accumulation_steps": 4, "gradient_clipping": 1.0},
    {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "CPU"},
    {
        "zero_stage": 3,
        "offload_optimizer_device": "nvme",
        "offload_optimizer_nvme_path": "/nvme",
        "offload_param_device": "none",
    },
    {"zero_stage": 3, "offload_param_device": "none", "gradient_accumulation_steps": "auto"},
]


@pytest.mark.parametrize("values", DEEPSPEED, ids=lambda values: json.dumps(values)[:80])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
def test_deepspeed_is_what_accelerate_launches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: dict[str, Any], precision: str
) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = {"distributed_type": "DEEPSPEED", "mixed_precision": precision, "deepspeed_config": values}
    plugin = launched(monkeypatch, tmp_path, config)
    plugin.set_mixed_precision(precision)
    real = plugin.deepspeed_config
    zero = DeepSpeedZeroConfig(**real["zero_optimization"])
    found = parsed(config)
    training, strategy, _ = with_training(found, TrainingSpec(), {}, 2)
    assert strategy.zero_stage == zero.stage
    assert (strategy.offload_optimizer, strategy.offload_param) == (
        zero.offload_optimizer.device,
        zero.offload_param.device,
    )
    assert with_cluster(found, ClusterSpec())[0].nvme_path == (zero.offload_optimizer.nvme_path and "/nvme")
    assert strategy.zero.reduce_bucket_size == zero.reduce_bucket_size
    assert strategy.zero.stage3_gather_16bit_weights_on_model_save == zero.gather_16bit_weights_on_model_save
    enabled = [name for name in ("bf16", "fp16") if real[name]["enabled"]]
    assert training.mixed_precision == (enabled[0] if enabled else "no")
    steps = real["gradient_accumulation_steps"]
    assert training.grad_accum_steps == (1 if steps == "auto" else steps)


def test_a_referenced_file_is_read_as_by_accelerate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    written = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto", "fp16": {"enabled": "auto"}}
    Path("ds.json").write_text(json.dumps(written))
    config = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}}
    real = launched(monkeypatch, tmp_path, config).deepspeed_config
    training, strategy, _ = with_training(parsed(config), TrainingSpec(), {}, 2)
    assert strategy.zero_stage == real["zero_optimization"]["stage"]
    assert training.grad_accum_steps == real["gradient_accumulation_steps"] == 1
    assert training.mixed_precision is None


def test_a_referenced_file_may_lie_beside_the_config(tmp_path: Path) -> None:
    written = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": "auto"}
    (tmp_path / "ds.json").write_text(json.dumps(written))
    (tmp_path / "a.yaml").write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n  deepspeed_config_file: ds.json\n"
    )
    found = read_engine_config(tmp_path / "a.yaml")
    assert found.strategy["kind"] == "zero1"
    assert any("accelerate looks in the folder it is started in" in note for note in found.notes)


def launched_without_precision(monkeypatch: pytest.MonkeyPatch, folder: Path, config: dict[str, Any]) -> None:
    plugin = launched(monkeypatch, folder, config)
    if config["distributed_type"] == "DEEPSPEED":
        plugin.set_mixed_precision("no")


def fsdp(**values: Any) -> dict[str, Any]:
    return {"distributed_type": "FSDP", "fsdp_config": {f"fsdp_{name}": value for name, value in values.items()}}


def deepspeed(**values: Any) -> dict[str, Any]:
    return {"distributed_type": "DEEPSPEED", "deepspeed_config": values}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {**fsdp(), "num_proceses": 2},
        "num_proceses: 2 is given to a key that accelerate does not have. Did you mean num_p",
    ),
    ({"distributed_type": "FSDB"}, "is not a kind that accelerate knows. Did you mean FSDP?"),
    ({**fsdp(), "mixed_precision": False}, "is what YAML makes of no without quotes. Write 'no'."),
    ({**fsdp(), "mixed_precision": "bf32"}, "is refused by accelerate. Use bf16, fp16 or no."),
    ({**fsdp(), "num_processes": -1}, "num_processes: missing, which accelerate refuses"),
    (fsdp(auto_wrap_policy="ALL"), "is refused by accelerate. Use TRANS"),
    (fsdp(version=2, reshard_after_forward="FULL_SHARD"), "is refused by accelerate in FSDP2. Use true"),
    (fsdp(version=2, state_dict_type="LOCAL_STATE_DICT"), "is refused by accelerate in FSDP2. Use SHARDED_STATE_DICT."),
    (fsdp(sync_module_states=False), "is refused by accelerate with fsdp_cpu_ram_efficient_loading. Set"),
    (fsdp(activation_checkpointing_offload=True), "needs fsdp_activation_checkpointing and fsdp_version 2"),
    (fsdp(sharding_strategy="SOME"), "is refused by accelerate. Use FULL"),
    (deepspeed(deepspeed_config_file="none.json"), "does not exist"),
    (deepspeed(zero_stage="x"), "a.yaml: deepspeed_config.zero_stage: 'x' is refused by accelerate"),
    (
        {**deepspeed(deepspeed_config_file="ds.json", zero_stage=2), "mixed_precision": "bf16"},
        "stands beside zero_stage, mixed_precision, which accelerate",
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=lambda value: json.dumps(value)[:70])
def test_what_accelerate_refuses_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises((ValueError, KeyError, AttributeError, FileNotFoundError)):
        launched_without_precision(monkeypatch, tmp_path, config)
    with pytest.raises(SpecError) as caught:
        with_cluster(parsed(config), ClusterSpec())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"distributed_type": "MEGATRON_LM"},
        {"distributed_type": "MULTI_CPU"},
        {"distributed_type": "FSDP", "mixed_precision": "fp8"},
        {"distributed_type": "MULTI_GPU", "dynamo_config": {"dynamo_backend": "INDUCTOR"}},
        {"distributed_type": "FSDP", "parallelism_config": {"parallelism_config_tp_size": 2}},
        {"distributed_type": "MULTI_GPU", "parallelism_config": {"parallelism_config_dp_replicate_size": 2}},
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_ignored_modules": "head"}},
        {"distributed_type": "MULTI_GPU", "use_cpu": True},
        {"compute_environment": "AMAZON_SAGEMAKER", "distributed_type": "NO"},
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "deepspeed_moe_layer_cls_names": "A"}},
    ],
    ids=lambda value: json.dumps(value)[:70],
)
def test_what_is_not_modelled_is_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"^a\.yaml: .+ is not modelled|^a\.yaml: .+ are not modelled"):
        parsed(config)


def test_the_tables_are_those_of_accelerate() -> None:
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    legacy = {"fp16", "dynamo_backend"}  # process_config turns them into today's
    assert keys.ACCELERATE[""].keys() - legacy == {each.name for each in dataclasses.fields(ClusterConfig)}
    flags = {action.dest for action in launch_command_parser()._actions}
    fsdp = {flag for flag in flags if flag.startswith("fsdp_")} | {"fsdp_ignored_modules"}
    earlier = {"fsdp_backward_prefetch_policy"}
    assert keys.ACCELERATE["fsdp_config"].keys() - earlier == fsdp
    parallel = {flag for flag in flags if flag.startswith("parallelism_config_")}
    assert keys.ACCELERATE["parallelism_config"].keys() == parallel
    assert keys.ACCELERATE["deepspeed_config"].keys() <= flags
    deepspeed = {flag for flag in flags if flag.startswith(("deepspeed", "zero", "offload"))}
    assert deepspeed <= keys.ACCELERATE["deepspeed_config"].keys()


def test_the_flag_of_zero_init_has_no_effect() -> None:
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations import is_deepspeed_zero3_enabled

    plugin = DeepSpeedPlugin(zero_stage=3, zero3_init_flag=False)
    plugin.set_deepspeed_weakref()
    assert is_deepspeed_zero3_enabled()
    found = parsed({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": False}})
    assert found.notes[0].startswith("zero3_init_flag false has no effect")


def test_what_deepspeed_refuses_of_an_accelerate_config() -> None:
    with pytest.raises(SpecError) as caught:
        parsed(deepspeed(zero_stage=7))
    assert str(caught.value).startswith("a.yaml: deepspeed_config.zero_stage: 7 is not a stage of ZeRO")
    with pytest.raises(SpecError) as caught:
        with_cluster(parsed(deepspeed(zero_stage=3, offload_param_device="nvme")), ClusterSpec())
    assert str(caught.value).startswith("a.yaml: deepspeed_config.offload_param_nvme_path: missing")


def test_gpus_and_nodes() -> None:
    found = parsed({"distributed_type": "MULTI_GPU", "num_processes": 16, "num_machines": 2, "mixed_precision": "bf16"})
    cluster, notes = with_cluster(found, ClusterSpec())
    assert (cluster.gpus, cluster.nodes, notes) == (16, 2, [])
    cluster, notes = with_cluster(found, ClusterSpec(gpus=4))
    assert (cluster.gpus, cluster.nodes) == (4, 2)
    assert [note.source for note in notes] == ["gpus 4, as asked, in place of 16 in a.yaml"]
    assert found.strategy == {"kind": "ddp"}
    with pytest.raises(SpecError, match="num_processes: 6 cannot be shared evenly by 4 nodes"):
        with_cluster(parsed({"distributed_type": "FSDP", "num_processes": 6, "num_machines": 4}), ClusterSpec())


def test_one_process() -> None:
    assert parsed({"distributed_type": False}).strategy == {"kind": "single"}
    found = parsed({"distributed_type": "NO", "num_processes": 4})
    assert with_cluster(found, ClusterSpec())[0].gpus == 1
    assert found.notes == ("distributed_type NO starts one process, not 4",)
