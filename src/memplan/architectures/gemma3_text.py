"""Gemma 3, text (transformers.models.gemma3): Gemma 2 with norms on query and key, and rotary tables per layer type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from memplan.architectures.gemma import GemmaConfig, GemmaModel, GemmaRMSNorm
from memplan.architectures.gemma2 import Gemma2DecoderLayer, Gemma2ForCausalLM, sliding_layers
from memplan.architectures.llama import LlamaAttention, LlamaConfig, decoder_heads
from memplan.architectures.nn import Build, RotaryEmbedding, position_ids
from memplan.specs.fields import Fields
from memplan.tape.tensor import Tensor, float32


class Gemma3Config(GemmaConfig):
    vocab_size = 262208
    hidden_size = 2304
    intermediate_size = 9216
    num_hidden_layers = 26
    num_attention_heads = 8
    default_kv_heads = 4

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.hidden_act = fields.str("hidden_activation", self.hidden_act)
        self.final_logit_softcapping = fields.has("final_logit_softcapping")
        self.layer_types = sliding_layers(fields, self.num_hidden_layers, fields.int("sliding_window_pattern", 6))
        self.windows = {"full_attention": None, "sliding_attention": fields.int("sliding_window", 4096)}


class Gemma3Attention(LlamaAttention):
    def __init__(self, b: Build, c: LlamaConfig, layer_idx: int) -> None:
        super().__init__(b, c, layer_idx)
        self.q_norm = GemmaRMSNorm(b, c.head_dim)
        self.k_norm = GemmaRMSNorm(b, c.head_dim)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query_states, key_states, value_states = super().project(hidden_states)
        query_states = self.q_norm(query_states)
        key_states = self.k_norm(key_states)
        return query_states, key_states, value_states


class Gemma3DecoderLayer(Gemma2DecoderLayer):
    attention_class: ClassVar[Callable[..., Any]] = Gemma3Attention


class Gemma3RotaryEmbedding(RotaryEmbedding):
    """Each layer type has frequencies of its own."""

    def __init__(self, b: Build, c: LlamaConfig) -> None:
        self.dim = c.rotary_dim
        self.dtype = None
        for kind in sorted(set(c.layer_types)):
            setattr(self, f"{kind}_inv_freq", b.tape.buffer((self.dim // 2,), float32))
            setattr(self, f"{kind}_original_inv_freq", b.tape.buffer((self.dim // 2,), float32))


class Gemma3TextModel(GemmaModel):
    layer_class: ClassVar[Callable[..., Any]] = Gemma3DecoderLayer

    def __init__(self, b: Build, c: Gemma3Config) -> None:
        super().__init__(b, c)
        self.rotary_emb = Gemma3RotaryEmbedding(b, c)

    def forward(self, input_ids: Tensor) -> Tensor:
        inputs_embeds = self.embed_tokens(input_ids)
        ids = position_ids(self.b, inputs_embeds)
        masks = self.masks(inputs_embeds)
        hidden_states = inputs_embeds
        positions = {kind: self.rotary_emb(hidden_states, ids) for kind in sorted(set(self.c.layer_types))}
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions[layer.layer_type], masks[layer.layer_type])
        return self.norm(hidden_states)


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = Gemma3Config
    model_class: ClassVar[Callable[..., Any]] = Gemma3TextModel


HEADS = decoder_heads(Gemma3ForCausalLM)
