"""GLM-4-0414 (transformers.models.glm4): GLM with a norm after each block as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from memplan.architectures.glm import GlmConfig, GlmDecoderLayer, GlmForCausalLM, GlmModel
from memplan.architectures.llama import decoder_heads
from memplan.architectures.nn import Build, RMSNorm
from memplan.tape.tensor import Tensor


class Glm4DecoderLayer(GlmDecoderLayer):
    def __init__(self, b: Build, c: GlmConfig, layer_idx: int) -> None:
        super().__init__(b, c, layer_idx)
        self.post_self_attn_layernorm = RMSNorm(b, c.hidden_size)
        self.post_mlp_layernorm = RMSNorm(b, c.hidden_size)

    def forward(self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, positions, mask)
        hidden_states = self.post_self_attn_layernorm(hidden_states)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = self.post_mlp_layernorm(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states


class Glm4Model(GlmModel):
    layer_class: ClassVar[Callable[..., Any]] = Glm4DecoderLayer


class Glm4ForCausalLM(GlmForCausalLM):
    model_class: ClassVar[Callable[..., Any]] = Glm4Model


HEADS = decoder_heads(Glm4ForCausalLM)
