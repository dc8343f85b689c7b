"""DeepSeek-V2 (transformers.models.deepseek_v2): multi-head latent attention, experts beside shared experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from memplan.architectures.llama import LlamaForCausalLM, LlamaMLP, decoder_heads
from memplan.architectures.moe import Experts, MoeConfig, MoeDecoderLayer, MoeModel
from memplan.architectures.nn import Build, Linear, Module, RMSNorm, RotaryEmbedding, attention, cached, in_pairs
from memplan.specs.fields import Fields
from memplan.tape import ops, routing
from memplan.tape.tensor import Tensor, bool_, float32


class DeepseekConfig(MoeConfig):
    """What V2 and V3 share. Queries and keys have a part that is rotated and a part that is not."""

    experts_field = "n_routed_experts"
    num_experts = 64
    n_shared_experts = 2
    moe_intermediate_size = 1407
    first_k_dense_replace = 0
    rotates_whole_heads = False

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        if self.num_key_value_heads != self.num_attention_heads:
            raise fields.wrong(
                "num_key_value_heads", self.num_key_value_heads, "is not num_attention_heads", "MLA needs them equal."
            )
        self.q_lora_rank = fields.nullable_int("q_lora_rank", 1536)
        self.kv_lora_rank = fields.int("kv_lora_rank", 512)
        self.qk_nope_head_dim = fields.int("qk_nope_head_dim", 128)
        self.qk_rope_head_dim = fields.int("qk_rope_head_dim", 64)
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.v_head_dim = fields.int("v_head_dim", 128)
        self.rotary_dim = in_pairs(fields, "qk_rope_head_dim", self.qk_rope_head_dim)
        self.moe_intermediate_size = fields.int("moe_intermediate_size", self.moe_intermediate_size)
        self.n_shared_experts = fields.int("n_shared_experts", self.n_shared_experts)
        dense = fields.int("first_k_dense_replace", self.first_k_dense_replace, minimum=0)
        self.sparse = [i >= dense for i in range(self.num_hidden_layers)]


class DeepseekV2Config(DeepseekConfig):
    vocab_size = 102400

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        fields.int("num_experts_per_tok")  # has no default
        self.topk_method = fields.str("topk_method", "greedy")
        if self.topk_method not in ("greedy", "group_limited_greedy"):
            raise fields.wrong("topk_method", self.topk_method, "is not known", "Use greedy or group_limited_greedy.")
        if self.topk_method == "group_limited_greedy":
            self.n_group, self.topk_group = fields.int("n_group"), fields.int("topk_group")
            check_expert_groups(fields, self.num_experts, self.n_group, self.topk_group)


def check_expert_groups(fields: Fields, num_experts: int, n_group: int, topk_group: int, at_least: int = 1) -> None:
    """Groups must be of one size, of at least so many experts, and a token is limited to some of them."""
    if num_experts % n_group or num_experts // n_group < at_least:
        problem = f"does not make groups of {at_least} or more of {num_experts} routed experts"
        raise fields.wrong("n_group", n_group, problem, "Correct one of them.")
    if topk_group > n_group:
        raise fields.wrong("topk_group", topk_group, f"is more than n_group {n_group}", "Use at most that.")


class DeepseekV2RotaryEmbedding(RotaryEmbedding):
    """The angles as complex64 [1, S, dim / 2], here with the real and the imaginary part as a last dimension."""

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        t = x.tape
        with t.no_grad():
            freqs = t.new((*position_ids.shape, 1), float32, "position_ids.float")
            freqs = t.new((*position_ids.shape, self.dim // 2), float32, "freqs")
            ones = t.new(freqs.shape, float32, "ones")
            freqs_cis = t.new((*freqs.shape, 2), float32, "polar")
            del ones
            return freqs_cis * 1.0


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation as a product of complex numbers, in float32; pairs of neighbours make one number."""
    xq_ = xq.float().reshape(*xq.shape[:-1], -1, 2)
    xk_ = xk.float().reshape(*xk.shape[:-1], -1, 2)
    freqs_cis = freqs_cis.unsqueeze(1)
    xq_out = (xq_ * freqs_cis).reshape(*xq.shape).to(xq.dtype)
    xk_out = (xk_ * freqs_cis).reshape(*xk.shape).to(xk.dtype)
    return xq_out, xk_out


