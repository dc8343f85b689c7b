"""Cohere (transformers.models.cohere): attention and MLP side by side, layer norms written out, rotation in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from memplan.architectures.llama import (
    LlamaAttention,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    decoder_heads,
)
from memplan.architectures.nn import Build, CheckpointLayer, Module, causal_lm_output, rotate_every_two
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tensor import Tensor, float32


class CohereConfig(LlamaConfig):
    vocab_size = 256000
    hidden_size = 8192
    intermediate_size = 22528
    num_hidden_layers = 40
    num_attention_heads = 64
    tie_word_embeddings = True

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.mlp_bias = False
        self.use_qk_norm = fields.bool("use_qk_norm", False)


class CohereLayerNorm(Module):
    """A layer norm without bias in float32, one operation at a time; ``shape`` is the weight's."""

    def __init__(self, b: Build, *shape: int) -> None:
        self.weight = b.parameter(*shape)

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(float32)
        mean = hidden_states.mean(-1, keepdim=True)
        variance = (hidden_states - mean).pow(2).mean(-1, keepdim=True)
        hidden_states = (hidden_states - mean) * ops.rsqrt(variance + 1e-5)
        hidden_states = self.weight.to(float32) * hidden_states
        return hidden_states.to(input_dtype)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Cohere's: every second element is its pair's partner, and the arithmetic is in float32."""
    dtype = q.dtype
    q = q.float()
    k = k.float()
    cos = cos.unsqueeze(1)
    sin = sin.unsqueeze(1)
    q_embed = (q * cos) + (rotate_every_two(q) * sin)
    k_embed = (k * cos) + (rotate_every_two(k) * sin)
    return q_embed.to(dtype), k_embed.to(dtype)


class CohereAttention(LlamaAttention):
    rotate = staticmethod(apply_rotary_pos_emb)

    def __init__(self, b: Build, c: CohereConfig, layer_idx: int) -> None:
        super().__init__(b, c, layer_idx)
        self.q_norm = CohereLayerNorm(b, c.num_attention_heads, c.head_dim) if c.use_qk_norm else None
        self.k_norm = CohereLayerNorm(b, c.num_key_value_heads, c.head_dim) if c.use_qk_norm else None

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = hidden_states.shape
        query_states = self.q_proj(hidden_states).view(batch, length, -1, self.head_dim)
        key_states = self.k_proj(hidden_states).view(batch, length, -1, self.head_dim)
        value_states = self.v_proj(hidden_states).view(batch, length, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query_states = self.q_norm(query_states)
            key_states = self.k_norm(key_states)
        return query_states.transpose(1, 2), key_states.transpose(1, 2), value_states.transpose(1, 2)


class CohereDecoderLayer(CheckpointLayer):
    def __init__(self, b: Build, c: CohereConfig, layer_idx: int) -> None:
        self.layer_type = c.layer_types[layer_idx]
        self.self_attn = CohereAttention(b, c, layer_idx)
        self.mlp = LlamaMLP(b, c)
        self.input_layernorm = CohereLayerNorm(b, c.hidden_size)

    def forward(self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states_attention, _ = self.self_attn(hidden_states, positions, mask)
        hidden_states_mlp = self.mlp(hidden_states)
        hidden_states = residual + hidden_states_attention + hidden_states_mlp
        return hidden_states


class CohereModel(LlamaModel):
    layer_class: ClassVar[Callable[..., Any]] = CohereDecoderLayer
    norm_class: ClassVar[Callable[..., Any]] = CohereLayerNorm


class CohereForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = CohereConfig
    model_class: ClassVar[Callable[..., Any]] = CohereModel

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden_states = self.model(input_ids)
        return causal_lm_output(self.b, self.lm_head, hidden_states, labels, scale=True)


HEADS = {name: make for name, make in decoder_heads(CohereForCausalLM).items() if name != "sequence-classification"}
