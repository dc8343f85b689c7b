"""StableLM (transformers.models.stablelm): layer norms, a quarter of each head rotated, parallel residuals in some."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from memplan.architectures.llama import (
    LlamaAttention,
    LlamaConfig,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    decoder_heads,
)
from memplan.architectures.nn import (
    AS_THEY_ARE,
    Build,
    Dropout,
    LayerNorm,
    Module,
    ModuleList,
    apply_rotary_pos_emb,
    attention,
    cached,
    causal_lm_output,
    rotary_dim,
)
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tensor import Tensor


class StableLmConfig(LlamaConfig):
    vocab_size = 50304
    hidden_size = 2560
    intermediate_size = 6912
    default_kv_heads = 32
    rotates_whole_heads = False

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.attention_bias = fields.bool("use_qkv_bias", False)
        self.output_bias = self.mlp_bias = False
        self.rotary_dim = rotary_dim(fields, self.head_dim, partial_rotary_factor=0.25)
        self.qk_layernorm = fields.bool("qk_layernorm", False)
        self.use_parallel_residual = fields.bool("use_parallel_residual", False)
        self.hidden_dropout = fields.float("hidden_dropout", 0.0, maximum=1.0)


class StableLmLayerNormPerHead(Module):
    """A layer norm for each head: [B, H, S, D] split into heads and joined again."""

    def __init__(self, b: Build, dim: int, heads: int) -> None:
        self.norms = ModuleList(LayerNorm(b, dim, bias=False) for _ in range(heads))

    def forward(self, hidden_states: Tensor) -> Tensor:
        states_per_heads = hidden_states.split(1, dim=1)
        return ops.cat([norm(states) for norm, states in zip(self.norms, states_per_heads, strict=True)], dim=1)


class StableLmAttention(LlamaAttention):
    def __init__(self, b: Build, c: StableLmConfig, layer_idx: int) -> None:
        super().__init__(b, c, layer_idx)
        self.rotary_dim = c.rotary_dim
        self.q_layernorm = StableLmLayerNormPerHead(b, c.head_dim, c.num_attention_heads) if c.qk_layernorm else None
        self.k_layernorm = StableLmLayerNormPerHead(b, c.head_dim, c.num_key_value_heads) if c.qk_layernorm else None

    def forward(
        self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        query_states, key_states, value_states = self.project(hidden_states)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query_states = self.q_layernorm(query_states)
            key_states = self.k_layernorm(key_states)
        cos, sin = positions
        passed = self.head_dim - self.rotary_dim
        query_rot = query_states.narrow(-1, 0, self.rotary_dim)
        query_pass = query_states.narrow(-1, self.rotary_dim, passed)
        key_rot = key_states.narrow(-1, 0, self.rotary_dim)
        key_pass = key_states.narrow(-1, self.rotary_dim, passed)
        query_rot, key_rot = apply_rotary_pos_emb(query_rot, key_rot, cos, sin)
        query_states = ops.cat((query_rot, query_pass))
        key_states = ops.cat((key_rot, key_pass))
        key_states, value_states = cached(self.b, key_states, value_states)
        attn_output, attn_weights = attention(self.b, query_states, key_states, value_states, mask, self.dropout)
        attn_output = attn_output.reshape(batch, length, -1)
        attn_output = self.o_proj(attn_output)
        return attn_output, attn_weights


class StableLmDecoderLayer(LlamaDecoderLayer):
    attention_class: ClassVar[Callable[..., Any]] = StableLmAttention
    norm_class: ClassVar[Callable[..., Any]] = LayerNorm

    def __init__(self, b: Build, c: StableLmConfig, layer_idx: int) -> None:
        super().__init__(b, c, layer_idx)
        self.dropout = Dropout(c.hidden_dropout)
        self.use_parallel_residual = c.use_parallel_residual
        if c.use_parallel_residual:
            self.post_attention_layernorm = None

    def forward(self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        self_attn_output, _ = self.self_attn(hidden_states, positions, mask)
        if self.use_parallel_residual:
            mlp_output = self.mlp(hidden_states)
            mlp_output = self.dropout(mlp_output)
            hidden_states = residual + self_attn_output + mlp_output
        else:
            residual = residual + self_attn_output
            mlp_output = self.mlp(self.post_attention_layernorm(residual))
            mlp_output = self.dropout(mlp_output)
            hidden_states = residual + mlp_output
        return hidden_states


class StableLmModel(LlamaModel):
    layer_class: ClassVar[Callable[..., Any]] = StableLmDecoderLayer
    norm_class: ClassVar[Callable[..., Any]] = LayerNorm


class StableLmForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = StableLmConfig
    model_class: ClassVar[Callable[..., Any]] = StableLmModel
    output: Callable[..., Any] = staticmethod(partial(causal_lm_output, own_loss=AS_THEY_ARE))


HEADS = decoder_heads(StableLmForCausalLM)
