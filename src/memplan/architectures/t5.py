"""T5 and mT5 (transformers.models.t5): an encoder and a decoder that share a learned bias of relative positions.

``seq_len`` is the length of both sequences: the encoder's input_ids and the labels, from which the decoder's inputs
are made, have the same shape [B, S].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from memplan.architectures.nn import (
    Build,
    CheckpointLayer,
    Dropout,
    Embedding,
    Layers,
    Linear,
    Model,
    Module,
    ModuleList,
    activation,
    bidirectional_mask,
    causal_mask,
    looked_at,
)
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.attention import scaled_dot_product_attention
from memplan.tape.tape import LOGITS, Tape
from memplan.tape.tensor import DType, Tensor, bool_, float16, float32, int64

ATTENTION = ("sdpa", "eager")

_DEFAULTS: dict[str, dict[str, Any]] = {
    "t5": {"vocab_size": 32128, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu"},
    "mt5": {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"},
}


class T5Config:
    """The fields of config.json that the memory of a T5 depends on."""

    def __init__(self, fields: Fields) -> None:
        model_type = fields.str("model_type", "t5")
        default = _DEFAULTS[model_type]
        self.vocab_size = fields.int("vocab_size", default["vocab_size"])
        self.d_model = fields.int("d_model", 512, alias="hidden_size")
        self.d_kv = fields.int("d_kv", 64, alias="head_dim")
        self.d_ff = fields.int("d_ff", default["d_ff"])
        self.num_layers = fields.layers("num_layers", default["num_layers"], alias="num_hidden_layers")
        self.num_decoder_layers = fields.layers("num_decoder_layers", self.num_layers)
        self.num_heads = fields.int("num_heads", default["num_heads"], alias="num_attention_heads")
        self.relative_attention_num_buckets = fields.int("relative_attention_num_buckets", 32)
        self.dropout_rate = fields.float("dropout_rate", 0.1, maximum=1.0)
        self.is_gated_act, self.dense_act_fn = feed_forward(fields, default["feed_forward_proj"])
        self.use_cache = fields.bool("use_cache", True)
        self.tie_word_embeddings = fields.bool("tie_word_embeddings", True)
        """False in T5 1.1 and mT5. transformers 5 ties all the same, until a checkpoint has both tensors."""
        self.scale_decoder_outputs = self.tie_word_embeddings and model_type == "t5"


def feed_forward(fields: Fields, default: str) -> tuple[bool, str]:
    """``feed_forward_proj``, {ACT_FN} or gated-{ACT_FN}: whether it is gated, and the activation's name."""
    projection = fields.str("feed_forward_proj", default)
    gate, _, act_fn = projection.rpartition("-")
    if gate not in ("", "gated"):
        raise fields.wrong("feed_forward_proj", projection, "is no activation", "Use a form like relu or gated-gelu.")
    return gate == "gated", "gelu_new" if projection == "gated-gelu" else act_fn


@dataclass(slots=True)
class Seq2SeqLMOutput:
    """What lives until the loss is computed: logits, encoder_last_hidden_state and past_key_values."""

    logits: Tensor
    encoder_last_hidden_state: Tensor
    past_key_values: list[Tensor] | None

    def float(self) -> Seq2SeqLMOutput:
        """accelerate's copies in float32: autocast leaves the hidden state in float32, and a cache is not converted."""
        return Seq2SeqLMOutput(self.logits.float(), self.encoder_last_hidden_state, self.past_key_values)

    def to(self, dtype: DType) -> Seq2SeqLMOutput:
        """FSDP2's copies in another dtype."""
        return Seq2SeqLMOutput(self.logits.to(dtype), self.encoder_last_hidden_state.to(dtype), self.past_key_values)


