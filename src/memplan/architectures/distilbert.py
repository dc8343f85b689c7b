"""DistilBERT (transformers.models.distilbert): BERT without token types and pooler, under names of its own."""

from __future__ import annotations

from memplan.architectures.nn import (
    Build,
    CheckpointLayer,
    Classifier,
    Dropout,
    Embedding,
    LayerNorm,
    Layers,
    Linear,
    Model,
    Module,
    activation,
    attention,
    bidirectional_mask,
    check_heads,
    check_position_table,
    num_labels,
)
from memplan.errors import UnsupportedError
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tape import LOGITS
from memplan.tape.tensor import Tensor, int64


class DistilBertConfig:
    """The fields of config.json that the memory of a DistilBERT depends on."""

    def __init__(self, fields: Fields) -> None:
        self.vocab_size = fields.int("vocab_size", 30522)
        self.max_position_embeddings = fields.int("max_position_embeddings", 512)
        self.n_layers = fields.layers("n_layers", 6, alias="num_hidden_layers")
        self.n_heads = fields.int("n_heads", 12, alias="num_attention_heads")
        self.dim = fields.int("dim", 768, alias="hidden_size")
        check_heads(fields, self.dim, self.n_heads)
        self.hidden_dim = fields.int("hidden_dim", 4 * 768)
        self.dropout = fields.float("dropout", 0.1, maximum=1.0)
        self.attention_dropout = fields.float("attention_dropout", 0.1, maximum=1.0)
        self.activation = fields.str("activation", "gelu")
        self.seq_classif_dropout = fields.float("seq_classif_dropout", 0.2, maximum=1.0)
        self.tie_word_embeddings = fields.bool("tie_word_embeddings", True)
        self.num_labels = num_labels(fields)
        if fields.raw("chunk_size_feed_forward"):
            raise UnsupportedError(f"{fields.source}: chunk_size_feed_forward is not modelled. Use --trace.")


class Embeddings(Module):
    def __init__(self, b: Build, c: DistilBertConfig) -> None:
        self.word_embeddings = Embedding(b, c.vocab_size, c.dim)
        self.position_embeddings = Embedding(b, c.max_position_embeddings, c.dim)
        self.LayerNorm = LayerNorm(b, c.dim)
        self.dropout = Dropout(c.dropout)
        self.max_position_embeddings = c.max_position_embeddings
        self.position_ids = b.tape.buffer((1, c.max_position_embeddings), int64)

    def forward(self, input_ids: Tensor) -> Tensor:
        check_position_table(input_ids, self.max_position_embeddings)
        inputs_embeds = self.word_embeddings(input_ids)
        position_ids = self.position_ids.narrow(1, 0, input_ids.shape[1])
        position_embeddings = self.position_embeddings(position_ids)
        embeddings = inputs_embeds + position_embeddings
        embeddings = self.LayerNorm(embeddings)
        embeddings = self.dropout(embeddings)
        return embeddings


