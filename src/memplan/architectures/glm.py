"""GLM (transformers.models.glm): Llama with one matrix for gate and up, half of each head rotated in pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from memplan.architectures.llama import (
    LlamaAttention,
    LlamaConfig,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    decoder_heads,
)
from memplan.architectures.nn import rotary_dim, rotate_every_two
from memplan.architectures.phi3 import FusedMLP
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tensor import Tensor


class GlmConfig(LlamaConfig):
    vocab_size = 151552
    intermediate_size = 13696
    num_hidden_layers = 40
    default_kv_heads = 2
    default_head_dim = 128
    attention_bias = True
    rotates_whole_heads = False

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.output_bias = False
        self.rotary_dim = rotary_dim(fields, self.head_dim, partial_rotary_factor=0.5, rounded_up=True)


def interleaved(x: Tensor) -> Tensor:
    """x[..., : n // 2].repeat_interleave(2, dim=-1): each of the first half's elements twice, in new memory."""
    half = x.narrow(-1, 0, x.shape[-1] // 2)
    return half.unsqueeze(-1).expand(*half.shape, 2).reshape(*x.shape)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """GLM's: cos and sin are interleaved in every layer, and the last dimensions of a head pass."""
    cos = cos.unsqueeze(1)
    sin = sin.unsqueeze(1)
    cos = interleaved(cos)
    sin = interleaved(sin)
    rotary_dim = cos.shape[-1]
    passed = q.shape[-1] - rotary_dim
    q_rot, q_pass = q.narrow(-1, 0, rotary_dim), q.narrow(-1, rotary_dim, passed)
    k_rot, k_pass = k.narrow(-1, 0, rotary_dim), k.narrow(-1, rotary_dim, passed)
    q_embed = (q_rot * cos) + (rotate_every_two(q_rot) * sin)
    k_embed = (k_rot * cos) + (rotate_every_two(k_rot) * sin)
    q_embed = ops.cat([q_embed, q_pass])
    k_embed = ops.cat([k_embed, k_pass])
    return q_embed, k_embed


class GlmAttention(LlamaAttention):
    rotate = staticmethod(apply_rotary_pos_emb)


class GlmDecoderLayer(LlamaDecoderLayer):
    attention_class: ClassVar[Callable[..., Any]] = GlmAttention
    mlp_class: ClassVar[Callable[..., Any]] = FusedMLP


class GlmModel(LlamaModel):
    layer_class: ClassVar[Callable[..., Any]] = GlmDecoderLayer


class GlmForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = GlmConfig
    model_class: ClassVar[Callable[..., Any]] = GlmModel


HEADS = decoder_heads(GlmForCausalLM)
