"""Llama (transformers.models.llama): grouped-query attention with rotary positions, RMSNorm, a gated MLP.

Most decoders since are Llama with a few parts exchanged, so the parts are class attributes and methods here, and
their files hold what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

from memplan.architectures.nn import (
    Build,
    CheckpointLayer,
    Embedding,
    Layers,
    Linear,
    Model,
    Module,
    RMSNorm,
    RotaryEmbedding,
    SequenceClassification,
    activation,
    apply_rotary_pos_emb,
    attention,
    cached,
    causal_lm_output,
    causal_mask,
    check_rope_type,
    in_pairs,
    position_ids,
)
from memplan.errors import SpecError
from memplan.specs.fields import Fields
from memplan.tape.tensor import Tensor


class LlamaConfig:
    """The fields of config.json that the memory of a Llama depends on; class attributes are their defaults."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    default_kv_heads: int | None = None
    default_head_dim: int | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rotates_whole_heads: bool = True
    more_rope_types: tuple[str, ...] = ()
    """Names that the family's config takes for one of the known."""

    def __init__(self, fields: Fields) -> None:
        self.vocab_size = fields.int("vocab_size", self.vocab_size)
        self.hidden_size = fields.int("hidden_size", self.hidden_size)
        self.intermediate_size = fields.int("intermediate_size", self.intermediate_size)
        self.num_hidden_layers = fields.layers("num_hidden_layers", self.num_hidden_layers)
        self.num_attention_heads = fields.int("num_attention_heads", self.num_attention_heads)
        kv_heads = fields.nullable_int("num_key_value_heads", self.default_kv_heads)
        self.num_key_value_heads = kv_heads or self.num_attention_heads
        check_groups(fields, self.num_attention_heads, self.num_key_value_heads)
        self.head_dim = head_dim(fields, self.hidden_size, self.num_attention_heads, self.default_head_dim)
        check_rope_type(fields, self.more_rope_types)
        self.rotary_dim = in_pairs(fields, "head_dim", self.head_dim) if self.rotates_whole_heads else self.head_dim
        self.hidden_act = fields.str("hidden_act", self.hidden_act)
        self.attention_bias = fields.bool("attention_bias", self.attention_bias)
        self.output_bias = self.attention_bias
        self.attention_dropout = fields.float("attention_dropout", self.attention_dropout, maximum=1.0)
        self.mlp_bias = fields.bool("mlp_bias", self.mlp_bias)
        self.tie_word_embeddings = fields.bool("tie_word_embeddings", self.tie_word_embeddings)
        self.layer_types: Sequence[str] = ["full_attention"] * self.num_hidden_layers
        self.windows: dict[str, int | None] = {"full_attention": None}
        """The masks that the model makes: the sliding window of each layer type, or None."""

    @property
    def kinds(self) -> Sequence[Hashable]:
        """What tells one layer from another."""
        return self.layer_types


def head_dim(fields: Fields, hidden_size: int, heads: int, default: int | None = None) -> int:
    """The explicit head_dim, the family's default, or hidden_size / heads, which must divide."""
    explicit = fields.optional_int("head_dim") or default
    if explicit is not None:
        return explicit
    if hidden_size % heads:
        raise SpecError(
            f"{fields.source}: hidden_size {hidden_size} is not divisible by num_attention_heads {heads}. "
            "Correct one of them, or give head_dim."
        )
    return hidden_size // heads


def check_groups(fields: Fields, heads: int, kv_heads: int) -> None:
    """Query heads must divide evenly over key-value heads."""
    if heads % kv_heads:
        raise SpecError(
            f"{fields.source}: num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}. "
            "Correct one of them."
        )


def layer_types(fields: Fields, default: Sequence[str]) -> Sequence[str]:
    """The explicit layer_types, one full_attention or sliding_attention per layer, or the family's default."""
    types = fields.list_str("layer_types", tuple(default))
    for i, name in enumerate(types):
        if name not in ("full_attention", "sliding_attention"):
            raise fields.wrong(f"layer_types[{i}]", name, "is not modelled", "Use full_attention or sliding_attention.")
    if len(types) != len(default):
        raise fields.wrong(
            "layer_types", len(types), f"entries for {len(default)} layers", "Give one for each of num_hidden_layers."
        )
    return types


def sliding_windows(fields: Fields, types: Sequence[str], window: int | None) -> dict[str, int | None]:
    """``LlamaConfig.windows`` of a model that makes a sliding mask only where a layer slides."""
    if "sliding_attention" not in types:
        return {"full_attention": None}
    if window is None:
        raise fields.wrong("layer_types", "sliding_attention", "has no window", "Give sliding_window and switch it on.")
    return {"full_attention": None, "sliding_attention": window}


