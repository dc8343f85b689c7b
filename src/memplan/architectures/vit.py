"""ViT (transformers.models.vit): patches of an image as tokens, a class token, LayerNorm before each sublayer.

The number of tokens follows from the size of the image, so ``seq_len`` has no effect.
"""

from __future__ import annotations

from memplan.architectures.nn import (
    Build,
    CheckpointLayer,
    Dropout,
    InputEmbeddings,
    LayerNorm,
    Layers,
    Linear,
    Model,
    Module,
    activation,
    attention,
    check_heads,
    looked_at,
    num_labels,
)
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tape import LOGITS
from memplan.tape.tensor import Tensor, float32, int64


class ViTConfig:
    """The fields of config.json that the memory of a ViT depends on."""

    def __init__(self, fields: Fields) -> None:
        self.hidden_size = fields.int("hidden_size", 768)
        self.num_hidden_layers = fields.layers("num_hidden_layers", 12)
        self.num_attention_heads = fields.int("num_attention_heads", 12)
        check_heads(fields, self.hidden_size, self.num_attention_heads)
        self.head_dim = self.hidden_size // self.num_attention_heads
        self.intermediate_size = fields.int("intermediate_size", 3072)
        self.hidden_act = fields.str("hidden_act", "gelu")
        self.hidden_dropout_prob = fields.float("hidden_dropout_prob", 0.0, maximum=1.0)
        self.attention_probs_dropout_prob = fields.float("attention_probs_dropout_prob", 0.0, maximum=1.0)
        self.image_size = pair(fields, "image_size", 224)
        self.patch_size = pair(fields, "patch_size", 16)
        self.num_channels = fields.int("num_channels", 3)
        self.qkv_bias = fields.bool("qkv_bias", True)
        self.pooler_output_size = fields.int("pooler_output_size", self.hidden_size)
        self.pooler_act = fields.str("pooler_act", "tanh")
        self.num_labels = num_labels(fields)
        for size, patch in zip(self.image_size, self.patch_size, strict=True):
            if patch > size:
                raise fields.wrong("patch_size", patch, f"is larger than image_size {size}", "Correct one of them.")


def pair(fields: Fields, name: str, default: int) -> tuple[int, int]:
    """A height and a width: one integer for both, or a list of two."""
    if not isinstance(fields.raw(name), (list, tuple)):
        size = fields.int(name, default)
        return size, size
    sizes = fields.list_int(name)
    if len(sizes) != 2:
        raise fields.wrong(name, sizes, "is not a height and a width", "Use one integer, or a list of two.")
    return sizes[0], sizes[1]


