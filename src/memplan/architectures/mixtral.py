"""Mixtral (transformers.models.mixtral): Mistral with experts in every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from memplan.architectures.llama import LlamaForCausalLM, decoder_heads
from memplan.architectures.moe import (
    TABLES_PER_LAYER,
    LoopedMoeBlock,
    MoeConfig,
    MoeDecoderLayer,
    MoeModel,
    SparseMoeBlock,
    TopKRouter,
    experts_are_modules,
)
from memplan.architectures.nn import Build, Linear, Module, activation
from memplan.errors import UnsupportedError
from memplan.specs.fields import Fields
from memplan.tape import ops, routing
from memplan.tape.tensor import Tensor


class MixtralConfig(MoeConfig):
    experts_field = "num_local_experts"
    intermediate_size = 14336
    default_kv_heads = 8

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.attention_bias = self.output_bias = False  # whatever the file says
        self.norm_topk_prob = True  # likewise
        self.windows = {"full_attention": fields.nullable_int("sliding_window", None)}
        if jitter := fields.float("router_jitter_noise", 0.0):
            raise UnsupportedError.at(
                f"{fields.source}: router_jitter_noise", jitter, "is not modelled", "Set it to 0."
            )


class MixtralTopKRouter(TopKRouter):
    """The weights are normalised and stay in float32, and so does everything they are multiplied with."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router_logits = ops.linear(hidden_states, self.weight)
        router_probs = ops.softmax(router_logits.float())
        router_top_value, router_indices = routing.topk(router_probs, self.top_k)
        router_top_value = ops.div_(router_top_value, router_top_value.sum(-1, keepdim=True))
        return router_logits, router_top_value, router_indices


class MixtralSparseMoeBlock(SparseMoeBlock):
    router_class = MixtralTopKRouter


class MixtralBlockSparseTop2MLP(Module):
    """An expert before transformers 5.0."""

    def __init__(self, b: Build, c: MixtralConfig) -> None:
        self.w1 = Linear(b, c.hidden_size, c.intermediate_size, bias=False)
        self.w2 = Linear(b, c.intermediate_size, c.hidden_size, bias=False)
        self.w3 = Linear(b, c.hidden_size, c.intermediate_size, bias=False)
        self.act_fn = activation(c.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        current_hidden_states = self.act_fn(self.w1(hidden_states)) * self.w3(hidden_states)
        current_hidden_states = self.w2(current_hidden_states)
        return current_hidden_states


class MixtralLoopedMoeBlock(LoopedMoeBlock):
    oldest = "4.48"
    why_not_older = TABLES_PER_LAYER

    def make_expert(self, b: Build, c: MixtralConfig) -> Module:
        return MixtralBlockSparseTop2MLP(b, c)


class MixtralDecoderLayer(MoeDecoderLayer):
    moe_class = MixtralSparseMoeBlock
    looped_moe_class = MixtralLoopedMoeBlock

    def __init__(self, b: Build, c: MixtralConfig, layer_idx: int) -> None:
        self.mlp_name = "block_sparse_moe" if experts_are_modules(b.software) else "mlp"
        super().__init__(b, c, layer_idx)


class MixtralModel(MoeModel):
    layer_class: ClassVar[Callable[..., Any]] = MixtralDecoderLayer


class MixtralForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = MixtralConfig
    model_class: ClassVar[Callable[..., Any]] = MixtralModel


HEADS = decoder_heads(MixtralForCausalLM)
