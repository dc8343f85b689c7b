"""Qwen3-MoE (transformers.models.qwen3_moe): Qwen3 with experts, all layers within one sliding window if any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from memplan.architectures.llama import LlamaForCausalLM, decoder_heads
from memplan.architectures.moe import (
    NOT_THERE,
    Experts,
    LoopedMoeBlock,
    MoeConfig,
    MoeDecoderLayer,
    MoeModel,
    SparseMoeBlock,
    TopKRouter,
)
from memplan.architectures.nn import Build
from memplan.architectures.qwen2_moe import sparse_layers
from memplan.architectures.qwen3 import Qwen3Attention
from memplan.specs.fields import Fields


class Qwen3MoeConfig(MoeConfig):
    vocab_size = 151936
    hidden_size = 2048
    intermediate_size = 6144
    num_hidden_layers = 24
    default_kv_heads = 4
    num_experts = 128
    num_experts_per_tok = 8

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.mlp_bias = False  # whatever the file says
        self.moe_intermediate_size = fields.int("moe_intermediate_size", 768)
        self.sparse = sparse_layers(fields, self.num_hidden_layers)
        if fields.bool("use_sliding_window", False):
            self.windows = {"full_attention": fields.nullable_int("sliding_window", 4096)}


class Qwen3MoeSparseMoeBlock(SparseMoeBlock):
    def __init__(self, b: Build, c: MoeConfig) -> None:
        self.experts = Experts(b, c)  # before the router: the optimizer's loop goes in this order
        self.gate = TopKRouter(b, c)


class Qwen3MoeLoopedMoeBlock(LoopedMoeBlock):
    oldest = "4.51"
    why_not_older = NOT_THERE


class Qwen3MoeDecoderLayer(MoeDecoderLayer):
    moe_class: ClassVar[Callable[..., Any]] = Qwen3MoeSparseMoeBlock
    looped_moe_class = Qwen3MoeLoopedMoeBlock
    attention_class: ClassVar[Callable[..., Any]] = Qwen3Attention


class Qwen3MoeModel(MoeModel):
    layer_class: ClassVar[Callable[..., Any]] = Qwen3MoeDecoderLayer


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = Qwen3MoeConfig
    model_class: ClassVar[Callable[..., Any]] = Qwen3MoeModel


HEADS = decoder_heads(Qwen3MoeForCausalLM)
