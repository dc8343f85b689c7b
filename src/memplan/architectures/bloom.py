"""BLOOM (transformers.models.bloom): alibi added by baddbmm, a normed embedding, a gelu that recomputes; no sdpa."""

from __future__ import annotations

from typing import Any

from memplan.architectures.nn import (
    AS_THEY_ARE,
    Activation,
    Build,
    CheckpointLayer,
    Dropout,
    Embedding,
    LayerNorm,
    Layers,
    Linear,
    Module,
    cached,
    causal_mask,
    check_heads,
    language_model_heads,
)
from memplan.errors import UnsupportedError
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.ops import Grads
from memplan.tape.tape import Node, Tape
from memplan.tape.tensor import Tensor, float32

ATTENTION = ("eager",)
"""What transformers has for it."""


class BloomConfig:
    """The fields of config.json that the memory of a BLOOM depends on."""

    def __init__(self, fields: Fields) -> None:
        self.vocab_size = fields.int("vocab_size", 250880)
        self.hidden_size = fields.int("n_embed", fields.int("hidden_size", 64))
        self.num_hidden_layers = fields.layers("n_layer", 2, alias="num_hidden_layers")
        self.num_attention_heads = fields.int("n_head", 8, alias="num_attention_heads")
        check_heads(fields, self.hidden_size, self.num_attention_heads)
        self.apply_residual_connection_post_layernorm = fields.bool("apply_residual_connection_post_layernorm", False)
        self.hidden_dropout = fields.float("hidden_dropout", 0.0, maximum=1.0)
        self.attention_dropout = fields.float("attention_dropout", 0.0, maximum=1.0)
        self.tie_word_embeddings = fields.bool("tie_word_embeddings", True)
        if fields.bool("slow_but_exact", False) and fields.int("pretraining_tp", 1) > 1:
            raise UnsupportedError(f"{fields.source}: slow_but_exact is not modelled. Set it to false, or use --trace.")


def dropout_add(x: Tensor, residual: Tensor, prob: float) -> Tensor:
    """residual + dropout(x)."""
    out = ops.dropout(x, prob)
    out = residual + out
    return out


def bloom_gelu(x: Tensor) -> Tensor:
    """GeLUFunction: keeps only its input; its steps are temporary, in backward too."""
    t = x.tape
    with t.no_grad():
        out = x * 0.5 * (ops.tanh(x * 0.8 * (x * 0.04 * x + 1.0)) + 1.0)
    out.node = t.node(_bloom_gelu_back, (x,), (x,))
    return out


