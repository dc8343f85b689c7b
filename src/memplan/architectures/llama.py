"""Llama (transformers.models.llama): grouped-query attention with rotary positions, RMSNorm, a gated MLP."""

from __future__ import annotations

from memplan.architectures.nn import (
    Build,
    CheckpointLayer,
    Embedding,
    Layers,
    Linear,
    Model,
    Module,
    RMSNorm,
    SequenceClassification,
    activation,
    apply_rotary_pos_emb,
    attention,
    causal_lm_output,
    causal_mask,
    position_ids,
    rotary_embedding,
)
from memplan.errors import SpecError
from memplan.specs.fields import Fields
from memplan.tape.tensor import Tensor


class LlamaConfig:
    """The fields of config.json that the memory of a Llama depends on."""

    def __init__(self, fields: Fields) -> None:
        self.vocab_size = fields.int("vocab_size", 32000)
        self.hidden_size = fields.int("hidden_size", 4096)
        self.intermediate_size = fields.int("intermediate_size", 11008)
        self.num_hidden_layers = fields.int("num_hidden_layers", 32)
        self.num_attention_heads = fields.int("num_attention_heads", 32)
        self.num_key_value_heads = fields.int("num_key_value_heads", self.num_attention_heads)
        self.head_dim = head_dim(fields, self.hidden_size, self.num_attention_heads)
        check_groups(fields, self.num_attention_heads, self.num_key_value_heads)
        self.hidden_act = fields.str("hidden_act", "silu")
        self.attention_bias = fields.bool("attention_bias", False)
        self.attention_dropout = fields.float("attention_dropout", 0.0, maximum=1.0)
        self.mlp_bias = fields.bool("mlp_bias", False)
        self.tie_word_embeddings = fields.bool("tie_word_embeddings", False)


def head_dim(fields: Fields, hidden_size: int, heads: int) -> int:
    """The explicit head_dim, or hidden_size / heads, which must divide."""
    explicit = fields.optional_int("head_dim")
    if explicit is not None:
        return explicit
    if hidden_size % heads:
        raise SpecError(
            f"{fields.source}: hidden_size {hidden_size} is not divisible by num_attention_heads {heads}. "
            "Correct one of them, or give head_dim."
        )
    return hidden_size // heads


def check_groups(fields: Fields, heads: int, kv_heads: int) -> None:
    """Query heads must divide evenly over key-value heads."""
    if heads % kv_heads:
        raise SpecError(
            f"{fields.source}: num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}. "
            "Correct one of them."
        )


class LlamaMLP(Module):
    def __init__(self, b: Build, c: LlamaConfig) -> None:
        self.gate_proj = Linear(b, c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up_proj = Linear(b, c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down_proj = Linear(b, c.intermediate_size, c.hidden_size, c.mlp_bias)
        self.act_fn = activation(c.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LlamaAttention(Module):
    def __init__(self, b: Build, c: LlamaConfig) -> None:
        self.b = b
        self.head_dim = c.head_dim
        self.dropout = c.attention_dropout
        self.q_proj = Linear(b, c.hidden_size, c.num_attention_heads * c.head_dim, c.attention_bias)
        self.k_proj = Linear(b, c.hidden_size, c.num_key_value_heads * c.head_dim, c.attention_bias)
        self.v_proj = Linear(b, c.hidden_size, c.num_key_value_heads * c.head_dim, c.attention_bias)
        self.o_proj = Linear(b, c.num_attention_heads * c.head_dim, c.hidden_size, c.attention_bias)

    def forward(
        self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        query_states = self.q_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        cos, sin = positions
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
        attn_output, attn_weights = attention(self.b, query_states, key_states, value_states, mask, self.dropout)
        attn_output = attn_output.reshape(batch, length, -1).contiguous()
        attn_output = self.o_proj(attn_output)
        return attn_output, attn_weights


class LlamaDecoderLayer(CheckpointLayer):
    def __init__(self, b: Build, c: LlamaConfig) -> None:
        self.self_attn = LlamaAttention(b, c)
        self.mlp = LlamaMLP(b, c)
        self.input_layernorm = RMSNorm(b, c.hidden_size)
        self.post_attention_layernorm = RMSNorm(b, c.hidden_size)

    def forward(self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, positions, mask)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states


class LlamaModel(Module):
    def __init__(self, b: Build, c: LlamaConfig) -> None:
        self.b = b
        self.head_dim = c.head_dim
        self.embed_tokens = Embedding(b, c.vocab_size, c.hidden_size)
        self.layers = Layers(b, [0] * c.num_hidden_layers, lambda i: LlamaDecoderLayer(b, c))
        self.norm = RMSNorm(b, c.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        inputs_embeds = self.embed_tokens(input_ids)
        ids = position_ids(inputs_embeds)
        mask = causal_mask(self.b, inputs_embeds)
        hidden_states = inputs_embeds
        positions = rotary_embedding(hidden_states, ids, self.head_dim)
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions, mask)
        return self.norm(hidden_states)


class LlamaForCausalLM(Model):
    def __init__(self, b: Build, fields: Fields) -> None:
        c = LlamaConfig(fields)
        self.b = b
        self.model = LlamaModel(b, c)
        self.lm_head = Linear(b, c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden_states = self.model(input_ids)
        return causal_lm_output(self.b, self.lm_head, hidden_states, labels)


def base_model(b: Build, fields: Fields) -> Module:
    return LlamaModel(b, LlamaConfig(fields))


def sequence_classification(b: Build, fields: Fields) -> Model:
    c = LlamaConfig(fields)
    return SequenceClassification(b, fields, "model", LlamaModel(b, c), c.hidden_size)


HEADS = {"causal-lm": LlamaForCausalLM, "base": base_model, "sequence-classification": sequence_classification}
