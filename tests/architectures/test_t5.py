"""T5: what its config says, what its two stacks share, and what it keeps."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import pytest

from memplan.architectures.nn import Build, Inventory
from memplan.architectures.registry import attention_implementations
from memplan.architectures.t5 import T5Config, T5ForConditionalGeneration
from memplan.errors import SpecError
from memplan.specs.fields import Fields
from memplan.tape.tape import Tape
from memplan.tape.tensor import Shape, Tensor, bfloat16, float16, float32

TINY = {
    "vocab_size": 50,
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 96,
    "num_layers": 5,
    "num_decoder_layers": 4,
    "num_heads": 4,
}


def fields(**values: Any) -> Fields:
    return Fields({**TINY, **values}, "config.json")


def run(b: Build, **values: Any) -> Counter[str]:
    """A forward and a backward pass; how often each operation allocated."""
    model = T5ForConditionalGeneration(b, fields(**values))
    loss, _ = model(*model.inputs(2, 16))
    b.tape.backward(loss)
    return Counter(name for name, _, _ in b.tape.births)


@pytest.mark.parametrize(
    ("projection", "expected"),
    [("relu", (False, "relu")), ("gated-gelu", (True, "gelu_new")), ("gated-silu", (True, "silu"))],
)
def test_feed_forward_projection(projection: str, expected: tuple[bool, str]) -> None:
    c = T5Config(fields(feed_forward_proj=projection))
    assert (c.is_gated_act, c.dense_act_fn) == expected


@pytest.mark.parametrize("projection", ["gate-gelu", "gated-gelu-new"])
def test_other_projections_are_refused(projection: str) -> None:
    with pytest.raises(SpecError, match=f"feed_forward_proj: '{projection}'"):
        T5Config(fields(feed_forward_proj=projection))


def test_defaults_are_those_of_transformers() -> None:
    t5, mt5 = (T5Config(Fields({"model_type": name}, "config.json")) for name in ("t5", "mt5"))
    assert (t5.vocab_size, t5.d_ff, t5.num_layers, t5.num_decoder_layers, t5.num_heads) == (32128, 2048, 6, 6, 8)
    assert (mt5.vocab_size, mt5.d_ff, mt5.num_layers, mt5.num_heads, mt5.is_gated_act) == (250112, 1024, 8, 6, True)


@pytest.mark.parametrize(
    ("values", "tied", "scaled"),
    [({}, True, True), ({"tie_word_embeddings": False}, False, False), ({"model_type": "mt5"}, True, False)],
)
def test_only_the_first_t5_scales_before_its_tied_head(values: dict[str, Any], tied: bool, scaled: bool) -> None:
    model = T5ForConditionalGeneration(Build(Tape(), float32), fields(**values))
    assert (model.lm_head.weight is model.shared.weight) == tied
    assert model.scale_decoder_outputs == scaled


def test_the_stacks_are_told_apart() -> None:
    b = Build(Tape(), bfloat16, full_depth=False)
    model = T5ForConditionalGeneration(b, fields())
    assert Inventory(model).stacks == {0: [0, 1, 1, 1, 4], 1: [0, 1, 1, 3]}
    loss, _ = model(*model.inputs(2, 16))
    b.tape.backward(loss)
    entered = [mark.layer for mark in b.tape.marks if mark.name == "layer" and mark.layer is not None]
    left = [mark.layer for mark in b.tape.marks if mark.name == "layer_backward_end" and mark.layer is not None]
    assert entered == [(0, 0), (0, 1), (0, 4), (1, 0), (1, 1), (1, 3)]
    assert left == entered[::-1]


def test_the_first_block_of_each_stack_has_the_table_of_biases() -> None:
    model = T5ForConditionalGeneration(Build(Tape(), bfloat16), fields())
    tables = [name for name, _ in model.named_modules() if name.endswith("relative_attention_bias")]
    assert tables == [
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias" for stack in ("encoder", "decoder")
    ]


@pytest.mark.parametrize(("use_cache", "checkpointing"), [(True, False), (False, False), (True, True)])
def test_the_decoder_copies_keys_and_values_into_a_cache_unless_it_recomputes(
    use_cache: bool, checkpointing: bool
) -> None:
    names = run(Build(Tape(), bfloat16, gradient_checkpointing=checkpointing), use_cache=use_cache)
    self_and_cross_attention = 2 * 4
    assert names["cat"] == (2 * self_and_cross_attention if use_cache and not checkpointing else 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_empty_bias_of_cross_attention_needs_a_gradient_only_under_checkpointing(checkpointing: bool) -> None:
    class Recorder(Tape):
        leaves: ClassVar[list[Shape]] = []

        def require_grad(self, x: Tensor) -> None:
            self.leaves.append(x.shape)
            super().require_grad(x)

    Recorder.leaves.clear()
    run(Build(Recorder(), bfloat16, attn="eager", gradient_checkpointing=checkpointing))
    # made in the decoder's first block, and once more where backward recomputes it
    assert Recorder.leaves == ([(1, 4, 16, 16)] * 2 if checkpointing else [])


@pytest.mark.parametrize(("dtype", "kept"), [(float16, float32), (bfloat16, bfloat16), (float32, float32)])
def test_wo_stays_in_float32_where_the_rest_is_float16(dtype: Any, kept: Any) -> None:
    model = T5ForConditionalGeneration(Build(Tape(), dtype), fields())
    dtypes = {p.dtype for name, module in model.named_modules() if name.endswith(".wo") for _, p in module.parameters()}
    assert dtypes == {kept}
    assert model.shared.weight.dtype is dtype


def test_float16_is_clamped_until_wo_makes_the_residual_float32() -> None:
    # the first block of the encoder after self-attention; of the decoder after self- and cross-attention
    assert run(Build(Tape(), float16))["clamp"] == 3
    assert run(Build(Tape(), bfloat16))["clamp"] == 0


def test_attention_implementations() -> None:
    assert attention_implementations("t5") == attention_implementations("mt5") == ("sdpa", "eager")
