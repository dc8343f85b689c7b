"""OLMo 2 (transformers.models.olmo2): RMSNorm after each block instead of before, and on the whole query and key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from memplan.architectures.llama import LlamaAttention, LlamaConfig, LlamaForCausalLM, LlamaMLP, decoder_heads
from memplan.architectures.nn import Build, CheckpointLayer, Module
from memplan.architectures.olmo import OlmoModel, apply_float32_rotary_pos_emb
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tensor import Tensor, float32


class Olmo2Config(LlamaConfig):
    vocab_size = 50304

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.mlp_bias = False


class Olmo2RMSNorm(Module):
    """As LlamaRMSNorm, but the weight is multiplied before the result is cast back."""

    def __init__(self, b: Build, dim: int) -> None:
        self.weight = b.parameter(dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * ops.rsqrt(variance + 1e-6)
        return (self.weight * hidden_states).to(input_dtype)


class Olmo2Attention(LlamaAttention):
    rotate = staticmethod(apply_float32_rotary_pos_emb)

    def __init__(self, b: Build, c: LlamaConfig, layer_idx: int) -> None:
        super().__init__(b, c, layer_idx)
        self.q_norm = Olmo2RMSNorm(b, c.num_attention_heads * c.head_dim)
        self.k_norm = Olmo2RMSNorm(b, c.num_key_value_heads * c.head_dim)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = hidden_states.shape
        query_states = self.q_norm(self.q_proj(hidden_states))
        key_states = self.k_norm(self.k_proj(hidden_states))
        value_states = self.v_proj(hidden_states)
        query_states = query_states.view(batch, length, -1, self.head_dim).transpose(1, 2)
        key_states = key_states.view(batch, length, -1, self.head_dim).transpose(1, 2)
        value_states = value_states.view(batch, length, -1, self.head_dim).transpose(1, 2)
        return query_states, key_states, value_states


class Olmo2DecoderLayer(CheckpointLayer):
    def __init__(self, b: Build, c: LlamaConfig, layer_idx: int) -> None:
        self.layer_type = c.layer_types[layer_idx]
        self.self_attn = Olmo2Attention(b, c, layer_idx)
        self.mlp = LlamaMLP(b, c)
        self.post_attention_layernorm = Olmo2RMSNorm(b, c.hidden_size)
        self.post_feedforward_layernorm = Olmo2RMSNorm(b, c.hidden_size)

    def forward(self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        residual = hidden_states
        hidden_states, _ = self.self_attn(hidden_states, positions, mask)
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.mlp(hidden_states)
        hidden_states = self.post_feedforward_layernorm(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states


class Olmo2Model(OlmoModel):
    layer_class: ClassVar[Callable[..., Any]] = Olmo2DecoderLayer
    norm_class: ClassVar[Callable[..., Any]] = Olmo2RMSNorm


class Olmo2ForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = Olmo2Config
    model_class: ClassVar[Callable[..., Any]] = Olmo2Model


HEADS = decoder_heads(Olmo2ForCausalLM)
