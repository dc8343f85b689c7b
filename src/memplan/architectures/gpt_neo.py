"""GPT-Neo (transformers.models.gpt_neo): GPT-2 with scores in float32 and a mask of its own in every layer; no sdpa."""

from __future__ import annotations

import json
from operator import index

from memplan.architectures.gpt2 import GPT2MLP
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
    activation,
    cached,
    causal_mask,
    check_heads,
    check_position_table,
    language_model_heads,
    position_ids,
)
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.attention import flash_attention_2
from memplan.tape.tensor import Tensor, bool_, float32

ATTENTION = ("eager", "flash_attention_2")


class GPTNeoConfig:
    """The fields of config.json that the memory of a GPT-Neo depends on: not the window, since masks are full-size."""

    def __init__(self, fields: Fields) -> None:
        self.vocab_size = fields.int("vocab_size", 50257)
        self.max_position_embeddings = fields.int("max_position_embeddings", 2048)
        self.hidden_size = fields.int("hidden_size", 2048)
        self.num_layers = fields.layers("num_layers", 24, alias="num_hidden_layers")
        _check_attention_types(fields, self.num_layers)
        self.num_heads = fields.int("num_heads", 16, alias="num_attention_heads")
        check_heads(fields, self.hidden_size, self.num_heads)
        self.intermediate_size = fields.int("intermediate_size", 4 * self.hidden_size)
        self.activation_function = fields.str("activation_function", "gelu_new")
        self.resid_dropout = fields.float("resid_dropout", 0.0, maximum=1.0)
        self.embed_dropout = fields.float("embed_dropout", 0.0, maximum=1.0)
        self.attention_dropout = fields.float("attention_dropout", 0.0, maximum=1.0)
        self.tie_word_embeddings = fields.bool("tie_word_embeddings", True)


