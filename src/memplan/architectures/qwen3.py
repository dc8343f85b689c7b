"""Qwen3 (transformers.models.qwen3): Qwen2 with RMSNorm on the heads of query and key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from memplan.architectures.llama import (
    LlamaAttention,
    LlamaConfig,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    decoder_heads,
)
from memplan.architectures.nn import Build, RMSNorm
from memplan.architectures.qwen2 import Qwen2Config
from memplan.specs.fields import Fields
from memplan.tape.tensor import Tensor


class Qwen3Config(Qwen2Config):
    default_head_dim = 128

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.attention_bias = self.output_bias = fields.bool("attention_bias", False)


class Qwen3Attention(LlamaAttention):
    def __init__(self, b: Build, c: LlamaConfig, layer_idx: int) -> None:
        super().__init__(b, c, layer_idx)
        self.q_norm = RMSNorm(b, c.head_dim)
        self.k_norm = RMSNorm(b, c.head_dim)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = hidden_states.shape
        query_states = self.q_norm(self.q_proj(hidden_states).view(batch, length, -1, self.head_dim)).transpose(1, 2)
        key_states = self.k_norm(self.k_proj(hidden_states).view(batch, length, -1, self.head_dim)).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        return query_states, key_states, value_states


class Qwen3DecoderLayer(LlamaDecoderLayer):
    attention_class: ClassVar[Callable[..., Any]] = Qwen3Attention


class Qwen3Model(LlamaModel):
    layer_class: ClassVar[Callable[..., Any]] = Qwen3DecoderLayer


class Qwen3ForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = Qwen3Config
    model_class: ClassVar[Callable[..., Any]] = Qwen3Model


HEADS = decoder_heads(Qwen3ForCausalLM)
