"""LoRA against PEFT's own modules in a traced step."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from tests.adapters.tape_step import TapeStep, build, peak, step
from tests.oracles.families import CONFIGS

from memplan.adapters.lora import DEFAULT_TARGETS, FUSED_EXPERTS, apply_lora, targets_to_choose
from memplan.architectures.nn import Build, Inventory, Model
from memplan.architectures.registry import FAMILIES
from memplan.errors import SpecError, UnsupportedError
from memplan.introspect.trace import TraceResult, trace_step
from memplan.specs.training import LoraSpec, QuantizationSpec

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
TIED = {**LLAMA, "tie_word_embeddings": True}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 1500,
    "n_embd": 192,
    "n_layer": 2,
    "n_head": 6,
    "n_positions": 256,
}
T5: dict[str, Any] = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 1000,
    "d_model": 192,
    "d_kv": 24,
    "d_ff": 520,
    "num_layers": 2,
    "num_heads": 6,
    "decoder_start_token_id": 0,
}
XLM_ROBERTA: dict[str, Any] = {
    "model_type": "xlm-roberta",
    "architectures": ["XLMRobertaForMaskedLM"],
    "vocab_size": 2003,
    "hidden_size": 192,
    "intermediate_size": 520,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "pad_token_id": 1,
}
VIT: dict[str, Any] = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "hidden_size": 192,
    "intermediate_size": 520,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "image_size": 64,
}
CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("all linear", LLAMA, {"targets": ("all-linear",), "dropout": 0.1}, {"dtype": "bfloat16"}),
    ("all linear, autocast", LLAMA, {"targets": ("all-linear",)}, {"mixed_precision": "bf16"}),
    ("saved head", LLAMA, {"targets": ("q_proj",), "modules_to_save": ("lm_head",)}, {"mixed_precision": "bf16"}),
    ("saved tied head", TIED, {"targets": ("q_proj",), "modules_to_save": ("lm_head",)}, {"dtype": "bfloat16"}),
    (
        "saved tied head and embedding, checkpointed",
        TIED,
        {"targets": ("v_proj",), "modules_to_save": ("lm_head", "embed_tokens")},
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
    ),
    (
        "saved once, under three names",
        LLAMA,
        {"targets": ("q_proj",), "modules_to_save": ("lm_head", "head", "lm_head")},
        {"dtype": "bfloat16"},
    ),
    (
        "saved under a longer and a shorter name",
        LLAMA,
        {"targets": ("q_proj",), "modules_to_save": ("layers.1.mlp", "mlp", "model.norm", "norm")},
        {"dtype": "bfloat16"},
    ),
    ("saved norm", LLAMA, {"targets": ("q_proj",), "modules_to_save": ("model.norm",)}, {"dtype": "bfloat16"}),
    ("Conv1D", GPT2, {"targets": ("c_attn", "c_proj"), "dropout": 0.1}, {"mixed_precision": "bf16"}),
    ("Conv1D, saved embedding", GPT2, {"targets": ("all-linear",), "modules_to_save": ("wte",)}, {}),
    ("T5 asks for a weight's dtype", T5, {"targets": ("all-linear",)}, {"dtype": "bfloat16"}),
    ("T5 asks for a saved weight's dtype", T5, {"targets": ("q",), "modules_to_save": ("wo",)}, {"dtype": "bfloat16"}),
    (
        "a saved head shares its bias with its decoder",
        XLM_ROBERTA,
        {"targets": ("query",), "modules_to_save": ("lm_head",)},
        {"dtype": "bfloat16"},
    ),
    (
        "patches are ViT's input embeddings, checkpointed",
        VIT,
        {"targets": ("all-linear",)},
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
    ),
]


@pytest.mark.parametrize(("config", "lora", "options"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_step_is_pefts(config: dict[str, Any], lora: dict[str, Any], options: dict[str, Any]) -> None:
    options = {"dtype": "float32", **options}
    targets = lora["targets"]
    traced = trace_step(
        config,
        seq_len=48,
        micro_batch_size=2,
        lora={
            "rank": 8,
            "targets": targets[0] if targets == ("all-linear",) else list(targets),
            "dropout": lora.get("dropout", 0.0),
            "modules_to_save": list(lora.get("modules_to_save", ())) or None,
        },
        **options,
    )
    adapt = partial(adapted, lora=LoraSpec(rank=8, **lora), model_type=config["model_type"])
    mine = step(config, options.pop("dtype"), adapt, **options)
    parameters = [p for p, _ in mine.inventory.parameters]
    assert sum(p.numel for p in parameters) == traced.num_parameters
    assert sum(p.numel for p in parameters if p.requires_grad) == traced.num_trainable
    assert peak(mine.forward + mine.backward) == pytest.approx(traced_peak(traced), rel=0.001)
    assert sum(mine.forward) == pytest.approx(traced.saved_activations, rel=0.005)
    assert gradients(mine) == traced.gradients


def adapted(b: Build, root: Model, lora: LoraSpec, model_type: str) -> None:
    apply_lora(b, root, lora, model_type)


def traced_peak(traced: TraceResult) -> int:
    """What forward and backward need above weights, optimizer states, inputs and the scalars of the Trainer."""
    passing = max(traced.phases[name] for name in ("forward", "loss", "backward"))
    return passing - traced.phases["idle"]


def gradients(run: TapeStep) -> int:
    return sum((p.nbytes + 511) // 512 * 512 for p, _ in run.inventory.parameters if p.requires_grad)


def test_adapters_of_16_bit_models_are_float32_unless_asked_otherwise() -> None:
    dtypes = {}
    for autocast in (True, False):
        b, root = build(LLAMA, "bfloat16")
        apply_lora(b, root, LoraSpec(rank=4, autocast_adapter_dtype=autocast), "llama")
        dtypes[autocast] = {p.dtype.name for p, _ in Inventory(root).parameters if p.requires_grad}
    assert dtypes == {True: {"float32"}, False: {"bfloat16"}}


def test_a_layer_that_is_named_by_its_index_is_adapted_alone() -> None:
    import memplan

    def estimate(**lora: Any) -> memplan.Estimate:
        spec = memplan.TrainingSpec(seq_len=48, lora=LoraSpec(rank=4, **lora))
        return memplan.estimate({**LLAMA, "num_hidden_layers": 5}, spec, "T4", replay=False)

    every = estimate(targets=("q_proj",)).model.trainable_parameters
    for index in (0, 1, 3):
        assert estimate(targets=(f"layers.{index}.self_attn.q_proj",)).model.trainable_parameters == every // 5
    mlp = 3 * LLAMA["hidden_size"] * LLAMA["intermediate_size"]
    saved = estimate(targets=("q_proj",), modules_to_save=("layers.2.mlp",)).model.trainable_parameters
    assert saved == every + mlp


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about a name that PEFT asks it for
@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|v)_proj",
        r"model\.layers\.[02]\.self_attn\.[qk]_proj",
        r".*layers\.\d\.mlp\.(?:up|down)_proj",
        r"(?!.*mlp).*_proj",
        r"lm_head|.*k_proj",
        r".*layers.(1|2).*o_proj",
        r"(q|v)_proj",  # of whole paths, which it is none of
    ],
)
def test_a_text_is_matched_with_whole_paths_as_in_peft(pattern: str) -> None:
    import peft
    import torch
    import transformers

    import memplan

    config = transformers.LlamaConfig(**{name: value for name, value in LLAMA.items() if name != "architectures"})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    b, root = build(LLAMA, "float32")
    lora = LoraSpec(rank=4, targets=pattern)
    try:
        real = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=pattern))
    except ValueError:
        with pytest.raises(SpecError, match="matches no module"):
            apply_lora(b, root, lora, "llama")
        return
    expected = {
        path.removeprefix("base_model.model.") for path, each in real.named_modules() if hasattr(each, "lora_A")
    }
    apply_lora(b, root, lora, "llama")
    assert {path for path, module in root.named_modules() if hasattr(module, "lora_A")} == expected
    estimate = memplan.estimate(LLAMA, {"seq_len": 16, "lora": lora}, "T4", replay=False)
    assert estimate.model.trainable_parameters == sum(each.numel() for each in real.parameters() if each.requires_grad)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ("(.*)*x", UnsupportedError, "may take long"),
        ("(a+)+$", UnsupportedError, "may take long"),
        (".*.*.*.*.*x", UnsupportedError, "may take long"),
        ("(a|b)" * 100, UnsupportedError, "may take long"),
        ("(q_proj", SpecError, "is no regular expression"),
        ("a{99999999999}", SpecError, "is no regular expression"),
        ((".*q_proj", "v_proj"), UnsupportedError, "beside other names"),
        (".{1,2}_proj", UnsupportedError, "has a comma"),
    ],
)
def test_a_regular_expression_that_is_not_matched_is_refused(
    targets: Any, error: type[Exception], message: str
) -> None:
    b, root = build(LLAMA, "float32")
    with pytest.raises(error, match=message):
        apply_lora(b, root, LoraSpec(rank=4, targets=targets), "llama")


def test_what_is_saved_is_no_regular_expression() -> None:
    """re.error: PEFT matches these names so where it looks for adapters' places, and not where it saves."""
    b, root = build(LLAMA, "float32")
    with pytest.raises(SpecError, match="modules_to_save: '\\('"):
        apply_lora(b, root, LoraSpec(rank=4, targets="q_proj", modules_to_save="("), "llama")


