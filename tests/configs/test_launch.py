"""The folder that runs a setup: what it holds, that the libraries read it, and that it is the setup again."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.architectures.registry import MODEL_CLASSES
from memplan.case import model_spec
from memplan.catalog.gpus import find_gpu
from memplan.catalog.models import all_models
from memplan.configs import launch
from memplan.configs.argument_keys import SCRIPT_ARGUMENTS
from memplan.configs.launch import as_written, files, parse, read, write
from memplan.configs.tiny import tiny_config
from memplan.configs.trainer import _OWN_NAMES
from memplan.engines.zero import master_dtype
from memplan.errors import MemplanError, SpecError
from memplan.estimator import resolve
from memplan.specs.hardware import ClusterSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import DdpSpec, FsdpSpec, OffloadOptimizerSpec, OffloadParamSpec, Strategy, ZeroSpec
from memplan.specs.training import OPTIMIZERS, LoraSpec, QuantizationSpec, TrainingSpec

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
LLAMA = model_spec("meta-llama/Llama-2-7b")
TWO = ClusterSpec(gpu=find_gpu("A100-80GB"), gpus=2, nvme_path="/nvme")
SOFTWARE = SoftwareSpec()


def written(
    strategy: Strategy | None = None,
    training: TrainingSpec | None = None,
    cluster: ClusterSpec | None = None,
    model: Any = LLAMA,
    software: SoftwareSpec = SOFTWARE,
) -> dict[str, str]:
    strategy = strategy or Strategy(kind="zero2")
    if cluster is None:
        cluster = TWO.replace(gpus=1) if strategy.kind == "single" else TWO
    return files(model, training or TrainingSpec(), cluster, strategy, software)


# -- emit, parse, emit -------------------------------------------------------------------------------------------------

counts = st.integers(1, 10**9)
flags = st.booleans()


def spec(kind: Callable[..., Any], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A spec of which any of these fields are given."""
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: kind(**values))


@st.composite
def zeros(draw: st.DrawFn) -> Strategy:
    stage = draw(st.integers(0, 3))
    places = {"offload_optimizer": "none", "offload_param": "none"}
    if stage > 0:
        places["offload_optimizer"] = draw(st.sampled_from(["none", "cpu"] + ["nvme"] * (stage == 3)))
    if stage == 3:
        places["offload_param"] = draw(st.sampled_from(["none", "cpu", "nvme"]))
    fields: dict[str, st.SearchStrategy[Any]] = {
        "contiguous_gradients": flags,
        "reduce_scatter": flags,
        "reduce_bucket_size": st.one_of(counts, st.just("auto")),
        "allgather_bucket_size": counts,
        "overlap_comm": st.sampled_from([None, True, False]),
        "round_robin_gradients": flags,
        "grad_accum_dtype": st.sampled_from([None, "fp32", "bf16"]),
        "communication_data_type": st.sampled_from([None, "fp32", "bf16"]),
        "zero_force_ds_cpu_optimizer": flags,
        "allgather_partitions": flags,
        "bf16_master_weights_and_grads": flags,
    }
    if stage == 3:
        fields |= {
            "stage3_model_persistence_threshold": counts,
            "zero_quantized_weights": flags,
            "sub_group_size": counts,
            "stage3_prefetch_bucket_size": st.one_of(counts, st.just("auto")),
            "stage3_param_persistence_threshold": st.one_of(counts, st.just("auto")),
            "stage3_max_live_parameters": counts,
            "stage3_max_reuse_distance": counts,
            "stage3_gather_16bit_weights_on_model_save": flags,
        }
    values = draw(st.fixed_dictionaries({}, optional=fields))
    if places["offload_optimizer"] != "none":
        keys: dict[str, st.SearchStrategy[Any]] = {"pin_memory": flags}
        if stage == 3:
            keys["ratio"] = st.sampled_from([0.5, 1.0])
        if places["offload_optimizer"] == "nvme":
            keys |= {"buffer_count": st.integers(4, 9), "pipeline_read": flags, "fast_init": flags}
        values["offload_optimizer"] = draw(spec(OffloadOptimizerSpec, **keys))
    if places["offload_param"] != "none":
        keys = {"pin_memory": flags}
        if places["offload_param"] == "nvme":
            keys |= {"buffer_count": st.integers(2, 9), "buffer_size": counts, "max_in_cpu": counts}
        values["offload_param"] = draw(spec(OffloadParamSpec, **keys))
    if "nvme" in places.values():
        values["aio"] = draw(st.fixed_dictionaries({}, optional={"block_size": counts, "queue_depth": counts}))
    return Strategy(kind=f"zero{stage}", zero=ZeroSpec(**values), **places)


fsdps = st.builds(
    lambda fsdp, place: Strategy(kind="fsdp", fsdp=fsdp, offload_param=place),
    st.one_of(
        spec(
            FsdpSpec,
            reshard_after_forward=flags,
            state_dict_type=st.sampled_from(["FULL_STATE_DICT", "SHARDED_STATE_DICT"]),
            cpu_ram_efficient_loading=flags,
            activation_checkpointing=flags,
        ),
        spec(
            lambda **values: FsdpSpec(version=1, **values),
            sharding_strategy=st.sampled_from(["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"]),
            backward_prefetch=st.sampled_from(["BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"]),
            forward_prefetch=flags,
            use_orig_params=flags,
        ),
        spec(
            lambda **values: FsdpSpec(version=1, sharding_strategy="HYBRID_SHARD", **values),
            state_dict_type=st.sampled_from(["FULL_STATE_DICT", "SHARDED_STATE_DICT"]),
            sync_module_states=st.just(True),
        ),
        st.just(FsdpSpec(auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=1000)),
        st.just(FsdpSpec(auto_wrap_policy="NO_WRAP")),
        st.just(FsdpSpec(transformer_layer_cls_to_wrap=("LlamaDecoderLayer", "Embedding"))),
    ),
    st.sampled_from(["none", "cpu"]),
)
ddps = spec(
    DdpSpec,
    bucket_cap_mb=st.integers(1, 500),
    broadcast_buffers=flags,
    find_unused_parameters=st.sampled_from([None, True, False]),
    static_graph=flags,
).map(lambda ddp: Strategy(kind="ddp", ddp=ddp))
loras = spec(
    lambda **values: LoraSpec(rank=8, **values),
    targets=st.sampled_from([(), ("q_proj",), ("all-linear",), ("q_proj", "k_proj")]),
    dropout=st.sampled_from([0.0, 0.1]),
    alpha=st.sampled_from([None, 16]),
    modules_to_save=st.sampled_from([(), ("lm_head",)]),
    bias=st.sampled_from(["none", "all"]),
    autocast_adapter_dtype=flags,
)
quantizations = st.builds(
    QuantizationSpec,
    kind=st.sampled_from(["int8", "nf4", "nf4-dq"]),
    compute_dtype=st.sampled_from([None, "float32"]),
    quant_storage=st.sampled_from(["uint8", "bfloat16"]),
    prepare_for_kbit_training=flags,
    peft_module_casting_to_bf16=flags,
    bf16_adapters=flags,
).map(lambda spec: spec.replace(quant_storage="uint8") if spec.kind == "int8" else spec)  # which packs nothing