class LlamaMLP(Module):
    def __init__(self, b: Build, c: LlamaConfig, intermediate_size: int | None = None) -> None:
        intermediate_size = intermediate_size or c.intermediate_size
        self.gate_proj = Linear(b, c.hidden_size, intermediate_size, c.mlp_bias)
        self.up_proj = Linear(b, c.hidden_size, intermediate_size, c.mlp_bias)
        self.down_proj = Linear(b, intermediate_size, c.hidden_size, c.mlp_bias)
        self.act_fn = activation(c.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LlamaAttention(Module):
    softcap = False
    rotate: Callable[..., tuple[Tensor, Tensor]] = staticmethod(apply_rotary_pos_emb)

    def __init__(self, b: Build, c: LlamaConfig, layer_idx: int) -> None:
        self.b = b
        self.head_dim = c.head_dim
        self.dropout = c.attention_dropout
        self.q_proj = Linear(b, c.hidden_size, c.num_attention_heads * c.head_dim, c.attention_bias)
        self.k_proj = Linear(b, c.hidden_size, c.num_key_value_heads * c.head_dim, c.attention_bias)
        self.v_proj = Linear(b, c.hidden_size, c.num_key_value_heads * c.head_dim, c.attention_bias)
        self.o_proj = Linear(b, c.num_attention_heads * c.head_dim, c.hidden_size, c.output_bias)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, H, S, D], key and value [B, K, S, D]."""
        batch, length, _ = hidden_states.shape
        query_states = self.q_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        return query_states, key_states, value_states

    def forward(
        self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        query_states, key_states, value_states = self.project(hidden_states)
        cos, sin = positions
        query_states, key_states = self.rotate(query_states, key_states, cos, sin)
        key_states, value_states = cached(self.b, key_states, value_states)
        attn_output, attn_weights = attention(
            self.b, query_states, key_states, value_states, mask, self.dropout, softcap=self.softcap
        )
        attn_output = attn_output.reshape(batch, length, -1).contiguous()
        attn_output = self.o_proj(attn_output)
        return attn_output, attn_weights


class LlamaDecoderLayer(CheckpointLayer):
    attention_class: ClassVar[Callable[..., Any]] = LlamaAttention
    mlp_class: ClassVar[Callable[..., Any]] = LlamaMLP
    norm_class: ClassVar[Callable[..., Any]] = RMSNorm
    mlp_name = "mlp"
    mlp: Module

    def __init__(self, b: Build, c: LlamaConfig, layer_idx: int) -> None:
        self.layer_type = c.layer_types[layer_idx]
        self.self_attn = self.attention_class(b, c, layer_idx)
        setattr(self, self.mlp_name, self.make_mlp(b, c, layer_idx))
        self.input_layernorm = self.norm_class(b, c.hidden_size)
        self.post_attention_layernorm = self.norm_class(b, c.hidden_size)

    def make_mlp(self, b: Build, c: LlamaConfig, layer_idx: int) -> Module:
        """This layer's MLP."""
        mlp: Module = self.mlp_class(b, c)
        return mlp

    def feed_forward(self, hidden_states: Tensor) -> tuple[Tensor, Any]:
        """The MLP's result, and what stays beside it until the layer is done."""
        return getattr(self, self.mlp_name)(hidden_states), None

    def forward(self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, positions, mask)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states, _kept = self.feed_forward(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states


class LlamaModel(Module):
    embedding_class: ClassVar[Callable[..., Any]] = Embedding
    layer_class: ClassVar[Callable[..., Any]] = LlamaDecoderLayer
    norm_class: ClassVar[Callable[..., Any]] = RMSNorm
    rotary_class: ClassVar[Callable[..., Any]] = RotaryEmbedding

    def __init__(self, b: Build, c: LlamaConfig) -> None:
        self.b = b
        self.c = c
        self.embed_tokens = self.embedding_class(b, c.vocab_size, c.hidden_size)
        self.layers = Layers(b, c.kinds, lambda i: self.layer_class(b, c, i))
        self.norm = self.norm_class(b, c.hidden_size)
        self.rotary_emb = self.rotary_class(b, c.rotary_dim)

    def masks(self, inputs_embeds: Tensor) -> dict[str, Tensor | None]:
        """The mask of each layer type, shared by its layers."""
        return {kind: causal_mask(self.b, inputs_embeds, window) for kind, window in self.c.windows.items()}

    def forward(self, input_ids: Tensor) -> Tensor:
        inputs_embeds = self.embed_tokens(input_ids)
        ids = position_ids(self.b, inputs_embeds)
        masks = self.masks(inputs_embeds)
        hidden_states = inputs_embeds
        positions = self.rotary_emb(hidden_states, ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions, masks[layer.layer_type])
        return self.norm(hidden_states)


class LlamaForCausalLM(Model):
    config_class: ClassVar[Callable[..., Any]] = LlamaConfig
    model_class: ClassVar[Callable[..., Any]] = LlamaModel
    output: Callable[..., Any] = staticmethod(causal_lm_output)

    def __init__(self, b: Build, fields: Fields) -> None:
        self.b = b
        self.c = self.config_class(fields)
        self.model = self.model_class(b, self.c)
        self.lm_head = Linear(b, self.c.hidden_size, self.c.vocab_size, bias=False)
        if self.c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden_states = self.model(input_ids)
        return self.output(self.b, self.lm_head, hidden_states, labels)


def decoder_heads(causal_lm: type[LlamaForCausalLM]) -> dict[str, Callable[..., Any]]:
    """The models that transformers makes of a decoder: with a language model's head, without, and as a classifier."""

    def base_model(b: Build, fields: Fields) -> Any:
        return causal_lm.model_class(b, causal_lm.config_class(fields))

    def sequence_classification(b: Build, fields: Fields) -> Model:
        c = causal_lm.config_class(fields)
        return SequenceClassification(b, fields, "model", causal_lm.model_class(b, c), c.hidden_size)

    return {"causal-lm": causal_lm, "base": base_model, "sequence-classification": sequence_classification}


HEADS = decoder_heads(LlamaForCausalLM)
