"""GPT-J (transformers.models.gptj): attention and MLP in parallel, interleaved rotation, scores in float32, no sdpa."""

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
    activation,
    cached,
    causal_mask,
    check_heads,
    check_position_table,
    in_pairs,
    language_model_heads,
    position_ids,
    rotate_every_two,
)
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.attention import flash_attention_2
from memplan.tape.tensor import Tensor, float32, int64

ATTENTION = ("eager", "flash_attention_2")
"""What transformers has for it."""


class GPTJConfig:
    """The fields of config.json that the memory of a GPT-J depends on."""

    def __init__(self, fields: Fields) -> None:
        self.vocab_size = fields.int("vocab_size", 50400)
        self.max_position_embeddings = fields.int("n_positions", 2048, alias="max_position_embeddings")
        self.hidden_size = fields.int("n_embd", 4096, alias="hidden_size")
        self.num_hidden_layers = fields.layers("n_layer", 28, alias="num_hidden_layers")
        self.num_attention_heads = fields.int("n_head", 16, alias="num_attention_heads")
        check_heads(fields, self.hidden_size, self.num_attention_heads)
        self.head_dim = self.hidden_size // self.num_attention_heads
        self.rotary_dim = fields.int("rotary_dim", 64)
        if self.rotary_dim > self.head_dim:
            problem = "is more than a head has"
            raise fields.wrong("rotary_dim", self.rotary_dim, problem, f"Use at most {self.head_dim}.")
        in_pairs(fields, "rotary_dim", self.rotary_dim)
        self.intermediate_size = fields.int("n_inner", 4 * self.hidden_size)
        self.activation_function = fields.str("activation_function", "gelu_new")
        self.resid_pdrop = fields.float("resid_pdrop", 0.0, maximum=1.0)
        self.embd_pdrop = fields.float("embd_pdrop", 0.0, maximum=1.0)
        self.attn_pdrop = fields.float("attn_pdrop", 0.0, maximum=1.0)
        self.tie_word_embeddings = fields.bool("tie_word_embeddings", False)


