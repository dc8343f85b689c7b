"""BERT (transformers.models.bert): bidirectional attention, LayerNorm after each sublayer, learned positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from memplan.architectures.nn import (
    Activation,
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


class BertConfig:
    """The fields of config.json that the memory of a BERT depends on."""

    defaults: ClassVar[dict[str, int]] = {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "type_vocab_size": 2,
    }

    def __init__(self, fields: Fields) -> None:
        defaults = self.defaults
        self.vocab_size = fields.int("vocab_size", defaults["vocab_size"])
        self.hidden_size = fields.int("hidden_size", defaults["hidden_size"])
        self.num_hidden_layers = fields.layers("num_hidden_layers", defaults["num_hidden_layers"])
        self.num_attention_heads = fields.int("num_attention_heads", defaults["num_attention_heads"])
        check_heads(fields, self.hidden_size, self.num_attention_heads)
        self.head_dim = self.hidden_size // self.num_attention_heads
        self.intermediate_size = fields.int("intermediate_size", defaults["intermediate_size"])
        self.hidden_act = fields.str("hidden_act", "gelu")
        self.hidden_dropout_prob = fields.float("hidden_dropout_prob", 0.1, maximum=1.0)
        self.attention_probs_dropout_prob = fields.float("attention_probs_dropout_prob", 0.1, maximum=1.0)
        self.classifier_dropout = fields.float("classifier_dropout", self.hidden_dropout_prob, maximum=1.0)
        self.max_position_embeddings = fields.int("max_position_embeddings", 512)
        self.type_vocab_size = fields.int("type_vocab_size", defaults["type_vocab_size"], minimum=0)
        self.tie_word_embeddings = fields.bool("tie_word_embeddings", True)
        self.num_labels = num_labels(fields)
        for name in ("is_decoder", "chunk_size_feed_forward"):
            if fields.raw(name):
                raise UnsupportedError.at(
                    f"{fields.source}: {name}", fields.raw(name), "is not modelled for an encoder", "Use --trace."
                )


class BertEmbeddings(Module):
    no_split = True

    def __init__(self, b: Build, c: BertConfig) -> None:
        self.word_embeddings = Embedding(b, c.vocab_size, c.hidden_size)
        self.position_embeddings = Embedding(b, c.max_position_embeddings, c.hidden_size)
        self.token_type_embeddings = Embedding(b, c.type_vocab_size, c.hidden_size)
        self.LayerNorm = LayerNorm(b, c.hidden_size)
        self.dropout = Dropout(c.hidden_dropout_prob)
        self.max_position_embeddings = c.max_position_embeddings
        self.position_ids = b.tape.buffer((1, c.max_position_embeddings), int64)
        self.token_type_ids = b.tape.buffer((1, c.max_position_embeddings), int64)

    def positions(self, input_ids: Tensor) -> Tensor:
        """The buffer's first S positions, [1, S]."""
        check_position_table(input_ids, self.max_position_embeddings)
        return self.position_ids.narrow(1, 0, input_ids.shape[1])

    def forward(self, input_ids: Tensor) -> Tensor:
        position_ids = self.positions(input_ids)
        token_type_ids = input_ids.tape.new(position_ids.shape, int64, "token_type_ids").expand(*input_ids.shape)
        inputs_embeds = self.word_embeddings(input_ids)
        token_type_embeddings = self.token_type_embeddings(token_type_ids)
        embeddings = inputs_embeds + token_type_embeddings
        position_embeddings = self.position_embeddings(position_ids)
        embeddings = embeddings + position_embeddings
        embeddings = self.LayerNorm(embeddings)
        embeddings = self.dropout(embeddings)
        return embeddings


