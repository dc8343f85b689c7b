"""OLMo (transformers.models.olmo): Llama with layer norms that have no weights and, in some, clipped q, k and v."""

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
from memplan.architectures.nn import Build, Module, apply_rotary_pos_emb
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tensor import Tensor, float32


class OlmoConfig(LlamaConfig):
    vocab_size = 50304

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.mlp_bias = False
        self.clip_qkv = fields.has("clip_qkv")


class OlmoLayerNorm(Module):
    """layer_norm in float32 without weight or bias."""

    def __init__(self, b: Build, dim: int) -> None:
        pass

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.layer_norm(hidden_states.to(float32), None, None).to(hidden_states.dtype)


def apply_float32_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """OLMo's: cos and sin are float32, and so is the arithmetic; the results have q's and k's dtypes."""
    q_embed, k_embed = apply_rotary_pos_emb(q, k, cos, sin)
    return q_embed.to(q.dtype), k_embed.to(k.dtype)


class OlmoAttention(LlamaAttention):
    rotate = staticmethod(apply_float32_rotary_pos_emb)

    def __init__(self, b: Build, c: OlmoConfig, layer_idx: int) -> None:
        super().__init__(b, c, layer_idx)
        self.clip_qkv = c.clip_qkv

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = hidden_states.shape
        query_states = self.q_proj(hidden_states)
        key_states = self.k_proj(hidden_states)
        value_states = self.v_proj(hidden_states)
        if self.clip_qkv:
            query_states = ops.clamp_(query_states)
            key_states = ops.clamp_(key_states)
            value_states = ops.clamp_(value_states)
        query_states = query_states.view(batch, length, -1, self.head_dim).transpose(1, 2)
        key_states = key_states.view(batch, length, -1, self.head_dim).transpose(1, 2)
        value_states = value_states.view(batch, length, -1, self.head_dim).transpose(1, 2)
        return query_states, key_states, value_states


class OlmoDecoderLayer(LlamaDecoderLayer):
    attention_class: ClassVar[Callable[..., Any]] = OlmoAttention
    norm_class: ClassVar[Callable[..., Any]] = OlmoLayerNorm


class OlmoModel(LlamaModel):
    layer_class: ClassVar[Callable[..., Any]] = OlmoDecoderLayer
    norm_class: ClassVar[Callable[..., Any]] = OlmoLayerNorm

    def __init__(self, b: Build, c: OlmoConfig) -> None:
        super().__init__(b, c)
        self.rotary_emb.dtype = float32


class OlmoForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = OlmoConfig
    model_class: ClassVar[Callable[..., Any]] = OlmoModel


HEADS = decoder_heads(OlmoForCausalLM)