def _bloom_gelu_back(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    x = saved[0]
    tanh_out = ops.tanh(x * 0.8 * (x * 0.04 * x + 1.0))
    ff = x * 0.5 * (-(tanh_out * tanh_out) * (x * 0.1 * x + 0.8)) + (tanh_out + 1.0) * 0.5
    return (ff * grad,)


class BloomAttention(Module):
    def __init__(self, b: Build, c: BloomConfig) -> None:
        self.b = b
        self.c = c
        self.query_key_value = Linear(b, c.hidden_size, 3 * c.hidden_size)
        self.dense = Linear(b, c.hidden_size, c.hidden_size)
        self.attention_dropout = Dropout(c.attention_dropout)

    def forward(
        self, hidden_states: Tensor, residual: Tensor, alibi: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, length, hidden_size = hidden_states.shape
        heads = self.c.num_attention_heads
        dim = hidden_size // heads
        fused_qkv = self.query_key_value(hidden_states)
        query_layer, key_layer, value_layer = self.split_heads(fused_qkv)
        key_layer, value_layer = cached(self.b, key_layer, value_layer)
        kv_length = key_layer.shape[2]
        query_layer = query_layer.reshape(batch * heads, length, dim)
        key_layer = key_layer.reshape(batch * heads, kv_length, dim).transpose(-1, -2)
        value_layer = value_layer.reshape(batch * heads, kv_length, dim)
        attention_scores = ops.baddbmm(alibi, query_layer, key_layer)
        attn_weights = attention_scores.view(batch, heads, length, kv_length)
        if mask is not None:
            attn_weights = attn_weights + mask
        attention_probs = ops.softmax(attn_weights, float32).to(query_layer.dtype)
        attention_probs = self.attention_dropout(attention_probs)
        context_layer = ops.bmm(attention_probs.view(batch * heads, length, kv_length), value_layer)
        context_layer = context_layer.view(batch, heads, length, dim).permute(0, 2, 1, 3)
        context_layer = context_layer.reshape(batch, length, hidden_size)
        output_tensor = self.dense(context_layer)
        output_tensor = dropout_add(output_tensor, residual, self.c.hidden_dropout)
        return output_tensor, attention_probs

    def split_heads(self, fused_qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [B, H, S, D], which lie beside each other for every head."""
        batch, length, three_times_hidden_size = fused_qkv.shape
        heads = self.c.num_attention_heads
        fused_qkv = fused_qkv.view(batch, length, heads, 3, three_times_hidden_size // 3 // heads)
        query_layer = fused_qkv.select(3, 0).transpose(1, 2)
        key_layer = fused_qkv.select(3, 1).transpose(1, 2)
        value_layer = fused_qkv.select(3, 2).transpose(1, 2)
        return query_layer, key_layer, value_layer


class BloomMLP(Module):
    def __init__(self, b: Build, c: BloomConfig) -> None:
        self.gelu_impl = Activation(bloom_gelu)
        self.dense_h_to_4h = Linear(b, c.hidden_size, 4 * c.hidden_size)
        self.dense_4h_to_h = Linear(b, 4 * c.hidden_size, c.hidden_size)
        self.hidden_dropout = c.hidden_dropout

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        hidden_states = self.gelu_impl(self.dense_h_to_4h(hidden_states))
        intermediate_output = self.dense_4h_to_h(hidden_states)
        output = dropout_add(intermediate_output, residual, self.hidden_dropout)
        return output


class BloomBlock(CheckpointLayer):
    def __init__(self, b: Build, c: BloomConfig) -> None:
        self.input_layernorm = LayerNorm(b, c.hidden_size)
        self.self_attention = BloomAttention(b, c)
        self.post_attention_layernorm = LayerNorm(b, c.hidden_size)
        self.mlp = BloomMLP(b, c)
        self.residual_of_norm = c.apply_residual_connection_post_layernorm

    def forward(self, hidden_states: Tensor, alibi: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        layernorm_output = self.input_layernorm(hidden_states)
        residual = layernorm_output if self.residual_of_norm else hidden_states
        attention_output, attn_weights = self.self_attention(layernorm_output, residual, alibi, mask)
        layernorm_output = self.post_attention_layernorm(attention_output)
        residual = layernorm_output if self.residual_of_norm else attention_output
        output = self.mlp(layernorm_output, residual)
        return output, attn_weights


class BloomModel(Module):
    def __init__(self, b: Build, c: BloomConfig) -> None:
        self.b = b
        self.num_heads = c.num_attention_heads
        self.word_embeddings = Embedding(b, c.vocab_size, c.hidden_size)
        self.word_embeddings_layernorm = LayerNorm(b, c.hidden_size)
        self.h = Layers(b, [0] * c.num_hidden_layers, lambda i: BloomBlock(b, c))
        self.ln_f = LayerNorm(b, c.hidden_size)

    def build_alibi_tensor(self, hidden_states: Tensor) -> Tensor:
        """The bias of every head and key position, [B * H, 1, S]."""
        t = self.b.tape
        batch, length, _ = hidden_states.shape
        kv_length = self.b.kv_length(length)
        alibi = t.new((self.num_heads, 1, kv_length), float32, "alibi")
        alibi = t.new((batch * self.num_heads, 1, kv_length), float32, "repeat")
        return alibi.to(hidden_states.dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        inputs_embeds = self.word_embeddings(input_ids)
        hidden_states = self.word_embeddings_layernorm(inputs_embeds)
        alibi = self.build_alibi_tensor(hidden_states)
        mask = causal_mask(self.b, inputs_embeds)
        for block in self.h:
            outputs = block(hidden_states, alibi, mask)  # the attention weights stay until the next block returns
            hidden_states = outputs[0]
        return self.ln_f(hidden_states)


HEADS = language_model_heads(
    BloomConfig,
    BloomModel,
    prefix="transformer",
    embedding="word_embeddings",
    own_loss=AS_THEY_ARE._replace(last_only="5.0"),
)
