"""Phi-1, Phi-1.5, Phi-2 (transformers.models.phi): attention and MLP in parallel, a part of each head rotated."""

from __future__ import annotations

from memplan.architectures.llama import LlamaConfig
from memplan.architectures.nn import (
    Build,
    CheckpointLayer,
    Dropout,
    Embedding,
    LayerNorm,
    Layers,
    Linear,
    Module,
    RotaryEmbedding,
    activation,
    apply_rotary_pos_emb,
    attention,
    cached,
    causal_mask,
    language_model_heads,
    position_ids,
    rotary_dim,
)
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tensor import Tensor


class PhiConfig(LlamaConfig):
    vocab_size = 51200
    hidden_size = 2048
    intermediate_size = 8192
    num_hidden_layers = 24
    hidden_act = "gelu_new"
    rotates_whole_heads = False

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.rotary_dim = rotary_dim(fields, self.head_dim, 0.5)
        self.resid_pdrop = fields.float("resid_pdrop", 0.0, maximum=1.0)
        self.embd_pdrop = fields.float("embd_pdrop", 0.0, maximum=1.0)
        self.qk_layernorm = fields.bool("qk_layernorm", False)


class PhiAttention(Module):
    def __init__(self, b: Build, c: PhiConfig) -> None:
        self.b = b
        self.head_dim = c.head_dim
        self.rotary_ndims = c.rotary_dim
        self.dropout = c.attention_dropout
        self.q_proj = Linear(b, c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = Linear(b, c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Linear(b, c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.dense = Linear(b, c.num_attention_heads * c.head_dim, c.hidden_size)
        self.qk_layernorm = c.qk_layernorm
        if c.qk_layernorm:
            self.q_layernorm = LayerNorm(b, c.hidden_size // c.num_attention_heads)
            self.k_layernorm = LayerNorm(b, c.hidden_size // c.num_attention_heads)

    def forward(
        self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        query_states = self.q_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        if self.qk_layernorm:
            query_states = self.q_layernorm(query_states)
            key_states = self.k_layernorm(key_states)
        cos, sin = positions
        rotated, passed = self.rotary_ndims, self.head_dim - self.rotary_ndims
        query_rot, query_pass = query_states.narrow(-1, 0, rotated), query_states.narrow(-1, rotated, passed)
        key_rot, key_pass = key_states.narrow(-1, 0, rotated), key_states.narrow(-1, rotated, passed)
        query_rot, key_rot = apply_rotary_pos_emb(query_rot, key_rot, cos, sin)
        query_states = ops.cat((query_rot, query_pass))
        key_states = ops.cat((key_rot, key_pass))
        key_states, value_states = cached(self.b, key_states, value_states)
        attn_output, attn_weights = attention(self.b, query_states, key_states, value_states, mask, self.dropout)
        attn_output = attn_output.reshape(batch, length, -1).contiguous()
        attn_output = self.dense(attn_output)
        return attn_output, attn_weights


class PhiMLP(Module):
    def __init__(self, b: Build, c: PhiConfig) -> None:
        self.activation_fn = activation(c.hidden_act)
        self.fc1 = Linear(b, c.hidden_size, c.intermediate_size)
        self.fc2 = Linear(b, c.intermediate_size, c.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.fc1(hidden_states)
        hidden_states = self.activation_fn(hidden_states)
        hidden_states = self.fc2(hidden_states)
        return hidden_states


class PhiDecoderLayer(CheckpointLayer):
    def __init__(self, b: Build, c: PhiConfig) -> None:
        self.resid_dropout = Dropout(c.resid_pdrop)
        self.self_attn = PhiAttention(b, c)
        self.mlp = PhiMLP(b, c)
        self.input_layernorm = LayerNorm(b, c.hidden_size)

    def forward(self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        attn_outputs, _ = self.self_attn(hidden_states, positions, mask)
        attn_outputs = self.resid_dropout(attn_outputs)
        feed_forward_hidden_states = self.resid_dropout(self.mlp(hidden_states))
        hidden_states = attn_outputs + feed_forward_hidden_states + residual
        return hidden_states


class PhiModel(Module):
    def __init__(self, b: Build, c: PhiConfig) -> None:
        self.b = b
        self.embed_tokens = Embedding(b, c.vocab_size, c.hidden_size)
        self.embed_dropout = Dropout(c.embd_pdrop)
        self.layers = Layers(b, c.kinds, lambda i: PhiDecoderLayer(b, c))
        self.final_layernorm = LayerNorm(b, c.hidden_size)
        self.rotary_emb = RotaryEmbedding(b, c.rotary_dim)

    def forward(self, input_ids: Tensor) -> Tensor:
        inputs_embeds = self.embed_tokens(input_ids)
        ids = position_ids(self.b, inputs_embeds)
        mask = causal_mask(self.b, inputs_embeds)
        inputs_embeds = self.embed_dropout(inputs_embeds)
        hidden_states = inputs_embeds
        positions = self.rotary_emb(hidden_states, ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions, mask)
        return self.final_layernorm(hidden_states)


HEADS = language_model_heads(PhiConfig, PhiModel, prefix="model", embedding="embed_tokens", bias=True)