@st.composite
def trainings(draw: st.DrawFn) -> TrainingSpec:
    values = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "micro_batch_size": st.integers(1, 64),
                "seq_len": st.integers(1, 4096),
                "grad_accum_steps": st.integers(1, 64),
                "optim": st.sampled_from(sorted(OPTIMIZERS.keys() - _OWN_NAMES.keys())),
                "dtype": st.sampled_from([None, "auto", "float32", "bfloat16"]),
                "mixed_precision": st.sampled_from([None, "no", "bf16", "fp16"]),
                "attn": st.sampled_from(["eager", "sdpa"]),
                "gradient_checkpointing": flags,
                "packed": flags,
                "liger": flags,
                "vocab_size": st.sampled_from([None, 32_064]),
                "eval_batch_size": st.sampled_from([None, 4]),
                "lora": loras,
                "alloc_conf": st.sampled_from([None, "expandable_segments:True", "max_split_size_mb:128"]),
            },
        )
    )
    if values.get("gradient_checkpointing"):
        values["use_reentrant"] = draw(st.sampled_from([None, True, False]))
    if "lora" in values and draw(flags):
        values["quantization"] = draw(quantizations)
    if values.get("dtype") == "auto":
        values["dtype"] = "float32"  # this config names none
    return TrainingSpec(**values)


def legal(training: TrainingSpec, cluster: ClusterSpec, strategy: Strategy) -> bool:
    """Whether a setup is none that is refused, as quantized weights without mixed precision are."""
    try:
        found = resolve(LLAMA, training, cluster, as_written(strategy), SOFTWARE)
        if strategy.is_deepspeed:
            master_dtype(strategy, found.dtype)
    except MemplanError:
        return False
    return True


@given(
    strategy=st.one_of(zeros(), fsdps, ddps, st.just(Strategy())), training=trainings(), nodes=st.sampled_from([1, 2])
)
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_the_setup_again(strategy: Strategy, training: TrainingSpec, nodes: int) -> None:
    cluster = TWO.replace(
        gpus=1 if strategy.kind == "single" else 4 * nodes, nodes=1 if strategy.kind == "single" else nodes
    )
    if strategy.fsdp.activation_checkpointing:  # the Trainer refuses both
        training = training.replace(gradient_checkpointing=False)
    if not legal(training, cluster, strategy):
        return
    found = files(LLAMA, training, cluster, strategy, SOFTWARE)
    again = parse(found)
    assert (again.model, again.gpus, again.nodes) == (LLAMA.id, cluster.gpus, cluster.nodes)
    assert again.notes == ()
    assert files(LLAMA, again.training, cluster, again.strategy, SOFTWARE) == found
    assert again.strategy.to_dict() == as_written(strategy).to_dict()
    setups = [
        resolve(LLAMA, asked, cluster, kind, SOFTWARE)
        for asked, kind in ((training, as_written(strategy)), (again.training, again.strategy))
    ]
    assert setups[0].precision == setups[1].precision
    known = {"dtype": None, "mixed_precision": None, "head": None}
    asked, got = (setup.training.to_dict() | known for setup in setups)
    for each in (asked, got):
        each["quantization"] = each["quantization"] and {**each["quantization"], "compute_dtype": None}
    assert asked == got


def test_zero_3_gathers_what_it_saves_and_nvme_has_its_folder() -> None:
    strategy = Strategy(
        kind="zero3", offload_param="nvme", offload_optimizer="nvme", zero=ZeroSpec(sub_group_size=10**8)
    )
    found = written(strategy)
    config = json.loads(found["ds_config.json"])
    assert config["zero_optimization"] == {
        "stage": 3,
        "sub_group_size": 10**8,
        "stage3_gather_16bit_weights_on_model_save": True,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"},
        "offload_param": {"device": "nvme", "nvme_path": "/nvme"},
    }
    assert parse(found).nvme_path == "/nvme"
    assert "scheduler" not in config  # the Trainer's goes with DeepSpeed's optimizer and with its own


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adamw_torch_loop"])
def test_an_optimizer_of_deepspeed_is_asked_for_in_its_config(optim: str) -> None:
    training = TrainingSpec(optim=optim)
    found = written(Strategy(kind="zero2", zero=ZeroSpec(ds_optimizer=True)), training)
    assert "optim" not in json.loads(found["training_args.json"])
    assert json.loads(found["ds_config.json"])["optimizer"]["params"]["lr"] == "auto"
    again = parse(found)
    assert again.training.optim == optim
    assert again.strategy.zero.ds_optimizer


# -- the libraries' own parsers ----------------------------------------------------------------------------------------

CASES: dict[str, tuple[Strategy, TrainingSpec]] = {
    "single": (Strategy(), TrainingSpec(gradient_checkpointing=True, use_reentrant=True)),
    "ddp": (Strategy(kind="ddp", ddp=DdpSpec(bucket_cap_mb=50, static_graph=True)), TrainingSpec(eval_batch_size=4)),
    "zero0": (Strategy(kind="zero0"), TrainingSpec()),
    "zero1": (Strategy(kind="zero1"), TrainingSpec(lora=8)),
    "zero2": (
        Strategy(kind="zero2", offload_optimizer="cpu", zero=ZeroSpec(reduce_bucket_size="auto")),
        TrainingSpec(grad_accum_steps=4),
    ),
    "zero2 with DeepSpeed's optimizer": (Strategy(kind="zero2", zero=ZeroSpec(ds_optimizer=True)), TrainingSpec()),
    "zero2 fp16": (Strategy(kind="zero2"), TrainingSpec(mixed_precision="fp16")),
    "zero3": (
        Strategy(kind="zero3", zero=ZeroSpec(reduce_bucket_size="auto", stage3_prefetch_bucket_size="auto")),
        TrainingSpec(liger=False, mixed_precision="no", dtype="float32"),
    ),
    "zero3 on nvme": (
        Strategy(kind="zero3", offload_param="nvme", offload_optimizer="nvme", zero=ZeroSpec(aio={"queue_depth": 16})),
        TrainingSpec(),
    ),
    "fsdp2": (Strategy(kind="fsdp", offload_param="cpu"), TrainingSpec()),
    "fsdp1": (Strategy(kind="fsdp", fsdp=FsdpSpec(version=1, sharding_strategy="SHARD_GRAD_OP")), TrainingSpec()),
}


