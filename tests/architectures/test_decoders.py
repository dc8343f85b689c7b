"""What the decoder families read from their configs, and when they make masks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from memplan.architectures.gemma import GemmaConfig
from memplan.architectures.gemma2 import Gemma2Config, Gemma2ForCausalLM
from memplan.architectures.gemma3_text import Gemma3Config
from memplan.architectures.glm import GlmConfig
from memplan.architectures.llama import LlamaForCausalLM
from memplan.architectures.mistral import MistralConfig, MistralForCausalLM
from memplan.architectures.nn import Build
from memplan.architectures.phi3 import Phi3Config
from memplan.architectures.qwen2 import Qwen2Config, Qwen2ForCausalLM
from memplan.architectures.smollm3 import SmolLM3Config
from memplan.architectures.stablelm import StableLmConfig
from memplan.errors import SpecError, UnsupportedError
from memplan.specs.fields import Fields
from memplan.tape.tape import Tape
from memplan.tape.tensor import bfloat16

TINY = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def fields(**values: Any) -> Fields:
    return Fields({**TINY, **values}, "config.json")


def allocations(causal_lm: type[LlamaForCausalLM], length: int, attn: str = "sdpa", **values: Any) -> Counter[str]:
    """How often each kind of tensor is allocated in the forward pass of two sequences."""
    tape = Tape()
    model = causal_lm(Build(tape, bfloat16, attn=attn), fields(**values))
    model(*model.inputs(2, length))
    return Counter(name for name, _, _ in tape.births)


@pytest.mark.parametrize(("length", "masks"), [(15, 0), (16, 1), (17, 1)])
def test_sdpa_needs_a_mask_once_the_sequence_fills_the_window(length: int, masks: int) -> None:
    names = allocations(MistralForCausalLM, length, sliding_window=16)
    assert names["sliding_window_overlay"] == masks
    assert names["attn_mask"] == masks * TINY["num_hidden_layers"], "each layer converts the shared boolean mask"


def test_a_null_window_is_none_and_a_missing_one_the_default() -> None:
    assert MistralConfig(fields(sliding_window=None)).windows == {FULL: None}
    assert MistralConfig(fields()).windows == {FULL: 4096}


def test_eager_makes_one_additive_mask_per_layer_type() -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    assert allocations(Qwen2ForCausalLM, 8, "eager")["causal_mask_additive"] == 1
    assert allocations(Qwen2ForCausalLM, 8, "eager", **window)["causal_mask_additive"] == 2


@pytest.mark.parametrize(
    ("config", "values", "expected"),
    [
        (Qwen2Config, {"sliding_window": 8}, [FULL] * 4),
        (Qwen2Config, {"use_sliding_window": True, "max_window_layers": 3}, [FULL, FULL, FULL, SLIDING]),
        (Gemma2Config, {}, [SLIDING, FULL, SLIDING, FULL]),
        (Gemma3Config, {}, [SLIDING] * 4),
        (Gemma3Config, {"sliding_window_pattern": 3}, [SLIDING, SLIDING, FULL, SLIDING]),
        (SmolLM3Config, {}, [FULL] * 4),
        (SmolLM3Config, {"use_sliding_window": True, "sliding_window": 8}, [FULL, FULL, FULL, SLIDING]),
    ],
)
def test_layer_types(config: type[Any], values: dict[str, Any], expected: list[str]) -> None:
    assert list(config(fields(**values)).layer_types) == expected


def test_smollm3_tells_layers_without_rotary_positions_apart() -> None:
    config = SmolLM3Config(fields(no_rope_layers=[1, 0, 1, 0]))
    assert config.kinds == [(FULL, 1), (FULL, 0), (FULL, 1), (FULL, 0)]


def test_layer_types_are_checked() -> None:
    with pytest.raises(SpecError, match=r"config\.json: layer_types: 3 entries for 4 layers"):
        Qwen2Config(fields(layer_types=[FULL] * 3))
    with pytest.raises(SpecError, match=r"layer_types\[1\]: 'linear_attention' is not modelled"):
        Qwen2Config(fields(layer_types=[FULL, "linear_attention", FULL, FULL]))
    with pytest.raises(SpecError, match="has no window"):
        Qwen2Config(fields(layer_types=[FULL, SLIDING, FULL, FULL]))
    with pytest.raises(SpecError, match="no_rope_layers"):
        SmolLM3Config(fields(no_rope_layers=[1]))


@pytest.mark.parametrize(
    ("config", "values", "dim"),
    [
        (Phi3Config, {}, 16),
        (StableLmConfig, {}, 4),
        (GlmConfig, {}, 64),
        (GlmConfig, {"head_dim": 32, "partial_rotary_factor": 0.25}, 8),
        (Phi3Config, {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.75}}, 12),
        (Phi3Config, {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "longrope"}}, 8),
    ],
)
def test_the_rotated_part_of_a_head(config: type[Any], values: dict[str, Any], dim: int) -> None:
    assert config(fields(**values)).rotary_dim == dim


def test_gemma2_has_no_sdpa() -> None:
    with pytest.raises(UnsupportedError, match="no 'sdpa' for gemma2"):
        Gemma2ForCausalLM(Build(Tape(), bfloat16, attn="sdpa"), fields())


def test_soft_caps_are_on_unless_null() -> None:
    assert Gemma2Config(fields()).final_logit_softcapping
    assert not Gemma2Config(fields(attn_logit_softcapping=None)).attn_logit_softcapping
    assert not Gemma3Config(fields()).final_logit_softcapping
    assert Gemma3Config(fields(final_logit_softcapping=30.0)).final_logit_softcapping


def test_bidirectional_gemma_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="use_bidirectional_attention"):
        GemmaConfig(fields(use_bidirectional_attention=True))


def test_heads_must_divide() -> None:
    with pytest.raises(SpecError, match="num_attention_heads 4 is not divisible by num_key_value_heads 3"):
        MistralConfig(fields(num_key_value_heads=3))
    with pytest.raises(SpecError, match="hidden_size 65 is not divisible by num_attention_heads 4"):
        MistralConfig(fields(hidden_size=65))
