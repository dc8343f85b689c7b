"""Mistral (transformers.models.mistral): Llama without biases, every layer within one sliding window."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from memplan.architectures.llama import LlamaConfig, LlamaForCausalLM, decoder_heads
from memplan.architectures.nn import OwnLoss, causal_lm_output
from memplan.specs.fields import Fields


class MistralConfig(LlamaConfig):
    intermediate_size = 14336
    default_kv_heads = 8
    sliding_window: int | None = 4096

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.attention_bias = self.output_bias = self.mlp_bias = False  # whatever the file says
        self.windows = {"full_attention": fields.nullable_int("sliding_window", self.sliding_window)}


class MistralForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = MistralConfig
    output: Callable[..., Any] = staticmethod(partial(causal_lm_output, own_loss=OwnLoss("4.48")))


HEADS = decoder_heads(MistralForCausalLM)
