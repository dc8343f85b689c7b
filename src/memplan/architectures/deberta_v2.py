"""DeBERTa-v2 and v3 (transformers.models.deberta_v2): attention disentangled into content and relative position."""

from __future__ import annotations

from typing import ClassVar

from memplan.architectures.bert import BertConfig, BertIntermediate, BertLMPredictionHead, BertOutput, masked_lm_output
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
    check_position_table,
    checkpoints_wrappers,
    looked_at,
)
from memplan.errors import SpecError, UnsupportedError
from memplan.specs.fields import Fields
from memplan.tape import ops
from memplan.tape.tape import LOGITS, Tape
from memplan.tape.tensor import DType, Tensor, bool_, float32, int64

ATTENTION = ("eager",)


class DebertaV2Config(BertConfig):
    """The fields of config.json that the memory of a DeBERTa-v2 depends on."""

    defaults: ClassVar[dict[str, int]] = {
        "vocab_size": 128100,
        "hidden_size": 1536,
        "num_hidden_layers": 24,
        "num_attention_heads": 24,
        "intermediate_size": 6144,
        "type_vocab_size": 0,
    }

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.embedding_size = fields.int("embedding_size", self.hidden_size)
        self.head_dim = fields.int("attention_head_size", self.head_dim)
        self.relative_attention = fields.bool("relative_attention", False)
        self.pos_att_type = position_attention(fields)
        self.share_att_key = fields.bool("share_att_key", False)
        self.position_biased_input = fields.bool("position_biased_input", True)
        self.norm_rel_ebd = "layer_norm" in fields.str("norm_rel_ebd", "none").lower()
        positions = fields.int("max_relative_positions", -1, minimum=-1)
        buckets = fields.int("position_buckets", -1, minimum=-1)
        self.att_span = buckets if buckets > 0 else positions if positions > 0 else self.max_position_embeddings
        self.has_buckets = buckets > 0
        self.pooler_hidden_size = fields.int("pooler_hidden_size", self.hidden_size)
        self.pooler_hidden_act = fields.str("pooler_hidden_act", "gelu")
        self.pooler_dropout = fields.float("pooler_dropout", 0.0, maximum=1.0)
        self.cls_dropout = fields.float("cls_dropout", self.hidden_dropout_prob, maximum=1.0)
        if fields.int("conv_kernel_size", 0, minimum=0):
            raise UnsupportedError(f"{fields.source}: conv_kernel_size: the convolution is not modelled. Use --trace.")
        if not self.relative_attention:
            raise UnsupportedError(f"{fields.source}: relative_attention: false is not modelled. Use --trace.")


def position_attention(fields: Fields) -> tuple[str, ...]:
    """``pos_att_type``: a list, or a text with | between its parts; of c2p and p2c."""
    value = fields.raw("pos_att_type")
    if value is None:
        return ()
    parts = value.lower().split("|") if isinstance(value, str) else fields.list_str("pos_att_type")
    return tuple(part.strip() for part in parts)


class DebertaV2Embeddings(Module):
    def __init__(self, b: Build, c: DebertaV2Config) -> None:
        self.c = c
        self.word_embeddings = Embedding(b, c.vocab_size, c.embedding_size)
        if c.position_biased_input:
            self.position_embeddings = Embedding(b, c.max_position_embeddings, c.embedding_size)
        if c.type_vocab_size:
            self.token_type_embeddings = Embedding(b, c.type_vocab_size, c.embedding_size)
        if c.embedding_size != c.hidden_size:
            self.embed_proj = Linear(b, c.embedding_size, c.hidden_size, bias=False)
        self.LayerNorm = LayerNorm(b, c.hidden_size)
        self.dropout = Dropout(c.hidden_dropout_prob)
        self.position_ids = b.tape.buffer((1, c.max_position_embeddings), int64)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, mask: Tensor) -> Tensor:
        c, t = self.c, input_ids.tape
        inputs_embeds = self.word_embeddings(input_ids)
        if c.position_biased_input:
            check_position_table(input_ids, c.max_position_embeddings)
            position_embeddings = self.position_embeddings(self.position_ids.narrow(1, 0, input_ids.shape[1]))
        else:
            position_embeddings = t.new(inputs_embeds.shape, inputs_embeds.dtype, "zeros_like")
        embeddings = inputs_embeds
        if c.position_biased_input:
            embeddings = embeddings + position_embeddings
        if c.type_vocab_size:
            token_type_embeddings = self.token_type_embeddings(token_type_ids)
            embeddings = embeddings + token_type_embeddings
        if c.embedding_size != c.hidden_size:
            embeddings = self.embed_proj(embeddings)
        embeddings = self.LayerNorm(embeddings)
        mask = t.new((*mask.shape, 1), embeddings.dtype, "mask")
        embeddings = embeddings * mask
        embeddings = self.dropout(embeddings)
        return embeddings