class Conv2d(Module):
    """torch.nn.Conv2d without padding, its stride the size of its kernel."""

    def __init__(self, b: Build, in_channels: int, out_channels: int, kernel_size: tuple[int, int]) -> None:
        self.weight = b.parameter(out_channels, in_channels, *kernel_size)
        self.bias = b.parameter(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv2d(x, self.weight, self.bias, stride=self.weight.shape[2:])


class ViTPatchEmbeddings(InputEmbeddings):
    def __init__(self, b: Build, c: ViTConfig) -> None:
        self.projection = Conv2d(b, c.num_channels, c.hidden_size, c.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        embeddings = self.projection(pixel_values)
        return embeddings.view(*embeddings.shape[:2], -1).transpose(1, 2)


class ViTEmbeddings(Module):
    no_split = True

    def __init__(self, b: Build, c: ViTConfig) -> None:
        (height, width), (patch_height, patch_width) = c.image_size, c.patch_size
        num_patches = (height // patch_height) * (width // patch_width)
        self.cls_token = b.parameter(1, 1, c.hidden_size)
        self.patch_embeddings = ViTPatchEmbeddings(b, c)
        self.position_embeddings = b.parameter(1, num_patches + 1, c.hidden_size)
        self.dropout = Dropout(c.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor) -> Tensor:
        embeddings = self.patch_embeddings(pixel_values)
        cls_tokens = self.cls_token.expand(pixel_values.shape[0], -1, -1)
        embeddings = ops.cat((cls_tokens, embeddings), dim=1)
        embeddings = embeddings + self.position_embeddings
        embeddings = self.dropout(embeddings)
        return embeddings


class ViTAttention(Module):
    def __init__(self, b: Build, c: ViTConfig) -> None:
        self.b = b
        self.head_dim = c.head_dim
        self.dropout = c.attention_probs_dropout_prob
        self.q_proj = Linear(b, c.hidden_size, c.hidden_size, c.qkv_bias)
        self.k_proj = Linear(b, c.hidden_size, c.hidden_size, c.qkv_bias)
        self.v_proj = Linear(b, c.hidden_size, c.hidden_size, c.qkv_bias)
        self.o_proj = Linear(b, c.hidden_size, c.hidden_size)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        query_states = self.q_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        attn_output, attn_weights = attention(
            self.b, query_states, key_states, value_states, None, self.dropout, is_causal=False
        )
        attn_output = attn_output.reshape(batch, length, -1).contiguous()
        attn_output = self.o_proj(attn_output)
        return attn_output, attn_weights


class ViTMLP(Module):
    def __init__(self, b: Build, c: ViTConfig) -> None:
        self.activation_fn = activation(c.hidden_act)
        self.fc1 = Linear(b, c.hidden_size, c.intermediate_size)
        self.fc2 = Linear(b, c.intermediate_size, c.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.fc1(hidden_states)
        hidden_states = self.activation_fn(hidden_states)
        hidden_states = self.fc2(hidden_states)
        return hidden_states


class ViTLayer(CheckpointLayer):
    def __init__(self, b: Build, c: ViTConfig) -> None:
        self.attention = ViTAttention(b, c)
        self.layernorm_before = LayerNorm(b, c.hidden_size)
        self.layernorm_after = LayerNorm(b, c.hidden_size)
        self.mlp = ViTMLP(b, c)
        self.dropout = Dropout(c.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        hidden_states = self.layernorm_before(hidden_states)
        hidden_states, _ = self.attention(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = hidden_states + residual
        residual = hidden_states
        hidden_states = self.layernorm_after(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = hidden_states + residual
        return hidden_states


class ViTPooler(Module):
    def __init__(self, b: Build, c: ViTConfig) -> None:
        self.dense = Linear(b, c.hidden_size, c.pooler_output_size)
        self.activation = activation(c.pooler_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        first_token_tensor = hidden_states.select(1, 0)
        pooled_output = self.dense(first_token_tensor)
        pooled_output = self.activation(pooled_output)
        return pooled_output


class ViTModel(Module):
    def __init__(self, b: Build, c: ViTConfig, add_pooling_layer: bool = True) -> None:
        self.embeddings = ViTEmbeddings(b, c)
        self.layers = Layers(b, [0] * c.num_hidden_layers, lambda i: ViTLayer(b, c))
        self.layernorm = LayerNorm(b, c.hidden_size)
        self.pooler = ViTPooler(b, c) if add_pooling_layer else None

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        expected_dtype = looked_at(self.embeddings.patch_embeddings.projection.weight).dtype
        pixel_values = pixel_values.to(expected_dtype)
        hidden_states = embedding_output = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        sequence_output = self.layernorm(hidden_states)
        pooled_output = self.pooler(sequence_output) if self.pooler is not None else None
        del embedding_output
        return sequence_output, pooled_output


class ViTForImageClassification(Model):
    def __init__(self, b: Build, fields: Fields) -> None:
        c = ViTConfig(fields)
        self.b = b
        self.shape = (c.num_channels, *c.image_size)
        self.vit = ViTModel(b, c, add_pooling_layer=False)
        self.classifier = Linear(b, c.hidden_size, c.num_labels)

    def inputs(self, batch: int, length: int) -> tuple[Tensor, ...]:
        """pixel_values [B, C, H, W], float32, and labels [B], int64; ``length`` has no effect."""
        t = self.b.tape
        return t.new((batch, *self.shape), float32, "pixel_values"), t.new((batch,), int64, "labels")

    def attention_mask(self, batch: int, length: int) -> None:
        """Images are not padded."""

    def forward(self, pixel_values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        sequence_output, _ = self.vit(pixel_values)
        with self.b.tape.tagged(LOGITS):
            pooled_output = sequence_output.select(1, 0)
            logits = self.classifier(pooled_output)
            self.b.tape.mark("loss")
            return ops.cross_entropy(logits, labels), logits


def base_model(b: Build, fields: Fields) -> Module:
    return ViTModel(b, ViTConfig(fields))


HEADS = {"image-classification": ViTForImageClassification, "base": base_model}
