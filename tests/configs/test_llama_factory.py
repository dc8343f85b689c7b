"""LLaMA-Factory's arguments: read as a setup, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.answers import Finding
from memplan.configs.arguments import parse_arguments
from memplan.configs.llama_factory import is_llama_factory, known_names, to_arguments
from memplan.configs.run import read_run
from memplan.errors import SpecError, UnsupportedError
from memplan.specs.training import TrainingSpec

SFT: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "model_name_or_path": "a/b",
    "template": "llama3",
    "bf16": True,
}


def training(shards: bool = False, **values: Any) -> TrainingSpec:
    arguments = to_arguments({**SFT, **values}, "lf.yaml", shards=shards)
    config = parse_arguments(arguments, "lf.yaml", [], known=known_names())
    assert config.notes == ()
    return TrainingSpec(**config.training)


def test_what_is_left_open_is_llama_factorys() -> None:
    """hparams: LoRA of rank 8 on every linear layer, 2048 tokens, padded, with checkpointing, in the type of AMP."""
    found = training()
    assert found.lora is not None
    assert (found.lora.rank, found.lora.targets, found.lora.dropout) == (8, ("all-linear",), 0.0)
    assert (found.seq_len, found.packed, found.gradient_checkpointing) == (2048, False, True)
    assert (found.use_reentrant, training(use_reentrant_gc=False).use_reentrant) == (True, False)
    assert (found.dtype, found.mixed_precision, found.attn, found.micro_batch_size) == ("bfloat16", "bf16", "sdpa", 8)


@pytest.mark.parametrize(
    ("values", "shards", "dtype"),
    [
        ({"finetuning_type": "full"}, False, "float32"),  # trained weights are made float32
        ({"finetuning_type": "full"}, True, "bfloat16"),  # ZeRO-3 and FSDP keep float32 shards themselves
        ({"finetuning_type": "lora"}, False, "bfloat16"),
        ({"finetuning_type": "lora", "bf16": False, "fp16": True}, False, "float16"),
        ({"finetuning_type": "lora", "bf16": False}, False, "auto"),
    ],
)
def test_the_type_that_weights_are_loaded_in(values: dict[str, Any], shards: bool, dtype: str) -> None:
    assert training(shards, **values).dtype == dtype


def test_pretraining_packs() -> None:
    found = training(stage="pt", finetuning_type="full", disable_gradient_checkpointing=True)
    assert (found.packed, found.lora, found.gradient_checkpointing) == (True, None, False)


def test_quantized_weights_stay_in_their_type() -> None:
    found = training(quantization_bit=4, lora_target="q_proj, v_proj", lora_rank=4, additional_target="lm_head")
    assert found.quantization is not None
    assert found.lora is not None
    assert (found.quantization.kind, found.quantization.quant_storage) == ("nf4-dq", "bfloat16")
    assert not found.quantization.prepare_for_kbit_training
    assert (found.lora.targets, found.lora.modules_to_save) == (("q_proj", "v_proj"), ("lm_head",))


@pytest.mark.parametrize(
    "values",
    [
        {"stage": "dpo"},
        {"stage": "rm"},
        {"finetuning_type": "freeze"},
        {"finetuning_type": "oft"},
        {"use_galore": True},
        {"use_badam": True},
        {"use_unsloth": True},
        {"use_dora": True},
        {"neat_packing": True},
        {"quantization_bit": 2},
        {"quantization_bit": 4, "quantization_method": "hqq"},
        {"flash_attn": "fa3"},
        {"pure_bf16": True},
        {"use_kt": True},
        {"tensor_model_parallel_size": 1},
        {"pipeline_model_parallel_size": 4},
        {"do_train": False},
        {"do_predict": True, "do_train": None},
    ],
)
def test_what_is_not_modelled_is_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError) as error:
        training(**values)
    assert f"lf.yaml: {list(values)[-1]}: " in str(error.value)


@pytest.mark.parametrize(
    "values", [{"stage": "sfft", "template": "a"}, {"quantization_bit": 8, "finetuning_type": "full"}]
)
def test_what_llama_factory_refuses_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"lf.yaml: {next(iter(values))}: "):
        training(**values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"stage": "sft"}, True),
        ({"stage": 3}, False),
        ({"finetuning_type": "lora"}, True),
        ({"model_name_or_path": "a", "max_seq_length": 8}, False),
    ],
)
def test_they_are_told_from_other_arguments(values: dict[str, Any], expected: bool) -> None:
    assert is_llama_factory(values) is expected


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("lora_rnk", "lora_rank"),
        ("cutof_len", "cutoff_len"),
        ("finetunning_tipe", "finetuning_type"),
        ("lerning_rate", "learning_rate"),
        ("image_min_pixels", None),  # of LLaMA-Factory, though it is like another one
        ("video_fps", None),
    ],
)
def test_a_misspelt_argument_is_refused(name: str, near: str | None) -> None:
    """LLaMA-Factory's parser is transformers', which takes no more than its dataclasses have."""
    found: list[Finding] = []
    data = {"stage": "sft", "do_train": True, "model_name_or_path": "gpt2", "bf16": True, name: 1}
    parse_arguments(to_arguments(data, "a.yaml", shards=False), "a.yaml", found, known=known_names())
    if near is None:
        assert found == []
        return
    assert [(each.code, each.severity, each.remedy) for each in found] == [
        ("misspelt-argument", "error", f"Did you mean {near}?")
    ]


def test_what_does_not_train_is_no_run() -> None:
    """As files for inference and export are: a model, a template and no more."""
    with pytest.raises(UnsupportedError, match=r"lf\.yaml: do_train: missing: LLaMA-Factory trains only if it is true"):
        to_arguments(
            {"model_name_or_path": "a/b", "template": "qwen3", "infer_backend": "vllm"}, "lf.yaml", shards=False
        )


def test_version_1_is_refused_by_name() -> None:
    values = {
        "model": "a/b",
        "model_class": "llm",
        "dist_config": {"name": "fsdp2"},
        "output_dir": "o",
        "cutoff_len": 8,
    }
    with pytest.raises(UnsupportedError, match="a config of LLaMA-Factory's v1 is not read"):
        read_run(values)
