"""Which pair of dtype and mixed precision a run has, once strategy and GPU are known."""

from __future__ import annotations

from typing import NamedTuple

from memplan.errors import SpecError
from memplan.specs.hardware import GPUSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import Dtype, MixedPrecision, TrainingSpec

__all__ = ["Precision", "resolve_precision"]

_DTYPE_OF: dict[MixedPrecision, Dtype] = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Precision(NamedTuple):
    """A resolved pair: what ``from_pretrained`` loads, and what ``TrainingArguments`` switches on."""

    dtype: Dtype
    mixed_precision: MixedPrecision


def resolve_precision(
    training: TrainingSpec, strategy: Strategy, gpu: GPUSpec | None, checkpoint_dtype: Dtype | None
) -> Precision:
    """Return the pair, with defaults filled in.

    Mixed precision defaults to bf16, on a GPU without it to fp16; the dtype to float32, under DeepSpeed
    to the 16-bit type of mixed precision. ``auto`` is ``checkpoint_dtype``.

    Raises SpecError for ``auto`` without a checkpoint dtype, and for training float16 weights under fp16 mixed
    precision, which ``torch.amp.GradScaler`` refuses ("Attempting to unscale FP16 gradients"), but where DeepSpeed or
    accelerate's FSDP (``prepare_model``, ``fsdp2_prepare_model``) make float32 of what is trained.
    """
    mixed = training.mixed_precision
    if mixed is None:
        mixed = "fp16" if gpu is not None and not gpu.supports_bf16 else "bf16"
    dtype = _dtype(training, strategy, mixed, checkpoint_dtype)
    widened = strategy.is_deepspeed or strategy.kind == "fsdp"
    if dtype == "float16" and mixed == "fp16" and not widened and _trains_loaded_dtype(training):
        remedy = "Use --dtype float32, --mixed-precision bf16 or no, or a --strategy of DeepSpeed, as zero2."
        raise SpecError.at("dtype", dtype, "cannot be trained under mixed precision fp16", remedy)
    return Precision(dtype, mixed)


def _trains_loaded_dtype(training: TrainingSpec) -> bool:
    """Whether a weight is trained in the dtype that the model is loaded in; PEFT's adapters are float32 by default."""
    lora, quantization = training.lora, training.quantization
    if training.task != "train" or (quantization is not None and quantization.prepare_for_kbit_training):
        return False
    return lora is None or not lora.autocast_adapter_dtype or bool(lora.modules_to_save)


def _dtype(training: TrainingSpec, strategy: Strategy, mixed: MixedPrecision, checkpoint_dtype: Dtype | None) -> Dtype:
    if training.dtype is None:
        return _DTYPE_OF[mixed] if strategy.is_deepspeed else "float32"
    if training.dtype != "auto":
        return training.dtype
    if checkpoint_dtype is None:
        remedy = "Use float32, bfloat16 or float16."
        raise SpecError.at("dtype", "auto", "is unknown: the config names no dtype", remedy)
    return checkpoint_dtype
