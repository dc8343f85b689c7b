"""Quantized layers and QLoRA models against what bitsandbytes, transformers and PEFT really allocated on CPU."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from tests.adapters.tape_step import REAL_CPU, build, events, peak, rounded, step
from tests.oracles import quantized
from tests.oracles.families import CONFIGS

from memplan import estimate
from memplan.adapters.lora import apply_lora, cast_trained_to_bf16
from memplan.adapters.quantization import (
    Linear4bit,
    Linear8bitLt,
    default_dtype,
    keys_to_not_convert,
    peft_module_casting_to_bf16,
    prepare_for_kbit_training,
    quantize,
)
from memplan.architectures.nn import Build, Conv1D, Inventory, Linear, Model, Module
from memplan.architectures.registry import FAMILIES
from memplan.memory.timeline import unroll
from memplan.specs.software import SoftwareSpec
from memplan.specs.training import LoraSpec, QuantizationSpec, TrainingSpec
from memplan.tape import tensor as dtypes
from memplan.tape.dispatch import cuda
from memplan.tape.tape import Tape

ARCHIVE = json.loads(quantized.ARCHIVE.read_text(encoding="utf-8"))
SMALL_TENSORS = 4096
"""Bytes within which peaks may differ: a few index tensors that the tape makes more or fewer of."""


def quantized_layer(b: Build, case: dict[str, Any]) -> Module:
    base = Linear(b, case["n_in"], case["n_out"], case["bias"])
    for _, p in base.parameters():
        p.node = None
    if case["kind"] == "int8":
        return Linear8bitLt(b, base)
    return Linear4bit(b, base, dtypes.dtype_named(case["compute_dtype"]), nested=case["kind"] == "nf4-dq")


@pytest.mark.parametrize("row", ARCHIVE["layers"], ids=lambda row: json.dumps(row["case"]))
def test_a_layer_allocates_what_bitsandbytes_does(row: dict[str, Any]) -> None:
    case, measured = row["case"], row["measured"]
    tape = Tape(REAL_CPU)
    layer = quantized_layer(Build(tape, dtypes.dtype_named(case["dtype"])), case)
    held = Inventory(layer)
    x = tape.new((*case["shape"], case["n_in"]), dtypes.dtype_named(case["input_dtype"]), "x")
    tape.require_grad(x)

    start = len(tape.log)
    with tape.autocasting(dtypes.bfloat16 if case["autocast"] else None):
        out = layer(x)
    middle = len(tape.log)
    forward = events(tape, start, middle)
    tape.backward(out)
    seed = tape.log[middle]  # the gradient that the measured call was given from outside
    tape.log[middle:] = [e for e in tape.log[middle:] if e not in (seed, ~seed)]
    backward = events(tape, middle, len(tape.log))

    at_rest = [held.parameters[0][0].nbytes] + [buffer.nbytes for buffer, _ in held.buffers]
    assert sorted(at_rest) == sorted(measured["at_rest"])
    for mine, real in ((forward, rounded(measured["forward"])), (backward, rounded(measured["backward"]))):
        assert [e for e in mine if e > 0] == [e for e in real if e > 0]
        assert peak(mine) == peak(real)


@pytest.mark.parametrize("row", ARCHIVE["models"], ids=lambda row: json.dumps(row["case"]))
def test_a_qlora_step_allocates_what_peft_and_bitsandbytes_do(row: dict[str, Any]) -> None:
    case, measured = row["case"], row["measured"]
    mine = step(
        ARCHIVE["config"],
        case["dtype"],
        partial(qlora, case=case),
        mixed_precision=case["mixed_precision"],
        micro_batch_size=case["micro_batch_size"],
        seq_len=case["seq_len"],
        gradient_checkpointing=case["gradient_checkpointing"],
        attn="eager",
        rules=REAL_CPU,
    )
    forward, backward = rounded(measured["forward"]), rounded(measured["backward"])
    assert sorted(p.nbytes for p, _ in mine.inventory.parameters) == measured["parameters"]
    assert peak(mine.forward) == pytest.approx(peak(forward), abs=SMALL_TENSORS)
    saved, real_saved = sum(mine.forward), sum(forward)
    assert saved == pytest.approx(real_saved, abs=SMALL_TENSORS)
    assert saved + peak(mine.backward) == pytest.approx(real_saved + peak(backward), abs=SMALL_TENSORS)


def qlora(b: Build, root: Model, case: dict[str, Any]) -> None:
    quantize(b, root, QuantizationSpec(kind=case["kind"]), dtypes.dtype_named(case["compute_dtype"]))
    prepare_for_kbit_training(root)
    lora = LoraSpec(rank=ARCHIVE["rank"], targets=tuple(case["targets"]), dropout=case["dropout"])
    apply_lora(b, root, lora, "llama")


@pytest.mark.parametrize("row", ARCHIVE["models"][::7], ids=lambda row: row["case"]["kind"])
def test_the_footprint_as_loaded_is_transformers(row: dict[str, Any]) -> None:
    case = row["case"]
    b, root = build(ARCHIVE["config"], case["dtype"])
    quantize(b, root, QuantizationSpec(kind=case["kind"]), dtypes.bfloat16)
    held = Inventory(root)
    registered = [buffer.nbytes for buffer, _ in held.buffers if buffer.registered]
    assert sum(p.nbytes for p, _ in held.parameters) + sum(registered) == row["measured"]["footprint"]


def test_checkpointing_does_not_free_what_int8_layers_keep() -> None:
    """ctx.A outlives the checkpoint, so int8 saves every linear layer's input even then; 4 bit does not."""
    saved = {}
    for kind in ("int8", "nf4"):
        adapt = partial(qlora, case={**quantized.MODEL, "kind": kind})
        run = step(ARCHIVE["config"], "bfloat16", adapt, gradient_checkpointing=True)
        saved[kind] = sum(run.forward)
    inputs = 3 * 4 * 2 * 48 * (192 + 320)  # layers, of float32, batch, length: what only int8 layers read
    assert saved["int8"] - saved["nf4"] >= inputs