class DeepseekV2Attention(Module):
    """Multi-head latent attention: key and value come from one small latent per token, as does the query if
    ``q_lora_rank`` is given; a key's rotated part is shared by all heads. In training everything is expanded.
    """

    def __init__(self, b: Build, c: DeepseekConfig, layer_idx: int) -> None:
        self.b = b
        self.c = c
        heads = c.num_attention_heads
        if c.q_lora_rank is None:
            self.q_proj = Linear(b, c.hidden_size, heads * c.qk_head_dim, bias=False)
        else:
            self.q_a_proj = Linear(b, c.hidden_size, c.q_lora_rank, c.attention_bias)
            self.q_a_layernorm = RMSNorm(b, c.q_lora_rank)
            self.q_b_proj = Linear(b, c.q_lora_rank, heads * c.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = Linear(b, c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, c.attention_bias)
        self.kv_a_layernorm = RMSNorm(b, c.kv_lora_rank)
        self.kv_b_proj = Linear(b, c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.o_proj = Linear(b, heads * c.v_head_dim, c.hidden_size, c.attention_bias)

    def rotate(self, q_rot: Tensor, k_rot: Tensor, positions: Any) -> tuple[Tensor, Tensor]:
        return apply_rotary_emb(q_rot, k_rot, positions)

    def query(self, hidden_states: Tensor) -> Tensor:
        if self.c.q_lora_rank is None:
            return self.q_proj(hidden_states)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, 1, S, kv_lora_rank] and [B, 1, S, qk_rope_head_dim] -> key and value of every head."""
        c = self.c
        batch, _, length, _ = kv_nope.shape
        kv_nope = self.kv_b_proj(kv_nope).view(batch, length, -1, c.qk_nope_head_dim + c.v_head_dim).transpose(1, 2)
        k_nope, value_states = kv_nope.split((c.qk_nope_head_dim, c.v_head_dim))
        k_rot = k_rot.expand(-1, k_nope.shape[1], -1, -1)
        key_states = kv_nope.tape.new((*kv_nope.shape[:-1], c.qk_head_dim), kv_nope.dtype, "key_states")
        key_states = ops.copy_slice(key_states, k_nope, 0)
        key_states = ops.copy_slice(key_states, k_rot, c.qk_nope_head_dim)
        return key_states, value_states

    def forward(self, hidden_states: Tensor, positions: Any, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        c = self.c
        batch, length, _ = hidden_states.shape
        q_states = self.query(hidden_states).view(batch, length, -1, c.qk_head_dim).transpose(1, 2)
        q_pass, q_rot = q_states.split((c.qk_nope_head_dim, c.qk_rope_head_dim))
        compressed_kv = self.kv_a_proj_with_mqa(hidden_states)
        kv_nope, k_rot = compressed_kv.split((c.kv_lora_rank, c.qk_rope_head_dim))
        kv_nope = self.kv_a_layernorm(kv_nope).view(batch, 1, length, c.kv_lora_rank)
        k_rot = k_rot.view(batch, 1, length, c.qk_rope_head_dim)
        q_rot, k_rot = self.rotate(q_rot, k_rot, positions)
        kv_nope, k_rot = cached(self.b, kv_nope, k_rot)
        query_states = ops.cat((q_pass, q_rot))
        key_states, value_states = self.expand_kv(kv_nope, k_rot)
        attn_output, attn_weights = attention(self.b, query_states, key_states, value_states, mask, c.attention_dropout)
        attn_output = attn_output.reshape(batch, length, -1).contiguous()
        attn_output = self.o_proj(attn_output)
        return attn_output, attn_weights


class DeepseekV2TopkRouter(Module):
    """A softmax over the experts, in float32 whatever the model is: input and weight are cast."""

    def __init__(self, b: Build, c: DeepseekV2Config) -> None:
        self.c = c
        self.weight = b.parameter(c.num_experts, c.hidden_size)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.c
        hidden_states = hidden_states.view(-1, c.hidden_size)
        router_logits = ops.linear(hidden_states.to(float32), self.weight.to(float32))
        scores = ops.softmax(router_logits, float32)
        if c.topk_method == "group_limited_greedy":
            with scores.tape.no_grad():  # the choice has no gradient; what its graph saves dies with this call
                group_scores = routing.max_(scores.view(-1, c.n_group, c.num_experts // c.n_group))
                group_idx = routing.topk(group_scores, c.topk_group)[1]
                group_mask = group_idx.tape.new(group_scores.shape, float32, "group_mask")
                score_mask = routing.expert_mask(group_mask, c.num_experts)
            scores = routing.masked_fill(scores, routing.logical_not(score_mask.to(bool_)))
        topk_weights, topk_indices = routing.topk(scores, c.num_experts_per_tok)
        topk_weights = topk_weights * 1.0
        return router_logits, topk_weights, topk_indices


class DeepseekV2Moe(Module):
    router_class: ClassVar[Callable[..., Any]] = DeepseekV2TopkRouter

    def __init__(self, b: Build, c: DeepseekConfig) -> None:
        self.experts = Experts(b, c)
        self.gate = self.router_class(b, c)
        self.shared_experts = LlamaMLP(b, c, c.moe_intermediate_size * c.n_shared_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        residuals = hidden_states
        _, topk_weights, topk_indices = self.gate(hidden_states)
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        hidden_states = self.experts(hidden_states, topk_indices, topk_weights).view(*residuals.shape)
        hidden_states = hidden_states + self.shared_experts(residuals)
        return hidden_states


class DeepseekV2DecoderLayer(MoeDecoderLayer):
    attention_class = DeepseekV2Attention
    moe_class = DeepseekV2Moe


class DeepseekV2Model(MoeModel):
    layer_class = DeepseekV2DecoderLayer
    rotary_class = DeepseekV2RotaryEmbedding


class DeepseekV2ForCausalLM(LlamaForCausalLM):
    config_class = DeepseekV2Config
    model_class = DeepseekV2Model


HEADS = decoder_heads(DeepseekV2ForCausalLM)
