"""Quantized weights under the engines that shard: what stays whole, what is refused, and why."""

from __future__ import annotations

from typing import Any

import pytest

import memplan
from memplan.errors import MemplanError, SpecError, UnsupportedError
from memplan.results import Estimate
from memplan.specs.strategy import FsdpSpec
from memplan.specs.training import LoraSpec, QuantizationSpec

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8003,
    "hidden_size": 512,
    "intermediate_size": 1400,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
LINEAR = 6 * (512 * 512 * 2 + 512 * 256 * 2 + 3 * 512 * 1400)
"""Weights of the layers that are quantized."""
PACKED = QuantizationSpec(kind="nf4", quant_storage="bfloat16")


def run(kind: str, quantization: Any, gpus: int = 4, *, replay: bool = False, **options: Any) -> Estimate:
    names = ("offload_optimizer", "offload_param", "fsdp")
    strategy = memplan.Strategy(kind=kind, **{name: options.pop(name) for name in names if name in options})
    options = {"dtype": "bfloat16", "lora": 8, **options}
    spec = memplan.TrainingSpec(seq_len=64, quantization=quantization, **options)
    return memplan.estimate(CONFIG, spec, memplan.ClusterSpec(gpu="A100-80GB", gpus=gpus), strategy, replay=replay)


def phases(estimate: Estimate) -> dict[str, int]:
    return {phase.name: phase.allocated for phase in estimate.gpu.phases}


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "grad_accum_steps": 3}], ids=str)
@pytest.mark.parametrize("quantization", ["nf4-dq", "int8", PACKED], ids=str)
@pytest.mark.parametrize("kind", ["zero0", "zero2", "zero3", "fsdp"])
def test_the_replay_of_all_layers_allocates_what_the_play_says(kind: str, quantization: Any, options: Any) -> None:
    if quantization is PACKED and kind != "zero3" and kind != "fsdp":
        quantization = "nf4"  # it is refused there
    if (kind, quantization) == ("fsdp", "int8"):
        pytest.skip("FSDP refuses int8")
    played, replayed = run(kind, quantization, **options), run(kind, quantization, **options, replay=True)
    there = phases(replayed)
    for phase, nbytes in phases(played).items():
        assert nbytes <= there[phase] <= nbytes * 1.02 + 64 * 2**20
    assert played.gpu.peak_reserved >= replayed.gpu.peak_reserved


@pytest.mark.parametrize("kind", ["zero0", "zero1", "zero2"])
def test_stages_that_keep_whole_weights_keep_quantized_ones_as_they_are(kind: str) -> None:
    """A byte each in int8 and a float32 scale per row; half a one in 4 bit, a scale for 64 of them, and a table."""
    rows, tables = 6 * (3 * 512 + 2 * 256 + 2 * 1400), 6 * 7 * 512
    in_8_bit, in_4_bit = (phases(run(kind, quantization))["idle"] for quantization in ("int8", "nf4"))
    assert in_8_bit - in_4_bit == pytest.approx(LINEAR // 2 - LINEAR // 16 + 4 * rows - tables, rel=0.001)


def test_zero3_with_int8_holds_weights_whole_beside_their_partitions_and_says_so() -> None:
    two, eight = (phases(run("zero3", "int8", gpus))["idle"] for gpus in (2, 8))
    assert two > eight > LINEAR
    names = {each.name: each.source for each in run("zero3", "int8").assumptions}
    assert "MatmulLtState.CB" in names["int8 weights"]
    assert "--strategy zero2" in names["int8 weights"]


def test_zero3_with_4_bit_holds_gathered_weights_until_the_step_is_done() -> None:
    """bitsandbytes keeps them in a ctx, which no checkpoint and no release lets go of."""
    found = run("zero3", "nf4", gradient_checkpointing=True)
    assert phases(found)["step"] - phases(found)["idle"] >= LINEAR // 2
    assert "nf4 weights" in {each.name for each in found.assumptions}


def test_fsdp_shards_what_is_packed_into_a_floating_type_and_nothing_else() -> None:
    whole, sharded = run("fsdp", "nf4", 8), run("fsdp", PACKED, 8)
    assert phases(whole)["idle"] - phases(sharded)["idle"] == pytest.approx(LINEAR // 2 * 7 // 8, rel=0.01)
    assert "bfloat16" in {each.name: each.source for each in whole.assumptions}["nf4 weights"]
    assert "nf4 weights" not in {each.name for each in sharded.assumptions}


V1 = {"fsdp": FsdpSpec(version=1)}
BF16_LORA = {"lora": LoraSpec(rank=8, autocast_adapter_dtype=False)}
FLOATS = QuantizationSpec(kind="nf4", quant_storage="float32")


@pytest.mark.parametrize(
    ("kind", "quantization", "options", "error", "message"),
    [
        ("fsdp", "int8", {}, SpecError, "quantization: 'int8' cannot be sharded"),
        ("fsdp", "nf4", V1, SpecError, "takes no integers"),
        ("fsdp", PACKED, V1, SpecError, "prepare_for_kbit_training: true leaves weights of several types"),
        *((kind, FLOATS, {}, SpecError, "it would cast packed weights to bf") for kind in ("zero2", "zero3", "fsdp")),
        ("zero2", "nf4", {"mixed_precision": "no"}, UnsupportedError, "--mixed-precision bf16"),
        (
            "fsdp",
            PACKED.replace(prepare_for_kbit_training=False),
            V1 | {"mixed_precision": "no"},
            SpecError,
            "stops at the first adapter",
        ),
        ("fsdp", PACKED, V1 | BF16_LORA | {"mixed_precision": "no"}, SpecError, "leaves weights of several types"),
    ],
)
def test_what_the_libraries_or_memplan_cannot_do_is_refused(
    kind: str, quantization: Any, options: dict[str, Any], error: type[MemplanError], message: str
) -> None:
    with pytest.raises(error) as caught:
        run(kind, quantization, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("quantization", [None, QuantizationSpec(kind="nf4", quant_storage="bfloat16")])
def test_fsdp_without_mixed_precision_takes_adapters_of_the_weights_type(quantization: Any) -> None:
    """All is in one 16-bit type then: adapters and what the optimizer keeps of them have half the bytes."""
    if quantization is not None:
        quantization = quantization.replace(prepare_for_kbit_training=False)
    mixed = run("fsdp", quantization, **V1, **BF16_LORA)
    pure = run("fsdp", quantization, **V1, **BF16_LORA, mixed_precision="no")
    assert pure.gpu.components.optimizer == pytest.approx(mixed.gpu.components.optimizer / 2, rel=0.1)  # of 512 bytes
    assert phases(pure)["idle"] < phases(mixed)["idle"]


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_quantized_weights_and_nvme(key: str) -> None:
    strategy = memplan.Strategy(kind="zero3", **{key: "nvme"})
    cluster = memplan.ClusterSpec(gpu="A100-80GB", gpus=2, nvme="100GiB")
    with pytest.raises(UnsupportedError, match=f"^{key}: .* Use cpu"):
        memplan.estimate(CONFIG, memplan.TrainingSpec(lora=8, quantization="nf4"), cluster, strategy)