def script_arguments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The dataclass in a written train.py."""
    source = importlib.util.spec_from_file_location("train", folder / "train.py")
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    monkeypatch.setitem(sys.modules, "train", module)  # where its annotations are looked up
    source.loader.exec_module(module)
    return module.ScriptArguments


@pytest.mark.parametrize("case", CASES)
def test_the_libraries_read_what_is_written(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers
    from transformers.integrations import deepspeed as integration

    strategy, training = CASES[case]
    write(written(strategy, training), tmp_path / "plan")
    monkeypatch.chdir(tmp_path / "plan")
    script = script_arguments(tmp_path / "plan", monkeypatch)
    values = json.loads(Path("training_args.json").read_text())
    parser = transformers.HfArgumentParser((script, transformers.TrainingArguments))
    on_cpu = {"use_cpu": True} | ({"fp16": False} if values["fp16"] else {})
    try:
        own, arguments = parser.parse_dict(values | on_cpu)  # a key of neither is refused
        assert own.seq_len == training.seq_len
        assert arguments.gradient_checkpointing == training.gradient_checkpointing
        wanted = {"use_reentrant": training.use_reentrant} if training.use_reentrant is not None else None
        assert arguments.activation_checkpointing_kwargs == wanted
        assert (arguments.ddp_static_graph or False) == strategy.ddp.static_graph
        if strategy.is_deepspeed:
            check_deepspeed(strategy, training, arguments)
    finally:
        integration.unset_hf_deepspeed_config()
    if strategy.kind in ("ddp", "fsdp"):
        check_accelerate(strategy, monkeypatch)


def check_deepspeed(strategy: Strategy, training: TrainingSpec, arguments: Any) -> None:
    from deepspeed import DeepSpeedConfig

    from memplan.configs.deepspeed import parse_deepspeed

    filled = arguments.hf_deepspeed_config
    config = type("Config", (), {"hidden_size": 64})
    filled.trainer_config_finalize(arguments, type("Model", (), {"config": config}), 10)
    assert "auto" not in json.dumps(filled.config)
    real = DeepSpeedConfig(filled.config)
    assert parse_deepspeed(filled.config, "ds_config.json").notes == ()  # keys that DeepSpeed would ignore are noted
    assert real.zero_optimization_stage == strategy.zero_stage
    zero = real.zero_config
    offloaded = {name: getattr(zero, name) for name in ("offload_optimizer", "offload_param")}
    assert {n: str(o.device if o else "none").rpartition(".")[2] for n, o in offloaded.items()} == {
        name: getattr(strategy, name) for name in offloaded
    }
    assert zero.gather_16bit_weights_on_model_save == (strategy.zero_stage == 3)
    assert real.gradient_accumulation_steps == training.grad_accum_steps
    assert real.train_micro_batch_size_per_gpu == training.micro_batch_size
    if strategy.zero.ds_optimizer:
        assert real.optimizer_params["lr"] == arguments.learning_rate


def check_accelerate(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands import launch as launcher
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import launch as prepare

    loaded = load_config_from_file("accelerate.yaml")
    assert loaded.num_processes == 2
    monkeypatch.setattr(prepare, "is_port_in_use", lambda port: False)
    arguments = launcher.launch_command_parser().parse_args(["--config_file", "accelerate.yaml", "train.py"])
    arguments, _, _ = launcher._validate_launch_command(arguments)
    environment = prepare.prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if strategy.kind == "ddp":
        assert arguments.multi_gpu
        assert "FSDP_VERSION" not in environment
        return
    fsdp = strategy.fsdp
    expected = {
        "FSDP_VERSION": str(fsdp.version),
        "FSDP_OFFLOAD_PARAMS": str(strategy.offload_param == "cpu").lower(),
        "FSDP_AUTO_WRAP_POLICY": fsdp.auto_wrap_policy,
        "FSDP_STATE_DICT_TYPE": fsdp.state_dict_type,
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    if fsdp.version == 1:
        expected["FSDP_SHARDING_STRATEGY"] = str(fsdp.sharding_strategy)
    assert expected.items() <= environment.items()


# -- train.py's own data -----------------------------------------------------------------------------------------------


class Table:
    """As much of datasets.Dataset as train.py uses; the library itself is the user's to install."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns
        self.column_names = list(columns)

    def map(self, function: Callable[..., Any], *, batched: bool, remove_columns: list[str]) -> Table:
        assert batched
        kept = {name: values for name, values in self.columns.items() if name not in remove_columns}
        return Table(kept | function(self.columns))


