"""DeepSeek-V3 and R1 (transformers.models.deepseek_v3): DeepSeek-V2 with a sigmoid router that a buffer balances."""

from __future__ import annotations

from typing import Any

from memplan.architectures.deepseek_v2 import (
    DeepseekConfig,
    DeepseekV2Attention,
    DeepseekV2Moe,
    check_expert_groups,
)
from memplan.architectures.llama import LlamaForCausalLM, decoder_heads
from memplan.architectures.moe import MoeDecoderLayer, MoeModel
from memplan.architectures.nn import Build, Module, apply_rotary_pos_emb
from memplan.specs.fields import Fields
from memplan.tape import ops, routing
from memplan.tape.tensor import Tensor, bool_, float32


class DeepseekV3Config(DeepseekConfig):
    vocab_size = 129280
    hidden_size = 7168
    intermediate_size = 18432
    num_hidden_layers = 61
    num_attention_heads = 128
    head_dim = 64  # qk_rope_head_dim; hidden_size need not divide by the heads
    num_experts = 256
    num_experts_per_tok = 8
    n_shared_experts = 1
    moe_intermediate_size = 2048
    first_k_dense_replace = 3
    norm_topk_prob = True

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.mlp_bias = False  # whatever the file says
        self.rope_interleave = fields.bool("rope_interleave", True)
        self.n_group = fields.int("n_group", 8)
        self.topk_group = fields.int("topk_group", 4)
        check_expert_groups(fields, self.num_experts, self.n_group, self.topk_group, at_least=2)


def apply_rotary_pos_emb_interleave(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates pairs of neighbours, by the even and the odd elements."""
    half = cos.shape[-1] // 2
    cos = cos.narrow(-1, 0, half).unsqueeze(1)
    sin = sin.narrow(-1, 0, half).unsqueeze(1)
    q1, q2 = ops.every(q, 0, 2), ops.every(q, 1, 2)
    k1, k2 = ops.every(k, 0, 2), ops.every(k, 1, 2)
    q_embed = ops.cat([q1 * cos - q2 * sin, q2 * cos + q1 * sin])
    k_embed = ops.cat([k1 * cos - k2 * sin, k2 * cos + k1 * sin])
    return q_embed, k_embed


class DeepseekV3Attention(DeepseekV2Attention):
    def __init__(self, b: Build, c: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__(b, c, layer_idx)
        self.rotation = apply_rotary_pos_emb_interleave if c.rope_interleave else apply_rotary_pos_emb

    def rotate(self, q_rot: Tensor, k_rot: Tensor, positions: Any) -> tuple[Tensor, Tensor]:
        cos, sin = positions
        return self.rotation(q_rot, k_rot, cos, sin)


class DeepseekV3TopkRouter(Module):
    """A sigmoid per expert, in float32 whatever the model is; a bias decides the choice, not the weights."""

    def __init__(self, b: Build, c: DeepseekV3Config) -> None:
        self.c = c
        self.weight = b.parameter(c.num_experts, c.hidden_size)
        self.e_score_correction_bias = b.tape.buffer((c.num_experts,), float32)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.c
        hidden_states = hidden_states.view(-1, c.hidden_size)
        router_logits = ops.linear(hidden_states.to(float32), self.weight.to(float32))
        scores = ops.sigmoid(router_logits)
        with scores.tape.no_grad():  # the choice has no gradient; what its graph saves dies with this call
            scores_for_choice = scores + self.e_score_correction_bias
            grouped = scores_for_choice.view(-1, c.n_group, c.num_experts // c.n_group)
            group_scores = routing.topk(grouped, 2)[0].sum(-1)
            del grouped
            group_idx = routing.topk(group_scores, c.topk_group)[1]
            group_mask = group_idx.tape.new(group_scores.shape, float32, "group_mask")
            score_mask = routing.expert_mask(group_mask, c.num_experts)
            scores_for_choice = routing.masked_fill(scores_for_choice, routing.logical_not(score_mask.to(bool_)))
            topk_indices = routing.topk(scores_for_choice, c.num_experts_per_tok)[1]
        topk_weights = routing.gather(scores, topk_indices)
        if c.norm_topk_prob:
            denominator = topk_weights.sum(-1, keepdim=True) + 1e-20
            topk_weights = ops.div_(topk_weights, denominator)
        topk_weights = topk_weights * 1.0
        return router_logits, topk_weights, topk_indices


class DeepseekV3MoE(DeepseekV2Moe):
    router_class = DeepseekV3TopkRouter


class DeepseekV3DecoderLayer(MoeDecoderLayer):
    attention_class = DeepseekV3Attention
    moe_class = DeepseekV3MoE


class DeepseekV3Model(MoeModel):
    layer_class = DeepseekV3DecoderLayer


class DeepseekV3ForCausalLM(LlamaForCausalLM):
    config_class = DeepseekV3Config
    model_class = DeepseekV3Model


HEADS = decoder_heads(DeepseekV3ForCausalLM)