class T5LayerNorm(Module):
    """No bias and no mean; the variance in float32."""

    def __init__(self, b: Build, hidden_size: int) -> None:
        self.weight = b.parameter(hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.to(float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * ops.rsqrt(variance + 1e-6)
        if self.weight.dtype is not float32:
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states


class OutputLinear(Linear):
    """``wo``, which from_pretrained keeps in float32 where it loads float16 (_keep_in_fp32_modules)."""

    def __init__(self, b: Build, n_in: int, n_out: int) -> None:
        super().__init__(replace(b, dtype=float32) if b.dtype is float16 else b, n_in, n_out, bias=False)


class T5DenseActDense(Module):
    def __init__(self, b: Build, c: T5Config) -> None:
        self.wi = Linear(b, c.d_model, c.d_ff, bias=False)
        self.wo = OutputLinear(b, c.d_ff, c.d_model)
        self.dropout = Dropout(c.dropout_rate)
        self.act = activation(c.dense_act_fn)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.wi(hidden_states)
        hidden_states = self.act(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = hidden_states.to(looked_at(self.wo.weight).dtype)
        hidden_states = self.wo(hidden_states)
        return hidden_states


class T5DenseGatedActDense(Module):
    def __init__(self, b: Build, c: T5Config) -> None:
        self.wi_0 = Linear(b, c.d_model, c.d_ff, bias=False)
        self.wi_1 = Linear(b, c.d_model, c.d_ff, bias=False)
        self.wo = OutputLinear(b, c.d_ff, c.d_model)
        self.dropout = Dropout(c.dropout_rate)
        self.act = activation(c.dense_act_fn)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_gelu = self.act(self.wi_0(hidden_states))
        hidden_linear = self.wi_1(hidden_states)
        hidden_states = hidden_gelu * hidden_linear
        hidden_states = self.dropout(hidden_states)
        hidden_states = hidden_states.to(looked_at(self.wo.weight).dtype)
        hidden_states = self.wo(hidden_states)
        return hidden_states


class T5LayerFF(Module):
    def __init__(self, b: Build, c: T5Config) -> None:
        self.DenseReluDense = T5DenseGatedActDense(b, c) if c.is_gated_act else T5DenseActDense(b, c)
        self.layer_norm = T5LayerNorm(b, c.d_model)
        self.dropout = Dropout(c.dropout_rate)

    def forward(self, hidden_states: Tensor) -> Tensor:
        forwarded_states = self.layer_norm(hidden_states)
        forwarded_states = self.DenseReluDense(forwarded_states)
        hidden_states = hidden_states + self.dropout(forwarded_states)
        return hidden_states


def relative_position_bucket(relative_position: Tensor, bidirectional: bool) -> Tensor:
    """T5Attention._relative_position_bucket: int64 [Sq, Sk] to int64 [Sq, Sk], through tensors of that shape."""
    t = relative_position.tape

    def new(dtype: DType, name: str) -> Tensor:
        return t.new(relative_position.shape, dtype, name)

    relative_buckets: Tensor | None = None
    if bidirectional:
        is_after = new(int64, "is_after")
        scaled = new(int64, "is_after * num_buckets")
        del is_after
        relative_buckets = new(int64, "relative_buckets")
        del scaled
        relative_position = new(int64, "abs")
    else:
        zeros = new(int64, "zeros_like")
        least = new(int64, "min")
        del zeros
        relative_position = new(int64, "neg")
        del least
    is_small = new(bool_, "is_small")
    value = new(float32, "float")
    for name in ("div", "log", "div", "mul"):
        value = new(float32, name)
    value = new(int64, "to")
    relative_position_if_large = new(int64, "add")
    del value
    full = new(int64, "full_like")
    relative_position_if_large = new(int64, "min")
    del full
    chosen = ops.where(is_small, relative_position, relative_position_if_large)
    if relative_buckets is None:
        relative_buckets = new(int64, "relative_buckets")
    del chosen
    return relative_buckets


def position_bias_mask(position_bias: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """create_position_bias_mask: what sdpa adds to the scores. [1 or B, H, Sq, Sk]."""
    t = position_bias.tape
    if mask is None and is_causal:
        mask = t.new(position_bias.shape[-2:], bool_, "causal_mask")
    if mask is not None:
        position_bias = ops.where(mask, position_bias, t.new((), position_bias.dtype, "min_dtype"))
    return position_bias.contiguous()


def attention(
    b: Build,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    position_bias: Tensor,
    dropout: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention with a bias on the scores and without scaling: query [B, H, S, D] -> [B, S, H, D], and the weights."""
    if b.attn == "sdpa":
        mask = position_bias_mask(position_bias, mask, is_causal)
        attn_output = scaled_dot_product_attention(query, key, value, mask, dropout)
        return attn_output.transpose(1, 2).contiguous(), None
    attn_weights = ops.matmul(query, key.transpose(2, 3)) * 1.0
    attn_weights = attn_weights + position_bias
    if mask is not None:
        attn_weights = attn_weights + mask
    attn_weights = ops.softmax(attn_weights)
    attn_weights = ops.dropout(attn_weights, dropout)
    attn_output = ops.matmul(attn_weights, value)
    attn_output = attn_output.transpose(1, 2).contiguous()
    return attn_output, attn_weights


class T5Attention(Module):
    def __init__(
        self, b: Build, c: T5Config, is_decoder: bool, is_causal: bool, has_relative_attention_bias: bool
    ) -> None:
        self.b = b
        self.is_decoder = is_decoder
        self.is_causal = is_causal
        self.has_relative_attention_bias = has_relative_attention_bias
        self.key_value_proj_dim = c.d_kv
        self.n_heads = c.num_heads
        self.dropout = c.dropout_rate
        inner_dim = c.num_heads * c.d_kv
        self.q = Linear(b, c.d_model, inner_dim, bias=False)
        self.k = Linear(b, c.d_model, inner_dim, bias=False)
        self.v = Linear(b, c.d_model, inner_dim, bias=False)
        self.o = Linear(b, inner_dim, c.d_model, bias=False)
        if has_relative_attention_bias:
            self.relative_attention_bias = Embedding(b, c.relative_attention_num_buckets, c.num_heads)

    def compute_bias(self, t: Tape, query_length: int, key_length: int) -> Tensor:
        """[1, H, Sq, Sk]"""
        relative_position = t.new((query_length, key_length), int64, "relative_position")
        bucket = relative_position_bucket(relative_position, bidirectional=not self.is_decoder)
        values = self.relative_attention_bias(bucket)
        values = values.permute(2, 0, 1).unsqueeze(0)
        return values

    def no_bias(self, query_states: Tensor, key_length: int) -> Tensor:
        """Zeros [1, H, Sq, Sk]; a leaf that needs a gradient under gradient checkpointing."""
        t = query_states.tape
        position_bias = t.new((1, self.n_heads, query_states.shape[2], key_length), query_states.dtype, "zeros")
        if self.b.gradient_checkpointing and t.training:
            t.require_grad(position_bias)
        return position_bias

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        position_bias: Tensor | None,
        past_key_values: list[Tensor] | None,
        key_value_states: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        query_states = self.q(hidden_states).view(batch, length, -1, self.key_value_proj_dim).transpose(1, 2)
        current_states = hidden_states if key_value_states is None else key_value_states
        key_length = current_states.shape[1]
        key_states = self.k(current_states).view(batch, key_length, -1, self.key_value_proj_dim).transpose(1, 2)
        value_states = self.v(current_states).view(batch, key_length, -1, self.key_value_proj_dim).transpose(1, 2)
        if past_key_values is not None:  # DynamicLayer.update: concatenated to an empty cache
            key_states, value_states = ops.cat((key_states,)), ops.cat((value_states,))
            past_key_values += key_states, value_states
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = self.compute_bias(hidden_states.tape, length, key_length)
        elif position_bias is None:
            position_bias = self.no_bias(query_states, key_length)
        attn_output, attn_weights = attention(
            self.b, query_states, key_states, value_states, mask, position_bias, self.dropout, self.is_causal
        )
        attn_output = attn_output.reshape(batch, length, -1).contiguous()
        attn_output = self.o(attn_output)
        return attn_output, position_bias, attn_weights


class T5LayerSelfAttention(Module):
    def __init__(self, b: Build, c: T5Config, is_decoder: bool, has_relative_attention_bias: bool) -> None:
        self.SelfAttention = T5Attention(b, c, is_decoder, is_decoder, has_relative_attention_bias)
        self.layer_norm = T5LayerNorm(b, c.d_model)
        self.dropout = Dropout(c.dropout_rate)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        position_bias: Tensor | None,
        past_key_values: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        normed_hidden_states = self.layer_norm(hidden_states)
        attention_output, position_bias, attn_weights = self.SelfAttention(
            normed_hidden_states, mask, position_bias, past_key_values
        )
        attention_output = hidden_states + self.dropout(attention_output)
        return attention_output, position_bias, attn_weights


class T5LayerCrossAttention(Module):
    def __init__(self, b: Build, c: T5Config) -> None:
        self.EncDecAttention = T5Attention(b, c, True, False, False)
        self.layer_norm = T5LayerNorm(b, c.d_model)
        self.dropout = Dropout(c.dropout_rate)

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor,
        mask: Tensor | None,
        position_bias: Tensor | None,
        past_key_values: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        normed_hidden_states = self.layer_norm(hidden_states)
        attention_output, position_bias, attn_weights = self.EncDecAttention(
            normed_hidden_states, mask, position_bias, past_key_values, key_value_states
        )
        layer_output = hidden_states + self.dropout(attention_output)
        return layer_output, position_bias, attn_weights


def clamped(hidden_states: Tensor) -> Tensor:
    """float16 is clamped to its finite values."""
    if hidden_states.dtype is not float16:
        return hidden_states
    hidden_states.tape.scratch(hidden_states.numel, "isinf")
    return ops.clamp(hidden_states)


class T5Block(CheckpointLayer):
    def __init__(self, b: Build, c: T5Config, is_decoder: bool, has_relative_attention_bias: bool) -> None:
        self.is_decoder = is_decoder
        layer: list[Module] = [T5LayerSelfAttention(b, c, is_decoder, has_relative_attention_bias)]
        if is_decoder:
            layer.append(T5LayerCrossAttention(b, c))
        layer.append(T5LayerFF(b, c))
        self.layer = ModuleList(layer)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        position_bias: Tensor | None,
        encoder_hidden_states: Tensor | None,
        encoder_mask: Tensor | None,
        encoder_decoder_position_bias: Tensor | None,
        past_key_values: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        self_attention, *cross_attention, feed_forward = self.layer
        hidden_states, self_attn_position_bias, _ = self_attention(hidden_states, mask, position_bias, past_key_values)
        hidden_states = clamped(hidden_states)
        cross_attn_position_bias = None
        if self.is_decoder:
            hidden_states, cross_attn_position_bias, _ = cross_attention[0](
                hidden_states, encoder_hidden_states, encoder_mask, encoder_decoder_position_bias, past_key_values
            )
            hidden_states = clamped(hidden_states)
        hidden_states = feed_forward(hidden_states)
        hidden_states = clamped(hidden_states)
        return hidden_states, self_attn_position_bias, cross_attn_position_bias


class T5Stack(Module):
    def __init__(self, b: Build, c: T5Config, shared: Embedding, is_decoder: bool) -> None:
        self.b = b
        self.is_decoder = is_decoder
        self.dropout = Dropout(c.dropout_rate)
        self.embed_tokens = Embedding(b, c.vocab_size, c.d_model)
        self.embed_tokens.weight = shared.weight
        # The first block has the table of biases. The last one is where the gradients of what all blocks share begin.
        depth = c.num_decoder_layers if is_decoder else c.num_layers
        kinds = ["inner"] * (depth - 1) + ["last"]
        self.block = Layers(b, kinds, lambda i: T5Block(b, c, is_decoder, i == 0), stack=int(is_decoder))
        self.final_layer_norm = T5LayerNorm(b, c.d_model)

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: list[Tensor] | None = None,
    ) -> Tensor:
        inputs_embeds = self.embed_tokens(input_ids)
        encoder_mask = None
        if encoder_hidden_states is not None:
            mask = causal_mask(replace(self.b, padded=False), inputs_embeds)  # the collator pads with labels of -100
            encoder_mask = bidirectional_mask(self.b, inputs_embeds, encoder_hidden_states)
        else:
            mask = bidirectional_mask(self.b, inputs_embeds)
        position_bias = None
        encoder_decoder_position_bias = None
        hidden_states = self.dropout(inputs_embeds)
        for block in self.block:
            hidden_states, position_bias, encoder_decoder_position_bias = block(
                hidden_states,
                mask,
                position_bias,
                encoder_hidden_states,
                encoder_mask,
                encoder_decoder_position_bias,
                past_key_values,
            )
        hidden_states = self.final_layer_norm(hidden_states)
        hidden_states = self.dropout(hidden_states)
        return hidden_states


def shift_right(labels: Tensor) -> Tensor:
    """The decoder's inputs: the labels one place later, with the padding token instead of -100."""
    t = labels.tape
    shifted_input_ids = t.new(labels.shape, int64, "shifted_input_ids")
    t.scratch(labels.nbytes, "clone")
    t.scratch(labels.numel, "masked")
    return shifted_input_ids


class T5Model(Module):
    def __init__(self, b: Build, c: T5Config) -> None:
        self.shared = Embedding(b, c.vocab_size, c.d_model)
        self.encoder = T5Stack(b, c, self.shared, is_decoder=False)
        self.decoder = T5Stack(b, c, self.shared, is_decoder=True)


class T5ForConditionalGeneration(Model):
    def __init__(self, b: Build, fields: Fields) -> None:
        c = T5Config(fields)
        self.b = b
        self.use_cache = c.use_cache
        self.scale_decoder_outputs = c.scale_decoder_outputs
        self.shared = Embedding(b, c.vocab_size, c.d_model)
        self.encoder = T5Stack(b, c, self.shared, is_decoder=False)
        self.decoder = T5Stack(b, c, self.shared, is_decoder=True)
        self.lm_head = Linear(b, c.d_model, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.shared.weight
        elif b.software.at_least("transformers", "5"):
            self.listed_as_tied = {"lm_head.weight": "shared.weight"}

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Seq2SeqLMOutput]:
        hidden_states = self.encoder(input_ids)
        decoder_input_ids = shift_right(labels)
        # Trainer turns use_cache off in the model's config, of which the decoder has a copy of its own.
        checkpointing = self.b.gradient_checkpointing and self.b.tape.training
        past_key_values: list[Tensor] | None = [] if self.use_cache and not checkpointing else None
        last_hidden_state = self.decoder(decoder_input_ids, hidden_states, past_key_values)
        with self.b.tape.tagged(LOGITS):
            sequence_output = last_hidden_state * 0.5 if self.scale_decoder_outputs else last_hidden_state
            lm_logits = self.lm_head(sequence_output)
            self.b.tape.mark("loss")
            loss = ops.cross_entropy(lm_logits.view(-1, lm_logits.shape[-1]), labels.view(-1))
        return loss, Seq2SeqLMOutput(lm_logits, hidden_states, past_key_values)


def base_model(b: Build, fields: Fields) -> Module:
    return T5Model(b, T5Config(fields))


HEADS = {"seq2seq-lm": T5ForConditionalGeneration, "base": base_model}
