"""Setups that a rounded error hides: every phase within the few scalars that the Trainer keeps, traced anew."""

from __future__ import annotations

from typing import Any

import pytest
from tests.oracles.compare import compare
from tests.oracles.o1 import Row, Setup

from memplan.introspect.trace import trace_step

SCALARS = 16 * 512
"""The running loss, the gradients' norm, the count of items, and scalars that layers save: no estimate counts them."""

BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 30011,
    "max_position_embeddings": 200,
}
FALCON: dict[str, Any] = {
    "model_type": "falcon",
    "architectures": ["FalconForCausalLM"],
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": 307,
    "alibi": True,
}
DEBERTA: dict[str, Any] = {
    **BERT,
    "model_type": "deberta-v2",
    "architectures": ["DebertaV2ForMaskedLM"],
    "vocab_size": 307,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
}
STABLELM: dict[str, Any] = {
    "model_type": "stablelm",
    "architectures": ["StableLmForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "qk_layernorm": True,
    "vocab_size": 307,
}
QWEN2_MOE: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 100,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "vocab_size": 307,
}
PADDED: dict[str, Any] = {"padded": True, "micro_batch_size": 5, "seq_len": 131, "grad_accum_steps": 3}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the masks of all micro-batches wait": ({**BERT, "vocab_size": 307}, PADDED),
    "a mask in evaluation": (BERT, {"padded": True, "seq_len": 131, "eval": True, "eval_batch_size": 40}),
    "alibi is made of the mask": (FALCON, PADDED),
    "a mask that the model looks at itself": (DEBERTA, {**PADDED, "attn": "eager"}),
    "a bias that nothing uses": ({**BERT, "tie_word_embeddings": False}, {"grad_accum_steps": 2}),
    "a norm for each head, of which there is one": (STABLELM, {"attn": "eager"}),
    "all-linear beside experts that are no layers": (
        QWEN2_MOE,
        {"lora": {"rank": 4, "targets": "all-linear"}, "gradient_checkpointing": True},
    ),
    "a bias that nothing uses, saved": (
        {**BERT, "tie_word_embeddings": False},
        {"lora": {"rank": 4, "targets": ["query"], "modules_to_save": ["cls"]}},
    ),
}


@pytest.mark.parametrize(("config", "options"), CASES.values(), ids=CASES)
def test_every_phase_is_within_a_few_scalars(config: dict[str, Any], options: dict[str, Any]) -> None:
    options = {"dtype": "float32", "mixed_precision": "no", "micro_batch_size": 2, "seq_len": 24, **options}
    traced = trace_step(config, **options).to_dict()
    comparison = compare(Row(_Asked(config, options), traced))
    for phase, (truth, estimated) in comparison.phases.items():
        assert 0 <= truth - estimated <= SCALARS, phase
    assert traced["num_parameters"] == comparison.result.model.parameters
    assert traced["num_trainable"] == comparison.result.model.trainable_parameters


class _Asked(Setup):
    """A setup with a config of its own."""

    def __init__(self, config: dict[str, Any], options: dict[str, Any]) -> None:
        super().__init__(config["model_type"], "odd", options)
        object.__setattr__(self, "_config", config)

    @property
    def values(self) -> dict[str, Any]:
        return self.__dict__["_config"]  # type: ignore[no-any-return]
