"""What Liger patches of a model, and what it would leave alone or kill."""

from __future__ import annotations

from typing import Any

import pytest
from tests.adapters.tape_step import build
from tests.oracles.families import CONFIGS

from memplan.adapters.liger import FAMILIES, LigerExperts, LigerFusedMLP, LigerMLP, LigerRMSNorm, apply_liger_kernel
from memplan.adapters.lora import apply_lora
from memplan.architectures import registry
from memplan.architectures.llama import LlamaAttention
from memplan.architectures.nn import Inventory, Model, Module
from memplan.errors import SpecError, UnsupportedError
from memplan.specs.software import SoftwareSpec
from memplan.specs.training import LoraSpec
from memplan.tape import liger

UNKNOWN_TO_LIGER = {
    *("bert", "bloom", "cohere", "deberta-v2", "distilbert", "falcon", "glm", "gpt2", "gpt_bigcode", "gpt_neo"),
    *("gpt_neox", "gptj", "mt5", "olmo", "olmoe", "opt", "phi", "qwen2_moe", "roberta", "stablelm", "starcoder2", "t5"),
    *("vit", "xlm-roberta"),
}
"""Families of memplan that MODEL_TYPE_TO_APPLY_LIGER_FN of liger-kernel 0.8.5 does not have."""


def patched(family: str, *, lora: LoraSpec | None = None, head: str | None = None, **changes: Any) -> Model:
    config = {**next(iter(CONFIGS[family].values())), **changes}
    attn = "eager" if family == "gemma2" else "sdpa"
    b, root = build(config, "bfloat16", head=head, attn=attn)
    apply_liger_kernel(b, root, config["model_type"])
    if lora is not None:
        apply_lora(b, root, lora, config["model_type"])
    return root


def modules(root: Module, kind: type[Module]) -> list[str]:
    return [path for path, module in root.named_modules() if isinstance(module, kind) and ".1." not in path]


def test_every_family_is_known_to_liger_or_refused() -> None:
    assert set(registry.FAMILIES) <= set(FAMILIES) | UNKNOWN_TO_LIGER
    assert not set(FAMILIES) & UNKNOWN_TO_LIGER


@pytest.mark.parametrize(
    ("family", "norms"),
    [
        ("llama", ["input_layernorm", "post_attention_layernorm"]),
        ("qwen3", ["self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"]),
        ("olmo2", ["post_attention_layernorm", "post_feedforward_layernorm"]),  # not those of query and key
        (
            "deepseek_v2",
            ["self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "input_layernorm", "post_attention_layernorm"],
        ),
    ],
)
def test_norms(family: str, norms: list[str]) -> None:
    found = [path for path in modules(patched(family), LigerRMSNorm) if path.startswith("model.layers.0.")]
    assert sorted(found) == sorted(f"model.layers.0.{name}" for name in norms)
    assert "model.norm" in modules(patched(family), LigerRMSNorm)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", LigerMLP), ("phi3", LigerFusedMLP), ("glm4", LigerFusedMLP), ("mixtral", LigerExperts)],
)
def test_feed_forward(family: str, kind: type[Module]) -> None:
    assert any(path.startswith("model.layers.0.mlp") for path in modules(patched(family), kind))


@pytest.mark.parametrize(("family", "rotates"), [("llama", True), ("phi3", True), ("glm4", False), ("smollm3", True)])
def test_rotary_positions(family: str, rotates: bool) -> None:
    found = [module for _, module in patched(family).named_modules() if isinstance(module, LlamaAttention)]
    assert (found[0].rotate is liger.rotary_pos_emb) == rotates


def test_smollm3_has_layers_without_positions_and_keeps_them() -> None:
    root = patched("smollm3", no_rope_layer_interval=2)
    found = [module.rotate for _, module in root.named_modules() if isinstance(module, LlamaAttention)]
    assert found[0] is liger.rotary_pos_emb
    assert found[1] is not liger.rotary_pos_emb


def test_no_parameter_is_lost() -> None:
    for family in sorted(set(FAMILIES) & set(CONFIGS)):
        config = next(iter(CONFIGS[family].values()))
        _, plain = build(config, "bfloat16", attn="eager" if family == "gemma2" else "sdpa")
        with_liger = patched(family)
        registry.name_parameters(plain)
        registry.name_parameters(with_liger)
        assert [p.name for p, _ in Inventory(with_liger).parameters] == [p.name for p, _ in Inventory(plain).parameters]


@pytest.mark.parametrize("family", ["gpt2", "falcon", "bert"])
def test_unknown_family_is_refused_by_name(family: str) -> None:
    with pytest.raises(SpecError, match=rf"liger: true has no kernels for {family}: the Trainer would go on without"):
        patched(family)


def test_classifier_is_refused() -> None:
    with pytest.raises(SpecError, match="gives every head a language model's forward pass"):
        patched("llama", head="sequence-classification")


def test_qwen3_moe_with_a_dense_layer_is_refused() -> None:
    with pytest.raises(SpecError, match=r"dies on model.layers.1.mlp"):
        patched("qwen3_moe", mlp_only_layers=[1])


def test_adapter_on_the_output_head_is_refused() -> None:
    root = patched("llama", lora=LoraSpec(rank=4, targets=("lm_head",)))
    with pytest.raises(SpecError, match="lora_targets: 'lm_head' trains nothing under Liger"):
        root(*root.inputs(1, 8))


def test_saved_output_head_is_the_copy() -> None:
    root = patched("llama", lora=LoraSpec(rank=4, targets=("q_proj",), modules_to_save=("lm_head",)))
    loss, logits = root(*root.inputs(1, 8))
    assert logits is None
    root.b.tape.backward(loss)
    assert "liger_grad_weight" in {name for name, _, _ in root.b.tape.births}


@pytest.mark.parametrize(
    ("versions", "error", "message"),
    [
        ({"liger_kernel": "0.5.2"}, UnsupportedError, "software: liger_kernel: '0.5.2' is not modelled"),
        ({"transformers": "4.57"}, SpecError, "software: transformers: '4.57' is not imported by liger-kernel 0.8"),
    ],
)
def test_versions(versions: dict[str, str], error: type[Exception], message: str) -> None:
    b, root = build(CONFIGS["llama"]["small"], "bfloat16", software=SoftwareSpec(**versions))
    with pytest.raises(error, match=message):
        apply_liger_kernel(b, root, "llama")