def apply_rotary_pos_emb(tensor: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """tensor [B, S, H, D], sin and cos [1, S, D / 2], each element of which is used twice."""
    t = tensor.tape
    batch, length, half = sin.shape
    sin = t.new((batch, length, 1, 2 * half), sin.dtype, "repeat_interleave")
    cos = t.new((batch, length, 1, 2 * half), cos.dtype, "repeat_interleave")
    return (tensor * cos) + (rotate_every_two(tensor) * sin)


class GPTJAttention(Module):
    def __init__(self, b: Build, c: GPTJConfig) -> None:
        self.b = b
        self.c = c
        self.attn_dropout = Dropout(c.attn_pdrop)
        self.resid_dropout = Dropout(c.resid_pdrop)
        self.k_proj = Linear(b, c.hidden_size, c.hidden_size, bias=False)
        self.v_proj = Linear(b, c.hidden_size, c.hidden_size, bias=False)
        self.q_proj = Linear(b, c.hidden_size, c.hidden_size, bias=False)
        self.out_proj = Linear(b, c.hidden_size, c.hidden_size, bias=False)
        self.embed_positions = b.tape.buffer((c.max_position_embeddings, c.rotary_dim), float32)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """GPTJAttention._attn."""
        query = query.to(float32)
        key = key.to(float32)
        attn_weights = ops.matmul(query, key.transpose(-1, -2))
        attn_weights = attn_weights / 2.0
        if mask is not None:
            attn_weights = attn_weights + mask
        attn_weights = ops.softmax(attn_weights)
        attn_weights = attn_weights.to(value.dtype)
        attn_weights = self.attn_dropout(attn_weights)
        attn_output = ops.matmul(attn_weights, value)
        return attn_output, attn_weights

    def attend_flash(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """GPTJFlashAttention2, whose second result is the attention's output itself."""
        key = key.permute(0, 2, 1, 3).contiguous()
        query = query.permute(0, 2, 1, 3).contiguous()
        value = value.permute(0, 2, 1, 3).contiguous()
        target = self.b.tape.autocast or self.q_proj.weight.dtype
        attn_weights = flash_attention_2(query, key, value, target)
        return attn_weights.permute(0, 2, 1, 3), attn_weights

    def forward(self, hidden_states: Tensor, mask: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor]:
        t = self.b.tape
        batch, length, hidden_size = hidden_states.shape
        query = self.q_proj(hidden_states)
        key = self.k_proj(hidden_states)
        value = self.v_proj(hidden_states)
        query = query.view(batch, length, -1, self.c.head_dim)
        key = key.view(batch, length, -1, self.c.head_dim)
        value = value.view(batch, length, -1, self.c.head_dim).permute(0, 2, 1, 3)
        rotary_dim, passed = self.c.rotary_dim, self.c.head_dim - self.c.rotary_dim
        embed_positions = t.new((ids.shape[0], *self.embed_positions.shape), float32, "embed_positions")
        repeated_position_ids = t.new((*ids.shape, rotary_dim), int64, "repeated_position_ids")
        sincos = t.new(repeated_position_ids.shape, embed_positions.dtype, "gather").to(key.dtype)
        sin, cos = sincos.split(rotary_dim // 2)
        k_rot, k_pass = key.narrow(-1, 0, rotary_dim), key.narrow(-1, rotary_dim, passed)
        q_rot, q_pass = query.narrow(-1, 0, rotary_dim), query.narrow(-1, rotary_dim, passed)
        k_rot = apply_rotary_pos_emb(k_rot, sin, cos)
        q_rot = apply_rotary_pos_emb(q_rot, sin, cos)
        key = ops.cat([k_rot, k_pass])
        query = ops.cat([q_rot, q_pass])
        key = key.permute(0, 2, 1, 3)
        query = query.permute(0, 2, 1, 3)
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


class GPTJMLP(Module):
    def __init__(self, b: Build, c: GPTJConfig) -> None:
        self.fc_in = Linear(b, c.hidden_size, c.intermediate_size)
        self.fc_out = Linear(b, c.intermediate_size, c.hidden_size)
        self.act = activation(c.activation_function)
        self.dropout = Dropout(c.resid_pdrop)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.fc_in(hidden_states)
        hidden_states = self.act(hidden_states)
        hidden_states = self.fc_out(hidden_states)
        hidden_states = self.dropout(hidden_states)
        return hidden_states


class GPTJBlock(CheckpointLayer):
    def __init__(self, b: Build, c: GPTJConfig) -> None:
        self.ln_1 = LayerNorm(b, c.hidden_size)
        self.attn = GPTJAttention(b, c)
        self.mlp = GPTJMLP(b, c)

    def forward(self, hidden_states: Tensor, mask: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor]:
        residual = hidden_states
        hidden_states = self.ln_1(hidden_states)
        attn_outputs, attn_weights = self.attn(hidden_states, mask, ids)
        feed_forward_hidden_states = self.mlp(hidden_states)
        hidden_states = attn_outputs + feed_forward_hidden_states + residual
        return hidden_states, attn_weights


class GPTJModel(Module):
    def __init__(self, b: Build, c: GPTJConfig) -> None:
        self.b = b
        self.max_position_embeddings = c.max_position_embeddings
        self.wte = Embedding(b, c.vocab_size, c.hidden_size)
        self.drop = Dropout(c.embd_pdrop)
        self.h = Layers(b, [0] * c.num_hidden_layers, lambda i: GPTJBlock(b, c))
        self.ln_f = LayerNorm(b, c.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        check_position_table(input_ids, self.max_position_embeddings, self.b.past_length)
        inputs_embeds = self.wte(input_ids)
        ids = position_ids(self.b, inputs_embeds)
        mask = causal_mask(self.b, inputs_embeds)
        hidden_states = inputs_embeds
        hidden_states = self.drop(hidden_states)
        for block in self.h:
            outputs = block(hidden_states, mask, ids)  # the attention weights stay until the next block returns
            hidden_states = outputs[0]
        return self.ln_f(hidden_states)


HEADS = language_model_heads(
    GPTJConfig, GPTJModel, prefix="transformer", embedding="wte", bias=True, own_loss=OwnLoss("4.48.3", last_only="5.0")
)
