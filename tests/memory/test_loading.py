"""What a model weighs once it is loaded, and what the GPU holds on the way."""

from __future__ import annotations

from typing import Any

import pytest
from tests.oracles.families import CONFIGS

from memplan.adapters.quantization import prepare_for_kbit_training, quantize
from memplan.architectures.nn import Build, Inventory, Module
from memplan.architectures.registry import FAMILIES, build_model
from memplan.introspect.trace import _build_model
from memplan.memory.loading import Held, blocks, by_device, footprint, load, tensors
from memplan.specs.model import ModelSpec
from memplan.specs.training import QuantizationSpec
from memplan.tape import tensor as dtypes
from memplan.tape.dispatch import CPU
from memplan.tape.tape import Tape
from memplan.units import GiB, MiB

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
}


def made(config: dict[str, Any], dtype: str, quantization: str | None = None, *, full_depth: bool = True) -> Module:
    spec = ModelSpec(
        id="test", model_type=config["model_type"], architecture=config["architectures"][0], config=config, source="x"
    )
    b = Build(Tape(CPU), dtypes.dtype_named(dtype), attn="eager", full_depth=full_depth)
    root = build_model(b, spec, None)
    if quantization is not None:
        quantize(b, root, QuantizationSpec(kind=quantization), dtypes.bfloat16)
    return root


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family", [family for family, named in CONFIGS.items() if next(iter(named.values()))["model_type"] in FAMILIES]
)
def test_every_familys_footprint_is_transformers(family: str, dtype: str) -> None:
    config = next(iter(CONFIGS[family].values()))
    held = tensors(made(config, dtype, full_depth=False))
    model = _build_model(config, dtype, "eager", None, None, None)
    for _, module in model.named_modules():
        bias = getattr(module, "e_score_correction_bias", None)
        if bias is not None:  # from_pretrained keeps it so (_keep_in_fp32_modules_strict)
            module.e_score_correction_bias = bias.float()
    assert footprint(held) == model.get_memory_footprint()
    real = [name for name, _ in model.named_parameters()] + [name for name, _ in model.named_buffers()]
    assert sorted(each.name for each in held) == sorted(real)


def test_layers_that_stand_for_others_are_named_as_all() -> None:
    few, all_ = (tensors(made(LLAMA, "bfloat16", "nf4-dq", full_depth=full_depth)) for full_depth in (False, True))
    assert [(each.name, each.tensor.nbytes) for each in few] == [(each.name, each.tensor.nbytes) for each in all_]


def test_scales_take_memory_and_are_not_in_the_footprint() -> None:
    root = made(LLAMA, "bfloat16", "nf4")
    held = tensors(root)
    scales = sum(buffer.nbytes for buffer, _ in Inventory(root).buffers if not buffer.registered)
    weights = 3 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
    assert scales == weights // 64 * 4 + 3 * 7 * 64
    assert blocks(held) >= footprint(held) + scales


def test_a_model_that_is_moved_to_the_gpu_needs_nothing_more() -> None:
    held = tensors(made(LLAMA, "bfloat16"))
    loaded = load(held, direct=False)
    assert loaded.peak_allocated == loaded.allocated >= blocks(held)


def test_loading_to_the_gpu_takes_the_memory_in_one_block_first() -> None:
    held = tensors(made(LLAMA, "bfloat16"))
    warmed, not_warmed = load(held, direct=True), load(held, direct=True, capacity=GiB)
    assert footprint(held) <= warmed.peak_reserved < footprint(held) + 4 * MiB
    # A gibibyte is below the margin that the warm-up leaves, so every tensor gets memory of its own.
    assert warmed.peak_reserved < not_warmed.peak_reserved


@pytest.mark.parametrize(("kind", "per_weight"), [("nf4", 2.0), ("int8", 4.0)])
def test_one_weight_at_a_time_is_there_as_loaded(kind: str, per_weight: float) -> None:
    """bfloat16 beside the packed result; int8 makes a float16 copy of that, too."""
    held = tensors(made(LLAMA, "bfloat16", kind))
    loaded = load(held, direct=True, capacity=GiB)
    largest = 1024 * 4096
    after_last = 2 * 1024 * 32000 * 2  # the head and the embeddings come first, the norm is small
    assert loaded.allocated > after_last
    assert loaded.peak_allocated - loaded.allocated <= per_weight * largest
    assert loaded.peak_allocated - loaded.allocated >= per_weight * largest - 7 * MiB  # what of a layer comes later


def test_preparation_raises_one_tensor_after_the_other() -> None:
    root = made(LLAMA, "bfloat16", "nf4")
    held = tensors(root)
    loaded = load(held, direct=True, capacity=GiB, prepare=True)
    prepare_for_kbit_training(root)
    assert loaded.allocated == pytest.approx(blocks(tensors(root)), rel=0.02)
    # The head is the last of the two large ones, of which the 16-bit copy is still there.
    assert loaded.peak_allocated >= loaded.allocated + 2 * 1024 * 32000 - 2 * MiB


def test_buffers_of_offloaded_modules_stay_on_the_first_gpu() -> None:
    held = tensors(made(LLAMA, "float32"))
    groups = by_device(held, {"model": "cpu", "lm_head": 1})

    def names(group: list[Held]) -> set[str]:
        return {each.name for each in group}

    assert "model.embed_tokens.weight" in names(groups["cpu"])
    assert names(groups[1]) == {"lm_head.weight", "model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"}
