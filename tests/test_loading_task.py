"""Task load against figures that others printed."""

from __future__ import annotations

import pytest

import memplan
from memplan.units import MiB


def load(model: str, **training: object) -> memplan.Estimate:
    software = memplan.SoftwareSpec.parse(str(training.pop("software", "")))
    spec = memplan.TrainingSpec(task="load", **training)  # type: ignore[arg-type]
    return memplan.estimate(model, spec, "A100-80GB", software=software)


def test_starcoder_in_int8_has_the_footprint_printed_in_2023() -> None:
    then = load("bigcode/starcoder", quantization="int8", software="transformers=4.31")
    assert then.footprint == 15_872_503_808 + 8192 * 8192  # parameters and the causal mask
    assert round(then.footprint / 1e6, 2) == 15_939.61
    now = load("bigcode/starcoder", quantization="int8", dtype="float16")
    assert now.footprint == then.footprint  # transformers 5 registers the mask still


def test_bert_base_cased_has_the_size_of_accelerates_documentation() -> None:
    found = load("bert-base-cased", dtype="float32", head="base").footprint
    assert found is not None
    assert round(found / MiB, 2) == 413.18


def test_a_device_map_places_every_layer_and_needs_a_capacity() -> None:
    spec = memplan.TrainingSpec(task="load", dtype="bfloat16", device_map="auto")
    result = memplan.estimate("meta-llama/Llama-2-7b", spec, "2xT4")
    assert result.device_map is not None
    assert set(result.device_map.values()) == {0, 1}
    assert {f"model.layers.{i}" for i in range(32)} <= set(result.device_map)
    assert result.gpu.peak_allocated < 0.6 * (result.footprint or 0)
    with pytest.raises(memplan.SpecError, match="device_map"):
        memplan.estimate("meta-llama/Llama-2-7b", spec, None)


@pytest.mark.parametrize(
    ("host_memory", "nvme", "verdict"),
    [("2GiB", "4GiB", "fits"), ("2GiB", "512MiB", "does-not-fit"), ("2GiB", None, "unknown"), ("64GiB", None, "fits")],
)
def test_what_a_device_map_leaves_to_host_and_disk_must_fit_there(host_memory, nvme, verdict: str) -> None:
    cluster = memplan.ClusterSpec(gpu="RTX3090", gpu_memory="1.5GiB", host_memory=host_memory, nvme=nvme)
    spec = memplan.TrainingSpec(task="load", device_map="auto")
    result = memplan.estimate("TinyLlama/TinyLlama-1.1B-Chat-v1.0", spec, cluster)
    assert result.host.peak > 0
    assert result.verdict == verdict


def test_quantized_training_holds_packed_weights() -> None:
    spec = memplan.TrainingSpec(lora=16, quantization="nf4", gradient_checkpointing=True)
    result = memplan.estimate("meta-llama/Llama-2-7b", spec, "RTX3090")
    assert result.model.parameters > 6_738_415_616
    assert result.gpu.components.weights < 6_738_415_616
    assert result.verdict == "fits"
