"""Granite (transformers.models.granite): Llama with scaled embeddings, residuals and logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from memplan.architectures.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel, decoder_heads
from memplan.architectures.nn import OwnLoss, causal_lm_output, position_ids
from memplan.tape.tensor import Tensor


class GraniteDecoderLayer(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, positions, mask)
        hidden_states = residual + hidden_states * 0.2
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + hidden_states * 0.2
        return hidden_states


class GraniteModel(LlamaModel):
    layer_class: ClassVar[Callable[..., Any]] = GraniteDecoderLayer

    def forward(self, input_ids: Tensor) -> Tensor:
        inputs_embeds = self.embed_tokens(input_ids)
        inputs_embeds = inputs_embeds * 12.0
        ids = position_ids(self.b, inputs_embeds)
        masks = self.masks(inputs_embeds)
        hidden_states = inputs_embeds
        positions = self.rotary_emb(hidden_states, ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions, masks[layer.layer_type])
        return self.norm(hidden_states)


class GraniteForCausalLM(LlamaForCausalLM):
    model_class: ClassVar[Callable[..., Any]] = GraniteModel
    output: Callable[..., Any] = staticmethod(partial(causal_lm_output, own_loss=OwnLoss("4.48")))

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden_states = self.model(input_ids)
        return self.output(self.b, self.lm_head, hidden_states, labels, scale=True)


HEADS = {name: make for name, make in decoder_heads(GraniteForCausalLM).items() if name != "sequence-classification"}
