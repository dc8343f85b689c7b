"""What BERT and its relatives read from their configs, what they refuse, and what they hold."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import memplan
from memplan.architectures import bert, deberta_v2, distilbert, roberta
from memplan.architectures.bert import BertConfig, BertForMaskedLM, BertForPreTraining
from memplan.architectures.deberta_v2 import DebertaV2Config, DebertaV2ForMaskedLM
from memplan.architectures.distilbert import DistilBertConfig
from memplan.architectures.nn import Build, Model
from memplan.architectures.registry import attention_implementations, name_parameters
from memplan.architectures.roberta import RobertaConfig, RobertaForMaskedLM
from memplan.errors import SpecError, UnsupportedError
from memplan.specs.fields import Fields
from memplan.tape.tape import AccumulateGrad, Tape
from memplan.tape.tensor import bfloat16

TINY = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
DEBERTA = {**TINY, "relative_attention": True, "pos_att_type": "p2c|c2p", "share_att_key": True, "position_buckets": 8}


def fields(**values: Any) -> Fields:
    return Fields({**TINY, **values}, "config.json")


def deberta_fields(**values: Any) -> Fields:
    return Fields({**DEBERTA, **values}, "config.json")


def run(model: Model, length: int = 16) -> Counter[str]:
    """A forward and a backward pass; how often each operation allocated."""
    tape = model.b.tape
    loss, _ = model(*model.inputs(2, length))
    tape.backward(loss)
    return Counter(name for name, _, _ in tape.births)


def test_a_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="is_decoder"):
        BertConfig(fields(is_decoder=True))
    with pytest.raises(UnsupportedError, match="chunk_size_feed_forward"):
        BertConfig(fields(chunk_size_feed_forward=8))
    assert BertConfig(fields(is_decoder=False, chunk_size_feed_forward=0)).hidden_size == 64


def test_heads_must_divide_the_hidden_size() -> None:
    for config_class in (BertConfig, RobertaConfig, DistilBertConfig):
        with pytest.raises(SpecError, match="not divisible by 5"):
            config_class(fields(num_attention_heads=5))


def test_defaults_are_those_of_transformers() -> None:
    empty = Fields({}, "config.json")
    assert BertConfig(empty).vocab_size == 30522
    assert RobertaConfig(empty).vocab_size == 50265
    assert RobertaConfig(Fields({"model_type": "xlm-roberta"}, "config.json")).vocab_size == 30522
    assert DebertaV2Config(Fields({"relative_attention": True}, "config.json")).hidden_size == 1536
    assert DistilBertConfig(Fields({"hidden_size": 64, "n_heads": 2}, "config.json")).dim == 64
    assert DistilBertConfig(Fields({"dim": 64, "n_heads": 2}, "config.json")).dim == 64


def test_a_sequence_must_fit_the_table_of_positions() -> None:
    assert run(BertForMaskedLM(Build(Tape(), bfloat16), fields()), 32)
    with pytest.raises(SpecError, match=r"seq_len: 33 .* Use at most 32"):
        run(BertForMaskedLM(Build(Tape(), bfloat16), fields()), 33)


def test_robertas_positions_begin_behind_the_padding_id() -> None:
    assert run(RobertaForMaskedLM(Build(Tape(), bfloat16), fields(pad_token_id=1)), 30)
    with pytest.raises(SpecError, match=r"seq_len: 31 .* Use at most 30"):
        run(RobertaForMaskedLM(Build(Tape(), bfloat16), fields(pad_token_id=1)), 31)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_only_padding_makes_a_mask(attn: str) -> None:
    masks = [
        run(BertForMaskedLM(Build(Tape(), bfloat16, attn=attn, padded=padded), fields()))["bidirectional_mask"]
        for padded in (False, True)
    ]
    assert masks == [0, 1]


@pytest.mark.parametrize("tied", [True, False])
def test_an_untied_head_has_a_bias_that_nothing_uses(tied: bool) -> None:
    model = BertForMaskedLM(Build(Tape(), bfloat16), fields(tie_word_embeddings=tied))
    head = model.cls.predictions
    run(model)
    assert (head.decoder.bias is head.bias) == tied
    assert (head.decoder.weight is model.bert.embeddings.word_embeddings.weight) == tied
    assert isinstance(head.bias.node, AccumulateGrad)
    assert (head.bias.node.grad is not None) == tied


def test_names_are_the_state_dicts() -> None:
    model = BertForPreTraining(Build(Tape(), bfloat16), fields())
    name_parameters(model)
    names = {p.name for _, module in model.named_modules() for _, p in module.parameters()}
    assert {
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.1.attention.self.query.bias",
        "bert.pooler.dense.weight",
        "cls.predictions.transform.LayerNorm.weight",
        "cls.seq_relationship.weight",
    } <= names


def test_pretraining_has_a_label_for_each_pair_of_sentences() -> None:
    shapes = [x.shape for x in BertForPreTraining(Build(Tape(), bfloat16), fields()).inputs(3, 16)]
    assert shapes == [(3, 16), (3, 16), (3,)]


def test_what_deberta_refuses() -> None:
    with pytest.raises(UnsupportedError, match="conv_kernel_size"):
        DebertaV2Config(deberta_fields(conv_kernel_size=3))
    with pytest.raises(UnsupportedError, match="relative_attention"):
        DebertaV2Config(deberta_fields(relative_attention=False))
    with pytest.raises(UnsupportedError, match="masked-lm"):
        DebertaV2ForMaskedLM(Build(Tape(), bfloat16), deberta_fields(legacy=False))
    assert attention_implementations("deberta-v2") == ("eager",)


@pytest.mark.parametrize(
    ("value", "expected"), [(None, ()), ("p2c|c2p", ("p2c", "c2p")), ("C2P | p2c", ("c2p", "p2c")), (["p2c"], ("p2c",))]
)
def test_position_attention_is_a_text_or_a_list(value: Any, expected: tuple[str, ...]) -> None:
    assert DebertaV2Config(deberta_fields(pos_att_type=value)).pos_att_type == expected


@pytest.mark.parametrize(
    ("values", "span"),
    [
        ({}, 8),
        ({"position_buckets": -1}, 32),
        ({"position_buckets": -1, "max_relative_positions": 20}, 20),
    ],
)
def test_span_of_relative_positions(values: dict[str, int], span: int) -> None:
    model = DebertaV2ForMaskedLM(Build(Tape(), bfloat16), deberta_fields(**values))
    assert model.deberta.encoder.rel_embeddings.weight.shape == (2 * span, 64)


@pytest.mark.parametrize("parts", ["c2p", "p2c", "c2p|p2c", ""])
def test_each_part_of_the_position_bias_gathers_once_a_layer(parts: str) -> None:
    names = run(DebertaV2ForMaskedLM(Build(Tape(), bfloat16), deberta_fields(pos_att_type=parts or [])))
    assert names["gather"] == 2 * len([part for part in parts.split("|") if part])


@pytest.mark.parametrize("family", [bert, roberta, distilbert, deberta_v2])
def test_every_family_has_the_encoders_heads(family: Any) -> None:
    assert {"base", "masked-lm", "sequence-classification"} <= set(family.HEADS)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("norm", "training", "fails"),
    [("layer_norm", {}, True), ("none", {}, False), ("layer_norm", {"lora": 4}, False)],
    ids=["normed", "as they are", "frozen"],
)
def test_reentrant_checkpoints_cannot_share_a_layer_norm(norm: str, training: dict[str, Any], fails: bool) -> None:
    """transformers hands the relative embeddings to a layer as a keyword, which is no input of its checkpoint."""
    import torch
    import transformers

    config = {**DEBERTA, "model_type": "deberta-v2", "norm_rel_ebd": norm, "architectures": ["DebertaV2ForMaskedLM"]}
    model = transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(**{**config, "pad_token_id": 0}))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    if training:
        model.requires_grad_(False)
        model.enable_input_require_grads()
    tokens = torch.randint(1, 50, (1, 16))
    loss = model.train()(input_ids=tokens, labels=tokens).loss
    run = {"seq_len": 16, "gradient_checkpointing": True, **training}
    if not fails:
        loss.backward()
        memplan.estimate(config, {**run, "use_reentrant": True}, "T4", replay=False)
        return
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    with pytest.raises(SpecError, match="use_reentrant: true fails on deberta-v2 with norm_rel_ebd"):
        memplan.estimate(config, {**run, "use_reentrant": True}, "T4", replay=False)
    memplan.estimate(config, run, "T4", replay=False)
    plan = memplan.plan(config, {"seq_len": 16, "use_reentrant": True}, "T4")
    assert not any(rung.estimate.setup["gradient_checkpointing"] for rung in plan.rungs)