TEXTS = ["a b c", "c b", "a a a a a a a"]


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"<mask>": 0, "</s>": 2, "<unk>": 3, "a": 4, "b": 5, "c": 6}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", mask_token="<mask>").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {},
            {"input_ids": [[4, 5, 6, 2], [6, 5, 2, 4], [4, 4, 4, 4]], "labels": [[4, 5, 6, 2], [6, 5, 2, 4], [4] * 4]},
        ),
        (
            {"packed": False},
            {
                "input_ids": [[4, 5, 6, 2], [6, 5, 2, 2], [4, 4, 4, 4]],
                "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
                "labels": [[4, 5, 6, -100], [6, 5, -100, -100], [4, 4, 4, 4]],
            },
        ),
        (
            {"model_class": "AutoModelForSeq2SeqLM", "target_column": "target"},
            {
                "input_ids": [[4, 5, 6, 2], [6, 5, 2, 2], [4, 4, 4, 4]],
                "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
                "labels": [[4, -100, -100, -100], [5, 6, -100, -100], [6, -100, -100, -100]],
            },
        ),
        ({"model_class": "AutoModelForMaskedLM"}, {"input_ids": [[4, 5, 6, 6], [5, 4, 4, 4], [4, 4, 4, 4]]}),
        (
            {"model_class": "AutoModelForMaskedLM", "packed": False},
            {
                "input_ids": [[4, 5, 6, 2], [6, 5, 2, 2], [4, 4, 4, 4]],
                "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
            },
        ),
        (
            {"model_class": "AutoModelForSequenceClassification"},
            {
                "input_ids": [[4, 5, 6, 2], [6, 5, 2, 2], [4, 4, 4, 4]],
                "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
                "labels": [0, 1, 0],
            },
        ),
    ],
)
def test_a_dataset_is_made_into_what_the_model_takes(
    values: dict[str, Any], expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("")
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Table:
        asked.append((args, kwargs))
        return Table({"text": TEXTS, "label": [0, 1, 0], "target": ["a", "b c", "c"]})

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    write(written(), tmp_path / "plan")
    script = script_arguments(tmp_path / "plan", monkeypatch)
    load_data = sys.modules["train"].load_data
    arguments = {"model_name_or_path": str(tmp_path / "model"), "seq_len": 4, "dataset": "someone/texts"} | values
    assert load_data(script(**arguments)).columns == expected
    path = str(tmp_path / "rows.jsonl")
    assert load_data(script(**arguments | {"dataset": path})).columns == expected
    assert asked == [
        (("someone/texts", None), {"split": "train"}),
        (("json",), {"data_files": path, "split": "train"}),
    ]


@pytest.mark.parametrize("packed", [True, False])
def test_a_masked_model_is_asked_for_what_is_hidden(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    save_tokenizer(tmp_path / "model")
    write(written(), tmp_path / "plan")
    script = script_arguments(tmp_path / "plan", monkeypatch)
    arguments = {"model_name_or_path": str(tmp_path / "model"), "model_class": "AutoModelForMaskedLM"}
    mask_tokens = sys.modules["train"].mask_tokens(script(**arguments, packed=packed))
    torch.manual_seed(0)
    tokens = torch.full((4, 64), 5)
    batch = mask_tokens([{"input_ids": row.tolist()} for row in tokens])
    assert set(batch) == {"input_ids", "labels"} | (set() if packed else {"attention_mask"})
    asked = batch["labels"] != -100
    assert 0.05 < asked.float().mean() < 0.3
    assert (batch["labels"][asked] == 5).all()
    assert (batch["input_ids"][~asked] == 5).all()
    assert (batch["input_ids"][asked] == 0).any()


@pytest.mark.parametrize(("kind", "hits"), [("AutoModelForCausalLM", 0.5), ("AutoModelForSeq2SeqLM", 0.75)])
def test_only_a_causal_models_logits_are_of_the_next_token(
    kind: str, hits: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    write(written(), tmp_path / "plan")
    script = script_arguments(tmp_path / "plan", monkeypatch)(model_name_or_path="", model_class=kind)
    guesses = np.array([[1, 2, 3, 3, 0]])
    labels = np.array([[0, 1, 2, 9, 9]] if kind == "AutoModelForCausalLM" else [[1, 2, 3, 4, -100]])
    prediction = SimpleNamespace(predictions=np.eye(10)[guesses], label_ids=labels)
    assert sys.modules["train"].accuracy(prediction, script) == {"accuracy": hits}


# -- the rehearsal's model ---------------------------------------------------------------------------------------------

NATIVE = [model for model in all_models() if model.remote_code is None]


@pytest.mark.parametrize("kind", sorted({model.config["model_type"] for model in NATIVE}))
def test_the_tiny_model_is_the_same_family_with_two_layers(kind: str) -> None:
    import torch
    import transformers

    models = [model_spec(model.id) for model in NATIVE if model.config["model_type"] == kind]
    for model in models:
        config = transformers.AutoConfig.for_model(**json.loads(json.dumps(tiny_config(model))))
        with torch.device("meta"):
            built = getattr(transformers, model.architecture)._from_config(config)
        assert config.num_hidden_layers == 2, model.id
        assert sum(p.numel() for p in built.parameters()) < 2_500_000, model.id
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(tiny_config(models[0]))))
    built = getattr(transformers, models[0].architecture)._from_config(config)
    inputs = {"input_ids": torch.randint(3, 512, (1, 16))}
    if kind == "vit":
        inputs = {"pixel_values": torch.randn(1, 3, config.image_size, config.image_size)}
    if config.is_encoder_decoder:
        inputs["labels"] = inputs["input_ids"]
    assert torch.isfinite(built(**inputs)[0]).all()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3_moe", "gpt2", "bert"])
def test_a_tiny_classifier_tells_where_a_text_ends(kind: str) -> None:
    """Its checkpoint does, whose config in the catalog may not."""
    import transformers

    for model in (model for model in NATIVE if model.config["model_type"] == kind):
        config = transformers.AutoConfig.for_model(**tiny_config(model_spec(model.id)))
        assert {config.pad_token_id, config.eos_token_id} - {None}, model.id


@pytest.mark.parametrize(
    ("model", "attention"), [("openai-community/gpt2", "sdpa"), ("EleutherAI/gpt-neo-125m", "eager")]
)
def test_a_rehearsal_on_cpu_takes_the_attention_that_there_is(
    model: str, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TrainingSpec(attn="flash_attention_2")
    write(written(Strategy(kind="ddp"), training, model=model_spec(model)), tmp_path / "plan")
    monkeypatch.chdir(tmp_path / "plan")
    script_arguments(tmp_path / "plan", monkeypatch)  # train.py, which it imports
    source = importlib.util.spec_from_file_location("smoke", tmp_path / "plan" / "smoke.py")
    assert source is not None
    assert source.loader is not None
    smoke = importlib.util.module_from_spec(source)
    source.loader.exec_module(smoke)
    values = json.loads(Path("training_args.json").read_text())
    replaced = smoke.run_on_cpu(values, smoke.save_tiny_model(values, str(tmp_path / "tiny")))
    assert values["attn_implementation"] == attention
    assert replaced == [f'attn_implementation: "flash_attention_2" -> "{attention}"']


# -- launch.sh ---------------------------------------------------------------------------------------------------------


def launched(
    folder: Path, found: Mapping[str, str], *options: str, gpus: int = 2, **environment: str
) -> tuple[list[str], dict[str, str], str]:
    """Run launch.sh with launchers that only note what they are called with: arguments, environment, messages."""
    write(found, folder / "plan")
    bin = folder / "bin"
    bin.mkdir()
    note = 'printf "%s\\n" "$(basename "$0")" "$@" > "$NOTED.args"; env > "$NOTED.env"\n'
    for name in ("deepspeed", "accelerate"):
        (bin / name).write_text(f"#!/bin/sh\n{note}")
    (bin / "python").write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then echo {gpus}; exit; fi\n{note}')
    for path in bin.iterdir():
        path.chmod(0o755)
    clean = {"PATH": f"{bin}:/usr/bin:/bin", "NOTED": str(folder / "noted"), **environment}
    path = str(folder / "plan" / "launch.sh")
    done = subprocess.run(["bash", path, *options], env=clean, capture_output=True, text=True, check=True)
    arguments = (folder / "noted.args").read_text().splitlines()
    variables = dict(line.split("=", 1) for line in (folder / "noted.env").read_text().splitlines() if "=" in line)
    return arguments, variables, done.stderr


def test_deepspeed_starts_as_many_ranks_as_planned(tmp_path: Path) -> None:
    arguments, environment, said = launched(tmp_path, written())
    assert arguments == ["deepspeed", "--master_port", "29500", "--num_gpus", "2", "--no_local_rank", "train.py"]
    assert "DS_ACCELERATOR" not in environment
    assert said == ""


def test_gpus_are_chosen_by_include_or_by_the_environment(tmp_path: Path) -> None:
    arguments, _, _ = launched(tmp_path, written(), "--include", "localhost:1,3")
    assert arguments[3:] == ["--include", "localhost:1,3", "--no_local_rank", "train.py"]
    (tmp_path / "b").mkdir()
    arguments, _, _ = launched(tmp_path / "b", written(), CUDA_VISIBLE_DEVICES="1,3")
    assert "--num_gpus" not in arguments


def test_a_rehearsal_without_gpus_is_two_ranks_on_cpu(tmp_path: Path) -> None:
    eight = TWO.replace(gpus=8)
    arguments, environment, said = launched(tmp_path, written(cluster=eight), "--smoke", gpus=0)
    assert arguments[3:] == ["--num_gpus", "2", "--no_local_rank", "smoke.py"]
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert said == "launch.sh: there is no GPU: 2 rank(s) on CPU\n"


def test_a_rehearsal_is_asked_for_anywhere_and_on_cpu_no_gpus_are_chosen(tmp_path: Path) -> None:
    arguments, _, _ = launched(tmp_path, written(), "--include", "localhost:1,3", "--smoke")
    assert arguments[3:] == ["--include", "localhost:1,3", "--no_local_rank", "smoke.py"]
    (tmp_path / "b").mkdir()
    options = ("--smoke", "--include", "localhost:1,3")
    arguments, environment, _ = launched(tmp_path / "b", written(), *options, gpus=0, CUDA_VISIBLE_DEVICES="1,3")
    assert arguments[3:] == ["--num_gpus", "2", "--no_local_rank", "smoke.py"]
    assert "CUDA_VISIBLE_DEVICES" not in environment


def test_one_process_takes_no_options_of_a_launcher(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        launched(tmp_path, written(Strategy()), "--include", "localhost:1")
    assert error.value.returncode == 2
    assert error.value.stderr == "launch.sh: one process takes no launcher's options: --include localhost:1\n"


OFFLOADED = Strategy(kind="zero2", offload_optimizer="cpu")
ON_NVME = Strategy(kind="zero3", offload_optimizer="nvme", offload_param="nvme")


@pytest.mark.parametrize("options", [(), ("--smoke",)])
@pytest.mark.parametrize(("strategy", "op"), [(OFFLOADED, "cpu_adam"), (ON_NVME, "cpu_adam")])
def test_a_missing_compiler_is_said_in_a_line(
    options: tuple[str, ...], strategy: Strategy, op: str, tmp_path: Path
) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        launched(tmp_path, written(strategy), *options, CXX="no-compiler", HOME=str(tmp_path))
    assert error.value.returncode == 2
    assert error.value.stderr == (
        f"launch.sh: no C++ compiler (no-compiler): DeepSpeed has to compile {op}, with which it offloads. "
        "Install one, as by apt-get install g++, or name yours in CXX.\n"
    )
    assert not (tmp_path / "noted.args").exists()


def test_a_compiler_is_asked_for_only_where_something_is_compiled(tmp_path: Path) -> None:
    def starts(folder: str, strategy: Strategy, **environment: str) -> bool:
        (tmp_path / folder).mkdir()
        arguments, _, said = launched(tmp_path / folder, written(strategy), **environment)
        return arguments[0] == "deepspeed" and said == ""

    none = {"CXX": "no-compiler", "HOME": str(tmp_path)}
    assert starts("there", OFFLOADED, CXX="sh")
    assert starts("kept", Strategy(kind="zero2"), **none)
    torch_own = OFFLOADED.replace(zero=ZeroSpec(zero_force_ds_cpu_optimizer=False))
    assert starts("torch", torch_own, **none)
    for op in ("cpu_adam", "async_io"):  # compiled before
        for folder in (tmp_path / "extensions", tmp_path / ".cache" / "torch_extensions" / "py311_cpu"):
            (folder / op).mkdir(parents=True)
            (folder / op / f"{op}.so").touch()
    assert starts("cached", ON_NVME, **none)
    assert starts("elsewhere", ON_NVME, CXX="no-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))


def test_a_rehearsal_of_fsdp1_broadcasts_nothing_on_cpu(tmp_path: Path) -> None:
    found = written(Strategy(kind="fsdp", fsdp=FsdpSpec(version=1)))
    off = ["--fsdp_sync_module_states", "false", "--fsdp_cpu_ram_efficient_loading", "false"]
    for gpus in (0, 2):
        (tmp_path / str(gpus)).mkdir()
        arguments, _, _ = launched(tmp_path / str(gpus), found, "--smoke", gpus=gpus)
        assert arguments[-len(off) - 1 :] == [*off, "smoke.py"] if gpus == 0 else off[0] not in arguments


def test_a_rehearsal_takes_the_gpus_that_there_are(tmp_path: Path) -> None:
    cluster = TWO.replace(gpus=16, nodes=2)
    arguments, _, said = launched(tmp_path, written(Strategy(kind="ddp"), cluster=cluster), "--smoke", gpus=4)
    assert arguments[1:8] == [
        "launch",
        "--config_file",
        "accelerate.yaml",
        "--num_machines",
        "1",
        "--num_processes",
        "4",
    ]
    assert said == "launch.sh: 4 GPU(s) here: as many ranks\n"


def test_one_gpu_is_one_gpu(tmp_path: Path) -> None:
    arguments, environment, _ = launched(tmp_path, written(Strategy()))
    assert arguments == ["python", "train.py"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"


def test_several_nodes(tmp_path: Path) -> None:
    cluster = TWO.replace(gpus=16, nodes=2)
    at = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    arguments, _, _ = launched(tmp_path, written(Strategy(kind="fsdp"), cluster=cluster), **at)
    text = " ".join(arguments)
    assert "--num_machines 2 --num_processes 16 --main_process_port 29500 --machine_rank 1" in text
    assert "--main_process_ip 10.0.0.1 train.py" in text
    (tmp_path / "b").mkdir()
    found = written(cluster=cluster)
    arguments, _, _ = launched(tmp_path / "b", found, **at)
    assert " ".join(arguments) == (
        "deepspeed --hostfile hostfile --no_ssh --node_rank 1 --master_addr 10.0.0.1 --master_port 29500 "
        "--no_local_rank train.py"
    )
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(tmp_path / "b" / "plan" / "hostfile")) == {"node-0": 8, "node-1": 8}


@pytest.mark.parametrize("case", CASES)
def test_scripts_are_bash(case: str, tmp_path: Path) -> None:
    strategy, training = CASES[case]
    for nodes in (1, 2) if strategy.kind != "single" else (1,):
        found = written(strategy, training, TWO.replace(gpus=4 if strategy.kind != "single" else 1, nodes=nodes))
        assert ("launch.slurm" in found) == (nodes == 2)
        assert ("hostfile" in found) == (nodes == 2 and strategy.is_deepspeed)
        for name in ("launch.sh", "launch.slurm"):
            done = subprocess.run(
                ["bash", "-n"], input=found.get(name, ""), text=True, capture_output=True, check=False
            )
            assert (done.returncode, done.stderr) == (0, "")


def test_a_slurm_job_starts_launch_sh_on_every_node(tmp_path: Path) -> None:
    write(written(cluster=TWO.replace(gpus=16, nodes=2)), tmp_path / "plan")
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "scontrol").write_text("#!/bin/sh\necho a1\necho a2\n")
    (bin / "srun").write_text('#!/bin/sh\nshift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n')
    (bin / "deepspeed").write_text('#!/bin/sh\necho "$@" >> noted\n')
    for path in bin.iterdir():
        path.chmod(0o755)
    environment = {
        "PATH": f"{bin}:/usr/bin:/bin",
        "SLURM_SUBMIT_DIR": str(tmp_path / "plan"),
        "SLURM_JOB_NODELIST": "a",
    }
    subprocess.run(["bash", str(tmp_path / "plan" / "launch.slurm")], env=environment, check=True)
    noted = (tmp_path / "plan" / "noted").read_text().splitlines()
    assert [line.split("--node_rank ")[1].split(" --master_port")[0] for line in noted] == [
        f"{node} --master_addr a1" for node in (0, 1)
    ]
    assert (tmp_path / "plan" / "hostfile").read_text() == "a1 slots=8\na2 slots=8\n"


@pytest.mark.parametrize(
    ("gpu", "gpus", "disabled"),
    [("RTX4090", 2, True), ("RTX3090", 2, True), ("RTX4090", 1, False), ("A100-80GB", 2, False), ("A6000", 2, False),
     ("RTX8000", 2, False), ("RTXPRO6000", 2, False), ("RTX6000Ada", 2, False)],
)  # fmt: skip
def test_consumer_boards_do_without_peer_to_peer(gpu: str, gpus: int, disabled: bool) -> None:
    cluster = ClusterSpec(gpu=find_gpu(gpu), gpus=gpus)
    text = written(Strategy(kind="zero1"), TrainingSpec(), cluster)["launch.sh"]
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
        assert (f'export {name}="${{{name}:-1}}"' in text) == disabled


def test_the_allocator_is_set_by_the_name_that_torch_has(tmp_path: Path) -> None:
    training = TrainingSpec(alloc_conf="expandable_segments:True,max_split_size_mb:128")
    cluster = TWO.replace(gpus=4, nodes=2)
    arguments = written(training=training, cluster=cluster)
    assert arguments[".deepspeed_env"] == "PYTORCH_ALLOC_CONF=expandable_segments:True,max_split_size_mb:128\n"
    assert parse(arguments).training.alloc_conf == training.alloc_conf
    _, environment, _ = launched(tmp_path, written(training=training, software=SoftwareSpec(torch="2.8")))
    assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True,max_split_size_mb:128"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at what PEFT asks it for
@pytest.mark.parametrize("model", ["meta-llama/Llama-2-7b", "mistralai/Mixtral-8x7B-v0.1"])
def test_peft_finds_what_a_written_lora_adapts(model: str) -> None:
    """Its own defaults where it does look them up: not for experts that are fused."""
    import peft
    import torch
    import transformers

    values = json.loads(written(training=TrainingSpec(lora=8), model=model_spec(model))["training_args.json"])
    assert values["lora"].get("target_modules") == (["q_proj", "v_proj"] if "Mixtral" in model else None)
    config = transformers.AutoConfig.for_model(**tiny_config(model_spec(model)))
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    adapted = peft.get_peft_model(built, peft.LoraConfig(**values["lora"]))
    names = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert names == {"q_proj", "v_proj"}


def test_images_stay_until_they_are_pixels() -> None:
    values = json.loads(
        written(Strategy(kind="ddp"), model=model_spec("google/vit-base-patch16-224"))["training_args.json"]
    )
    assert values["model_class"] == "AutoModelForImageClassification"
    assert (values["text_column"], values["remove_unused_columns"]) == ("image", False)


def test_a_gpu_without_bf16_trains_in_fp16_and_a_bf16_checkpoint_is_warned_of() -> None:
    turing = ClusterSpec(gpu=find_gpu("T4"), gpus=2)
    plain = LLAMA.replace(config={**LLAMA.config, "torch_dtype": "float16"})
    bf16 = LLAMA.replace(config={**LLAMA.config, "torch_dtype": "bfloat16"})
    for model, warned in ((plain, False), (bf16, True)):
        found = written(cluster=turing, model=model)
        values = json.loads(found["training_args.json"])
        assert (values["bf16"], values["fp16"], values["dtype"]) == (False, True, "float16")
        assert ("The checkpoint is in bfloat16" in found["launch.sh"]) == warned


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"training": TrainingSpec(task="load")}, "task: 'load' has no training to write files for. Use --task train."),
    ({"training": TrainingSpec(task="generate")}, "task: 'generate' has no training"),
    (
        {"training": TrainingSpec(head="base")},
        "head: 'base' is none that a written train.py can train. Use --head causal",
    ),
    ({"training": TrainingSpec(keeps_outputs=True)}, "keeps_outputs: true is not asked of the Trainer. Leave it out"),
    ({"training": TrainingSpec(optim="muon")}, "optim: 'muon' has no name in TrainingArguments. Use adamw_torch_fused"),
    ({"training": TrainingSpec(optim="adamw_torch_loop")}, "has no name in TrainingArguments. Use adamw_torch,"),
    ({"strategy": Strategy(), "cluster": TWO}, "gpus: 2 is more than strategy single uses"),
    (
        {"strategy": Strategy(kind="zero3", offload_optimizer="nvme"), "cluster": ClusterSpec(gpus=2, nvme=10**12)},
        "nvme_path: null is no folder",
    ),
    (
        {"strategy": Strategy(kind="zero3", zero=ZeroSpec(zero3_init_flag=False))},
        "zero3_init_flag: false cannot be asked",
    ),
    (
        {"strategy": Strategy(kind="ddp", ddp=DdpSpec(gradient_as_bucket_view=True))},
        "gradient_as_bucket_view: true has no",
    ),
    (
        {"strategy": Strategy(kind="fsdp", fsdp=FsdpSpec(version=1, limit_all_gathers=False))},
        "limit_all_gathers: false",
    ),
    (
        {
            "strategy": Strategy(
                kind="fsdp", fsdp=FsdpSpec(version=1, cpu_ram_efficient_loading=True, sync_module_states=False)
            )
        },
        "accelerate.yaml: fsdp_config.fsdp_sync_module_states: false is refused by accelerate",
    ),
    (
        {"software": SoftwareSpec(transformers="4.50")},
        "transformers: '4.50' is older than what train.py is written for",
    ),
    ({"cluster": TWO.replace(gpu=find_gpu("cpu"))}, "gpu: 'cpu' has no run to write files for"),
]