def test_repeated_layers_give_the_peak_of_all_layers() -> None:
    """What int8 layers keep lives beyond their layer's own part of the log."""
    config = {**ARCHIVE["config"], "num_hidden_layers": 7}
    peaks = []
    for full_depth in (True, False):
        adapt = partial(qlora, case={**quantized.MODEL, "kind": "int8"})
        run = step(config, "bfloat16", adapt, full_depth=full_depth)
        profile = unroll(run.tape, run.inventory.stacks).profile()
        peaks.append((profile.peaks["backward"].total, profile.saved.total, profile.end.total))
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq"])
def test_cuda_reads_the_packed_weight_for_few_rows(kind: str) -> None:
    largest = {}
    for rows in (1, 4, 5):
        tape = Tape(cuda((9, 0)))
        layer = quantized_layer(Build(tape, dtypes.bfloat16), {**quantized.LAYER, "kind": kind, "n_in": 1024})
        layer(tape.new((1, rows, 1024), dtypes.bfloat16, "x"))
        largest[rows] = max(tape.sizes)
    dequantized = 320 * 1024 * 2
    assert largest[1] < largest[4] < dequantized == largest[5]


def converted(root: Model) -> set[str]:
    b = root.b
    quantize(b, root, QuantizationSpec(kind="nf4"), dtypes.bfloat16)
    return {path for _, _, path, module in root.places() if isinstance(module, Linear4bit)}


FAMILY_CONFIGS = [
    (family, name)
    for family, named in CONFIGS.items()
    for name, config in named.items()
    if config["model_type"] in FAMILIES and name not in ("7b", "8b")
]


