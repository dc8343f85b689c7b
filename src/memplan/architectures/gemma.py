"""Gemma (transformers.models.gemma): Llama with scaled embeddings and norms that multiply by 1 + weight in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from memplan.architectures.llama import (
    LlamaConfig,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    decoder_heads,
)
from memplan.architectures.nn import Build, Embedding, Module
from memplan.errors import UnsupportedError
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tensor import Tensor


class GemmaConfig(LlamaConfig):
    vocab_size = 256000
    hidden_size = 3072
    intermediate_size = 24576
    num_hidden_layers = 28
    num_attention_heads = 16
    default_kv_heads = 16
    default_head_dim = 256
    hidden_act = "gelu_pytorch_tanh"
    tie_word_embeddings = True

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.mlp_bias = False
        if fields.bool("use_bidirectional_attention", False):
            raise UnsupportedError(f"{fields.source}: use_bidirectional_attention is not modelled. Use --trace.")


class GemmaRMSNorm(Module):
    """The whole norm in float32, with 1 + weight as the factor; then back to the input's dtype."""

    def __init__(self, b: Build, dim: int) -> None:
        self.weight = b.parameter(dim)

    def norm(self, x: Tensor) -> Tensor:
        return x * ops.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        output = self.norm(x.float())
        output = output * (1.0 + self.weight.float())
        return output.to(x.dtype)


class GemmaScaledWordEmbedding(Embedding):
    """Embeddings times the square root of the hidden size, a scalar of the weights' dtype."""

    def __init__(self, b: Build, rows: int, dim: int) -> None:
        super().__init__(b, rows, dim)
        self.embed_scale = b.tape.buffer((), b.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 55.5


class GemmaDecoderLayer(LlamaDecoderLayer):
    norm_class: ClassVar[Callable[..., Any]] = GemmaRMSNorm


class GemmaModel(LlamaModel):
    embedding_class: ClassVar[Callable[..., Any]] = GemmaScaledWordEmbedding
    layer_class: ClassVar[Callable[..., Any]] = GemmaDecoderLayer
    norm_class: ClassVar[Callable[..., Any]] = GemmaRMSNorm


class GemmaForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = GemmaConfig
    model_class: ClassVar[Callable[..., Any]] = GemmaModel


HEADS = decoder_heads(GemmaForCausalLM)