@pytest.mark.parametrize(("setup", "message"), REFUSED)
def test_what_cannot_be_run_is_refused(setup: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        written(**setup)
    assert message in str(error.value)


def test_a_local_model_is_found_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = json.dumps(dict(LLAMA.config) | {"model_type": "llama"})
    Path("mine").mkdir()
    Path("mine/config.json").write_text(config)
    Path("other.json").write_text(config)
    for name in ("mine", "mine/config.json", str(tmp_path / "mine")):
        values = json.loads(written(model=model_spec(name))["training_args.json"])
        assert values["model_name_or_path"] == str(tmp_path / "mine")
    with pytest.raises(SpecError, match="is a config, and names no checkpoint to train"):
        written(model=model_spec("other.json"))


@pytest.mark.parametrize("name", ["a\ntouch /tmp/x", "a\r\ntouch x", "$(touch x)", "`touch x`", "a\u2028b"])
def test_a_name_stays_a_comment(name: str, tmp_path: Path) -> None:
    found = written(model=LLAMA.replace(id=name))
    lines = found["launch.sh"].splitlines()
    assert [line for line in lines if "touch" in line] == [lines[1]] * ("touch" in name)
    assert lines[1].startswith("# Written by memplan: ")
    assert len(lines) == len(written()["launch.sh"].splitlines())
    assert parse(found).model == name
    launched(tmp_path, found)


def test_heads_are_those_with_a_loss() -> None:
    import transformers

    assert all(hasattr(transformers, name) for name in MODEL_CLASSES.values())


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_after_a_user_has_changed_it(tmp_path: Path) -> None:
    write(written(Strategy(kind="zero3")), tmp_path / "plan")
    path = tmp_path / "plan" / "training_args.json"
    values = json.loads(path.read_text()) | {
        "per_device_train_batch_size": 3,
        "warmup_steps": 10,
        "my_own": True,
    }
    path.write_text(json.dumps(values))
    found = read(tmp_path / "plan")
    assert (found.training.micro_batch_size, found.strategy.kind, found.gpus) == (3, "zero3", 2)
    assert [note.source for note in found.notes] == [f"{path}: my_own are not read"]


BROKEN: list[tuple[str, str | None, str]] = [
    ("training_args.json", None, "training_args.json: missing. Give a folder"),
    ("training_args.json", "{", "training_args.json: is not JSON"),
    ("training_args.json", "[]", "holds a list"),
    ("training_args.json", "{}", "model_name_or_path: missing"),
    (
        "training_args.json",
        '{"model_name_or_path": "a", "model_class": "AutoModelForCausal"}',
        "Did you mean AutoModelForCausalLM",
    ),
    ("training_args.json", '{"model_name_or_path": "a", "bf16": true, "fp16": true}', "fp16: true cannot go with bf16"),
    ("training_args.json", '{"model_name_or_path": "a", "lora": 8}', "lora: 8 is not an object"),
    ("ds_config.json", None, "ds_config.json: missing"),
    ("ds_config.json", '{"zero_optimization": {"stage": 9}}', "stage: 9 is not a stage"),
    ("launch.sh", "NODES=1\n", "launch.sh: GPUS_PER_NODE: missing"),
    ("launch.sh", None, "launch.sh: GPUS_PER_NODE: missing"),
]


@pytest.mark.parametrize(("name", "text", "message"), BROKEN)
def test_a_broken_folder_is_named(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    write(written(), tmp_path / "plan")
    (tmp_path / "plan" / name).unlink()
    if text is not None:
        (tmp_path / "plan" / name).write_text(text)
    with pytest.raises(SpecError) as error:
        read(tmp_path / "plan")
    assert message in str(error.value)
    assert str(tmp_path / "plan" / name) in str(error.value)


def test_only_folders_are_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is not a folder"):
        read(tmp_path / "none")


# -- writing -----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_written_at_once(tmp_path: Path) -> None:
    found = written()
    paths = write(found, tmp_path / "a" / "plan")
    assert [path.name for path in paths] == list(found)
    assert contents(tmp_path) == {f"a/plan/{name}": text for name, text in found.items()}
    assert os.access(tmp_path / "a" / "plan" / "launch.sh", os.X_OK)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a" / "plan").stat().st_mode) == 0o777 & ~mask


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    write({"a": "1", "b": "1"}, tmp_path)
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(SpecError, match=r"out: '.*b' exists. Use another folder, or --force to replace it."):
        write({"b": "2", "c": "2"}, tmp_path)
    assert contents(tmp_path) == {"a": "1", "b": "1", "mine": "mine"}
    write({"b": "2", "c": "2"}, tmp_path, force=True)
    assert contents(tmp_path) == {"a": "1", "b": "2", "c": "2", "mine": "mine"}


def test_a_dangling_link_is_something_too(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "none")
    with pytest.raises(SpecError, match="exists"):
        write({"a": "1"}, tmp_path)
    write({"a": "1"}, tmp_path, force=True)
    assert not (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, force: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    write({"a": "1"}, tmp_path / "plan")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(launch.os, "fsync", full)
    for folder in ("plan", "new"):
        with pytest.raises(SpecError, match="cannot be written"):
            write({"a": "2"} if force else {"b": "2"}, tmp_path / folder, force=force)
    assert contents(tmp_path) == {"plan/a": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "plan" / "a").mkdir(parents=True)
    for folder, names, message in (
        ("file", {"a": "1"}, "is a file, not a folder"),
        ("file/below", {"a": "1"}, "cannot be written"),
        ("plan", {"a": "1"}, "is a folder, where a file would be written"),
        ("nul\0byte", {"a": "1"}, "cannot be written"),
        ("plan", {"../a": "1"}, "is not a file's name"),
    ):
        with pytest.raises(SpecError, match=re.escape(message)):
            write(names, tmp_path / folder, force=True)


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    monkeypatch.setattr(launch.tempfile, "mkdtemp", refused)
    with pytest.raises(SpecError, match=r"cannot be written \(Permission denied\). Use another"):
        write({"a": "1"}, tmp_path / "plan")


def test_the_scripts_fields_are_those_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(written(), tmp_path / "plan")
    script = script_arguments(tmp_path / "plan", monkeypatch)
    fields = {field.name for field in dataclasses.fields(script)}
    assert fields <= SCRIPT_ARGUMENTS.keys()


def test_force_takes_away_what_memplan_wrote_for_another_engine(tmp_path: Path) -> None:
    nodes = TWO.replace(gpus=4, nodes=2)
    before = written(Strategy(kind="zero2"), cluster=nodes) | {"plan.json": "{}"}
    before["plan.json"] = json.dumps({"files": list(before)})
    write(before, tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    after = written(Strategy(kind="fsdp"))
    after["plan.json"] = json.dumps({"files": list(after)})
    assert {"ds_config.json", "hostfile", "launch.slurm"} <= set(before) - set(after)
    write(after, tmp_path, force=True)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*after, "mine.txt"}
    write(before, tmp_path, force=True)
    assert not (tmp_path / "accelerate.yaml").exists()


def test_force_leaves_what_is_not_memplans(tmp_path: Path) -> None:
    for name in ("hostfile", "ds_config.json", "launch.sh"):
        (tmp_path / name).write_text("mine")
    found = written(Strategy(kind="ddp"))
    write(found, tmp_path, force=True)
    assert {name: (tmp_path / name).read_text() for name in ("hostfile", "ds_config.json")} == {
        "hostfile": "mine",
        "ds_config.json": "mine",
    }
    # The launch.sh is memplan's now: files that it does not use are no longer told from the ones it wrote.
    (tmp_path / "plan.json").write_text(json.dumps({"files": list(found)}))
    write(found, tmp_path, force=True)
    assert (tmp_path / "hostfile").read_text() == "mine"


def test_what_starts_a_run_is_replaced_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(written(Strategy(kind="zero2")), tmp_path)
    moved = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (moved.append(self.name), replace(self, target))[1])
    write(written(Strategy(kind="zero3")), tmp_path, force=True)
    assert moved[-1] == "launch.sh"


@given(strategy=st.one_of(zeros(), fsdps, ddps, st.just(Strategy())), training=trainings())
@settings(max_examples=25, deadline=None)
def test_the_libraries_read_whatever_is_written(strategy: Strategy, training: TrainingSpec) -> None:
    """HfArgumentParser with DeepSpeedConfig and no key that it ignores, or accelerate's loader."""
    import tempfile

    import transformers
    from accelerate.commands.config.config_args import load_config_from_file
    from deepspeed import DeepSpeedConfig
    from transformers.integrations import deepspeed as integration

    from memplan.configs.deepspeed import parse_deepspeed

    if strategy.fsdp.activation_checkpointing:  # the Trainer refuses both
        training = training.replace(gradient_checkpointing=False)
    if not legal(training, TWO.replace(gpus=1) if strategy.kind == "single" else TWO, strategy):
        return
    found = written(strategy, training)
    values = json.loads(found["training_args.json"])
    own = {name: value for name, value in values.items() if name in SCRIPT_ARGUMENTS and name != "use_liger_kernel"}
    rest = {name: value for name, value in values.items() if name not in own}
    with tempfile.TemporaryDirectory() as folder:
        for name in found.keys() & {"ds_config.json", "accelerate.yaml"}:
            (Path(folder) / name).write_text(found[name])
        if "deepspeed" in rest:
            rest["deepspeed"] = f"{folder}/ds_config.json"
        try:
            parser = transformers.HfArgumentParser(transformers.TrainingArguments)
            (arguments,) = parser.parse_dict(rest | {"use_cpu": True, "fp16": False})
            if strategy.is_deepspeed:
                filled = arguments.hf_deepspeed_config
                config = type("Config", (), {"hidden_size": 64})
                filled.trainer_config_finalize(arguments, type("Model", (), {"config": config}), 10)
                real = DeepSpeedConfig(filled.config)
                assert real.zero_optimization_stage == strategy.zero_stage
                assert parse_deepspeed(filled.config, "ds_config.json").notes == ()
        finally:
            integration.unset_hf_deepspeed_config()
        if "accelerate.yaml" in found:
            assert load_config_from_file(f"{folder}/accelerate.yaml").num_processes == 2


@pytest.mark.parametrize("case", [case for case in CASES if "nvme" not in case])
def test_what_is_written_has_no_mistakes(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memplan import checks

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    strategy, training = CASES[case]
    write(written(strategy, training), tmp_path / "plan")
    found = checks.check(tmp_path / "plan", cluster={"gpu": "A100-80GB", "host_memory": "4TiB", "nvme": "8TiB"})
    assert found.findings == ()
    assert found.estimate is not None
    assert found.estimate.setup["strategy"] == strategy.kind
