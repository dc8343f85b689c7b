"""Checkpoints that are quantized already: what the ``quantization_config`` of their config.json asks for.

Source: transformers/quantizers/auto.py (get_hf_quantizer, merge_quantization_configs: the checkpoint's own config
wins), quantizer_finegrained_fp8.py, utils/quantization_config.py (BitsAndBytesConfig), 5.23.
"""

from __future__ import annotations

from memplan.errors import SpecError, UnsupportedError
from memplan.specs.fields import Fields
from memplan.specs.model import ModelSpec
from memplan.specs.training import QuantizationSpec

FIELD = "quantization_config"
DEQUANTIZED = "fp8"
"""The method whose weights transformers itself turns back into the model's dtype."""
DEQUANTIZED_SOURCE = (
    "taken as dequantized to the dtype: FineGrainedFP8Config(dequantize=True), which GPUs below compute capability 8.9 "
    "get without asking (transformers/quantizers/quantizer_finegrained_fp8.py); from 8.9 on they hold fp8"
)


def is_dequantized(model: ModelSpec) -> bool:
    """Whether the checkpoint is in fp8, which is estimated as dequantized."""
    fields = _fields(model)
    return fields is not None and _method(fields) == DEQUANTIZED


def checkpoint_quantization(model: ModelSpec, asked: QuantizationSpec | None) -> QuantizationSpec | None:
    """Return how the weights are quantized: ``asked``, with what the checkpoint's own config decides.

    Raises UnsupportedError for a checkpoint that is quantized by a method that is not modelled, SpecError for one in
    bitsandbytes' format if ``asked`` is another kind, or none.
    """
    fields = _fields(model)
    if fields is None:
        return asked
    method = _method(fields)
    if method == DEQUANTIZED and asked is None:
        return asked
    if method != "bitsandbytes":
        remedy = "Give the config of the checkpoint that it was made from, with --quantization nf4 for 4 bits."
        if method == DEQUANTIZED:
            remedy = "Leave --quantization out, or give the config of a 16-bit checkpoint."
        raise UnsupportedError.at(f"{model.id}: {FIELD}.quant_method", method, "is not modelled here", remedy)
    kind = _bitsandbytes_kind(fields)
    if asked is None or asked.kind != kind:
        problem = f"is not what the checkpoint holds: {kind}, in bitsandbytes' format"
        remedy = f"Use --quantization {kind}, or give the config of the checkpoint that it was made from."
        raise SpecError.at("quantization", "none" if asked is None else asked.kind, problem, remedy)
    compute = fields.str("bnb_4bit_compute_dtype", "float32") if kind != "int8" else None
    return asked if compute is None else asked.replace(compute_dtype=compute)


def _fields(model: ModelSpec) -> Fields | None:
    return model.fields.section(FIELD) if model.fields.raw(FIELD) else None


def _method(fields: Fields) -> str:
    """``quant_method``; bitsandbytes' configs did without once."""
    if fields.bool("load_in_4bit", False) or fields.bool("load_in_8bit", False):
        return "bitsandbytes"
    return fields.str("quant_method")


def _bitsandbytes_kind(fields: Fields) -> str:
    skipped = fields.list_str("llm_int8_skip_modules", ())
    if any(name != "lm_head" for name in skipped):
        raise UnsupportedError(
            f"{fields.source}.llm_int8_skip_modules: {list(skipped)!r} keeps other layers than the default does, which "
            "is not modelled. Give the config of the checkpoint that it was made from."
        )
    if fields.bool("load_in_8bit", False):
        return "int8"
    quant_type = fields.str("bnb_4bit_quant_type", "fp4")
    if quant_type != "nf4":
        remedy = "Give the config of the checkpoint that it was made from, with --quantization nf4."
        raise UnsupportedError.at(f"{fields.source}.bnb_4bit_quant_type", quant_type, "is not modelled", remedy)
    return "nf4-dq" if fields.bool("bnb_4bit_use_double_quant", False) else "nf4"
