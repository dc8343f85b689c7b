"""OPT (transformers.models.opt): learned positions from the attention mask, ReLU, projections around OPT-350m."""

from __future__ import annotations

from memplan.architectures.nn import (
    AS_THEY_ARE,
    Build,
    CausalLM,
    CheckpointLayer,
    Embedding,
    LayerNorm,
    Layers,
    Linear,
    Module,
    activation,
    attention,
    cached,
    causal_lm_output,
    causal_mask,
    check_heads,
    check_position_table,
    language_model_heads,
)
from memplan.errors import UnsupportedError
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tensor import Tensor, float32, int64


class OPTConfig:
    """The fields of config.json that the memory of an OPT depends on."""

    def __init__(self, fields: Fields) -> None:
        self.vocab_size = fields.int("vocab_size", 50272)
        self.hidden_size = fields.int("hidden_size", 768)
        self.word_embed_proj_dim = fields.int("word_embed_proj_dim", self.hidden_size)
        self.num_hidden_layers = fields.layers("num_hidden_layers", 12)
        self.ffn_dim = fields.int("ffn_dim", 3072)
        self.max_position_embeddings = fields.int("max_position_embeddings", 2048)
        self.num_attention_heads = fields.int("num_attention_heads", 12)
        check_heads(fields, self.hidden_size, self.num_attention_heads)
        self.do_layer_norm_before = fields.bool("do_layer_norm_before", True)
        remove_final_layer_norm = fields.bool("_remove_final_layer_norm", False)
        self.final_layer_norm = self.do_layer_norm_before and not remove_final_layer_norm
        self.dropout = fields.float("dropout", 0.1, maximum=1.0)
        self.attention_dropout = fields.float("attention_dropout", 0.0, maximum=1.0)
        self.activation_function = fields.str("activation_function", "relu")
        self.enable_bias = fields.bool("enable_bias", True)
        self.layer_norm_elementwise_affine = fields.bool("layer_norm_elementwise_affine", True)
        self.tie_word_embeddings = fields.bool("tie_word_embeddings", True)
        if fields.float("layerdrop", 0.0, maximum=1.0) > 0.0:
            raise UnsupportedError(f"{fields.source}: layerdrop leaves layers out at random. Set it to 0 to estimate.")


class OPTLearnedPositionalEmbedding(Embedding):
    """Positions are shifted by two rows."""

    def __init__(self, b: Build, rows: int, dim: int) -> None:
        super().__init__(b, rows + 2, dim)

    def forward(self, position_ids: Tensor) -> Tensor:
        return super().forward(position_ids + 2)


class OPTAttention(Module):
    def __init__(self, b: Build, c: OPTConfig) -> None:
        self.b = b
        self.num_heads = c.num_attention_heads
        self.head_dim = c.hidden_size // c.num_attention_heads
        self.dropout = c.attention_dropout
        self.k_proj = Linear(b, c.hidden_size, c.hidden_size, c.enable_bias)
        self.v_proj = Linear(b, c.hidden_size, c.hidden_size, c.enable_bias)
        self.q_proj = Linear(b, c.hidden_size, c.hidden_size, c.enable_bias)
        self.out_proj = Linear(b, c.hidden_size, c.hidden_size, c.enable_bias)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        query_states = self.q_proj(hidden_states) * 0.5
        query_states = query_states.view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2)
        key_states = self.k_proj(hidden_states)
        value_states = self.v_proj(hidden_states)
        key_states = key_states.view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2)
        value_states = value_states.view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2)
        key_states, value_states = cached(self.b, key_states, value_states)
        attn_output, attn_weights = attention(self.b, query_states, key_states, value_states, mask, self.dropout)
        attn_output = attn_output.reshape(batch, length, -1).contiguous()
        attn_output = self.out_proj(attn_output)
        return attn_output, attn_weights