def test_default_targets_are_pefts_mapping() -> None:
    pefts = {family: tuple(names) for family, names in PEFT_TARGETS.items() if family in FAMILIES}
    assert {family: DEFAULT_TARGETS.get(family) for family in pefts} == pefts


def test_names_of_fused_experts_are_pefts() -> None:
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    pattern, mapping = conversion._MODEL_TO_CONVERSION_PATTERN, conversion._MOE_TARGET_MODULE_MAPPING
    pefts = {family: tuple(mapping[pattern[family]]) for family in FAMILIES if pattern.get(family) in mapping}
    assert {family: set(names) for family, names in FUSED_EXPERTS.items()} == {f: set(n) for f, n in pefts.items()}


@pytest.mark.parametrize("targets", [("q_proj", "gate_proj", "up_proj"), ("mlp.down_proj",), ("all-linear",)])
def test_layers_named_like_fused_experts_are_refused(targets: tuple[str, ...]) -> None:
    b, root = build(LLAMA, "float32")
    with pytest.raises(UnsupportedError, match="experts' fused 3-D weights"):
        apply_lora(b, root, LoraSpec(rank=4, targets=targets), "deepseek_v3")


def test_a_family_without_default_needs_targets() -> None:
    b, root = build(LLAMA, "float32")
    with pytest.raises(SpecError, match=r"lora_targets: PEFT has no default for model_type 'granite'.*all-linear"):
        apply_lora(b, root, LoraSpec(rank=4), "granite")


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(DEFAULT_TARGETS)))
def test_a_plan_adapts_what_peft_can_where_it_has_no_default(family: str) -> None:
    import memplan

    config = next(iter(CONFIGS[family].values()))
    targets = targets_to_choose(family)
    given = targets[0] if targets == ("all-linear",) else list(targets)
    traced = trace_step(config, seq_len=16, micro_batch_size=1, dtype="float32", lora={"rank": 4, "targets": given})
    training = memplan.TrainingSpec(seq_len=16, lora=LoraSpec(rank=4, targets=targets))
    mine = memplan.estimate(config, training, "T4", replay=False)
    assert mine.model.trainable_parameters == traced.num_trainable > 0


