"""GPT-2 (transformers.models.gpt2): fused Conv1D projections, learned positions, dropout everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from memplan.architectures.nn import (
    AS_THEY_ARE,
    Build,
    CheckpointLayer,
    Conv1D,
    Dropout,
    Embedding,
    LayerNorm,
    Layers,
    Module,
    activation,
    attention,
    cached,
    causal_mask,
    check_heads,
    check_position_table,
    language_model_heads,
    position_ids,
)
from memplan.errors import UnsupportedError
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tensor import Tensor, float32


class GPT2Config:
    """The fields of config.json that the memory of a GPT-2 depends on."""

    activation_function = "gelu_new"

    def __init__(self, fields: Fields) -> None:
        self.vocab_size = fields.int("vocab_size", 50257)
        self.max_position_embeddings = fields.int("n_positions", 1024, alias="max_position_embeddings")
        self.hidden_size = fields.int("n_embd", 768, alias="hidden_size")
        self.num_hidden_layers = fields.layers("n_layer", 12, alias="num_hidden_layers")
        self.num_attention_heads = fields.int("n_head", 12, alias="num_attention_heads")
        check_heads(fields, self.hidden_size, self.num_attention_heads)
        self.intermediate_size = fields.int("n_inner", 4 * self.hidden_size)
        self.activation_function = fields.str("activation_function", self.activation_function)
        self.resid_pdrop = fields.float("resid_pdrop", 0.1, maximum=1.0)
        self.embd_pdrop = fields.float("embd_pdrop", 0.1, maximum=1.0)
        self.attn_pdrop = fields.float("attn_pdrop", 0.1, maximum=1.0)
        self.reorder_and_upcast_attn = fields.bool("reorder_and_upcast_attn", False)
        self.tie_word_embeddings = fields.bool("tie_word_embeddings", True)
        if fields.bool("add_cross_attention", False):
            raise UnsupportedError(f"{fields.source}: add_cross_attention is not modelled. Use --trace.")


def eager_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, upcast: bool
) -> tuple[Tensor, Tensor]:
    """GPT-2's own: the softmax keeps the dtype of the scores, which are float32 with reorder_and_upcast_attn."""
    if upcast:
        t = query.tape
        batch, heads, length, dim = query.shape
        kv_length = key.shape[2]
        attn_weights = t.new((batch * heads, length, kv_length), float32, "attn_weights")
        with t.autocasting(None):
            q, k = query.reshape(-1, length, dim), key.transpose(-1, -2).reshape(-1, dim, kv_length)
            attn_weights = ops.baddbmm(attn_weights, q.float(), k.float())
            attn_weights = attn_weights.reshape(batch, heads, length, kv_length)
    else:
        attn_weights = ops.matmul(query, key.transpose(-1, -2)) * 0.5
    if mask is not None:
        attn_weights = attn_weights + mask
    attn_weights = ops.softmax(attn_weights)
    attn_weights = attn_weights.to(value.dtype)
    attn_weights = ops.dropout(attn_weights, dropout)
    attn_output = ops.matmul(attn_weights, value)
    attn_output = attn_output.transpose(1, 2)
    return attn_output, attn_weights


class GPT2Attention(Module):
    def __init__(self, b: Build, c: GPT2Config) -> None:
        self.b = b
        self.c = c
        self.head_dim = c.hidden_size // c.num_attention_heads
        self.c_attn = Conv1D(b, 3 * c.hidden_size, c.hidden_size)
        self.c_proj = Conv1D(b, c.hidden_size, c.hidden_size)
        self.resid_dropout = Dropout(c.resid_pdrop)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        batch, length, hidden_size = hidden_states.shape
        query_states, key_states, value_states = self.c_attn(hidden_states).split(hidden_size)
        key_states = key_states.view(batch, length, -1, self.head_dim).transpose(1, 2)
        value_states = value_states.view(batch, length, -1, self.head_dim).transpose(1, 2)
        query_states = query_states.view(batch, length, -1, self.head_dim).transpose(1, 2)
        key_states, value_states = cached(self.b, key_states, value_states)
        attn_weights: Tensor | None
        if self.b.attn == "eager":
            attn_output, attn_weights = eager_attention_forward(
                query_states, key_states, value_states, mask, self.c.attn_pdrop, self.c.reorder_and_upcast_attn
            )
        else:
            attn_output, attn_weights = attention(
                self.b, query_states, key_states, value_states, mask, self.c.attn_pdrop
            )
        attn_output = attn_output.reshape(batch, length, -1).contiguous()
        attn_output = self.c_proj(attn_output)
        attn_output = self.resid_dropout(attn_output)
        return attn_output, attn_weights


class GPT2MLP(Module):
    def __init__(self, b: Build, c: GPT2Config) -> None:
        self.c_fc: Module = Conv1D(b, c.intermediate_size, c.hidden_size)
        self.c_proj: Module = Conv1D(b, c.hidden_size, c.intermediate_size)
        self.act = activation(c.activation_function)
        self.dropout = Dropout(c.resid_pdrop)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.c_fc(hidden_states)
        hidden_states = self.act(hidden_states)
        hidden_states = self.c_proj(hidden_states)
        hidden_states = self.dropout(hidden_states)
        return hidden_states


class GPT2Block(CheckpointLayer):
    attention_class: ClassVar[Callable[..., Module]] = GPT2Attention
    mlp_class: ClassVar[Callable[..., Module]] = GPT2MLP

    def __init__(self, b: Build, c: GPT2Config) -> None:
        self.ln_1 = LayerNorm(b, c.hidden_size)
        self.attn = self.attention_class(b, c)
        self.ln_2 = LayerNorm(b, c.hidden_size)
        self.mlp = self.mlp_class(b, c)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> Any:
        residual = hidden_states
        hidden_states = self.ln_1(hidden_states)
        attn_output, given = self.attn(hidden_states, mask)
        hidden_states = attn_output + residual
        residual = hidden_states
        hidden_states = self.ln_2(hidden_states)
        feed_forward_hidden_states = self.mlp(hidden_states)
        hidden_states = residual + feed_forward_hidden_states
        return hidden_states if self.presents is None else (hidden_states, given)


class GPT2Model(Module):
    block_class: ClassVar[Callable[..., GPT2Block]] = GPT2Block

    def __init__(self, b: Build, c: GPT2Config) -> None:
        self.b = b
        self.max_position_embeddings = c.max_position_embeddings
        self.wte = Embedding(b, c.vocab_size, c.hidden_size)
        self.wpe = Embedding(b, c.max_position_embeddings, c.hidden_size)
        self.drop = Dropout(c.embd_pdrop)
        self.h = Layers(b, [0] * c.num_hidden_layers, lambda i: self.block_class(b, c))
        self.ln_f = LayerNorm(b, c.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        check_position_table(input_ids, self.max_position_embeddings, self.b.past_length)
        inputs_embeds = self.wte(input_ids)
        ids = position_ids(self.b, inputs_embeds)
        position_embeds = self.wpe(ids)
        hidden_states = inputs_embeds + position_embeds
        mask = causal_mask(self.b, inputs_embeds)
        hidden_states = self.drop(hidden_states)
        for block in self.h:
            hidden_states = block(hidden_states, mask)
        return self.ln_f(hidden_states)


HEADS = language_model_heads(
    GPT2Config, GPT2Model, prefix="transformer", embedding="wte", own_loss=AS_THEY_ARE._replace(last_only="4.53")
)
