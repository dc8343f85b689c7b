"""Qwen2-MoE (transformers.models.qwen2_moe): Qwen2 with experts beside one shared expert behind a gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from memplan.architectures.llama import LlamaForCausalLM, LlamaMLP, decoder_heads, layer_types
from memplan.architectures.moe import (
    TABLES_PER_LAYER,
    Experts,
    LoopedMoeBlock,
    MoeConfig,
    MoeDecoderLayer,
    MoeModel,
    TopKRouter,
    experts_are_modules,
)
from memplan.architectures.nn import Build, Linear, Module
from memplan.errors import UnsupportedError
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tensor import Tensor


class Qwen2MoeConfig(MoeConfig):
    vocab_size = 151936
    hidden_size = 2048
    intermediate_size = 5632
    num_hidden_layers = 24
    num_attention_heads = 16
    default_kv_heads = 16
    num_experts = 60
    num_experts_per_tok = 4

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.attention_bias = fields.bool("qkv_bias", True)
        self.output_bias = self.mlp_bias = False  # whatever the file says
        self.moe_intermediate_size = fields.int("moe_intermediate_size", 1408)
        self.shared_expert_intermediate_size = fields.int("shared_expert_intermediate_size", 5632)
        self.sparse = sparse_layers(fields, self.num_hidden_layers)
        sliding = fields.bool("use_sliding_window", False)
        # Both masks are made whether a layer uses them or not; without sliding windows the window is 0.
        self.windows["sliding_attention"] = fields.int("sliding_window", 4096) if sliding else 0
        last = fields.int("max_window_layers", 28, minimum=0) if sliding else 0
        slides = [i % 2 == 0 and i < last for i in range(self.num_hidden_layers)]
        self.layer_types = layer_types(fields, ["sliding_attention" if s else "full_attention" for s in slides])


def sparse_layers(fields: Fields, layers: int) -> Sequence[bool]:
    """Every ``decoder_sparse_step``-th layer has experts, but for those named in ``mlp_only_layers``."""
    dense = fields.list_int("mlp_only_layers", (), minimum=0)
    step = fields.int("decoder_sparse_step", 1)
    return [i not in dense and (i + 1) % step == 0 for i in range(layers)]


class Qwen2MoeSparseMoeBlock(Module):
    def __init__(self, b: Build, c: Qwen2MoeConfig) -> None:
        self.gate = TopKRouter(b, c)
        self.experts = Experts(b, c)
        self.shared_expert = LlamaMLP(b, c, c.shared_expert_intermediate_size)
        self.shared_expert_gate = Linear(b, c.hidden_size, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, length, hidden_dim = hidden_states.shape
        hidden_states_reshaped = hidden_states.view(-1, hidden_dim)
        shared_expert_output = self.shared_expert(hidden_states_reshaped)
        _, routing_weights, selected_experts = self.gate(hidden_states_reshaped)
        expert_output = self.experts(hidden_states_reshaped, selected_experts, routing_weights)
        shared_expert_output = ops.sigmoid(self.shared_expert_gate(hidden_states_reshaped)) * shared_expert_output
        expert_output = expert_output + shared_expert_output
        return expert_output.reshape(batch, length, hidden_dim)


class Qwen2MoeLoopedMoeBlock(LoopedMoeBlock):
    oldest = "4.45"
    why_not_older = TABLES_PER_LAYER

    def make_modules(self, b: Build, c: Qwen2MoeConfig) -> None:
        super().make_modules(b, c)
        self.shared_expert = LlamaMLP(b, c, c.shared_expert_intermediate_size)
        self.shared_expert_gate = Linear(b, c.hidden_size, 1, bias=False)

    def beside_experts(self, hidden_states: Tensor, final_hidden_states: Tensor) -> Tensor:
        shared_expert_output = self.shared_expert(hidden_states)
        shared_expert_output = ops.sigmoid(self.shared_expert_gate(hidden_states)) * shared_expert_output
        return final_hidden_states + shared_expert_output


class Qwen2MoeDecoderLayer(MoeDecoderLayer):
    moe_class = Qwen2MoeSparseMoeBlock
    looped_moe_class = Qwen2MoeLoopedMoeBlock


class Qwen2MoeModel(MoeModel):
    layer_class: ClassVar[Callable[..., Any]] = Qwen2MoeDecoderLayer

    def __init__(self, b: Build, c: Qwen2MoeConfig) -> None:
        if experts_are_modules(b.software):  # one mask for all layers
            if "sliding_attention" in c.layer_types:
                remedy = "Use transformers 5.0 or later."
                problem = f"is not modelled for transformers {b.software.transformers}"
                raise UnsupportedError.at("use_sliding_window", True, problem, remedy)
            c.windows = {"full_attention": None}
        super().__init__(b, c)


class Qwen2MoeForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = Qwen2MoeConfig
    model_class: ClassVar[Callable[..., Any]] = Qwen2MoeModel


HEADS = decoder_heads(Qwen2MoeForCausalLM)