def build_relative_position(t: Tape, length: int, has_buckets: bool) -> Tensor:
    """Distances of queries and keys, in buckets that grow with them: int64 [1, S, S]."""

    def new(dtype: DType, name: str) -> Tensor:
        return t.new((length, length), dtype, name)

    rel_pos_ids = new(int64, "rel_pos_ids")
    if has_buckets:
        rel_pos_ids = make_log_bucket_position(rel_pos_ids)
        rel_pos_ids = new(int64, "rel_pos_ids")
    return rel_pos_ids.unsqueeze(0)


def make_log_bucket_position(relative_pos: Tensor) -> Tensor:
    """The float32 numbers of the buckets, through tensors of the same shape."""
    t = relative_pos.tape

    def new(dtype: DType, name: str) -> Tensor:
        return t.new(relative_pos.shape, dtype, name)

    sign = new(int64, "sign")
    below, above = new(bool_, "lt"), new(bool_, "gt")
    inside = new(bool_, "and")
    del below, above
    distance = new(int64, "abs")
    abs_pos = new(int64, "where")
    del inside, distance
    log_pos = new(float32, "div")
    for name in ("log", "div", "mul", "ceil", "add"):
        log_pos = new(float32, name)
    is_near = new(bool_, "le")
    near, far = new(float32, "type_as"), new(float32, "mul")
    bucket_pos = new(float32, "bucket_pos")
    del sign, abs_pos, log_pos, is_near, near, far
    return bucket_pos


def transpose_for_scores(x: Tensor, heads: int) -> Tensor:
    """[B, S, H * D] -> [B * H, S, D]"""
    batch, length, _ = x.shape
    x = x.view(batch, length, heads, -1)
    return x.permute(0, 2, 1, 3).contiguous().view(batch * heads, length, -1)


