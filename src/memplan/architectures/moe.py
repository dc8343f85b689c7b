"""The parts that mixtures of experts share: routers, and experts as transformers 5 runs them.

Every ``...Experts`` class of transformers 5 holds the weights of all experts as two 3-D parameters and, unless told
otherwise, runs ``grouped_mm_experts_forward``: each token is copied once per expert that takes it, the copies are
sorted by expert and multiplied in two grouped matmuls. Every tensor on the way has T * k rows for T tokens and k
experts per token, and every expert gets a gradient, so **no byte depends on how evenly the router spreads the
tokens**: if all of them go to the same k experts the run needs the same memory. The load is among an estimate's
assumptions all the same, with its spread. (``experts_implementation="eager"``, a loop over experts, is not modelled.)

grouped_mm is on no autocast list (aten/src/ATen/autocast_mode.h): under mixed precision with float32 weights the
experts compute in float32 and keep float32 activations, and there is no 16-bit copy of their weights.

Sources: transformers/integrations/moe.py and models/{mixtral,qwen2_moe,qwen3_moe,olmoe}, transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

from memplan.architectures.llama import LlamaConfig, LlamaDecoderLayer, LlamaModel
from memplan.architectures.nn import Build, Module, activation
from memplan.constants import Constant
from memplan.errors import UnsupportedError
from memplan.specs.fields import Fields
from memplan.tape import ops, routing
from memplan.tape.tensor import Tensor, float32, int32


class MoeConfig(LlamaConfig):
    """A Llama with experts in some layers; class attributes are defaults."""

    experts_field: ClassVar[str] = "num_experts"
    num_experts: int = 8
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = False

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.num_experts = fields.int(self.experts_field, self.num_experts)
        self.num_experts_per_tok = fields.int("num_experts_per_tok", self.num_experts_per_tok)
        if self.num_experts_per_tok > self.num_experts:
            problem = f"is more than {self.experts_field} {self.num_experts}"
            raise fields.wrong("num_experts_per_tok", self.num_experts_per_tok, problem, "Use at most that.")
        self.moe_intermediate_size = self.intermediate_size
        self.norm_topk_prob = fields.bool("norm_topk_prob", self.norm_topk_prob)
        self.sparse: Sequence[bool] = [True] * self.num_hidden_layers
        """Which layers have experts."""
        if fields.bool("output_router_logits", False):
            raise UnsupportedError.at(
                f"{fields.source}: output_router_logits", True, "adds a loss that is not modelled", "Set it to false."
            )

    @property
    def kinds(self) -> Sequence[Hashable]:
        return list(zip(self.layer_types, self.sparse, strict=True))


class TopKRouter(Module):
    """A softmax over the experts, of which each token takes the best k: logits [T, E], weights and indices [T, k]."""

    def __init__(self, b: Build, c: MoeConfig) -> None:
        self.top_k = c.num_experts_per_tok
        self.norm_topk_prob = c.norm_topk_prob
        self.weight = b.parameter(c.num_experts, c.hidden_size)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router_logits = ops.linear(hidden_states, self.weight)
        router_probs = ops.softmax(router_logits, float32)
        router_top_value, router_indices = routing.topk(router_probs, self.top_k)
        if self.norm_topk_prob:
            router_top_value = ops.div_(router_top_value, router_top_value.sum(-1, keepdim=True))
        router_top_value = router_top_value.to(router_logits.dtype)
        return router_logits, router_top_value, router_indices


class Experts(Module):
    """grouped_mm_experts_forward: hidden states [T, H], indices and weights [T, k] -> [T, H].

    Raises UnsupportedError for transformers before 5.0, where experts were modules of their own, called in a loop.
    """

    def __init__(self, b: Build, c: MoeConfig) -> None:
        if not b.software.at_least("transformers", "5.0"):
            problem = "calls experts one by one, which is not modelled"
            raise UnsupportedError.at("software: transformers", b.software.transformers, problem, "Use 5.0 or later.")
        self.num_experts = c.num_experts
        self.gate_up_proj = b.parameter(c.num_experts, 2 * c.moe_intermediate_size, c.hidden_size)
        self.down_proj = b.parameter(c.num_experts, c.hidden_size, c.moe_intermediate_size)
        self.act_fn = activation(c.hidden_act)
        b.tape.assumptions["busiest_expert_load"] = expert_load(c.num_experts, c.num_experts_per_tok)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        num_tokens, hidden_dim = hidden_states.shape
        num_top_k = top_k_index.shape[-1]
        sample_weights = top_k_weights.reshape(-1)
        expert_ids = top_k_index.reshape(-1)
        expert_ids_g, perm = routing.sort(expert_ids)
        selected_hidden_states_g = routing.index(hidden_states, routing.floor_divide(perm))
        sample_weights_g = routing.index(sample_weights, perm)
        histc_input = expert_ids_g.to(int32)  # float32 on CPU
        tokens_per_expert = routing.histc(histc_input, self.num_experts)
        offsets = routing.cumsum(tokens_per_expert)
        proj_out = grouped_linear(selected_hidden_states_g, self.gate_up_proj, offsets)
        proj_out = self.apply_gate(proj_out)
        proj_out = grouped_linear(proj_out, self.down_proj, offsets)
        weighted_out = proj_out * sample_weights_g.unsqueeze(-1)
        inv_perm = routing.inverse(perm)
        weighted_out = routing.index(weighted_out, inv_perm)
        final_hidden_states = weighted_out.view(num_tokens, num_top_k, hidden_dim).sum(1)
        return final_hidden_states.to(hidden_states.dtype)

    def apply_gate(self, gate_up_out: Tensor) -> Tensor:
        gate, up = gate_up_out.chunk(2)
        return self.act_fn(gate) * up


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [S, in] in groups that end at ``offsets``, each with its own weight of [E, out, in]."""
    return routing.grouped_mm(x.to(weight.dtype), weight.transpose(-2, -1), offsets)


def expert_load(num_experts: int, num_experts_per_tok: int) -> Constant:
    """The share of the tokens that the busiest expert takes: balanced, up to every token."""
    balanced = num_experts_per_tok / num_experts
    return Constant(
        "busiest_expert_load",
        balanced,
        balanced,
        1.0,
        "share of the tokens",
        "a balanced router; with grouped_mm no byte depends on it (transformers/integrations/moe.py, 5.23)",
    )


class SparseMoeBlock(Module):
    """A router and its experts in the place of an MLP."""

    router_class: ClassVar[Callable[..., Any]] = TopKRouter

    def __init__(self, b: Build, c: MoeConfig) -> None:
        self.gate = self.router_class(b, c)
        self.experts = Experts(b, c)

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, length, hidden_dim = hidden_states.shape
        hidden_states = hidden_states.view(-1, hidden_dim)
        _, top_k_weights, top_k_index = self.gate(hidden_states)
        hidden_states = self.experts(hidden_states, top_k_index, top_k_weights)
        return hidden_states.reshape(batch, length, hidden_dim)


class MoeDecoderLayer(LlamaDecoderLayer):
    moe_class: ClassVar[Callable[..., Any]] = SparseMoeBlock

    def make_mlp(self, b: Build, c: Any, layer_idx: int) -> Module:
        mlp: Module = self.moe_class(b, c) if c.sparse[layer_idx] else self.mlp_class(b, c)
        return mlp


class MoeModel(LlamaModel):
    layer_class: ClassVar[Callable[..., Any]] = MoeDecoderLayer
