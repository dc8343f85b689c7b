"""training_args.json as it is written: the fields of train.py's ScriptArguments and of TrainingArguments.

Sources: transformers 5.23 ``training_args.py``, ``trainer_optimizer.py``, ``utils/quantization_config.py``
(BitsAndBytesConfig), peft 0.21.2 ``tuners/lora/config.py`` (LoraConfig).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memplan.adapters.lora import ALL_LINEAR, is_pattern, targets_to_tell
from memplan.architectures.registry import MODEL_CLASSES, head_of
from memplan.configs.arguments import DDP, FOUR_BIT
from memplan.errors import SpecError
from memplan.micro_batch import Setup, compute_dtype, prepares_for_kbit_training
from memplan.specs.model import ModelSpec
from memplan.specs.strategy import DdpSpec, Strategy
from memplan.specs.training import LoraSpec, QuantizationSpec, TrainingSpec

__all__ = ["to_training_args"]

_OWN_NAMES = {"adamw_torch_foreach": "adamw_torch", "adamw_torch_loop": "adamw_torch", "muon": "adamw_torch_fused"}
"""Optimizers without a name in TrainingArguments, and what is near to them."""


def to_training_args(setup: Setup, given: TrainingSpec, strategy: Strategy) -> dict[str, Any]:
    """Return training_args.json of a resolved setup; ``given`` is its TrainingSpec before it was resolved.

    Raises SpecError for what transformers' Trainer cannot be asked for.
    """
    training, precision, model = setup.training, setup.precision, setup.model
    head = training.head or head_of(model.architecture)
    if head not in MODEL_CLASSES:
        remedy = f"Use --head {' or '.join(MODEL_CLASSES)}."
        raise SpecError.at("head", head, "is none that a written train.py can train", remedy)
    if training.keeps_outputs:
        remedy = "Leave it out: the Trainer lets them go."
        raise SpecError.at("keeps_outputs", True, "is not asked of the Trainer", remedy)
    values: dict[str, Any] = {
        "model_name_or_path": _location(model),
        "model_class": MODEL_CLASSES[head],
        "dtype": precision.dtype,
        "attn_implementation": training.attn,
        "dataset": None,
        "seq_len": training.seq_len,
        "packed": training.packed,
    }
    if training.vocab_size is not None:
        values["vocab_size"] = training.vocab_size
    if training.lora is not None:
        values["lora"] = _to_lora(training.lora, setup)
        assert given.lora is not None
        if not given.lora.autocast_adapter_dtype:
            values["autocast_adapter_dtype"] = False
    if given.quantization is not None:
        values["quantization"] = _to_quantization(given.quantization, compute_dtype(setup).name)
    if prepares_for_kbit_training(training):
        values["prepare_for_kbit_training"] = True
    if given.quantization is not None:
        for name in ("peft_module_casting_to_bf16", "bf16_adapters"):
            if getattr(given.quantization, name):
                values[name] = True
    if head == "image-classification":
        # The Trainer would take the images away before they are made pixels.
        values |= {"text_column": "image", "remove_unused_columns": False}
    values |= {
        "output_dir": "output",
        "num_train_epochs": 1,
        "learning_rate": 2e-5 if training.lora is None else 2e-4,
        "per_device_train_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.grad_accum_steps,
        "bf16": precision.mixed_precision == "bf16",
        "fp16": precision.mixed_precision == "fp16",
        "logging_steps": 10,
    }
    if not strategy.zero.ds_optimizer or not strategy.is_deepspeed:
        values["optim"] = _to_optim(training.optim)
    if given.gradient_checkpointing:  # resolved, it may be FSDP's own, which the Trainer refuses beside this one
        # gradient_checkpointing is the name's alias from 5.23 on, which warns of its end.
        new = setup.software.at_least("transformers", "5.23")
        name = "activation_checkpointing" if new else "gradient_checkpointing"
        values[name] = True
        if given.use_reentrant is not None:
            values[f"{name}_kwargs"] = {"use_reentrant": given.use_reentrant}
    if training.liger:
        values["use_liger_kernel"] = True
    if training.eval_batch_size is not None:
        values |= {"eval_strategy": "steps", "per_device_eval_batch_size": training.eval_batch_size}
        if training.eval_accumulation_steps is not None:
            values["eval_accumulation_steps"] = training.eval_accumulation_steps
    if strategy.kind == "ddp":
        values |= _to_ddp(strategy.ddp)
    return values


def _location(model: ModelSpec) -> str:
    """What from_pretrained loads, from whatever folder train.py is run in."""
    if not model.source.startswith("path:"):
        return model.id
    path = Path(model.id).expanduser().absolute()
    if path.suffix != ".json":
        return str(path)
    if path.name != "config.json":
        remedy = "Give the folder that from_pretrained loads."
        raise SpecError.at("model", model.id, "is a config, and names no checkpoint to train", remedy)
    return str(path.parent)


def _to_optim(optim: str) -> str:
    if optim in _OWN_NAMES:
        remedy = f"Use {_OWN_NAMES[optim]}, which is nearest to it."
        raise SpecError.at("optim", optim, "has no name in TrainingArguments", remedy)
    return optim


def _to_lora(lora: LoraSpec, setup: Setup) -> dict[str, Any]:
    """Arguments of peft.LoraConfig; without target_modules PEFT looks up the model type, if it can."""
    values: dict[str, Any] = {"r": lora.rank, "lora_dropout": lora.dropout, "bias": lora.bias}
    if lora.alpha is not None:
        values["lora_alpha"] = lora.alpha
    targets = targets_to_tell(lora, setup.model.model_type, setup.software)
    if targets:
        # A list has names only: what PEFT matches with paths is text.
        as_text = targets == (ALL_LINEAR,) or is_pattern(targets)
        values["target_modules"] = targets[0] if as_text else list(targets)
    if lora.modules_to_save:
        values["modules_to_save"] = list(lora.modules_to_save)
    return values


def _to_quantization(quantization: QuantizationSpec, computes_in: str) -> dict[str, Any]:
    """Arguments of BitsAndBytesConfig."""
    if quantization.kind == "int8":
        return {"load_in_8bit": True}
    return {
        FOUR_BIT: True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": quantization.kind == "nf4-dq",
        "bnb_4bit_compute_dtype": computes_in,
        "bnb_4bit_quant_storage": quantization.quant_storage,
    }


def _to_ddp(ddp: DdpSpec) -> dict[str, Any]:
    if ddp.gradient_as_bucket_view:
        remedy = "Leave it out: accelerate has it for DistributedDataParallelKwargs in code of one's own."
        raise SpecError.at("gradient_as_bucket_view", True, "has no name in TrainingArguments", remedy)
    changed = ddp.model_dump(exclude_defaults=True)
    return {key: changed[field] for key, field in DDP.items() if field in changed}