class DisentangledSelfAttention(Module):
    def __init__(self, b: Build, c: DebertaV2Config) -> None:
        self.c = c
        all_head_size = c.num_attention_heads * c.head_dim
        self.query_proj = Linear(b, c.hidden_size, all_head_size)
        self.key_proj = Linear(b, c.hidden_size, all_head_size)
        self.value_proj = Linear(b, c.hidden_size, all_head_size)
        self.pos_dropout = Dropout(c.hidden_dropout_prob)
        self.dropout = Dropout(c.attention_probs_dropout_prob)
        if not c.share_att_key:
            if "c2p" in c.pos_att_type:
                self.pos_key_proj = Linear(b, c.hidden_size, all_head_size)
            if "p2c" in c.pos_att_type:
                self.pos_query_proj = Linear(b, c.hidden_size, all_head_size)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, relative_pos: Tensor, rel_embeddings: Tensor
    ) -> Tensor:
        c, t, heads = self.c, hidden_states.tape, self.c.num_attention_heads
        query_layer = transpose_for_scores(self.query_proj(hidden_states), heads)
        key_layer = transpose_for_scores(self.key_proj(hidden_states), heads)
        value_layer = transpose_for_scores(self.value_proj(hidden_states), heads)
        attention_scores = ops.bmm(query_layer, key_layer.transpose(1, 2) / 2.0)
        rel_embeddings = self.pos_dropout(rel_embeddings)
        rel_att = self.disentangled_attention_bias(query_layer, key_layer, relative_pos, rel_embeddings)
        if rel_att is not None:
            attention_scores = attention_scores + rel_att
        rows, length, _ = attention_scores.shape
        attention_scores = attention_scores.view(-1, heads, length, length)
        attention_mask = t.new(attention_mask.shape, bool_, "attention_mask")
        attention_scores = ops.masked_fill(attention_scores, t.new(attention_mask.shape, bool_, "bitwise_not"))
        attention_probs = ops.softmax(attention_scores)
        attention_probs = self.dropout(attention_probs)
        context_layer = ops.bmm(attention_probs.view(rows, length, length), value_layer)
        context_layer = context_layer.view(-1, heads, length, c.head_dim).permute(0, 2, 1, 3).contiguous()
        context_layer = context_layer.view(rows // heads, length, -1)
        return context_layer

    def position_layers(self, rel_embeddings: Tensor, times: int) -> tuple[Tensor | None, Tensor | None]:
        """The query and the key of every relative position: [B * H, 2 * span, D]."""
        c = self.c

        def layer(projection: Linear) -> Tensor:
            return ops.repeat(transpose_for_scores(projection(rel_embeddings), c.num_attention_heads), times)

        pos_query_layer = pos_key_layer = None
        if c.share_att_key:
            pos_query_layer = layer(self.query_proj)
            pos_key_layer = layer(self.key_proj)
        else:
            if "c2p" in c.pos_att_type:
                pos_key_layer = layer(self.pos_key_proj)
            if "p2c" in c.pos_att_type:
                pos_query_layer = layer(self.pos_query_proj)
        return pos_query_layer, pos_key_layer

    def disentangled_attention_bias(
        self, query_layer: Tensor, key_layer: Tensor, relative_pos: Tensor, rel_embeddings: Tensor
    ) -> Tensor | None:
        """[B * H, S, S]"""
        c = self.c
        rows, length, _ = query_layer.shape
        rel_embeddings = rel_embeddings.unsqueeze(0)
        pos_query_layer, pos_key_layer = self.position_layers(rel_embeddings, rows // c.num_attention_heads)
        score = None
        if "c2p" in c.pos_att_type and pos_key_layer is not None:
            c2p_att = ops.bmm(query_layer, pos_key_layer.transpose(1, 2))
            c2p_pos = clamped_positions(relative_pos, negated=False)
            c2p_att = ops.gather(c2p_att, c2p_pos.expand(rows, length, length))
            score = (c2p_att / 2.0) + 0.0
        if "p2c" in c.pos_att_type and pos_query_layer is not None:
            p2c_pos = clamped_positions(relative_pos, negated=True)
            p2c_att = ops.bmm(key_layer, pos_query_layer.transpose(1, 2))
            p2c_att = ops.gather(p2c_att, p2c_pos.expand(rows, length, length)).transpose(1, 2)
            scaled = p2c_att / 2.0
            score = scaled + 0.0 if score is None else ops.add_(score, scaled)
        return score


def clamped_positions(relative_pos: Tensor, negated: bool) -> Tensor:
    """The rows of the relative embeddings, between its first and its last: int64 [1, S, S]."""
    t = relative_pos.tape
    if negated:
        relative_pos = t.new(relative_pos.shape, int64, "neg")
    relative_pos = t.new(relative_pos.shape, int64, "add")
    return t.new(relative_pos.shape, int64, "clamp")


class DebertaV2Attention(Module):
    def __init__(self, b: Build, c: DebertaV2Config) -> None:
        self.self = DisentangledSelfAttention(b, c)
        self.output = BertOutput(b, c, c.hidden_size)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, relative_pos: Tensor, rel_embeddings: Tensor
    ) -> Tensor:
        self_output = self.self(hidden_states, attention_mask, relative_pos, rel_embeddings)
        attention_output = self.output(self_output, hidden_states)
        return attention_output


class DebertaV2Layer(CheckpointLayer):
    no_split = False

    held = True

    def __init__(self, b: Build, c: DebertaV2Config) -> None:
        self.attention = DebertaV2Attention(b, c)
        self.intermediate = BertIntermediate(b, c)
        self.output = BertOutput(b, c, c.intermediate_size)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, relative_pos: Tensor, rel_embeddings: Tensor
    ) -> Tensor:
        attention_output = self.attention(hidden_states, attention_mask, relative_pos, rel_embeddings)
        intermediate_output = self.intermediate(attention_output)
        layer_output = self.output(intermediate_output, attention_output)
        return layer_output


