"""RoBERTa and XLM-RoBERTa (transformers.models.roberta): BERT with positions counted from the token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from memplan.architectures.bert import BertConfig, BertEmbeddings, BertModel, masked_lm_output
from memplan.architectures.nn import (
    Build,
    Classifier,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    Model,
    Module,
    check_position_table,
)
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tape import LOGITS
from memplan.tape.tensor import Tensor, bool_, int32, int64


class RobertaConfig(BertConfig):
    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.head_first = fields.str("model_type", "roberta") == "xlm-roberta"
        """XLMRobertaFor... makes its head before its encoder, and so the parameters stand in this order."""
        if not self.head_first:  # xlm-roberta's default is BERT's
            self.vocab_size = fields.int("vocab_size", 50265)
        self.pad_token_id = fields.int("pad_token_id", 1, minimum=0)


class RobertaEmbeddings(BertEmbeddings):
    def __init__(self, b: Build, c: RobertaConfig) -> None:
        super().__init__(b, c)
        # Made last, which is where the optimizer's loop meets it.
        self.position_embeddings = self.__dict__.pop("position_embeddings")
        self.padding_idx = c.pad_token_id

    def positions(self, input_ids: Tensor) -> Tensor:
        """create_position_ids_from_input_ids: [B, S], from padding_idx + 1 on."""
        check_position_table(input_ids, self.max_position_embeddings - self.padding_idx - 1)
        t, shape = input_ids.tape, input_ids.shape
        not_padding = t.new(shape, bool_, "ne")
        mask = t.new(shape, int32, "mask")
        del not_padding
        counted = t.new(shape, int64, "cumsum")
        incremental_indices = t.new(shape, int32, "incremental_indices")
        del counted
        position_ids = t.new(shape, int64, "incremental_indices.long")
        del mask, incremental_indices
        position_ids = t.new(shape, int64, "position_ids")
        return position_ids


class RobertaModel(BertModel):
    embeddings_class: ClassVar[Callable[..., Any]] = RobertaEmbeddings


class RobertaLMHead(Module):
    """``bias`` is the decoder's where embeddings are tied; otherwise nothing uses it."""

    def __init__(self, b: Build, c: RobertaConfig, word_embeddings: Embedding) -> None:
        self.dense = Linear(b, c.hidden_size, c.hidden_size)
        self.layer_norm = LayerNorm(b, c.hidden_size)
        self.decoder = Linear(b, c.hidden_size, c.vocab_size)
        self.bias = b.parameter(c.vocab_size)
        if c.tie_word_embeddings:
            self.decoder.weight = word_embeddings.weight
            self.decoder.bias = self.bias

    def forward(self, features: Tensor) -> Tensor:
        x = self.dense(features)
        x = ops.gelu(x)
        x = self.layer_norm(x)
        x = self.decoder(x)
        return x


class RobertaForMaskedLM(Model):
    output_embeddings_path = "lm_head.decoder"

    def __init__(self, b: Build, fields: Fields) -> None:
        c = RobertaConfig(fields)
        self.b = b
        self.roberta = RobertaModel(b, c, add_pooling_layer=False)
        self.lm_head = RobertaLMHead(b, c, self.roberta.embeddings.word_embeddings)
        if c.head_first:
            self.roberta = self.__dict__.pop("roberta")

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        sequence_output, _ = self.roberta(input_ids)
        return masked_lm_output(self.b, self.lm_head, sequence_output, labels)


class RobertaClassificationHead(Module):
    def __init__(self, b: Build, c: RobertaConfig) -> None:
        self.dense = Linear(b, c.hidden_size, c.hidden_size)
        self.dropout = Dropout(c.classifier_dropout)
        self.out_proj = Linear(b, c.hidden_size, c.num_labels)

    def forward(self, features: Tensor) -> Tensor:
        x = features.select(1, 0)
        x = self.dropout(x)
        x = self.dense(x)
        x = ops.tanh(x)
        x = self.dropout(x)
        x = self.out_proj(x)
        return x


class RobertaForSequenceClassification(Classifier):
    def __init__(self, b: Build, fields: Fields) -> None:
        c = RobertaConfig(fields)
        self.b = b
        self.roberta = RobertaModel(b, c, add_pooling_layer=False)
        self.classifier = RobertaClassificationHead(b, c)
        if c.head_first:
            self.roberta = self.__dict__.pop("roberta")

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        sequence_output, _ = self.roberta(input_ids)
        with self.b.tape.tagged(LOGITS):
            logits = self.classifier(sequence_output)
            self.b.tape.mark("loss")
            return ops.cross_entropy(logits, labels), logits


def base_model(b: Build, fields: Fields) -> Module:
    return RobertaModel(b, RobertaConfig(fields))


HEADS = {
    "masked-lm": RobertaForMaskedLM,
    "base": base_model,
    "sequence-classification": RobertaForSequenceClassification,
}