def test_all_linear_leaves_out_the_head_and_what_is_saved() -> None:
    b, root = build(LLAMA, "float32")
    apply_lora(b, root, LoraSpec(rank=4, targets=("ALL-LINEAR",), modules_to_save=("mlp",)), "llama")
    adapted_paths = {path for path, module in root.named_modules() if hasattr(module, "lora_A")}
    assert adapted_paths == {f"model.layers.{i}.self_attn.{name}_proj" for i in range(3) for name in "qkvo"}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ("q_prj",)}, "lora_targets: 'q_prj' matches no module. Did you mean q_proj"),
        ({"targets": ("q_proj", "nothing_like_it")}, "lora_targets: 'nothing_like_it' matches no module"),
        ({"targets": ("q_proj",), "modules_to_save": ("lm_haed",)}, "modules_to_save: 'lm_haed' matches no module"),
    ],
)
def test_a_name_that_matches_nothing_is_refused(lora: dict[str, Any], message: str) -> None:
    b, root = build(LLAMA, "float32")
    with pytest.raises(SpecError, match=message):
        apply_lora(b, root, LoraSpec(rank=4, **lora), "llama")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"bias": "all"}, "lora.bias: 'all' is not modelled"),
        ({"targets": ("embed_tokens",)}, "only linear layers are modelled"),
        ({"targets": ("lm_head",), "modules_to_save": ("layers",)}, "a Layers, which is not copied"),
        (
            {"targets": ("q_proj",), "modules_to_save": ("up_proj", "mlp")},
            "up_proj is matched, inside model.layers.0.mlp, which",
        ),
    ],
)
def test_what_is_not_modelled_is_refused(lora: dict[str, Any], message: str) -> None:
    b, root = build(LLAMA, "float32")
    with pytest.raises(UnsupportedError, match=message):
        apply_lora(b, root, LoraSpec(rank=4, **lora), "llama")


def test_a_quantized_module_cannot_be_saved() -> None:
    from memplan.adapters.quantization import quantize
    from memplan.tape.tensor import bfloat16

    b, root = build(LLAMA, "bfloat16")
    quantize(b, root, QuantizationSpec(kind="nf4"), bfloat16)
    with pytest.raises(UnsupportedError, match="a Linear4bit, which is not copied"):
        apply_lora(b, root, LoraSpec(rank=4, targets=("q_proj",), modules_to_save=("down_proj",)), "llama")
