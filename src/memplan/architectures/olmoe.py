"""OLMoE (transformers.models.olmoe): Llama with experts in every layer, norms on query and key, clipped q, k, v."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from memplan.architectures.llama import LlamaAttention, LlamaForCausalLM, decoder_heads
from memplan.architectures.moe import NOT_THERE, LoopedMoeBlock, MoeConfig, MoeDecoderLayer, MoeModel
from memplan.architectures.nn import Build, RMSNorm
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tensor import Tensor


class OlmoeConfig(MoeConfig):
    vocab_size = 50304
    hidden_size = 2048
    intermediate_size = 2048
    num_hidden_layers = 16
    num_attention_heads = 16
    num_experts = 64
    num_experts_per_tok = 8

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.mlp_bias = False  # whatever the file says
        self.clip_qkv = fields.has("clip_qkv")


class OlmoeAttention(LlamaAttention):
    def __init__(self, b: Build, c: OlmoeConfig, layer_idx: int) -> None:
        super().__init__(b, c, layer_idx)
        self.clip_qkv = c.clip_qkv
        self.q_norm = RMSNorm(b, c.hidden_size)
        self.k_norm = RMSNorm(b, c.hidden_size // c.num_attention_heads * c.num_key_value_heads)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = hidden_states.shape
        query_states = self.q_norm(self.q_proj(hidden_states))
        key_states = self.k_norm(self.k_proj(hidden_states))
        value_states = self.v_proj(hidden_states)
        if self.clip_qkv:
            query_states = ops.clamp_(query_states)
            key_states = ops.clamp_(key_states)
            value_states = ops.clamp_(value_states)
        query_states = query_states.view(batch, length, -1, self.head_dim).transpose(1, 2)
        key_states = key_states.view(batch, length, -1, self.head_dim).transpose(1, 2)
        value_states = value_states.view(batch, length, -1, self.head_dim).transpose(1, 2)
        return query_states, key_states, value_states


class OlmoeLoopedMoeBlock(LoopedMoeBlock):
    oldest = "4.45"
    why_not_older = NOT_THERE
    hit_only = "5.0"


class OlmoeDecoderLayer(MoeDecoderLayer):
    looped_moe_class = OlmoeLoopedMoeBlock
    attention_class: ClassVar[Callable[..., Any]] = OlmoeAttention


class OlmoeModel(MoeModel):
    layer_class: ClassVar[Callable[..., Any]] = OlmoeDecoderLayer


class OlmoeForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = OlmoeConfig
    model_class: ClassVar[Callable[..., Any]] = OlmoeModel


HEADS = decoder_heads(OlmoeForCausalLM)
