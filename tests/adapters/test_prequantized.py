"""Checkpoints that are quantized already, from their config to the answer."""

from __future__ import annotations

from typing import Any

import pytest
from tests.oracles.families import CONFIGS
from transformers.utils.quantization_config import QuantizationMethod

import memplan

LLAMA: dict[str, Any] = CONFIGS["llama"]["small"]
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def estimate(quantization_config: object, **training: Any) -> memplan.Estimate:
    spec = memplan.TrainingSpec(**{"seq_len": 64, "dtype": "bfloat16", **training})
    return memplan.estimate(LLAMA | {"quantization_config": quantization_config}, spec, "A100-80GB")


@pytest.mark.parametrize("task", ["train", "load", "generate"])
@pytest.mark.parametrize("method", sorted(set(QuantizationMethod) - {"bitsandbytes", "fp8"}))
def test_methods_that_are_not_modelled_are_refused_by_name(method: str, task: str) -> None:
    message = rf"config: quantization_config.quant_method: '{method.value}' is not modelled here. Give the config of"
    with pytest.raises(memplan.UnsupportedError, match=message):
        estimate({"quant_method": method.value, "bits": 4}, task=task)


def test_no_quantization_config_is_none() -> None:
    plain = memplan.estimate(LLAMA, memplan.TrainingSpec(seq_len=64, dtype="bfloat16"), "A100-80GB")
    assert estimate(None) == estimate({}) == plain


def test_fp8_is_taken_as_dequantized_and_says_so() -> None:
    plain, fp8 = estimate(None), estimate({"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert fp8.gpu == plain.gpu
    assert [each.name for each in fp8.assumptions if each not in plain.assumptions] == ["fp8 checkpoint"]
    with pytest.raises(memplan.UnsupportedError, match=r"'fp8' is not modelled here\. Leave --quantization out"):
        estimate({"quant_method": "fp8"}, task="load", quantization="nf4")


def test_the_catalogs_fp8_models_are_estimated() -> None:
    spec = memplan.TrainingSpec(task="load", dtype="bfloat16")
    result = memplan.estimate("deepseek-ai/DeepSeek-V3", spec, "B200")
    assert result.footprint == pytest.approx(2 * result.model.parameters, rel=1e-3)
    assert any(each.name == "fp8 checkpoint" for each in result.assumptions)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}, "int8"),
        (NF4, "nf4"),
        (NF4 | {"bnb_4bit_use_double_quant": True}, "nf4-dq"),
    ],
)
def test_bitsandbytes_checkpoints_must_be_asked_for_as_what_they_are(config: dict, kind: str) -> None:
    assert (
        estimate(config, task="load", quantization=kind).footprint
        == estimate(None, task="load", quantization=kind).footprint
    )
    for other in {"none", "int8", "nf4", "nf4-dq"} - {kind}:
        with pytest.raises(
            memplan.SpecError, match=f"^quantization: '{other}' is not what .*Use --quantization {kind}"
        ):
            estimate(config, task="load", quantization=other)


def test_the_checkpoint_decides_what_4_bit_computes_in() -> None:
    def peak(config: dict | None, compute: str | None) -> int:
        quantization = memplan.QuantizationSpec(kind="nf4", compute_dtype=compute)
        return estimate(config, lora=8, quantization=quantization).gpu.steady_allocated

    for compute in ("float32", "bfloat16"):
        assert peak(NF4 | {"bnb_4bit_compute_dtype": compute}, None) == peak(None, compute)
    assert peak(NF4, None) == peak(None, "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type: 'fp4' is not modelled"),
        ({"llm_int8_skip_modules": ["mlp"]}, "keeps other layers than"),
        ({"quant_method": 4, "load_in_4bit": False}, "quant_method: 4 is not text"),
        ({"quant_method": None, "load_in_4bit": False}, "quant_method: is null"),
    ],
)
def test_other_settings_of_bitsandbytes_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(memplan.MemplanError, match=message):
        estimate(NF4 | changes, task="load", quantization="nf4")