class BertSelfAttention(Module):
    def __init__(self, b: Build, c: BertConfig) -> None:
        self.b = b
        self.head_dim = c.head_dim
        self.dropout = c.attention_probs_dropout_prob
        self.query = Linear(b, c.hidden_size, c.hidden_size)
        self.key = Linear(b, c.hidden_size, c.hidden_size)
        self.value = Linear(b, c.hidden_size, c.hidden_size)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        query_layer = self.query(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        key_layer = self.key(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        value_layer = self.value(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        attn_output, attn_weights = attention(
            self.b, query_layer, key_layer, value_layer, mask, self.dropout, is_causal=False, upcast=False
        )
        attn_output = attn_output.reshape(batch, length, -1).contiguous()
        return attn_output, attn_weights


class BertOutput(Module):
    """BertSelfOutput and BertOutput: a projection, dropout, and the LayerNorm of its sum with the residual."""

    def __init__(self, b: Build, c: BertConfig, n_in: int) -> None:
        self.dense = Linear(b, n_in, c.hidden_size)
        self.LayerNorm = LayerNorm(b, c.hidden_size)
        self.dropout = Dropout(c.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        hidden_states = self.dense(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = self.LayerNorm(hidden_states + input_tensor)
        return hidden_states


class BertAttention(Module):
    def __init__(self, b: Build, c: BertConfig) -> None:
        self.self = BertSelfAttention(b, c)
        self.output = BertOutput(b, c, c.hidden_size)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        attention_output, attn_weights = self.self(hidden_states, mask)
        attention_output = self.output(attention_output, hidden_states)
        return attention_output, attn_weights


class BertIntermediate(Module):
    def __init__(self, b: Build, c: BertConfig) -> None:
        self.dense = Linear(b, c.hidden_size, c.intermediate_size)
        self.intermediate_act_fn = activation(c.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.dense(hidden_states)
        hidden_states = self.intermediate_act_fn(hidden_states)
        return hidden_states


class BertLayer(CheckpointLayer):
    def __init__(self, b: Build, c: BertConfig) -> None:
        self.attention = BertAttention(b, c)
        self.intermediate = BertIntermediate(b, c)
        self.output = BertOutput(b, c, c.intermediate_size)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        attention_output, _ = self.attention(hidden_states, mask)
        intermediate_output = self.intermediate(attention_output)
        layer_output = self.output(intermediate_output, attention_output)
        return layer_output


class BertEncoder(Module):
    def __init__(self, b: Build, c: BertConfig) -> None:
        self.layer = Layers(b, [0] * c.num_hidden_layers, lambda i: BertLayer(b, c))

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layer:
            hidden_states = layer(hidden_states, mask)
        return hidden_states


class BertPooler(Module):
    def __init__(self, b: Build, c: BertConfig) -> None:
        self.dense = Linear(b, c.hidden_size, c.hidden_size)
        self.activation = Activation(ops.tanh)

    def forward(self, hidden_states: Tensor) -> Tensor:
        first_token_tensor = hidden_states.select(1, 0)
        pooled_output = self.dense(first_token_tensor)
        pooled_output = self.activation(pooled_output)
        return pooled_output


class BertModel(Module):
    embeddings_class: ClassVar[Callable[..., Any]] = BertEmbeddings

    def __init__(self, b: Build, c: BertConfig, add_pooling_layer: bool = True) -> None:
        self.b = b
        self.embeddings = self.embeddings_class(b, c)
        self.encoder = BertEncoder(b, c)
        self.pooler = BertPooler(b, c) if add_pooling_layer else None

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        embedding_output = self.embeddings(input_ids)
        mask = self._mask(embedding_output)
        sequence_output = self.encoder(embedding_output, mask)
        pooled_output = self.pooler(sequence_output) if self.pooler is not None else None
        return sequence_output, pooled_output

    def _mask(self, embedding_output: Tensor) -> Tensor | None:
        """Before transformers 4.57 eager attention adds a mask [B, 1, 1, S] in the model's dtype, padding or not."""
        if self.b.attn != "eager" or self.b.software.at_least("transformers", "4.57"):
            return bidirectional_mask(self.b, embedding_output)
        batch, length = embedding_output.shape[:2]
        return embedding_output.tape.new((batch, 1, 1, length), embedding_output.dtype, "extended_attention_mask")


class BertPredictionHeadTransform(Module):
    def __init__(self, b: Build, c: BertConfig) -> None:
        self.dense = Linear(b, c.hidden_size, c.hidden_size)
        self.transform_act_fn = activation(c.hidden_act)
        self.LayerNorm = LayerNorm(b, c.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.dense(hidden_states)
        hidden_states = self.transform_act_fn(hidden_states)
        hidden_states = self.LayerNorm(hidden_states)
        return hidden_states


class BertLMPredictionHead(Module):
    """``bias`` is the decoder's where embeddings are tied; otherwise nothing uses it."""

    def __init__(self, b: Build, c: BertConfig, word_embeddings: Embedding) -> None:
        self.transform = BertPredictionHeadTransform(b, c)
        self.decoder = Linear(b, c.hidden_size, c.vocab_size)
        self.bias = b.parameter(c.vocab_size)
        if c.tie_word_embeddings:
            self.decoder.weight = word_embeddings.weight
            self.decoder.bias = self.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.transform(hidden_states)
        hidden_states = self.decoder(hidden_states)
        return hidden_states


class BertPreTrainingHeads(Module):
    """BertOnlyMLMHead, and with ``next_sentence`` BertPreTrainingHeads."""

    def __init__(self, b: Build, c: BertConfig, word_embeddings: Embedding, next_sentence: bool) -> None:
        self.predictions = BertLMPredictionHead(b, c, word_embeddings)
        if next_sentence:
            self.seq_relationship = Linear(b, c.hidden_size, 2)

    def forward(self, sequence_output: Tensor, pooled_output: Tensor | None = None) -> Any:
        prediction_scores = self.predictions(sequence_output)
        if pooled_output is None:
            return prediction_scores
        return prediction_scores, self.seq_relationship(pooled_output)


def token_cross_entropy(prediction_scores: Tensor, labels: Tensor) -> Tensor:
    """CrossEntropyLoss over all positions, in the dtype of the scores: prediction_scores [B, S, V], labels [B, S]."""
    return ops.cross_entropy(prediction_scores.view(-1, prediction_scores.shape[-1]), labels.view(-1))


def masked_lm_output(b: Build, head: Module, sequence_output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The head and the loss of a ...ForMaskedLM: (loss, logits)."""
    with b.tape.tagged(LOGITS):
        prediction_scores = head(sequence_output)
        b.tape.mark("loss")
        return token_cross_entropy(prediction_scores, labels), prediction_scores


class BertForMaskedLM(Model):
    output_embeddings_path = "cls.predictions.decoder"

    def __init__(self, b: Build, fields: Fields) -> None:
        c = BertConfig(fields)
        self.b = b
        self.bert = BertModel(b, c, add_pooling_layer=False)
        self.cls = BertPreTrainingHeads(b, c, self.bert.embeddings.word_embeddings, next_sentence=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        sequence_output, _ = self.bert(input_ids)
        return masked_lm_output(self.b, self.cls, sequence_output, labels)


class BertForPreTraining(Model):
    output_embeddings_path = "cls.predictions.decoder"

    def __init__(self, b: Build, fields: Fields) -> None:
        c = BertConfig(fields)
        self.b = b
        self.bert = BertModel(b, c)
        self.cls = BertPreTrainingHeads(b, c, self.bert.embeddings.word_embeddings, next_sentence=True)

    def inputs(self, batch: int, length: int) -> tuple[Tensor, ...]:
        """input_ids and labels [B, S], next_sentence_label [B]; int64."""
        return *super().inputs(batch, length), self.b.tape.new((batch,), int64, "next_sentence_label")

    def forward(self, input_ids: Tensor, labels: Tensor, next_sentence_label: Tensor) -> tuple[Tensor, Tensor]:
        sequence_output, pooled_output = self.bert(input_ids)
        with self.b.tape.tagged(LOGITS):
            prediction_scores, seq_relationship_score = self.cls(sequence_output, pooled_output)
            self.b.tape.mark("loss")
            masked_lm_loss = token_cross_entropy(prediction_scores, labels)
            next_sentence_loss = ops.cross_entropy(seq_relationship_score, next_sentence_label)
            return masked_lm_loss + next_sentence_loss, prediction_scores


class BertForSequenceClassification(Classifier):
    def __init__(self, b: Build, fields: Fields) -> None:
        c = BertConfig(fields)
        self.b = b
        self.bert = BertModel(b, c)
        self.dropout = Dropout(c.classifier_dropout)
        self.classifier = Linear(b, c.hidden_size, c.num_labels)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        _sequence_output, pooled_output = self.bert(input_ids)
        with self.b.tape.tagged(LOGITS):
            pooled_output = self.dropout(pooled_output)
            logits = self.classifier(pooled_output)
            self.b.tape.mark("loss")
            return ops.cross_entropy(logits, labels), logits


def base_model(b: Build, fields: Fields) -> Module:
    return BertModel(b, BertConfig(fields))


HEADS = {
    "masked-lm": BertForMaskedLM,
    "pretraining": BertForPreTraining,
    "base": base_model,
    "sequence-classification": BertForSequenceClassification,
}
