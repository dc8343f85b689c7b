"""A model's config made tiny: the same family with 2 narrow layers, for a rehearsal without a hub.

Names are those of transformers' config classes. A key that is in no table keeps its value: it decides operations, not
sizes.
"""

from __future__ import annotations

from typing import Any

from memplan.specs.model import ModelSpec

__all__ = ["LAYERS", "SWAPPED_VOCABULARY", "VOCABULARY", "tiny_config"]

LAYERS = 2
HEADS = 4
HEAD_DIM = 16
WIDTH = HEADS * HEAD_DIM
VOCABULARY = 512
SWAPPED_VOCABULARY = 2**15
"""Tokens whose embedding in 16 bit, shared by 2 ranks, has 2 MiB each: DeepSpeed does not swap less than 1 MiB to NVMe
(``runtime/swap_tensor/utils.py``, ``MIN_AIO_BYTES``)."""


_HEAD_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEAD_KEYS = ("num_key_value_heads", "num_kv_heads")
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(_HEAD_KEYS, HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "kv_lora_rank"), HEAD_DIM),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), HEAD_DIM // 2),
    **dict.fromkeys(("hidden_size", "n_embd", "n_embed", "d_model", "dim", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("pooler_hidden_size", "embedding_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "n_inner"), 2 * WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank"), WIDTH // 2),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), HEADS),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "max_window_layers"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    "vocab_size": VOCABULARY,  # or as asked
}
"""The largest value that each key keeps."""
_END = 2
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Lists with an entry per layer."""
_LAYER_NUMBERS = ("mlp_only_layers",)
"""Lists of the numbers of layers."""
_ROTARY_FACTORS = ("long_factor", "short_factor")
"""Lists with an entry per pair of rotated dimensions."""
_LEFT_OUT = ("quantization_config", "dtype", "torch_dtype", "auto_map", "_name_or_path")
"""What is about the checkpoint, not the model."""


def tiny_config(model: ModelSpec, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """Return values of a ``config.json``: those of ``model`` with 2 layers, 4 heads of 16 and ``vocabulary`` tokens."""
    config = {"model_type": model.model_type, **{k: v for k, v in model.config.items() if k not in _LEFT_OUT}}
    heads = next((config[key] for key in _HEAD_KEYS if key in config), None)
    for key, value in config.items():
        if isinstance(value, int) and not isinstance(value, bool) and key in _SIZES:
            config[key] = min(value, vocabulary if key == "vocab_size" else _SIZES[key])
        elif key in _KV_HEAD_KEYS and isinstance(value, int):
            config[key] = {heads: HEADS, 1: 1}.get(value, HEADS // 2)
        elif key.endswith("_token_id"):
            config[key] = _token(value)
        elif key in _PER_LAYER and value is not None:
            config[key] = list(value)[:LAYERS]
        elif key in _LAYER_NUMBERS and value is not None:
            config[key] = [number for number in value if number < LAYERS]
        elif key in ("rope_scaling", "rope_parameters") and isinstance(value, dict):
            config[key] = _rotary(value, float(config.get("partial_rotary_factor") or 1.0))
        elif key == "attention_types":  # of gpt_neo: [[kinds, how often], ...]
            kinds = [kind for names, times in value for kind in list(names) * times][:LAYERS]
            config[key] = [[kinds, 1]]
    if "vocab_size" in config and config.get("pad_token_id") is None:
        # What a classifier finds the end of a text by. A checkpoint has it, if its config here has not.
        config["eos_token_id"] = _END if config.get("eos_token_id") is None else config["eos_token_id"]
    return config


def _token(value: object) -> object:
    """An id within the vocabulary; several may end a text."""
    if isinstance(value, (list, tuple)):
        return [_token(each) for each in value]
    return value % VOCABULARY if isinstance(value, int) and value >= 0 else value


def _rotary(values: dict[str, Any], partial: float) -> dict[str, Any]:
    """The factors of longrope are as many as the pairs of dimensions that it rotates."""
    partial = float(values.get("partial_rotary_factor") or partial)
    pairs = int(HEAD_DIM * partial) // 2
    return {name: list(value)[:pairs] if name in _ROTARY_FACTORS else value for name, value in values.items()}
