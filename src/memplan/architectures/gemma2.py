"""Gemma 2 (transformers.models.gemma2): Gemma with norms around each block, soft caps, every other layer sliding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from memplan.architectures.gemma import GemmaConfig, GemmaDecoderLayer, GemmaModel, GemmaRMSNorm
from memplan.architectures.llama import LlamaAttention, LlamaConfig, LlamaForCausalLM, decoder_heads, layer_types
from memplan.architectures.nn import Build
from memplan.errors import UnsupportedError
from memplan.specs.fields import Fields
from memplan.tape.tensor import Tensor

ATTENTION = ("eager", "flash_attention_2")
"""The attn_implementations that transformers has: sdpa cannot cap scores. The first is what it falls back to."""


class Gemma2Config(GemmaConfig):
    hidden_size = 2304
    intermediate_size = 9216
    num_hidden_layers = 26
    num_attention_heads = 8
    default_kv_heads = 4

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.hidden_act = fields.str("hidden_activation", self.hidden_act)
        self.attn_logit_softcapping = not fields.is_null("attn_logit_softcapping")
        self.final_logit_softcapping = not fields.is_null("final_logit_softcapping")
        self.layer_types = sliding_layers(fields, self.num_hidden_layers, pattern=2)
        self.windows = {"full_attention": None, "sliding_attention": fields.int("sliding_window", 4096)}


def sliding_layers(fields: Fields, layers: int, pattern: int) -> list[str]:
    """layer_types; by default every ``pattern``-th layer sees the whole sequence."""
    default = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    return list(layer_types(fields, default))


class Gemma2Attention(LlamaAttention):
    def __init__(self, b: Build, c: Gemma2Config, layer_idx: int) -> None:
        super().__init__(b, c, layer_idx)
        self.softcap = c.attn_logit_softcapping


class Gemma2DecoderLayer(GemmaDecoderLayer):
    attention_class: ClassVar[Callable[..., Any]] = Gemma2Attention

    def __init__(self, b: Build, c: LlamaConfig, layer_idx: int) -> None:
        super().__init__(b, c, layer_idx)
        self.pre_feedforward_layernorm = GemmaRMSNorm(b, c.hidden_size)
        self.post_feedforward_layernorm = GemmaRMSNorm(b, c.hidden_size)

    def forward(self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, positions, mask)
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.pre_feedforward_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = self.post_feedforward_layernorm(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states


class Gemma2Model(GemmaModel):
    layer_class: ClassVar[Callable[..., Any]] = Gemma2DecoderLayer

    def __init__(self, b: Build, c: Gemma2Config) -> None:
        if b.attn not in ATTENTION:
            raise UnsupportedError(
                f"attn: transformers has no {b.attn!r} for gemma2, whose attention scores are capped. "
                f"Use {' or '.join(ATTENTION)}."
            )
        super().__init__(b, c)


class Gemma2ForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = Gemma2Config
    model_class: ClassVar[Callable[..., Any]] = Gemma2Model

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden_states = self.model(input_ids)
        return self.output(self.b, self.lm_head, hidden_states, labels, softcap=self.c.final_logit_softcapping)


HEADS = decoder_heads(Gemma2ForCausalLM)
