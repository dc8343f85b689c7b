"""The parts that mixtures of experts share: routers, and experts as transformers 5 and 4 run them.

Every ``...Experts`` class of transformers 5 holds the weights of all experts as two 3-D parameters and, unless told
otherwise, runs ``grouped_mm_experts_forward``: each token is copied once per expert that takes it, the copies are
sorted by expert and multiplied in two grouped matmuls. Every tensor on the way has T * k rows for T tokens and k
experts per token, and every expert gets a gradient, so **no byte depends on how evenly the router spreads the
tokens**: if all of them go to the same k experts the run needs the same memory. The load is among an estimate's
assumptions all the same, with its spread. (``experts_implementation="eager"``, a loop over experts, is not modelled.)

Before 5.0 every expert was a module with linear layers of its own, called with the tokens that chose it. What is saved
for backward has T * k rows in all, however they are spread, but what is alive during one expert's products has as many
rows as it has tokens. The estimate takes the tokens to be spread evenly; its upper end, that all of them go to the same
experts.

grouped_mm is on no autocast list (aten/src/ATen/autocast_mode.h): under mixed precision with float32 weights the
experts compute in float32 and keep float32 activations, and there is no 16-bit copy of their weights.

Sources: transformers/integrations/moe.py and models/{mixtral,qwen2_moe,qwen3_moe,olmoe}, transformers 5.23; of the loop
the same models at 4.48 to 4.57.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

from memplan.architectures.llama import LlamaConfig, LlamaDecoderLayer, LlamaMLP, LlamaModel
from memplan.architectures.nn import Build, Linear, Module, ModuleList, activation
from memplan.constants import Constant
from memplan.errors import UnsupportedError
from memplan.specs.fields import Fields
from memplan.specs.software import SoftwareSpec
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
    """grouped_mm_experts_forward: hidden states [T, H], indices and weights [T, k] -> [T, H]."""

    def __init__(self, b: Build, c: MoeConfig) -> None:
        self.num_experts = c.num_experts
        self.gate_up_proj = b.parameter(c.num_experts, 2 * c.moe_intermediate_size, c.hidden_size)
        self.down_proj = b.parameter(c.num_experts, c.hidden_size, c.moe_intermediate_size)
        self.act_fn = activation(c.hidden_act)
        b.tape.assumptions[BUSIEST_EXPERT_LOAD] = expert_load(c.num_experts, c.num_experts_per_tok)

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


TABLES_PER_LAYER = "keeps tables of cosines and sines in every layer, which is not modelled"
BUSIEST_EXPERT_LOAD = "busiest_expert_load"
NOT_THERE = "does not have this model"
GROUPED = "with grouped_mm no byte depends on it (transformers/integrations/moe.py, 5.23)"
LOOPED = "high counts that all tokens take the same experts, which transformers before 5.0 calls one by one"


def expert_load(num_experts: int, num_experts_per_tok: int, consequence: str = GROUPED) -> Constant:
    """The share of the tokens that the busiest expert takes: balanced, up to every token."""
    balanced = num_experts_per_tok / num_experts
    unit = "share of the tokens"
    return Constant(BUSIEST_EXPERT_LOAD, balanced, balanced, 1.0, unit, f"a balanced router; {consequence}")


def experts_are_modules(software: SoftwareSpec) -> bool:
    """Whether every expert is a module of its own, called with the tokens that chose it: before transformers 5.0."""
    return not software.at_least("transformers", "5.0")


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


class LoopedMoeBlock(Module):
    """A router and its experts in the place of an MLP, before transformers 5.0: a loop over the experts.

    Gives its result and, as it did then, the router's logits. Raises UnsupportedError for versions before ``oldest``.
    """

    oldest: ClassVar[str]
    """The version of transformers from which on the family is confirmed."""
    why_not_older: ClassVar[str]
    hit_only: ClassVar[str] = "4.53"
    """The version that goes over a tensor of the experts that any token chose, rather than over all experts."""

    def __init__(self, b: Build, c: MoeConfig) -> None:
        if not b.software.at_least("transformers", self.oldest):
            given, remedy = b.software.transformers, f"Use {self.oldest} or later."
            raise UnsupportedError.at("software: transformers", given, self.why_not_older, remedy)
        self.b = b
        self.num_experts = c.num_experts
        self.top_k = c.num_experts_per_tok
        self.norm_topk_prob = c.norm_topk_prob
        self.make_modules(b, c)
        b.tape.assumptions[BUSIEST_EXPERT_LOAD] = expert_load(c.num_experts, c.num_experts_per_tok, LOOPED)

    def make_modules(self, b: Build, c: Any) -> None:
        """The block's modules, in their order."""
        self.gate = Linear(b, c.hidden_size, c.num_experts, bias=False)
        self.experts = ModuleList(self.make_expert(b, c) for _ in range(c.num_experts))

    def make_expert(self, b: Build, c: Any) -> Module:
        """One expert: hidden states [n, H] -> [n, H]."""
        return LlamaMLP(b, c, c.moe_intermediate_size)

    def beside_experts(self, hidden_states: Tensor, final_hidden_states: Tensor) -> Tensor:
        """What else the block computes, before its variables die."""
        return final_hidden_states

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, hidden_dim = hidden_states.shape
        hidden_states = hidden_states.view(-1, hidden_dim)
        router_logits = self.gate(hidden_states)
        routing_weights = ops.softmax(router_logits, float32)
        routing_weights, selected_experts = routing.topk(routing_weights, self.top_k)
        if self.norm_topk_prob:
            routing_weights = ops.div_(routing_weights, routing_weights.sum(-1, keepdim=True))
        routing_weights = routing_weights.to(hidden_states.dtype)
        final_hidden_states = hidden_states.tape.new(hidden_states.shape, hidden_states.dtype, "zeros")
        expert_mask = routing.one_hot(selected_experts, self.num_experts).permute(2, 1, 0)
        tokens = tokens_by_expert(batch * length, self.top_k, self.num_experts, self.b.busiest_experts)
        masks = self.masks(expert_mask, tokens)
        for expert, n, mask in zip(self.experts, tokens, masks, strict=True):
            if mask is None:
                continue
            idx, top_x = routing.nonzero(mask(), n).unbind(1)
            current_state = routing.index(hidden_states.unsqueeze(0), top_x, dim=1).reshape(-1, hidden_dim)
            current_hidden_states = expert(current_state) * routing.index(routing_weights.unsqueeze(2), top_x, idx)
            final_hidden_states = routing.index_add_(
                final_hidden_states, top_x, current_hidden_states.to(hidden_states.dtype)
            )
        final_hidden_states = self.beside_experts(hidden_states, final_hidden_states)
        return final_hidden_states.reshape(batch, length, hidden_dim), router_logits

    def masks(self, expert_mask: Tensor, tokens: Sequence[int]) -> Sequence[Callable[[], Tensor] | None]:
        """What makes each expert's part of the mask, int64 [k, T]: a view, or a copy by a tensor's index; None for an
        expert that is passed by.
        """
        if not self.b.software.at_least("transformers", self.hit_only):
            return [partial(expert_mask.select, 0, i) for i in range(len(tokens))]
        # Next to nothing, rather than nothing, leaves an expert a gradient.
        hits = [n != 0 or self.b.busiest_experts for n in tokens]
        counts = routing.counted(expert_mask)
        expert_hit = routing.nonzero(ops.compare(counts, counts), sum(hits))
        del counts
        one = expert_hit.select(0, 0)
        return [partial(_squeezed_index, expert_mask, one) if hit else None for hit in hits]


