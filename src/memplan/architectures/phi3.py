"""Phi-3 (transformers.models.phi3): Llama with fused projections, a part of each head rotated, residual dropout."""

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
from memplan.architectures.nn import (
    Build,
    Dropout,
    Linear,
    Module,
    activation,
    rotary_dim,
    rotate_half,
)
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tensor import Tensor


class Phi3Config(LlamaConfig):
    vocab_size = 32064
    hidden_size = 3072
    intermediate_size = 8192
    rotates_whole_heads = False
    more_rope_types = ("su",)

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.output_bias = False
        self.rotary_dim = rotary_dim(fields, self.head_dim, rounded_up=True)
        self.resid_pdrop = fields.float("resid_pdrop", 0.0, maximum=1.0)
        self.windows = {"full_attention": fields.nullable_int("sliding_window", None)}


class FusedMLP(Module):
    """Phi3MLP, GlmMLP, Glm4MLP: gate and up projection in one matrix."""

    def __init__(self, b: Build, c: LlamaConfig) -> None:
        self.gate_up_proj = Linear(b, c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down_proj = Linear(b, c.intermediate_size, c.hidden_size, bias=False)
        self.activation_fn = activation(c.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        up_states = self.gate_up_proj(hidden_states)
        gate, up_states = up_states.chunk(2)
        up_states = up_states * self.activation_fn(gate)
        return self.down_proj(up_states)


def apply_partial_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first dimensions of each head, as many as cos and sin have; the others pass."""
    cos = cos.unsqueeze(1)
    sin = sin.unsqueeze(1)
    rotary_dim = cos.shape[-1]
    passed = q.shape[-1] - rotary_dim
    q_rot, q_pass = q.narrow(-1, 0, rotary_dim), q.narrow(-1, rotary_dim, passed)
    k_rot, k_pass = k.narrow(-1, 0, rotary_dim), k.narrow(-1, rotary_dim, passed)
    q_embed = ops.cat([(q_rot * cos) + (rotate_half(q_rot) * sin), q_pass])
    k_embed = ops.cat([(k_rot * cos) + (rotate_half(k_rot) * sin), k_pass])
    return q_embed, k_embed


class Phi3Attention(LlamaAttention):
    rotate = staticmethod(apply_partial_rotary_pos_emb)

    def __init__(self, b: Build, c: LlamaConfig, layer_idx: int) -> None:
        self.b = b
        self.head_dim = c.head_dim
        self.dropout = c.attention_dropout
        self.query_size = c.num_attention_heads * c.head_dim
        self.kv_size = c.num_key_value_heads * c.head_dim
        self.o_proj = Linear(b, self.query_size, c.hidden_size, bias=False)
        self.qkv_proj = Linear(b, c.hidden_size, self.query_size + 2 * self.kv_size, bias=False)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = hidden_states.shape
        qkv = self.qkv_proj(hidden_states)
        query_states = qkv.narrow(-1, 0, self.query_size)
        key_states = qkv.narrow(-1, self.query_size, self.kv_size)
        value_states = qkv.narrow(-1, self.query_size + self.kv_size, self.kv_size)
        query_states = query_states.view(batch, length, -1, self.head_dim).transpose(1, 2)
        key_states = key_states.view(batch, length, -1, self.head_dim).transpose(1, 2)
        value_states = value_states.view(batch, length, -1, self.head_dim).transpose(1, 2)
        return query_states, key_states, value_states


class Phi3DecoderLayer(LlamaDecoderLayer):
    attention_class: ClassVar[Callable[..., Any]] = Phi3Attention
    mlp_class: ClassVar[Callable[..., Any]] = FusedMLP

    def __init__(self, b: Build, c: Phi3Config, layer_idx: int) -> None:
        super().__init__(b, c, layer_idx)
        self.resid_attn_dropout = Dropout(c.resid_pdrop)
        self.resid_mlp_dropout = Dropout(c.resid_pdrop)

    def forward(self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _self_attn_weights = self.self_attn(hidden_states, positions, mask)
        hidden_states = residual + self.resid_attn_dropout(hidden_states)
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + self.resid_mlp_dropout(hidden_states)
        return hidden_states


class Phi3Model(LlamaModel):
    layer_class: ClassVar[Callable[..., Any]] = Phi3DecoderLayer


class Phi3ForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = Phi3Config
    model_class: ClassVar[Callable[..., Any]] = Phi3Model


HEADS = decoder_heads(Phi3ForCausalLM)
