"""Which file describes a model_type. One line per family."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from memplan.architectures.nn import Build, Module
from memplan.errors import SpecError, UnsupportedError, did_you_mean
from memplan.specs.model import ModelSpec

FAMILIES: dict[str, str] = {
    "bert": "bert",
    "roberta": "roberta",
    "distilbert": "distilbert",
    "deberta-v2": "deberta_v2",
    "t5": "t5",
    "mt5": "t5",
    "vit": "vit",
    "xlm-roberta": "roberta",
    "llama": "llama",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "opt": "opt",
    "phi": "phi",
    "gptj": "gptj",
    "gpt_bigcode": "gpt_bigcode",
    "falcon": "falcon",
    "bloom": "bloom",
    "gpt_neo": "gpt_neo",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2_moe",
    "qwen3_moe": "qwen3_moe",
    "olmoe": "olmoe",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "phi3": "phi3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3_text",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "stablelm": "stablelm",
    "cohere": "cohere",
    "starcoder2": "starcoder2",
    "glm": "glm",
    "glm4": "glm4",
    "smollm3": "smollm3",
    "granite": "granite",
}
"""config.json's ``model_type`` -> module of this package."""

_HEADS_BY_SUFFIX = (
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
    ("ForConditionalGeneration", "seq2seq-lm"),
    ("ForSequenceClassification", "sequence-classification"),
    ("ForImageClassification", "image-classification"),
    ("ForMaskedLM", "masked-lm"),
    ("ForPreTraining", "pretraining"),
    ("Model", "base"),
)


MODEL_CLASSES: dict[str, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
"""Heads that can be asked for and have a loss, and the class of transformers that loads them."""


def head_of(architecture: str) -> str:
    """The head that a transformers class name stands for. Raises UnsupportedError for one that is not modelled."""
    if architecture.endswith("EncoderModel"):
        remedy = "Give --head seq2seq-lm, or --head base, for the whole model."
        raise UnsupportedError.at("architectures", architecture, "is half of a model, which is not modelled", remedy)
    for suffix, head in _HEADS_BY_SUFFIX:
        if architecture.endswith(suffix):
            return head
    raise UnsupportedError(f"architectures: {architecture!r} has a head that is not modelled. Give --head.")


def attention_implementations(model_type: str) -> tuple[str, ...]:
    """What transformers has for a family: its file's ATTENTION, or all three."""
    module_name = FAMILIES.get(model_type)
    if module_name is None:
        return ALL_ATTENTION
    found: tuple[str, ...] = getattr(import_module(f"memplan.architectures.{module_name}"), "ATTENTION", ALL_ATTENTION)
    return found


ALL_ATTENTION = ("sdpa", "eager", "flash_attention_2")


def trainable_heads(model_type: str) -> tuple[str, ...]:
    """The heads with a loss that memplan has for a family, and that can be asked for."""
    heads = import_module(f"memplan.architectures.{FAMILIES[model_type]}").HEADS if model_type in FAMILIES else {}
    return tuple(head for head in heads if head in MODEL_CLASSES)


def build_model(b: Build, model: ModelSpec, head: str | None) -> Module:
    """Make the model's modules. Raises UnsupportedError for what is not written."""
    module_name = FAMILIES.get(model.model_type)
    if module_name is None:
        raise UnsupportedError(
            f"model_type: {model.model_type!r} is not written. Use --trace with the train extra installed, "
            f"or one of {', '.join(sorted(FAMILIES))}."
        )
    heads: dict[str, Callable[..., Any]] = import_module(f"memplan.architectures.{module_name}").HEADS
    wanted = head or head_of(model.architecture)
    if wanted not in heads:
        raise SpecError.at("head", wanted, f"does not exist for {model.model_type}", did_you_mean(wanted, heads))
    root: Module = heads[wanted](b, model.fields)
    return root


def name_parameters(root: Module) -> None:
    """Give every parameter its name in the state dict; a tied one keeps its first."""
    for prefix, module in root.named_modules():
        for name, parameter in module.parameters():
            if not parameter.name:
                parameter.name = f"{prefix}.{name}" if prefix else name
