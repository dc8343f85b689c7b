"""Falcon (transformers.models.falcon): parallel attention, one or few key-value heads, rotation or alibi."""

from __future__ import annotations

from memplan.architectures.nn import (
    AS_THEY_ARE,
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
    cached,
    causal_mask,
    check_heads,
    check_rope_type,
    in_pairs,
    language_model_heads,
    position_ids,
)
from memplan.errors import SpecError
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.attention import flash_attention_2, scaled_dot_product_attention
from memplan.tape.tensor import Tensor, bfloat16, bool_, float32, int64


class FalconConfig:
    """The fields of config.json that the memory of a Falcon depends on."""

    def __init__(self, fields: Fields) -> None:
        self.vocab_size = fields.int("vocab_size", 65024)
        self.hidden_size = fields.int("hidden_size", 4544) if not fields.has("n_embed") else fields.int("n_embed")
        self.num_hidden_layers = fields.layers("num_hidden_layers", 32)
        self.num_attention_heads = fields.int("num_attention_heads", 71)
        check_heads(fields, self.hidden_size, self.num_attention_heads)
        self.head_dim = self.hidden_size // self.num_attention_heads
        self.new_decoder_architecture = fields.bool("new_decoder_architecture", False)
        self.multi_query = fields.bool("multi_query", True)
        self.parallel_attn = fields.bool("parallel_attn", True)
        num_kv_heads = fields.int("num_kv_heads", self.num_attention_heads)
        one_kv_head = self.multi_query and not self.new_decoder_architecture
        self.num_kv_heads = 1 if one_kv_head else num_kv_heads
        layer_norms = fields.int("num_ln_in_parallel_attn", 2 if self.new_decoder_architecture else 1)
        self.two_layer_norms = self.new_decoder_architecture and layer_norms == 2
        self.alibi = fields.bool("alibi", False)
        if not self.alibi:
            check_rope_type(fields)
            in_pairs(fields, "hidden_size / num_attention_heads", self.head_dim)
        self.hidden_dropout = fields.float("hidden_dropout", 0.0, maximum=1.0)
        self.attention_dropout = fields.float("attention_dropout", 0.0, maximum=1.0)
        self.bias = fields.bool("bias", False)
        self.ffn_hidden_size = fields.int("ffn_hidden_size", 4 * self.hidden_size)
        self.activation = fields.str("activation", "gelu")
        self.tie_word_embeddings = fields.bool("tie_word_embeddings", True)
        if self.num_attention_heads % self.num_kv_heads:
            problem = f"does not divide {self.num_attention_heads} heads"
            raise fields.wrong("num_kv_heads", num_kv_heads, problem, "Correct one of them.")
        if self.new_decoder_architecture and not self.parallel_attn:
            problem = "does not work with new_decoder_architecture in transformers"
            raise fields.wrong("parallel_attn", False, problem, "Set it to true.")
        # FalconDecoderLayer makes layer norms by this alone, and runs them by new_decoder_architecture too.
        works = (1, 2) if self.new_decoder_architecture or not self.parallel_attn else (1,)
        if layer_norms not in works:
            kind = "with" if self.new_decoder_architecture else "without"
            problem = f"does not work {kind} new_decoder_architecture in transformers"
            raise fields.wrong("num_ln_in_parallel_attn", layer_norms, problem, "Use 1, or leave it out.")


class FalconLinear(Linear):
    """x @ weight.T + bias, in two operations; the transposed weight has no place in autocast's cache."""

    def forward(self, x: Tensor) -> Tensor:
        hidden_states = ops.matmul(x, self.weight.transpose(0, 1))
        if self.bias is None:
            return hidden_states
        return hidden_states + self.bias


def dropout_add(x: Tensor, residual: Tensor, prob: float) -> Tensor:
    """residual + dropout(x)."""
    out = ops.dropout(x, prob)
    out = residual + out
    return out