class OPTDecoderLayer(CheckpointLayer):
    def __init__(self, b: Build, c: OPTConfig) -> None:
        affine = c.layer_norm_elementwise_affine
        self.do_layer_norm_before = c.do_layer_norm_before
        self.dropout = c.dropout
        self.self_attn = OPTAttention(b, c)
        self.activation_fn = activation(c.activation_function)
        self.self_attn_layer_norm = LayerNorm(b, c.hidden_size, elementwise_affine=affine)
        self.fc1 = Linear(b, c.hidden_size, c.ffn_dim, c.enable_bias)
        self.fc2 = Linear(b, c.ffn_dim, c.hidden_size, c.enable_bias)
        self.final_layer_norm = LayerNorm(b, c.hidden_size, elementwise_affine=affine)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, mask)
        hidden_states = ops.dropout(hidden_states, self.dropout)
        hidden_states = residual + hidden_states
        if not self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, shape[-1])
        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        hidden_states = self.fc1(hidden_states)
        hidden_states = self.activation_fn(hidden_states)
        hidden_states = self.fc2(hidden_states)
        hidden_states = ops.dropout(hidden_states, self.dropout)
        hidden_states = (residual + hidden_states).view(*shape)
        if not self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        return hidden_states


class OPTDecoder(Module):
    def __init__(self, b: Build, c: OPTConfig) -> None:
        self.b = b
        self.max_position_embeddings = c.max_position_embeddings
        self.embed_tokens = Embedding(b, c.vocab_size, c.word_embed_proj_dim)
        self.embed_positions = OPTLearnedPositionalEmbedding(b, c.max_position_embeddings, c.hidden_size)
        projects = c.word_embed_proj_dim != c.hidden_size
        self.project_out = Linear(b, c.hidden_size, c.word_embed_proj_dim, bias=False) if projects else None
        self.project_in = Linear(b, c.word_embed_proj_dim, c.hidden_size, bias=False) if projects else None
        self.final_layer_norm: LayerNorm | None = None
        if c.final_layer_norm:
            self.final_layer_norm = LayerNorm(b, c.hidden_size, elementwise_affine=c.layer_norm_elementwise_affine)
        self.layers = Layers(b, [0] * c.num_hidden_layers, lambda i: OPTDecoderLayer(b, c))

    def position_ids(self, input_ids: Tensor) -> Tensor:
        """The cumulative sum of the attention mask, which is made where the batch has none."""
        t = self.b.tape
        mask = input_ids if self.b.padded else t.new(input_ids.shape, float32, "position_attention_mask")
        ids = t.new(mask.shape, mask.dtype, "cumsum")
        ids = ids * mask + -1
        return ids.to(int64)

    def forward(self, input_ids: Tensor) -> Tensor:
        check_position_table(input_ids, self.max_position_embeddings, self.b.past_length)
        inputs_embeds = self.embed_tokens(input_ids)
        position_ids = self.position_ids(input_ids)
        mask = causal_mask(self.b, inputs_embeds)
        pos_embeds = self.embed_positions(position_ids)
        if self.project_in is not None:
            inputs_embeds = self.project_in(inputs_embeds)
        hidden_states = inputs_embeds + pos_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask)
        if self.final_layer_norm is not None:
            hidden_states = self.final_layer_norm(hidden_states)
        if self.project_out is not None:
            hidden_states = self.project_out(hidden_states)
        return hidden_states


class OPTModel(Module):
    def __init__(self, b: Build, c: OPTConfig) -> None:
        self.decoder = OPTDecoder(b, c)

    @property
    def embed_tokens(self) -> Embedding:
        return self.decoder.embed_tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states: Tensor = self.decoder(input_ids)
        return hidden_states


class OPTForCausalLM(CausalLM):
    """It calls the decoder, past the model that holds it."""

    def __init__(self, b: Build, fields: Fields) -> None:
        c = OPTConfig(fields)
        self.model = OPTModel(b, c)
        super().__init__(b, "model", self.model, self.model.embed_tokens, c.tie_word_embeddings, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden_states = self.model.decoder(input_ids)
        return causal_lm_output(
            self.b, self.lm_head, hidden_states, labels, own_loss=AS_THEY_ARE._replace(last_only="5.0")
        )


HEADS = {
    **language_model_heads(OPTConfig, OPTModel, prefix="model", embedding="embed_tokens"),
    "causal-lm": OPTForCausalLM,
}