class DistilBertSelfAttention(Module):
    def __init__(self, b: Build, c: DistilBertConfig) -> None:
        self.b = b
        self.head_dim = c.dim // c.n_heads
        self.dropout = c.attention_dropout
        self.q_lin = Linear(b, c.dim, c.dim)
        self.k_lin = Linear(b, c.dim, c.dim)
        self.v_lin = Linear(b, c.dim, c.dim)
        self.out_lin = Linear(b, c.dim, c.dim)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        query_layer = self.q_lin(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        key_layer = self.k_lin(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        value_layer = self.v_lin(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        attn_output, attn_weights = attention(
            self.b, query_layer, key_layer, value_layer, mask, self.dropout, is_causal=False, upcast=False
        )
        attn_output = attn_output.reshape(batch, length, -1).contiguous()
        attn_output = self.out_lin(attn_output)
        return attn_output, attn_weights


class FFN(Module):
    def __init__(self, b: Build, c: DistilBertConfig) -> None:
        self.dropout = Dropout(c.dropout)
        self.lin1 = Linear(b, c.dim, c.hidden_dim)
        self.lin2 = Linear(b, c.hidden_dim, c.dim)
        self.activation = activation(c.activation)

    def forward(self, input: Tensor) -> Tensor:
        x = self.lin1(input)
        x = self.activation(x)
        x = self.lin2(x)
        x = self.dropout(x)
        return x


class TransformerBlock(CheckpointLayer):
    no_split = False

    def __init__(self, b: Build, c: DistilBertConfig) -> None:
        self.attention = DistilBertSelfAttention(b, c)
        self.sa_layer_norm = LayerNorm(b, c.dim)
        self.ffn = FFN(b, c)
        self.output_layer_norm = LayerNorm(b, c.dim)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        attention_output, _ = self.attention(hidden_states, mask)
        attention_output = self.sa_layer_norm(attention_output + hidden_states)
        ffn_output = self.ffn(attention_output)
        ffn_output = self.output_layer_norm(ffn_output + attention_output)
        return ffn_output


class Transformer(Module):
    def __init__(self, b: Build, c: DistilBertConfig) -> None:
        self.layer = Layers(b, [0] * c.n_layers, lambda i: TransformerBlock(b, c))

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layer:
            hidden_states = layer(hidden_states, mask)
        return hidden_states


class DistilBertModel(Module):
    def __init__(self, b: Build, c: DistilBertConfig) -> None:
        self.b = b
        self.embeddings = Embeddings(b, c)
        self.transformer = Transformer(b, c)

    def forward(self, input_ids: Tensor) -> Tensor:
        embeddings = self.embeddings(input_ids)
        mask = bidirectional_mask(self.b, embeddings)
        return self.transformer(embeddings, mask)


class CrossEntropyLoss(Module):
    """torch.nn.CrossEntropyLoss, which here is one of the model's modules."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return ops.cross_entropy(input, target)


class DistilBertForMaskedLM(Model):
    output_embeddings_path = "vocab_projector"

    def __init__(self, b: Build, fields: Fields) -> None:
        c = DistilBertConfig(fields)
        self.b = b
        self.activation = activation(c.activation)
        self.mlm_loss_fct = CrossEntropyLoss()
        self.distilbert = DistilBertModel(b, c)
        self.vocab_transform = Linear(b, c.dim, c.dim)
        self.vocab_layer_norm = LayerNorm(b, c.dim)
        self.vocab_projector = Linear(b, c.dim, c.vocab_size)
        if c.tie_word_embeddings:
            self.vocab_projector.weight = self.distilbert.embeddings.word_embeddings.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states = self.distilbert(input_ids)
        with self.b.tape.tagged(LOGITS):
            prediction_logits = self.vocab_transform(hidden_states)
            prediction_logits = self.activation(prediction_logits)
            prediction_logits = self.vocab_layer_norm(prediction_logits)
            prediction_logits = self.vocab_projector(prediction_logits)
            self.b.tape.mark("loss")
            mlm_loss = self.mlm_loss_fct(prediction_logits.view(-1, prediction_logits.shape[-1]), labels.view(-1))
            return mlm_loss, prediction_logits


class DistilBertForSequenceClassification(Classifier):
    def __init__(self, b: Build, fields: Fields) -> None:
        c = DistilBertConfig(fields)
        self.b = b
        self.distilbert = DistilBertModel(b, c)
        self.pre_classifier = Linear(b, c.dim, c.dim)
        self.classifier = Linear(b, c.dim, c.num_labels)
        self.dropout = Dropout(c.seq_classif_dropout)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden_state = self.distilbert(input_ids)
        with self.b.tape.tagged(LOGITS):
            pooled_output = hidden_state.select(1, 0)
            pooled_output = self.pre_classifier(pooled_output)
            pooled_output = ops.relu(pooled_output)
            pooled_output = self.dropout(pooled_output)
            logits = self.classifier(pooled_output)
            self.b.tape.mark("loss")
            return ops.cross_entropy(logits, labels), logits


def base_model(b: Build, fields: Fields) -> Module:
    return DistilBertModel(b, DistilBertConfig(fields))


HEADS = {
    "masked-lm": DistilBertForMaskedLM,
    "base": base_model,
    "sequence-classification": DistilBertForSequenceClassification,
}