class FalconAttention(Module):
    def __init__(self, b: Build, c: FalconConfig) -> None:
        self.b = b
        self.c = c
        if c.new_decoder_architecture:
            qkv_out_dim = (c.num_attention_heads + 2 * c.num_kv_heads) * c.head_dim
        else:
            qkv_out_dim = c.hidden_size + 2 * c.head_dim if c.multi_query else 3 * c.hidden_size
        self.query_key_value = FalconLinear(b, c.hidden_size, qkv_out_dim, c.bias)
        self.dense = FalconLinear(b, c.hidden_size, c.hidden_size, c.bias)
        self.attention_dropout = Dropout(c.attention_dropout)

    def split_heads(self, fused_qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, H, D] each, or with one head for key and value; grouped heads are expanded and copied."""
        batch, length, _ = fused_qkv.shape
        heads, dim = self.c.num_attention_heads, self.c.head_dim
        if self.c.new_decoder_architecture:
            group = heads // self.c.num_kv_heads
            qkv = fused_qkv.view(batch, length, -1, group + 2, dim)
            query = qkv.narrow(3, 0, group)
            key = ops.take_one(qkv, 3)
            value = ops.take_one(qkv, 3)
            key = key.expand(*query.shape)
            value = value.expand(*query.shape)
            flat = [x.reshape(batch, length, heads, dim) for x in (query, key, value)]
            return flat[0], flat[1], flat[2]
        if not self.c.multi_query:
            fused_qkv = fused_qkv.view(batch, length, heads, 3, dim)
            return fused_qkv.select(3, 0), fused_qkv.select(3, 1), fused_qkv.select(3, 2)
        fused_qkv = fused_qkv.view(batch, length, heads + 2, dim)
        return fused_qkv.narrow(2, 0, heads), ops.take_one(fused_qkv, 2), ops.take_one(fused_qkv, 2)

    def forward(
        self, hidden_states: Tensor, alibi: Tensor | None, mask: Tensor | None, positions: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        fused_qkv = self.query_key_value(hidden_states)
        query_layer, key_layer, value_layer = self.split_heads(fused_qkv)
        batch, length, heads, dim = query_layer.shape
        query_layer = query_layer.transpose(1, 2).reshape(batch, heads, length, dim)
        key_layer = key_layer.transpose(1, 2).reshape(batch, -1, length, dim)
        value_layer = value_layer.transpose(1, 2).reshape(batch, -1, length, dim)
        if alibi is None:
            cos, sin = positions
            query_layer, key_layer = apply_rotary_pos_emb(query_layer, key_layer, cos, sin)
        key_layer, value_layer = cached(self.b, key_layer, value_layer)
        attn_weights: Tensor | None = None
        if self.b.attn == "flash_attention_2":
            attn_output = self.flash(query_layer, key_layer, value_layer)
        elif self.b.attn == "sdpa":
            dropout = self.c.attention_dropout if alibi is not None else 0.0
            attn_output = scaled_dot_product_attention(query_layer, key_layer, value_layer, mask, dropout)
        elif alibi is None:
            attn_weights = ops.matmul(query_layer, key_layer.transpose(-1, -2))
            attn_weights = ops.mul_(attn_weights)
            assert mask is not None  # eager attention always has one
            attn_weights = ops.softmax(attn_weights + mask, hidden_states.dtype)
            attn_output = ops.matmul(attn_weights, value_layer)
        else:
            matmul_result = ops.matmul(query_layer, key_layer.transpose(-1, -2))
            attention_scores = matmul_result.to(float32)
            attention_logits = attention_scores + alibi.view(batch, heads, 1, -1)
            attention_logits = ops.mul_(attention_logits)
            assert mask is not None
            attn_weights = ops.softmax(attention_logits + mask, hidden_states.dtype)
            attn_weights = self.attention_dropout(attn_weights)
            attn_output = ops.matmul(attn_weights, value_layer)
        attn_output = attn_output.permute(0, 2, 1, 3)
        attn_output = attn_output.reshape(batch, length, heads * dim)
        attn_output = self.dense(attn_output)
        return attn_output, attn_weights

    def flash(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """FalconFlashAttention2."""
        target = self.b.tape.autocast or self.query_key_value.weight.dtype
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return flash_attention_2(query, key, value, target).transpose(1, 2)


class FalconMLP(Module):
    def __init__(self, b: Build, c: FalconConfig) -> None:
        self.dense_h_to_4h = FalconLinear(b, c.hidden_size, c.ffn_hidden_size, c.bias)
        self.act = activation(c.activation)
        self.dense_4h_to_h = FalconLinear(b, c.ffn_hidden_size, c.hidden_size, c.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.dense_h_to_4h(x))
        x = self.dense_4h_to_h(x)
        return x


class FalconDecoderLayer(CheckpointLayer):
    def __init__(self, b: Build, c: FalconConfig) -> None:
        self.c = c
        self.self_attention = FalconAttention(b, c)
        self.mlp = FalconMLP(b, c)
        if not c.parallel_attn:
            self.post_attention_layernorm = LayerNorm(b, c.hidden_size)
        if c.two_layer_norms:
            self.ln_attn = LayerNorm(b, c.hidden_size)
            self.ln_mlp = LayerNorm(b, c.hidden_size)
        else:
            self.input_layernorm = LayerNorm(b, c.hidden_size)

    def forward(
        self, hidden_states: Tensor, alibi: Tensor | None, mask: Tensor | None, positions: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        residual = hidden_states
        if self.c.two_layer_norms:
            attention_layernorm_out = self.ln_attn(hidden_states)
            mlp_layernorm_out = self.ln_mlp(hidden_states)
        else:
            attention_layernorm_out = self.input_layernorm(hidden_states)
        attention_output, attn_weights = self.self_attention(attention_layernorm_out, alibi, mask, positions)
        if not self.c.parallel_attn:
            residual = dropout_add(attention_output, residual, self.c.attention_dropout)
            mlp_layernorm_out = self.post_attention_layernorm(residual)
        elif not self.c.two_layer_norms:
            mlp_layernorm_out = attention_layernorm_out
        mlp_output = self.mlp(mlp_layernorm_out)
        if self.c.parallel_attn:
            mlp_output = ops.add_(mlp_output, attention_output)
        output = dropout_add(mlp_output, residual, self.c.hidden_dropout)
        return output, attn_weights


class FalconModel(Module):
    def __init__(self, b: Build, c: FalconConfig) -> None:
        if c.alibi and b.attn == "flash_attention_2":
            raise SpecError.at("attn", b.attn, "does not work with alibi in transformers", "Use sdpa or eager.")
        self.b = b
        self.c = c
        self.word_embeddings = Embedding(b, c.vocab_size, c.hidden_size)
        self.h = Layers(b, [0] * c.num_hidden_layers, lambda i: FalconDecoderLayer(b, c))
        self.ln_f = LayerNorm(b, c.hidden_size)
        self.rotary_emb = RotaryEmbedding(b, c.head_dim)

    def build_alibi_tensor(self, inputs_embeds: Tensor) -> Tensor:
        """The bias of every head and key position, [B * H, 1, S]."""
        t = self.b.tape
        batch, length, _ = inputs_embeds.shape
        length = self.b.kv_length(length)
        mask = None if self.b.padded else t.new((batch, length), int64, "attention_mask")  # or else the batch's
        arange_tensor = t.new((batch, length), int64, "arange_tensor")
        del mask
        alibi = t.new((batch * self.c.num_attention_heads, 1, length), bfloat16, "alibi")
        del arange_tensor
        return alibi.to(inputs_embeds.dtype)

    def add_alibi(self, mask: Tensor, alibi: Tensor) -> Tensor:
        """The mask of every head, [B, H, S, S]: its bias where the mask lets pass."""
        t = self.b.tape
        if mask.dtype is bool_:
            mask = t.new(mask.shape, alibi.dtype, "where")
        scaled = alibi / 8.0
        masked = t.new(mask.shape, bool_, "less")
        filled = t.new((*alibi.shape[:2], *mask.shape[2:]), alibi.dtype, "masked_fill")
        del scaled, masked
        return filled

    def forward(self, input_ids: Tensor) -> Tensor:
        inputs_embeds = self.word_embeddings(input_ids)
        batch = inputs_embeds.shape[0]
        alibi: Tensor | None = None
        if self.c.alibi:
            alibi = self.build_alibi_tensor(inputs_embeds)
        ids = position_ids(self.b, inputs_embeds)
        mask = causal_mask(self.b, inputs_embeds, allow_is_causal_skip=False)
        if alibi is not None and mask is not None:
            alibi = alibi.reshape(batch, self.c.num_attention_heads, 1, -1)
            mask = self.add_alibi(mask, alibi)
        hidden_states = inputs_embeds
        positions = self.rotary_emb(hidden_states, ids)
        for block in self.h:
            outputs = block(hidden_states, alibi, mask, positions)  # the attention weights stay until the next block
            hidden_states = outputs[0]
        return self.ln_f(hidden_states)


HEADS = language_model_heads(
    FalconConfig, FalconModel, prefix="transformer", embedding="word_embeddings", own_loss=AS_THEY_ARE
)
