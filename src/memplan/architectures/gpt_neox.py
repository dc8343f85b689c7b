"""GPT-NeoX (transformers.models.gpt_neox; Pythia): parallel residual, fused projection, a part of each head rotated."""

from __future__ import annotations

from memplan.architectures.nn import (
    Build,
    CheckpointLayer,
    Dropout,
    Embedding,
    LayerNorm,
    Layers,
    Linear,
    Module,
    OwnLoss,
    RotaryEmbedding,
    activation,
    attention,
    cached,
    causal_mask,
    check_heads,
    check_rope_type,
    language_model_heads,
    position_ids,
    rotary_dim,
    rotate_half,
)
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tensor import Tensor


class GPTNeoXConfig:
    """The fields of config.json that the memory of a GPT-NeoX depends on."""

    def __init__(self, fields: Fields) -> None:
        self.vocab_size = fields.int("vocab_size", 50432)
        self.hidden_size = fields.int("hidden_size", 6144)
        self.num_hidden_layers = fields.layers("num_hidden_layers", 44)
        self.num_attention_heads = fields.int("num_attention_heads", 64)
        check_heads(fields, self.hidden_size, self.num_attention_heads)
        self.head_size = self.hidden_size // self.num_attention_heads
        check_rope_type(fields)
        rotary_pct = fields.float("rotary_pct", 0.25, maximum=1.0)
        self.rotary_ndims = rotary_dim(fields, self.head_size, rotary_pct, rounded_up=True)
        self.intermediate_size = fields.int("intermediate_size", 24576)
        self.hidden_act = fields.str("hidden_act", "gelu")
        self.attention_dropout = fields.float("attention_dropout", 0.0, maximum=1.0)
        self.hidden_dropout = fields.float("hidden_dropout", 0.0, maximum=1.0)
        self.use_parallel_residual = fields.bool("use_parallel_residual", True)
        self.attention_bias = fields.bool("attention_bias", True)
        self.tie_word_embeddings = fields.bool("tie_word_embeddings", False)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first dimensions of each head, as many as cos and sin have; the others pass."""
    cos = cos.unsqueeze(1)
    sin = sin.unsqueeze(1)
    rotated = cos.shape[-1]
    passed = q.shape[-1] - rotated
    q_rot, q_pass = q.narrow(-1, 0, rotated), q.narrow(-1, rotated, passed)
    k_rot, k_pass = k.narrow(-1, 0, rotated), k.narrow(-1, rotated, passed)
    q_embed = (q_rot * cos) + (rotate_half(q_rot) * sin)
    k_embed = (k_rot * cos) + (rotate_half(k_rot) * sin)
    q_embed = ops.cat([q_embed, q_pass])
    k_embed = ops.cat([k_embed, k_pass])
    return q_embed, k_embed


class GPTNeoXMLP(Module):
    def __init__(self, b: Build, c: GPTNeoXConfig) -> None:
        self.dense_h_to_4h = Linear(b, c.hidden_size, c.intermediate_size)
        self.dense_4h_to_h = Linear(b, c.intermediate_size, c.hidden_size)
        self.act = activation(c.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.dense_h_to_4h(hidden_states)
        hidden_states = self.act(hidden_states)
        hidden_states = self.dense_4h_to_h(hidden_states)
        return hidden_states


class GPTNeoXAttention(Module):
    def __init__(self, b: Build, c: GPTNeoXConfig) -> None:
        self.b = b
        self.head_size = c.head_size
        self.dropout = c.attention_dropout
        self.query_key_value = Linear(b, c.hidden_size, 3 * c.hidden_size, c.attention_bias)
        self.dense = Linear(b, c.hidden_size, c.hidden_size, c.attention_bias)

    def forward(
        self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        qkv = self.query_key_value(hidden_states).view(batch, length, -1, 3 * self.head_size).transpose(1, 2)
        query_states, key_states, value_states = qkv.chunk(3)
        cos, sin = positions
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
        key_states, value_states = cached(self.b, key_states, value_states)
        attn_output, attn_weights = attention(self.b, query_states, key_states, value_states, mask, self.dropout)
        attn_output = attn_output.reshape(batch, length, -1).contiguous()
        attn_output = self.dense(attn_output)
        return attn_output, attn_weights


class GPTNeoXLayer(CheckpointLayer):
    def __init__(self, b: Build, c: GPTNeoXConfig) -> None:
        self.use_parallel_residual = c.use_parallel_residual
        self.input_layernorm = LayerNorm(b, c.hidden_size)
        self.post_attention_layernorm = LayerNorm(b, c.hidden_size)
        self.post_attention_dropout = Dropout(c.hidden_dropout)
        self.post_mlp_dropout = Dropout(c.hidden_dropout)
        self.attention = GPTNeoXAttention(b, c)
        self.mlp = GPTNeoXMLP(b, c)

    def forward(self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        attn_output, _ = self.attention(self.input_layernorm(hidden_states), positions, mask)
        attn_output = self.post_attention_dropout(attn_output)
        if self.use_parallel_residual:
            mlp_output = self.mlp(self.post_attention_layernorm(hidden_states))
            mlp_output = self.post_mlp_dropout(mlp_output)
            hidden_states = mlp_output + attn_output + hidden_states
        else:
            attn_output = attn_output + hidden_states
            mlp_output = self.mlp(self.post_attention_layernorm(attn_output))
            mlp_output = self.post_mlp_dropout(mlp_output)
            hidden_states = mlp_output + attn_output
        return hidden_states


class GPTNeoXModel(Module):
    def __init__(self, b: Build, c: GPTNeoXConfig) -> None:
        self.b = b
        self.embed_in = Embedding(b, c.vocab_size, c.hidden_size)
        self.emb_dropout = Dropout(c.hidden_dropout)
        self.layers = Layers(b, [0] * c.num_hidden_layers, lambda i: GPTNeoXLayer(b, c))
        self.final_layer_norm = LayerNorm(b, c.hidden_size)
        self.rotary_emb = RotaryEmbedding(b, c.rotary_ndims)

    def forward(self, input_ids: Tensor) -> Tensor:
        inputs_embeds = self.embed_in(input_ids)
        ids = position_ids(self.b, inputs_embeds)
        mask = causal_mask(self.b, inputs_embeds)
        hidden_states = self.emb_dropout(inputs_embeds)
        positions = self.rotary_emb(hidden_states, ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions, mask)
        return self.final_layer_norm(hidden_states)


HEADS = language_model_heads(
    GPTNeoXConfig,
    GPTNeoXModel,
    prefix="gpt_neox",
    embedding="embed_in",
    own_loss=OwnLoss("4.49", in_float32=False, last_only="4.49"),
)