def _check_attention_types(fields: Fields, num_layers: int) -> None:
    """[[kinds of the layers, how often], ...]: GPTNeoConfig.validate_architecture refuses another number of layers."""
    given = fields.raw("attention_types")
    try:
        patterns = (
            [(["global", "local"], 12)] if given is None else [(list(kinds), index(count)) for kinds, count in given]
        )
    except (TypeError, ValueError):
        patterns = []
    layers = sum(len(kinds) * max(count, 0) for kinds, count in patterns)
    if layers != num_layers or not {kind for kinds, _ in patterns for kind in kinds} <= {"global", "local"}:
        problem = f"does not say global or local for each of num_layers {num_layers}, as GPTNeoConfig asks"
        usual = [["global", "local"], num_layers // 2] if num_layers % 2 == 0 else [["global"], num_layers]
        raise fields.wrong("attention_types", given, problem, f"Use {json.dumps([usual])}.")


class GPTNeoSelfAttention(Module):
    def __init__(self, b: Build, c: GPTNeoConfig) -> None:
        self.b = b
        self.c = c
        self.bias = b.tape.buffer((1, 1, c.max_position_embeddings, c.max_position_embeddings), bool_)
        self.attn_dropout = Dropout(c.attention_dropout)
        self.resid_dropout = Dropout(c.resid_dropout)
        self.k_proj = Linear(b, c.hidden_size, c.hidden_size, bias=False)
        self.v_proj = Linear(b, c.hidden_size, c.hidden_size, bias=False)
        self.q_proj = Linear(b, c.hidden_size, c.hidden_size, bias=False)
        self.out_proj = Linear(b, c.hidden_size, c.hidden_size)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """GPTNeoSelfAttention._attn."""
        query = query.to(float32)
        key = key.to(float32)
        attn_weights = ops.matmul(query, key.transpose(-1, -2))
        own_mask = self.bias.narrow(2, 0, query.shape[2]).narrow(3, 0, key.shape[2])
        mask_value = query.tape.new((), attn_weights.dtype, "mask_value")
        attn_weights = ops.where(own_mask, attn_weights, mask_value)
        if mask is not None:
            attn_weights = attn_weights + mask
        attn_weights = ops.softmax(attn_weights)
        attn_weights = attn_weights.to(value.dtype)
        attn_weights = self.attn_dropout(attn_weights)
        attn_output = ops.matmul(attn_weights, value)
        return attn_output, attn_weights

    def attend_flash(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """GPTNeoFlashAttention2, whose second result is the attention's output itself."""
        target = self.b.tape.autocast or self.q_proj.weight.dtype
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        attn_weights = flash_attention_2(query, key, value, target)
        return attn_weights.transpose(1, 2), attn_weights

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, length, hidden_size = hidden_states.shape
        shape = (batch, length, self.c.num_heads, hidden_size // self.c.num_heads)
        query = self.q_proj(hidden_states)
        key = self.k_proj(hidden_states)
        value = self.v_proj(hidden_states)
        query = query.view(*shape).permute(0, 2, 1, 3)
        key = key.view(*shape).permute(0, 2, 1, 3)
        value = value.view(*shape).permute(0, 2, 1, 3)
        key, value = cached(self.b, key, value)
        if self.b.attn == "flash_attention_2":
            attn_output, attn_weights = self.attend_flash(query, key, value)
        else:
            attn_output, attn_weights = self.attend(query, key, value, mask)
        attn_output = attn_output.permute(0, 2, 1, 3).contiguous()
        attn_output = attn_output.view(batch, length, hidden_size)
        attn_output = self.out_proj(attn_output)
        attn_output = self.resid_dropout(attn_output)
        return attn_output, attn_weights


class GPTNeoAttention(Module):
    def __init__(self, b: Build, c: GPTNeoConfig) -> None:
        self.attention = GPTNeoSelfAttention(b, c)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        attn_output, attn_weights = self.attention(hidden_states, mask)
        return attn_output, attn_weights


class GPTNeoMLP(GPT2MLP):
    def __init__(self, b: Build, c: GPTNeoConfig) -> None:
        self.c_fc = Linear(b, c.hidden_size, c.intermediate_size)
        self.c_proj = Linear(b, c.intermediate_size, c.hidden_size)
        self.act = activation(c.activation_function)
        self.dropout = Dropout(c.resid_dropout)


class GPTNeoBlock(CheckpointLayer):
    def __init__(self, b: Build, c: GPTNeoConfig) -> None:
        self.ln_1 = LayerNorm(b, c.hidden_size)
        self.attn = GPTNeoAttention(b, c)
        self.ln_2 = LayerNorm(b, c.hidden_size)
        self.mlp = GPTNeoMLP(b, c)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden_states
        hidden_states = self.ln_1(hidden_states)
        attn_output, attn_weights = self.attn(hidden_states, mask)
        hidden_states = attn_output + residual
        residual = hidden_states
        hidden_states = self.ln_2(hidden_states)
        feed_forward_hidden_states = self.mlp(hidden_states)
        hidden_states = residual + feed_forward_hidden_states
        return hidden_states, attn_weights


class GPTNeoModel(Module):
    def __init__(self, b: Build, c: GPTNeoConfig) -> None:
        self.b = b
        self.max_position_embeddings = c.max_position_embeddings
        self.wte = Embedding(b, c.vocab_size, c.hidden_size)
        self.wpe = Embedding(b, c.max_position_embeddings, c.hidden_size)
        self.drop = Dropout(c.embed_dropout)
        self.h = Layers(b, [0] * c.num_layers, lambda i: GPTNeoBlock(b, c))
        self.ln_f = LayerNorm(b, c.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        check_position_table(input_ids, self.max_position_embeddings, self.b.past_length)
        inputs_embeds = self.wte(input_ids)
        ids = position_ids(self.b, inputs_embeds)
        mask = causal_mask(self.b, inputs_embeds)
        position_embeds = self.wpe(ids)
        hidden_states = inputs_embeds + position_embeds
        hidden_states = self.drop(hidden_states)
        for block in self.h:
            outputs = block(hidden_states, mask)  # the attention weights stay until the next block returns
            hidden_states = outputs[0]
        return self.ln_f(hidden_states)


HEADS = language_model_heads(
    GPTNeoConfig,
    GPTNeoModel,
    prefix="transformer",
    embedding="wte",
    own_loss=OwnLoss("4.48.3", and_back=True, last_only="5.0"),
)