@pytest.mark.parametrize(("family", "name"), FAMILY_CONFIGS)
def test_the_same_modules_are_quantized_as_by_transformers(family: str, name: str) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D as RealConv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    from memplan.introspect.trace import _build_model

    config = CONFIGS[family][name]
    model = _build_model(config, "float32", "eager", None, None, None)
    kept = get_keys_to_not_convert(model) + list(model._keep_in_fp32_modules or [])
    real = {
        path
        for path, module in model.named_modules()
        if should_convert_module(path, kept) and (isinstance(module, RealConv1D) or type(module) is torch.nn.Linear)
    }
    _, root = build(config, "float32", attn="eager")
    assert converted(root) == real


def test_a_tied_head_and_the_last_module_stay() -> None:
    config = {**ARCHIVE["config"], "tie_word_embeddings": True}
    _, tied = build(config, "float32")
    assert {"lm_head", "model.embed_tokens"} <= set(keys_to_not_convert(tied))
    _, classifier = build(config, "float32", head="sequence-classification")
    assert "score" in keys_to_not_convert(classifier)
    assert not any(isinstance(module, (Linear, Conv1D)) for module in linear_in_layers(tied))


def linear_in_layers(root: Model) -> list[Module]:
    converted(root)
    return [module for path, module in root.named_modules() if ".layers." in path and not path.endswith("norm")]


def test_16_bit_tensors_go_to_float32_and_packed_ones_stay() -> None:
    b, root = build(ARCHIVE["config"], "float16")
    quantize(b, root, QuantizationSpec(kind="int8"), dtypes.float16)
    prepare_for_kbit_training(root)
    assert {p.dtype.name for p, _ in Inventory(root).parameters} == {"float32", "int8"}
    assert not any(p.requires_grad for p, _ in Inventory(root).parameters)


def test_trl_casts_heads_and_norms_after_the_adapters() -> None:
    """What modules_to_save trains goes to bfloat16 as well; adapters stay, unless they are cast too."""
    b, root = build(ARCHIVE["config"], "bfloat16")
    quantize(b, root, QuantizationSpec(kind="nf4"), dtypes.bfloat16)
    prepare_for_kbit_training(root)
    apply_lora(b, root, LoraSpec(rank=4, targets=("q_proj",), modules_to_save=("lm_head",)), "llama")
    peft_module_casting_to_bf16(root)
    dtypes_of = {path: p.dtype.name for path, module in root.named_modules() for _, p in module.parameters()}
    heads = [path for path in dtypes_of if "lm_head" in path or "embed_tokens" in path]
    assert len(heads) == 3
    assert {dtypes_of[path] for path in heads} == {"bfloat16"}
    assert {name for path, name in dtypes_of.items() if "norm" in path} == {"float32"}
    assert {name for path, name in dtypes_of.items() if "lora_" in path} == {"float32"}
    cast_trained_to_bf16(root)
    trained = {p.dtype.name for p, _ in Inventory(root).parameters if p.requires_grad}
    assert trained == {"bfloat16"}


@pytest.mark.parametrize(
    ("casts", "numbers"),
    # Two tables of 1000 x 192; A and B of q_proj (192 to 192) and v_proj (192 to 64) in three layers.
    [("peft_module_casting_to_bf16", 2 * 1000 * 192), ("bf16_adapters", 3 * 4 * (192 + 192 + 192 + 64))],
)
def test_what_is_cast_after_the_adapters_halves(casts: str, numbers: int) -> None:
    training = TrainingSpec(seq_len=16, quantization=QuantizationSpec(kind="nf4"), lora=LoraSpec(rank=4))
    asked = training.replace(quantization=QuantizationSpec(kind="nf4", **{casts: True}))
    before, after = (
        estimate(ARCHIVE["config"], each, "A100-80GB").gpu.components.weights for each in (training, asked)
    )
    assert before - after == 2 * numbers


def test_the_dtype_of_a_quantized_load_depends_on_transformers() -> None:
    assert default_dtype(SoftwareSpec(transformers="4.31"), "bfloat16") == "float16"
    assert default_dtype(SoftwareSpec(), "bfloat16") == "bfloat16"
    assert default_dtype(SoftwareSpec(), None) is None
