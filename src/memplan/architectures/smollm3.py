"""SmolLM3 (transformers.models.smollm3): Llama whose every fourth layer has no rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

from memplan.architectures.llama import (
    LlamaAttention,
    LlamaConfig,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    decoder_heads,
    layer_types,
    sliding_windows,
)
from memplan.architectures.nn import Build
from memplan.specs.fields import Fields
from memplan.tape.tensor import Tensor


class SmolLM3Config(LlamaConfig):
    vocab_size = 128256
    hidden_size = 2048
    num_hidden_layers = 36
    num_attention_heads = 16
    default_kv_heads = 4
    tie_word_embeddings = True

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        layers = self.num_hidden_layers
        interval = fields.int("no_rope_layer_interval", 4)
        every = tuple(int((i + 1) % interval != 0) for i in range(layers))
        self.no_rope_layers = fields.list_int("no_rope_layers", every, minimum=0)
        """1 for the layers that do rotate."""
        if len(self.no_rope_layers) < layers:
            found = len(self.no_rope_layers)
            raise fields.wrong("no_rope_layers", found, f"entries for {layers} layers", "Give one for each.")
        window = fields.optional_int("sliding_window")
        slides = fields.bool("use_sliding_window", False) and window is not None
        sliding = [slides and not rotated for rotated in self.no_rope_layers[:layers]]
        self.layer_types = layer_types(fields, ["sliding_attention" if s else "full_attention" for s in sliding])
        self.windows = sliding_windows(fields, self.layer_types, window)

    @property
    def kinds(self) -> Sequence[Hashable]:
        return list(zip(self.layer_types, self.no_rope_layers[: self.num_hidden_layers], strict=True))


class SmolLM3Attention(LlamaAttention):
    def __init__(self, b: Build, c: SmolLM3Config, layer_idx: int) -> None:
        super().__init__(b, c, layer_idx)
        if not c.no_rope_layers[layer_idx]:
            self.rotate = unrotated


def unrotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """A layer without positions."""
    return q, k


class SmolLM3DecoderLayer(LlamaDecoderLayer):
    attention_class: ClassVar[Callable[..., Any]] = SmolLM3Attention


class SmolLM3Model(LlamaModel):
    layer_class: ClassVar[Callable[..., Any]] = SmolLM3DecoderLayer


class SmolLM3ForCausalLM(LlamaForCausalLM):
    config_class: ClassVar[Callable[..., Any]] = SmolLM3Config
    model_class: ClassVar[Callable[..., Any]] = SmolLM3Model


HEADS = decoder_heads(SmolLM3ForCausalLM)
