"""Qwen2 (transformers.models.qwen2): Llama with biases on q, k and v, and sliding windows in the upper layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from memplan.architectures.llama import LlamaConfig, LlamaForCausalLM, decoder_heads, layer_types, sliding_windows
from memplan.specs.fields import Fields


class Qwen2Config(LlamaConfig):
    vocab_size = 151936
    intermediate_size = 22016
    default_kv_heads = 32

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.attention_bias, self.output_bias, self.mlp_bias = True, False, False  # whatever the file says
        use_sliding_window = fields.bool("use_sliding_window", False)
        sliding_window = fields.nullable_int("sliding_window", 4096) if use_sliding_window else None
        max_window_layers = fields.int("max_window_layers", 28, minimum=0)
        sliding = [sliding_window is not None and i >= max_window_layers for i in range(self.num_hidden_layers)]
        self.layer_types = layer_types(fields, ["sliding_attention" if s else "full_attention" for s in sliding])
        self.windows = sliding_windows(fields, self.layer_types, sliding_window)


class Qwen2ForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = Qwen2Config


HEADS = decoder_heads(Qwen2ForCausalLM)