def _squeezed_index(expert_mask: Tensor, expert_idx: Tensor) -> Tensor:
    """expert_mask[expert_idx].squeeze(0), by a tensor of one element."""
    return routing.index(expert_mask, expert_idx).squeeze(0)


def tokens_by_expert(tokens: int, top_k: int, num_experts: int, busiest: bool) -> list[int]:
    """How many of the tokens each expert takes: all alike, or the last ``top_k`` all of them, and the others none."""
    if busiest:  # the last ones' backward begins while all that others saved is alive
        return [0] * (num_experts - top_k) + [tokens] * top_k
    bounds = [tokens * top_k * i // num_experts for i in range(num_experts + 1)]
    return [end - start for start, end in pairwise(bounds)]


class MoeDecoderLayer(LlamaDecoderLayer):
    moe_class: ClassVar[Callable[..., Any]] = SparseMoeBlock
    looped_moe_class: ClassVar[Callable[..., Any] | None] = None
    """The block before transformers 5.0; None is not modelled."""

    def make_mlp(self, b: Build, c: Any, layer_idx: int) -> Module:
        make: Any = self.moe_class if c.sparse[layer_idx] else self.mlp_class
        if c.sparse[layer_idx] and experts_are_modules(b.software):
            make = self.looped_moe_class
            if make is None:
                given, problem = b.software.transformers, "calls experts one by one, which is not modelled here"
                raise UnsupportedError.at("software: transformers", given, problem, "Use 5.0 or later.")
        mlp: Module = make(b, c)
        return mlp

    def feed_forward(self, hidden_states: Tensor) -> tuple[Tensor, Any]:
        out = getattr(self, self.mlp_name)(hidden_states)
        return out if isinstance(out, tuple) else (out, None)


class MoeModel(LlamaModel):
    layer_class: ClassVar[Callable[..., Any]] = MoeDecoderLayer
