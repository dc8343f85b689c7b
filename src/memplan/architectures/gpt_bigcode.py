"""GPTBigCode (transformers.models.gpt_bigcode; StarCoder): GPT-2 with one key-value head for all queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from memplan.architectures.gpt2 import GPT2MLP, GPT2Block, GPT2Config, GPT2Model
from memplan.architectures.nn import (
    AS_THEY_ARE,
    Build,
    CausalLM,
    Dropout,
    Linear,
    Module,
    activation,
    attention,
    cached,
    language_model_heads,
)
from memplan.specs.fields import Fields
from memplan.tape.tensor import DType, Tensor, bool_, float32


class GPTBigCodeConfig(GPT2Config):
    activation_function = "gelu_pytorch_tanh"

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.multi_query = fields.bool("multi_query", True)


class GPTBigCodeAttention(Module):
    def __init__(self, b: Build, c: GPTBigCodeConfig) -> None:
        self.b = b
        self.c = c
        self.gives_present = gives_presents(b)
        self.head_dim = c.hidden_size // c.num_attention_heads
        self.kv_dim = self.head_dim * (1 if c.multi_query else c.num_attention_heads)
        self.c_attn = Linear(b, c.hidden_size, c.hidden_size + 2 * self.kv_dim)
        self.c_proj = Linear(b, c.hidden_size, c.hidden_size)
        self.resid_dropout = Dropout(c.resid_pdrop)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The output, and the weights; or in their place ``present``, a view of all that c_attn gave."""
        batch, length, hidden_size = hidden_states.shape
        if self.c.multi_query:
            fused = self.c_attn(hidden_states).unsqueeze(1)
            query, key, value = fused.split((hidden_size, self.kv_dim, self.kv_dim))
            query = query.view(batch, length, -1, self.head_dim).transpose(1, 2)
        else:
            fused = self.c_attn(hidden_states).view(batch, length, -1, 3 * self.head_dim).transpose(1, 2)
            query, key, value = fused.split(self.head_dim)
        del fused
        key, value = cached(self.b, key, value)
        attn_output, attn_weights = attention(self.b, query, key, value, mask, self.c.attn_pdrop)
        attn_output = attn_output.reshape(batch, length, -1).contiguous()
        attn_output = self.c_proj(attn_output)
        attn_output = self.resid_dropout(attn_output)
        return attn_output, key if self.gives_present else attn_weights


class GPTBigCodeMLP(GPT2MLP):
    def __init__(self, b: Build, c: GPTBigCodeConfig) -> None:
        self.c_fc = Linear(b, c.hidden_size, c.intermediate_size)
        self.c_proj = Linear(b, c.intermediate_size, c.hidden_size)
        self.act = activation(c.activation_function)
        self.dropout = Dropout(c.resid_pdrop)


class GPTBigCodeBlock(GPT2Block):
    attention_class: ClassVar[Callable[..., Any]] = GPTBigCodeAttention
    mlp_class: ClassVar[Callable[..., Any]] = GPTBigCodeMLP


class GPTBigCodeModel(GPT2Model):
    block_class: ClassVar[Callable[..., Any]] = GPTBigCodeBlock

    def __init__(self, b: Build, c: GPTBigCodeConfig) -> None:
        super().__init__(b, c)
        self.bias = b.tape.buffer((c.max_position_embeddings, c.max_position_embeddings), bool_)
        self.presents: list[Tensor] = []
        """``past_key_values``."""
        self.presents_shape = (c.num_hidden_layers, 2, 1 if c.multi_query else c.num_attention_heads)
        for _, block in self.h.children():
            block.presents = self.presents if gives_presents(b) else None  # type: ignore[attr-defined]


def gives_presents(b: Build) -> bool:
    """modeling_gpt_bigcode.py before 4.53 made a cache under gradient checkpointing too, which others turn off."""
    return b.gradient_checkpointing and b.cache is None and not b.software.at_least("transformers", "4.53")


@dataclass(slots=True)
class CausalLMOutputWithCache:
    """What lives until the loss is computed: logits and past_key_values, a tuple of tensors."""

    logits: Tensor
    presents: list[Tensor]
    shape: tuple[int, ...]
    """Layers, keys and values, heads."""

    def float(self) -> CausalLMOutputWithCache:
        """accelerate's copies in float32."""
        return self.to(float32)

    def to(self, dtype: DType) -> CausalLMOutputWithCache:
        """Copies in another dtype, which keep nothing else of c_attn's output alive."""
        logits, (present, *_) = self.logits.to(dtype), self.presents
        if present.dtype is dtype:
            return CausalLMOutputWithCache(logits, self.presents, self.shape)
        batch, _, length, head_dim = present.shape
        copies = present.tape.new((*self.shape, batch, length, head_dim), dtype, "past_key_values")
        return CausalLMOutputWithCache(logits, [copies], self.shape)


class GPTBigCodeForCausalLM(CausalLM):
    transformer: GPTBigCodeModel

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
        loss, logits = super().forward(input_ids, labels)
        presents = list(self.transformer.presents)
        self.transformer.presents.clear()
        if not presents or not self.b.tape.training:
            return loss, logits
        return loss, CausalLMOutputWithCache(logits, presents, self.transformer.presents_shape)


HEADS = language_model_heads(
    GPTBigCodeConfig,
    GPTBigCodeModel,
    prefix="transformer",
    embedding="wte",
    own_loss=AS_THEY_ARE._replace(last_only="5.0"),
    causal_lm_class=GPTBigCodeForCausalLM,
)