class DebertaV2Encoder(Module):
    def __init__(self, b: Build, c: DebertaV2Config) -> None:
        self.b = b
        self.c = c
        # The last layer is where the gradient of the relative embeddings, which all layers share, begins.
        self.layer = Layers(b, ["inner"] * (c.num_hidden_layers - 1) + ["last"], lambda i: DebertaV2Layer(b, c))
        self.rel_embeddings = Embedding(b, 2 * c.att_span, c.hidden_size)
        if c.norm_rel_ebd:
            self.LayerNorm = LayerNorm(b, c.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """All hidden states: the input and every layer's output."""
        batch, length, _ = hidden_states.shape
        attention_mask = hidden_states.tape.new((batch, 1, length, length), attention_mask.dtype, "attention_mask")
        relative_pos = build_relative_position(hidden_states.tape, length, self.c.has_buckets)
        all_hidden_states = [hidden_states]
        rel_embeddings: Tensor = looked_at(self.rel_embeddings.weight)
        if self.c.norm_rel_ebd:
            rel_embeddings = self.LayerNorm(rel_embeddings)
            self._check_reentrant(rel_embeddings)
        for layer in self.layer:
            all_hidden_states.append(layer(all_hidden_states[-1], attention_mask, relative_pos, rel_embeddings))
        return all_hidden_states

    def _check_reentrant(self, rel_embeddings: Tensor) -> None:
        """As a keyword it is no input of a layer's checkpoint, whose backward goes on into what made it.

        So a reentrant one's does, once per layer, and the second finds the graph freed.
        """
        tape, b = rel_embeddings.tape, self.b
        if not (b.gradient_checkpointing and tape.reentrant) or checkpoints_wrappers(b.software):
            return
        if rel_embeddings.node is not None and self.c.num_hidden_layers > 1:
            problem = (
                "fails on deberta-v2 with norm_rel_ebd: the backward of each layer reaches the LayerNorm they share"
            )
            raise SpecError.at("use_reentrant", True, problem, "Use --no-use-reentrant.")


class DebertaV2Model(Module):
    def __init__(self, b: Build, c: DebertaV2Config) -> None:
        self.b = b
        self.embeddings = DebertaV2Embeddings(b, c)
        self.encoder = DebertaV2Encoder(b, c)

    def forward(self, input_ids: Tensor) -> Tensor:
        t = input_ids.tape
        # Without padding the model makes a mask of its own, of ones in float32; the batch's looks like its tokens.
        attention_mask = input_ids if self.b.padded else t.new(input_ids.shape, float32, "attention_mask")
        token_type_ids = t.new(input_ids.shape, int64, "token_type_ids")
        embedding_output = self.embeddings(input_ids, token_type_ids, attention_mask)
        encoded_layers = self.encoder(embedding_output, attention_mask)
        return encoded_layers[-1]


class DebertaV2OnlyMLMHead(Module):
    def __init__(self, b: Build, c: DebertaV2Config, word_embeddings: Embedding) -> None:
        self.predictions = BertLMPredictionHead(b, c, word_embeddings)

    def forward(self, sequence_output: Tensor) -> Tensor:
        prediction_scores: Tensor = self.predictions(sequence_output)
        return prediction_scores


class DebertaV2ForMaskedLM(Model):
    output_embeddings_path = "cls.predictions.decoder"

    def __init__(self, b: Build, fields: Fields) -> None:
        c = DebertaV2Config(fields)
        if not fields.bool("legacy", True) or c.embedding_size != c.hidden_size:
            raise UnsupportedError(f"{fields.source}: this kind of masked-lm head is not modelled. Use --trace.")
        self.b = b
        self.deberta = DebertaV2Model(b, c)
        self.cls = DebertaV2OnlyMLMHead(b, c, self.deberta.embeddings.word_embeddings)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        sequence_output = self.deberta(input_ids)
        return masked_lm_output(self.b, self.cls, sequence_output, labels)


class ContextPooler(Module):
    def __init__(self, b: Build, c: DebertaV2Config) -> None:
        self.dense = Linear(b, c.pooler_hidden_size, c.pooler_hidden_size)
        self.dropout = Dropout(c.pooler_dropout)
        self.activation = activation(c.pooler_hidden_act).forward  # looked up in each forward: not one of its modules

    def forward(self, hidden_states: Tensor) -> Tensor:
        context_token = hidden_states.select(1, 0)
        context_token = self.dropout(context_token)
        pooled_output = self.dense(context_token)
        pooled_output = self.activation(pooled_output)
        return pooled_output


class DebertaV2ForSequenceClassification(Classifier):
    def __init__(self, b: Build, fields: Fields) -> None:
        c = DebertaV2Config(fields)
        self.b = b
        self.deberta = DebertaV2Model(b, c)
        self.pooler = ContextPooler(b, c)
        self.classifier = Linear(b, c.hidden_size, c.num_labels)
        self.dropout = Dropout(c.cls_dropout)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        encoder_layer = self.deberta(input_ids)
        with self.b.tape.tagged(LOGITS):
            pooled_output = self.pooler(encoder_layer)
            pooled_output = self.dropout(pooled_output)
            logits = self.classifier(pooled_output)
            self.b.tape.mark("loss")
            return ops.cross_entropy(logits, labels), logits


def base_model(b: Build, fields: Fields) -> Module:
    return DebertaV2Model(b, DebertaV2Config(fields))


HEADS = {
    "masked-lm": DebertaV2ForMaskedLM,
    "base": base_model,
    "sequence-classification": DebertaV2ForSequenceClassification,
}
