"""Configs the oracles trace: per family one where activations and the optimizer step weigh most ("small"), and one
whose vocabulary is wide for its width, so that the logits do ("wide"). Both are small enough for a second each;
llama has more, with real widths. What a family does differently by an option of its config is in
``configs/<family>.json``, name -> values, and joins these under the name "variant <name>".
Values are config.json values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Config = dict[str, Any]

_SMALL: Config = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}
_WIDE: Config = {
    **_SMALL,
    "hidden_size": 384,
    "intermediate_size": 1000,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 32003,
}
_GPT2_SMALL: Config = {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 1000, "n_positions": 4096}
_GPT2_WIDE: Config = {**_GPT2_SMALL, "n_embd": 384, "n_head": 6, "vocab_size": 32003}


def _decoder(model_type: str, architecture: str, **values: Any) -> dict[str, Config]:
    named = {"model_type": model_type, "architectures": [architecture]}
    return {"small": {**_SMALL, **named, **values}, "wide": {**_WIDE, **named, **values}}


def _gpt2_like(model_type: str, architecture: str, **values: Any) -> dict[str, Config]:
    named = {"model_type": model_type, "architectures": [architecture]}
    return {"small": {**_GPT2_SMALL, **named, **values}, "wide": {**_GPT2_WIDE, **named, **values}}


def _encoder_decoder(model_type: str, architecture: str, **values: Any) -> dict[str, Config]:
    return {
        name: {
            "model_type": model_type,
            "architectures": [architecture],
            "d_model": config["hidden_size"],
            "d_ff": config["intermediate_size"],
            "num_layers": 4,
            "num_decoder_layers": 4,
            "num_heads": config["num_attention_heads"],
            "d_kv": 64,
            "vocab_size": config["vocab_size"],
            "decoder_start_token_id": 0,
            **values,
        }
        for name, config in (("small", _SMALL), ("wide", _WIDE))
    }


def _mla(model_type: str, architecture: str, **values: Any) -> dict[str, Config]:
    """Multi-head latent attention has as many key as query heads, and its first layer is dense here."""
    shared = {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    }
    made = _decoder(model_type, architecture, **shared, **values)
    for config in made.values():
        config["num_key_value_heads"] = config["num_attention_heads"]
    return made


_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}

CONFIGS: dict[str, dict[str, Config]] = {
    "llama": {
        **_decoder("llama", "LlamaForCausalLM"),
        "tied": {**_WIDE, **_LLAMA, "tie_word_embeddings": True},
        "biased": {**_SMALL, **_LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 48},
        "dropout": {**_SMALL, **_LLAMA, "attention_dropout": 0.1},
        "7b": {
            **_LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
        },
        "8b": {
            **_LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        },
    },
    "mistral": _decoder("mistral", "MistralForCausalLM", sliding_window=64),
    "mixtral": _decoder("mixtral", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "qwen2": _decoder("qwen2", "Qwen2ForCausalLM"),
    "qwen3": _decoder("qwen3", "Qwen3ForCausalLM", head_dim=64),
    "qwen3_moe": _decoder(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
    ),
    "qwen2_moe": _decoder(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=320,
    ),
    "gemma": _decoder("gemma", "GemmaForCausalLM", head_dim=64),
    "gemma2": _decoder("gemma2", "Gemma2ForCausalLM", head_dim=64, sliding_window=64),
    "gemma3_text": _decoder("gemma3_text", "Gemma3ForCausalLM", head_dim=64, sliding_window=64),
    "phi": _decoder("phi", "PhiForCausalLM"),
    "phi3": _decoder("phi3", "Phi3ForCausalLM", pad_token_id=0),
    "gpt2": {
        **_gpt2_like("gpt2", "GPT2LMHeadModel"),
        "no_dropout": {
            **_GPT2_SMALL,
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
    },
    "gptj": _gpt2_like("gptj", "GPTJForCausalLM", rotary_dim=32),
    "gpt_neo": {
        name: {
            "model_type": "gpt_neo",
            "architectures": ["GPTNeoForCausalLM"],
            "hidden_size": config["n_embd"],
            "num_layers": config["n_layer"],
            "num_heads": config["n_head"],
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": 1024,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 64,
        }
        for name, config in (("small", _GPT2_SMALL), ("wide", _GPT2_WIDE))
    },
    "gpt_neox": _decoder("gpt_neox", "GPTNeoXForCausalLM"),
    "opt": {
        name: {**config, "ffn_dim": 4 * config["hidden_size"], "word_embed_proj_dim": config["hidden_size"]}
        for name, config in _decoder("opt", "OPTForCausalLM").items()
    },
    "bloom": {
        name: {
            "model_type": "bloom",
            "architectures": ["BloomForCausalLM"],
            "hidden_size": config["n_embd"],
            "n_layer": config["n_layer"],
            "n_head": config["n_head"],
            "vocab_size": config["vocab_size"],
        }
        for name, config in (("small", _GPT2_SMALL), ("wide", _GPT2_WIDE))
    },
    "falcon": _decoder("falcon", "FalconForCausalLM", multi_query=True),
    "gpt_bigcode": _gpt2_like("gpt_bigcode", "GPTBigCodeForCausalLM"),
    "starcoder2": _decoder("starcoder2", "Starcoder2ForCausalLM", sliding_window=64),
    "olmo": _decoder("olmo", "OlmoForCausalLM"),
    "olmoe": _decoder("olmoe", "OlmoeForCausalLM", num_experts=8, num_experts_per_tok=2),
    "olmo2": _decoder("olmo2", "Olmo2ForCausalLM"),
    "stablelm": _decoder("stablelm", "StableLmForCausalLM"),
    "cohere": _decoder("cohere", "CohereForCausalLM"),
    "deepseek_v2": _mla("deepseek_v2", "DeepseekV2ForCausalLM"),
    "deepseek_v3": _mla("deepseek_v3", "DeepseekV3ForCausalLM", n_group=2, topk_group=1),
    "granite": _decoder("granite", "GraniteForCausalLM"),
    "smollm3": _decoder("smollm3", "SmolLM3ForCausalLM", pad_token_id=0),
    "glm": _decoder("glm", "GlmForCausalLM", head_dim=64, pad_token_id=0),
    "glm4": _decoder("glm4", "Glm4ForCausalLM", head_dim=64, pad_token_id=0),
    "bert": _decoder("bert", "BertForSequenceClassification"),
    "roberta": _decoder("roberta", "RobertaForSequenceClassification", pad_token_id=1),
    "xlm-roberta": _decoder("xlm-roberta", "XLMRobertaForSequenceClassification", pad_token_id=1),
    "distilbert": {
        name: {
            "model_type": "distilbert",
            "architectures": ["DistilBertForSequenceClassification"],
            "dim": config["hidden_size"],
            "hidden_dim": config["intermediate_size"],
            "n_layers": 4,
            "n_heads": config["num_attention_heads"],
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": 4096,
        }
        for name, config in (("small", _SMALL), ("wide", _WIDE))
    },
    "deberta-v2": _decoder(
        "deberta-v2",
        "DebertaV2ForSequenceClassification",
        relative_attention=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        position_buckets=64,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        type_vocab_size=0,
        problem_type="single_label_classification",  # without it the loss looks for the labels that are not negative
    ),
    "t5": _encoder_decoder("t5", "T5ForConditionalGeneration"),
    "mt5": _encoder_decoder("mt5", "MT5ForConditionalGeneration", tie_word_embeddings=False),
    "vit": {
        name: {
            "model_type": "vit",
            "architectures": ["ViTForImageClassification"],
            "hidden_size": config["hidden_size"],
            "intermediate_size": config["intermediate_size"],
            "num_hidden_layers": 4,
            "num_attention_heads": config["num_attention_heads"],
            "image_size": image_size,
            "patch_size": 16,
        }
        for name, config, image_size in (("small", _SMALL, 96), ("wide", _WIDE, 224))
    },
}
"""Family -> name -> config.json values."""

for _path in sorted((Path(__file__).parent / "configs").glob("*.json")):
    for _name, _values in json.loads(_path.read_text(encoding="utf-8")).items():
        CONFIGS.setdefault(_path.stem, {})[f"variant {_name}"] = _values

EAGER_ONLY = frozenset({"bloom", "deberta-v2", "gemma2", "gpt_neo", "gptj"})
"""Families for which transformers refuses ``attn_implementation="sdpa"``."""

LORA_TARGETS: dict[str, list[str]] = {
    "phi3": ["qkv_proj"],
    "gpt2": ["c_attn"],
    "gpt_bigcode": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "bloom": ["query_key_value"],
    "falcon": ["query_key_value"],
    "deepseek_v2": ["q_a_proj", "kv_b_proj"],
    "deepseek_v3": ["q_a_proj", "kv_b_proj"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "xlm-roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "deberta-v2": ["query_proj", "value_proj"],
    "t5": ["q", "v"],
    "mt5": ["q", "v"],
}
"""Family -> the modules LoRA adapts there; q_proj and v_proj elsewhere."""
