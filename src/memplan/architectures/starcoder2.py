"""StarCoder2 (transformers.models.starcoder2): Llama with biases, layer norms, a plain MLP and dropout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from memplan.architectures.llama import (
    LlamaAttention,
    LlamaConfig,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    decoder_heads,
)
from memplan.architectures.nn import (
    Build,
    LayerNorm,
    Linear,
    Module,
    OwnLoss,
    activation,
    causal_lm_output,
    position_ids,
)
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tensor import Tensor


class Starcoder2Config(LlamaConfig):
    vocab_size = 49152
    hidden_size = 3072
    intermediate_size = 12288
    num_hidden_layers = 30
    num_attention_heads = 24
    default_kv_heads = 2
    hidden_act = "gelu_pytorch_tanh"
    tie_word_embeddings = True

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.attention_bias = self.output_bias = self.mlp_bias = fields.bool("use_bias", True)
        self.residual_dropout = fields.float("residual_dropout", 0.0, maximum=1.0)
        self.embedding_dropout = fields.float("embedding_dropout", 0.0, maximum=1.0)
        self.windows = {"full_attention": fields.nullable_int("sliding_window", None)}


class Starcoder2MLP(Module):
    def __init__(self, b: Build, c: Starcoder2Config) -> None:
        self.c_fc = Linear(b, c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.c_proj = Linear(b, c.intermediate_size, c.hidden_size, c.mlp_bias)
        self.act = activation(c.hidden_act)
        self.residual_dropout = c.residual_dropout

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.c_fc(hidden_states)
        hidden_states = self.act(hidden_states)
        hidden_states = self.c_proj(hidden_states)
        hidden_states = ops.dropout(hidden_states, self.residual_dropout)
        return hidden_states


class Starcoder2Attention(LlamaAttention):
    def __init__(self, b: Build, c: Starcoder2Config, layer_idx: int) -> None:
        super().__init__(b, c, layer_idx)
        self.residual_dropout = c.residual_dropout

    def forward(
        self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        attn_output, attn_weights = super().forward(hidden_states, positions, mask)
        attn_output = ops.dropout(attn_output, self.residual_dropout)
        return attn_output, attn_weights


class Starcoder2DecoderLayer(LlamaDecoderLayer):
    attention_class: ClassVar[Callable[..., Any]] = Starcoder2Attention
    mlp_class: ClassVar[Callable[..., Any]] = Starcoder2MLP
    norm_class: ClassVar[Callable[..., Any]] = LayerNorm


class Starcoder2Model(LlamaModel):
    c: Starcoder2Config
    layer_class: ClassVar[Callable[..., Any]] = Starcoder2DecoderLayer
    norm_class: ClassVar[Callable[..., Any]] = LayerNorm

    def forward(self, input_ids: Tensor) -> Tensor:
        inputs_embeds = self.embed_tokens(input_ids)
        ids = position_ids(self.b, inputs_embeds)
        masks = self.masks(inputs_embeds)
        hidden_states = inputs_embeds
        hidden_states = ops.dropout(hidden_states, self.c.embedding_dropout)
        positions = self.rotary_emb(hidden_states, ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions, masks[layer.layer_type])
        return self.norm(hidden_states)


class Starcoder2ForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = Starcoder2Config
    model_class: ClassVar[Callable[..., Any]] = Starcoder2Model
    output: Callable[..., Any] = staticmethod(partial(causal_lm_output, own_loss=OwnLoss("4.47")))


HEADS = decoder_heads(Starcoder2ForCausalLM)
