"""What the GPT-2-like and the parallel decoders read from a config, keep beside their weights, and refuse."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.architectures.nn import Build, Inventory, Module
from memplan.architectures.registry import build_model
from memplan.errors import MemplanError, SpecError, UnsupportedError
from memplan.specs.model import ModelSpec
from memplan.tape.tape import Tape
from memplan.tape.tensor import DType, bfloat16, float32

GPT2 = {"n_embd": 96, "n_head": 6, "n_layer": 2, "vocab_size": 500, "n_positions": 64}
DECODER = {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 500}
BLOOM = {"hidden_size": 96, "n_head": 6, "n_layer": 2, "vocab_size": 500}
NEO = {
    "hidden_size": 96,
    "num_heads": 6,
    "num_layers": 2,
    "vocab_size": 500,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]],
}
SIZES = {
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gptj": {**GPT2, "rotary_dim": 8},
    "gpt_neo": NEO,
    "gpt_neox": DECODER,
    "opt": {**DECODER, "max_position_embeddings": 64},
    "phi": DECODER,
    "falcon": DECODER,
    "bloom": BLOOM,
}


def build(model_type: str, attn: str = "eager", dtype: DType = float32, **values: Any) -> tuple[Build, Any]:
    config = {**SIZES[model_type], **values}
    model = ModelSpec(id="config.json", model_type=model_type, architecture="", config=config, source="test")
    b = Build(Tape(), dtype, attn=attn)
    return b, build_model(b, model, "causal-lm")


def shapes(module: Module) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.{name}": parameter.shape
        for prefix, child in module.named_modules()
        for name, parameter in child.parameters()
    }


@pytest.mark.parametrize("model_type", sorted(SIZES))
def test_hidden_size_must_divide_by_the_heads(model_type: str) -> None:
    heads = next(name for name in SIZES[model_type] if name.endswith(("head", "heads")))
    with pytest.raises(SpecError, match=r"config\.json.*96.*not divisible.*7"):
        build(model_type, **{heads: 7})


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_bigcode", "gptj", "gpt_neo", "opt"])
def test_a_sequence_longer_than_the_position_table_is_refused(model_type: str) -> None:
    _, model = build(model_type)
    model(*model.inputs(1, 64))
    with pytest.raises(SpecError, match=r"seq_len: 65 is longer than the model's table of 64 positions"):
        model(*model.inputs(1, 65))


@pytest.mark.parametrize("model_type", sorted(SIZES))
@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_the_embedding(model_type: str, tied: bool) -> None:
    _, model = build(model_type, tie_word_embeddings=tied)
    tables = [p for p, _ in Inventory(model).parameters if p.shape == (500, 96)]
    assert len(tables) == (1 if tied else 2)


@pytest.mark.parametrize(
    ("model_type", "values", "error", "message"),
    [
        ("gpt2", {"add_cross_attention": True}, UnsupportedError, "add_cross_attention"),
        ("gptj", {"rotary_dim": 24}, SpecError, "rotary_dim: 24 is more than a head has. Use at most 16"),
        ("gpt_neo", {"num_layers": 3}, SpecError, r'num_layers 3, as GPTNeoConfig asks. Use \[\[\["global"\], 3\]\]'),
        ("gpt_neo", {"attention_types": [[["sparse"], 2]]}, SpecError, "attention_types"),
        ("gpt_neo", {"attention_types": [[["global"], "2"]]}, SpecError, "attention_types"),
        ("opt", {"layerdrop": 0.1}, UnsupportedError, "layerdrop"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 4}, UnsupportedError, "slow_but_exact"),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4}, SpecError, "num_kv_heads: 4 does not divide"),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, SpecError, "parallel_attn"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, SpecError, "num_ln_in_parallel_attn"),
        ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3}, SpecError, "num_ln_in_parallel"),
        ("phi", {"num_key_value_heads": 4}, SpecError, "not divisible by num_key_value_heads 4"),
    ],
)
def test_refusals(model_type: str, values: dict[str, Any], error: type[MemplanError], message: str) -> None:
    with pytest.raises(error, match=message):
        build(model_type, **values)


def test_falcon_with_alibi_has_no_flash_attention() -> None:
    build("falcon", attn="flash_attention_2")
    with pytest.raises(SpecError, match="attn: 'flash_attention_2' does not work with alibi"):
        build("falcon", attn="flash_attention_2", alibi=True)


def test_masks_and_positions_that_are_buffers() -> None:
    assert sum(Inventory(build("gpt_bigcode")[1]).buffer_blocks) == 64 * 64
    assert sum(Inventory(build("gpt_neo")[1]).buffer_blocks) == 2 * 64 * 64, "one mask per layer"
    assert sum(Inventory(build("gptj")[1]).buffer_blocks) == 2 * 64 * 8 * 4, "one table of sines per layer"


def test_one_key_value_head() -> None:
    head = 96 // 6
    name = "transformer.h.0.attn.c_attn.weight"
    assert shapes(build("gpt_bigcode")[1])[name] == (96 + 2 * head, 96)
    assert shapes(build("gpt_bigcode", multi_query=False)[1])[name] == (3 * 96, 96)
    name = "transformer.h.0.self_attention.query_key_value.weight"
    assert shapes(build("falcon")[1])[name] == (96 + 2 * head, 96)
    assert shapes(build("falcon", multi_query=False)[1])[name] == (3 * 96, 96)
    grouped = build("falcon", new_decoder_architecture=True, num_kv_heads=3)[1]
    assert shapes(grouped)[name] == (96 + 2 * 3 * head, 96)


def test_the_part_of_a_head_that_rotates() -> None:
    def rotated(model_type: str, **values: Any) -> int:
        _, model = build(model_type, **values)
        return next(m.dim for _, m in model.named_modules() if type(m).__name__ == "RotaryEmbedding")

    assert rotated("gpt_neox") == 4
    assert rotated("gpt_neox", rotary_pct=0.5) == 8
    assert rotated("gpt_neox", rope_parameters={"partial_rotary_factor": 1.0}) == 16
    assert rotated("phi") == 8
    assert rotated("phi", partial_rotary_factor=0.25) == 4


def test_opt_350m_projects_between_two_widths() -> None:
    found = shapes(build("opt", word_embed_proj_dim=40, do_layer_norm_before=False)[1])
    assert found["model.decoder.project_in.weight"] == (96, 40)
    assert found["model.decoder.project_out.weight"] == (40, 96)
    assert found["model.decoder.embed_positions.weight"] == (64 + 2, 96)
    assert found["lm_head.weight"] == (500, 40)
    assert "model.decoder.final_layer_norm.weight" not in found


def test_upcast_attention_has_its_scores_in_float32() -> None:
    def scores(upcast: bool) -> int:
        b, model = build("gpt2", dtype=bfloat16, reorder_and_upcast_attn=upcast, vocab_size=8)
        model(*model.inputs(2, 64))
        return next(b.tape.sizes[i] for i, (name, _, _) in enumerate(b.tape.births) if name == "softmax")

    assert scores(False) == 2 * 6 * 64 * 64 * 2
    assert scores(True) == 2 * 6 * 64 * 64 * 4
