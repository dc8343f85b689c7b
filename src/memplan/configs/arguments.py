"""TrainingArguments, with the arguments of the script that reads them, in memplan's terms.

As ``HfArgumentParser`` takes them: a JSON or YAML file, or values. What they leave open is TrainingArguments' own
default, which is not memplan's: a batch of 8, full precision. Sources: transformers 5.23 ``training_args.py``,
``integrations/deepspeed.py`` (HfTrainerDeepSpeedConfig), ``utils/quantization_config.py``, peft 0.21.2
``tuners/lora/config.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

from memplan.adapters.lora import ALL_LINEAR
from memplan.answers import Finding
from memplan.architectures.registry import MODEL_CLASSES
from memplan.configs.argument_keys import (
    DEFAULTS,
    LENGTHS,
    OF_TRL,
    OTHER_TRAINERS,
    REMOVED_ARGUMENTS,
    SCRIPT_ARGUMENTS,
    TRAINING_ARGUMENTS,
)
from memplan.configs.llama_factory import is_llama_factory
from memplan.configs.section import quoted
from memplan.configs.setup import EngineConfig
from memplan.errors import SpecError, UnsupportedError, did_you_mean

__all__ = ["argument", "fsdp_config", "is_of_trl", "parse_arguments", "switched_on"]

DDP = {
    "ddp_bucket_cap_mb": "bucket_cap_mb",
    "ddp_broadcast_buffers": "broadcast_buffers",
    "ddp_find_unused_parameters": "find_unused_parameters",
    "ddp_static_graph": "static_graph",
}
"""Fields of TrainingArguments, and those of DdpSpec."""
FOUR_BIT = "load_in_4bit"
_IN_4_BITS = (FOUR_BIT, "q_lora", "use_4bit_quantization")
_IN_8_BITS = ("load_in_8bit", "use_8bit_quantization")
_KNOWN = TRAINING_ARGUMENTS | SCRIPT_ARGUMENTS
_ATTENTION = ("attn_implementation", "use_flash_attn", "use_flash_attention_2")
_EVAL_ONLY = ("bf16_full_eval", "fp16_full_eval")


def argument(data: Mapping[str, Any], name: str) -> Any:
    """What TrainingArguments have for a field: as given, or their default."""
    value = data.get(name)
    return DEFAULTS.get(name) if value is None else value


def is_of_trl(data: Mapping[str, Any]) -> bool:
    """Whether arguments are those of TRL's configs."""
    return not OF_TRL.isdisjoint(data) and not is_llama_factory(data)


def switched_on(data: Mapping[str, Any], precision: Literal["bf16", "fp16"]) -> bool:
    """Whether TrainingArguments ask for a mixed precision.

    TRL's take bf16 where neither is said (``self.bf16 = not self.fp16`` of its configs' ``__post_init__``).
    """
    if precision == "bf16" and data.get("bf16") is None and is_of_trl(data):
        return not data.get("fp16")
    return bool(data.get(precision))


def parse_arguments(
    data: Mapping[str, Any], source: str, findings: list[Finding] | None = None, *, known: tuple[str, ...] = ()
) -> EngineConfig:
    """Read arguments; ``known`` are names that somebody else reads.

    Fields of TrainingSpec are in ``training``, those of DDP in ``strategy``, a key that is not known is in a note.
    With ``findings`` a removed argument joins them; without it is noted. Raises SpecError, and UnsupportedError for
    what is not modelled.
    """
    for name, what in OTHER_TRAINERS.items():
        if data.get(name) is not None and name not in known:
            raise UnsupportedError(
                f"{source}: {name}: {what} is not modelled. Check the supervised fine-tuning instead."
            )
    notes = _unread(data, source, findings, known)
    _refuse_unmodelled(data, source)
    training: dict[str, Any] = {
        "micro_batch_size": argument(data, "per_device_train_batch_size"),
        "grad_accum_steps": argument(data, "gradient_accumulation_steps"),
        "optim": argument(data, "optim"),
        "mixed_precision": _mixed_precision(data, source),
        "liger": bool(_first(data, "use_liger_kernel", "use_liger")),
    }
    checkpointing = _first(data, "activation_checkpointing", "gradient_checkpointing")
    if checkpointing is not None:
        training["gradient_checkpointing"] = bool(checkpointing)
    training["use_reentrant"] = _use_reentrant(data, source)
    training |= _sequences(data) | _model(data, source) | _adapters(data, source, notes)
    if _evaluates(data):
        training["eval_batch_size"] = argument(data, "per_device_eval_batch_size")
        if data.get("eval_accumulation_steps") is not None:
            training["eval_accumulation_steps"] = data["eval_accumulation_steps"]
    ddp = {field: data[key] for key, field in DDP.items() if data.get(key) is not None}
    if data.get("auto_find_batch_size"):
        notes.append("auto_find_batch_size: per_device_train_batch_size is where it starts")
    return EngineConfig(source, {"ddp": ddp} if ddp else {}, training, keys=_keys(data), notes=tuple(notes))


def _keys(data: Mapping[str, Any]) -> dict[str, str]:
    """Fields, and the arguments that set them here."""
    length = next((name for name in LENGTHS if data.get(name) is not None), "seq_len")
    nested = isinstance(data.get("lora"), Mapping)
    lora = {field: f"lora.{name}" if nested else f"lora_{name}" for name, field in _LORA.items()}
    four_bits = {f"quantization.{name}": f"bnb_4bit_{name}" for name in ("compute_dtype", "quant_storage")}
    return {
        "micro_batch_size": "per_device_train_batch_size",
        "grad_accum_steps": "gradient_accumulation_steps",
        "eval_batch_size": "per_device_eval_batch_size",
        "attn": next((name for name in _ATTENTION if data.get(name) is not None), _ATTENTION[0]),
        "seq_len": length,
        **{f"ddp.{field}": name for name, field in DDP.items()},
        **{f"lora.{field}": name for field, name in lora.items()},
        "lora_targets": lora["targets"],
        **{field: f"quantization.{name}" if "quantization" in data else name for field, name in four_bits.items()},
    }


_LORA = {"r": "rank", "alpha": "alpha", "dropout": "dropout", "target_modules": "targets", "bias": "bias"}
"""What follows ``lora_`` in the names of arguments, and fields of LoraSpec."""


def fsdp_config(data: Mapping[str, Any], source: str, findings: list[Finding] | None = None) -> dict[str, Any]:
    """Fields of Strategy that ``fsdp`` and ``fsdp_config`` of TrainingArguments come to (``_process_fsdp_args``).

    The defaults are the Trainer's, which FsdpSpec has. Raises SpecError.
    """
    given = data.get("fsdp_config") or {}
    if not isinstance(given, Mapping):
        raise SpecError.at(f"{source}: fsdp_config", given, "is not an object or a file of one", "Write {...}.")
    keys = {str(name).removeprefix("fsdp_"): value for name, value in given.items()}
    version = _number(keys.get("version", 2), f"{source}: fsdp_config.version")
    if version not in (1, 2):
        raise SpecError.at(f"{source}: fsdp_config.version", version, "is not a version of FSDP", "Use 1 or 2.")
    offload = bool(keys.get("cpu_offload"))
    reshard = keys.get("reshard_after_forward")
    for item in _words(data.get("fsdp")):
        if item in ("full_shard", "shard_grad_op"):
            reshard = (item == "full_shard" if version == 2 else item) if reshard is None else reshard
        elif item in ("hybrid_shard", "hybrid_shard_zero2", "no_shard"):
            if version == 2:
                remedy = 'Use full_shard or shard_grad_op, or "version": 1 in fsdp_config.'
                raise SpecError.at(f"{source}: fsdp", item, "is refused by the Trainer with FSDP2", remedy)
            reshard = item if reshard is None else reshard
        elif item == "offload":
            offload = offload or "cpu_offload" not in keys
        elif item not in ("auto_wrap", "true"):
            names = ["full_shard", "shard_grad_op", "offload", "auto_wrap", "hybrid_shard", "no_shard"]
            raise SpecError.at(f"{source}: fsdp", item, "is no option of fsdp", did_you_mean(item, names))
    for name in ("xla", "xla_fsdp_v2"):
        if keys.get(name):
            raise UnsupportedError(f"{source}: fsdp_config.{name}: FSDP of XLA is not modelled. Leave it out.")
    unknown = [name for name in keys if name not in _FSDP_KEYS]
    if unknown and findings is not None:
        findings += [_fsdp_unknown(name, keys[name], source) for name in unknown]
    found: dict[str, Any] = {"version": version, "cpu_ram_efficient_loading": _truth(keys, "cpu_ram_efficient_loading")}
    found["activation_checkpointing"] = _truth(keys, "activation_checkpointing")
    for name in ("auto_wrap_policy", "state_dict_type"):
        if keys.get(name) is not None:
            found[name] = str(keys[name]).upper()
    layers = keys.get("transformer_layer_cls_to_wrap")
    if layers and found.get("auto_wrap_policy", "TRANSFORMER_BASED_WRAP") == "TRANSFORMER_BASED_WRAP":
        found["transformer_layer_cls_to_wrap"] = layers
    if found.get("auto_wrap_policy") == "SIZE_BASED_WRAP":
        found["min_num_params"] = _number(keys.get("min_num_params", 0), f"{source}: fsdp_config.min_num_params")
    if version == 2:
        found["reshard_after_forward"] = str(True if reshard is None else reshard).lower() in ("true", "1")
    else:
        # FullyShardedDataParallelPlugin takes sharding_strategy from the launcher's environment, and prefers it to the
        # Trainer's reshard_after_forward: FULL_SHARD, whatever is asked for.
        found["sharding_strategy"] = "FULL_SHARD"
        found["forward_prefetch"] = _truth(keys, "forward_prefetch")
        found["backward_prefetch"] = str(keys.get("backward_prefetch", "NO_PREFETCH")).upper()
        for name in ("use_orig_params", "sync_module_states", "limit_all_gathers"):
            found[name] = _truth(keys, name, default=True)
        if findings is not None and reshard is not None and str(reshard).lower() != "full_shard":
            findings.append(_fsdp1_ignored(reshard, source))
    return {"kind": "fsdp", "offload_param": "cpu" if offload else "none", "fsdp": found}


_FSDP_KEYS = frozenset(
    {
        *("version", "cpu_offload", "reshard_after_forward", "auto_wrap_policy", "min_num_params"),
        *("transformer_layer_cls_to_wrap", "cpu_ram_efficient_loading", "state_dict_type", "activation_checkpointing"),
        *("forward_prefetch", "backward_prefetch", "use_orig_params", "sync_module_states", "limit_all_gathers"),
        *("xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt", "xla_fsdp_settings"),
    }
)
"""What ``_process_fsdp_args`` reads; it ignores others."""


def _fsdp_unknown(name: str, value: object, source: str) -> Finding:
    return Finding(
        code="misspelt-key",
        severity="error",
        path=f"{source}: fsdp_config.{name}",
        message=f"{quoted(value)} is given to a key that the Trainer does not have, and ignores.",
        remedy=did_you_mean(name, _FSDP_KEYS),
    )


def _fsdp1_ignored(asked: object, source: str) -> Finding:
    return Finding(
        code="fsdp1-sharding-ignored",
        severity="warning",
        path=f"{source}: fsdp",
        message=f"{quoted(asked)} has no effect with FSDP1 under the Trainer: accelerate shards fully.",
        remedy="Use version 2 with reshard_after_forward: false, or an accelerate YAML with fsdp_sharding_strategy.",
    )


# -- parts -------------------------------------------------------------------------------------------------------------


def _unread(data: Mapping[str, Any], source: str, findings: list[Finding] | None, known: tuple[str, ...]) -> list[str]:
    """Notes on arguments that nobody reads; what transformers has removed or is misspelt is a finding."""
    unknown, wrong = [], []
    for name, value in data.items():
        if name in _KNOWN or name in known:
            continue
        if findings is not None and name in REMOVED_ARGUMENTS:
            wrong.append(_removed(name, value, source))
        elif findings is not None and (near := _misspelt(name, known)) is not None:
            wrong.append(_near(name, value, near, source, "LLaMA-Factory does" if known else "TrainingArguments do"))
        else:
            unknown.append(name)
    if findings is not None:
        # A script with arguments of its own may have these as well.
        findings += [each.model_copy(update={"severity": "warning"}) for each in wrong] if unknown else wrong
    return [f"{source}: {', '.join(unknown)} are not read"] if unknown else []


def _misspelt(name: str, known: tuple[str, ...]) -> str | None:
    """The argument that a name differs from by a slip: a letter or two, or dashes for underscores.

    A script has arguments of its own, ``known`` are all that there are.
    """
    import difflib

    names, cutoff = ((*TRAINING_ARGUMENTS, *known), 0.9) if known else (TRAINING_ARGUMENTS, 0.92)
    near = difflib.get_close_matches(name.lower().replace("-", "_"), names, n=1, cutoff=cutoff)
    return near[0] if near else None


def _removed(name: str, value: object, source: str) -> Finding:
    near = REMOVED_ARGUMENTS[name]
    return Finding(
        code="removed-argument",
        severity="error",
        path=f"{source}: {name}",
        message=f"{quoted(value)} is given to an argument that transformers 5 has removed: HfArgumentParser refuses "
        "it, unless the script has it.",
        remedy="Leave it out." if near.startswith("nothing") else f"Use {near}.",
    )


def _near(name: str, value: object, near: str, source: str, whose: str) -> Finding:
    return Finding(
        code="misspelt-argument",
        severity="error",
        path=f"{source}: {name}",
        message=f"{quoted(value)} is given to an argument that {whose} not have: HfArgumentParser refuses "
        "it, unless the script has it.",
        remedy=f"Did you mean {near}?",
    )


def _refuse_unmodelled(data: Mapping[str, Any], source: str) -> None:
    for name, value in data.items():
        key = _KNOWN.get(name)
        if key is None or not key.only or value in key.only or (name in _EVAL_ONLY and not _evaluates(data)):
            continue
        raise UnsupportedError(f"{source}: {name}: {quoted(value)} is not modelled: {key.why}. Leave it out.")


def _first(data: Mapping[str, Any], *names: str) -> Any:
    return next((data[name] for name in names if data.get(name) is not None), None)


def _use_reentrant(data: Mapping[str, Any], source: str) -> bool | None:
    """What is left of these arguments transformers hands to ``torch.utils.checkpoint``, whose default is another."""
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    name = next((name for name in names if data.get(name) is not None), None)
    if name is None:
        return data.get("use_reentrant")
    field, kwargs = f"{source}: {name}", data[name]
    if isinstance(kwargs, str):  # as on a command line
        with suppress(ValueError):
            kwargs = json.loads(kwargs)
    if not isinstance(kwargs, Mapping):
        raise SpecError.at(field, data[name], "is not an object", 'Write {"use_reentrant": false}.')
    for key, idle in (("every_n_layers", 1), ("offload", False)):
        if kwargs.get(key, idle) != idle:
            raise UnsupportedError(f"{field}.{key}: {kwargs[key]!r} is not modelled. Leave it out.")
    found = kwargs.get("use_reentrant")
    if not isinstance(found, bool | None):
        raise SpecError.at(f"{field}.use_reentrant", found, "is not true or false", "Write one.")
    handed_on = kwargs.keys() - {"every_n_layers", "offload"}
    return True if found is None and handed_on else found


def _evaluates(data: Mapping[str, Any]) -> bool:
    strategy = _first(data, "eval_strategy", "evaluation_strategy")
    return strategy is not None and strategy not in ("no", False)


def _mixed_precision(data: Mapping[str, Any], source: str) -> str:
    bf16, fp16 = switched_on(data, "bf16"), switched_on(data, "fp16")
    if bf16 and fp16:
        raise SpecError.at(f"{source}: fp16", True, "cannot go with bf16, which is on too", "Switch one of them off.")
    return "bf16" if bf16 else "fp16" if fp16 else "no"


def _sequences(data: Mapping[str, Any]) -> dict[str, Any]:
    """Scripts pad, unless they are told to pack; run_clm.py cuts blocks from one stream of tokens."""
    name = next((name for name in LENGTHS if data.get(name) is not None), None)
    packed = _first(data, "packed", "packing")
    found = {"packed": bool(name == "block_size" if packed is None else packed)}
    return found if name is None else {"seq_len": data[name], **found}


def _model(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    # peft's examples/sft load in what 4-bit weights are packed into.
    dtype = _first(data, "dtype", "torch_dtype", "bnb_4bit_quant_storage_dtype")
    if dtype is not None:
        found["dtype"] = str(dtype).removeprefix("torch.")
    attn, flash = data.get(_ATTENTION[0]), _first(data, *_ATTENTION[1:])
    if attn is not None or flash:
        found["attn"] = attn if attn is not None else "flash_attention_2"
    if data.get("vocab_size") is not None:
        found["vocab_size"] = data["vocab_size"]
    if "model_class" in data:
        heads = {name: head for head, name in MODEL_CLASSES.items()}
        name = data["model_class"]
        if not isinstance(name, str) or name not in heads:
            remedy = did_you_mean(str(name), heads)
            raise SpecError.at(f"{source}: model_class", name, "is none that a written train.py can train", remedy)
        found["head"] = heads[name]
    return found


def _adapters(data: Mapping[str, Any], source: str, notes: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if data.get("lora") is not None:
        found["lora"] = _from_lora(_mapping(data, "lora", source), data.get("autocast_adapter_dtype", True))
    elif _uses_lora(data):
        names = {
            "lora_r": "rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "lora_target_modules": "targets",
            "lora_modules_to_save": "modules_to_save",
            "lora_bias": "bias",
        }
        given = {field: data[name] for name, field in names.items() if data.get(name) is not None}
        if given.get("targets") == [ALL_LINEAR]:
            given["targets"] = ALL_LINEAR
        # TRL's ModelConfig has 16, Qwen's finetune.py 64, FastChat's train_lora.py 8.
        if "rank" not in given:
            notes.append(f"{source} does not say the rank of LoRA: 16 as in TRL; give --lora-rank")
        found["lora"] = {"rank": 16, **given}
    if data.get("quantization") is not None:
        prepare = data.get("prepare_for_kbit_training", False)
        found["quantization"] = _from_quantization(_mapping(data, "quantization", source), prepare) | _casts(data)
    elif _first(data, *_IN_8_BITS, *_IN_4_BITS):
        values = {
            FOUR_BIT: any(data.get(name) for name in _IN_4_BITS),
            "bnb_4bit_use_double_quant": _first(data, "use_bnb_nested_quant", "use_nested_quant"),
            "bnb_4bit_compute_dtype": data.get("bnb_4bit_compute_dtype"),
            "bnb_4bit_quant_storage": _first(data, "bnb_4bit_quant_storage", "bnb_4bit_quant_storage_dtype") or "uint8",
        }
        found["quantization"] = _from_quantization(values, data.get("prepare_for_kbit_training", True)) | _casts(data)
        notes.append(f"{source}: weights that are not quantized are read as peft prepares them, in float32")
    return found


def _uses_lora(data: Mapping[str, Any]) -> bool:
    asked = _first(data, "use_peft", "use_lora", "use_peft_lora")
    return bool(asked) if asked is not None else data.get("lora_r") is not None


def _mapping(data: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    if not isinstance(data[key], Mapping):
        raise SpecError.at(f"{source}: {key}", data[key], "is not an object", "Write {...}.")
    found: Mapping[str, Any] = data[key]
    return found


def _from_lora(values: Mapping[str, Any], autocast_adapter_dtype: bool) -> dict[str, Any]:
    names = {"r": "rank", "lora_dropout": "dropout", "lora_alpha": "alpha", "target_modules": "targets"}
    found = {names.get(key, key): value for key, value in values.items() if value is not None}
    return found | {"autocast_adapter_dtype": autocast_adapter_dtype}


def _from_quantization(values: Mapping[str, Any], prepare: bool) -> dict[str, Any]:
    if not values.get(FOUR_BIT):
        return {"kind": "int8", "prepare_for_kbit_training": prepare}
    return {
        "kind": "nf4-dq" if values.get("bnb_4bit_use_double_quant") else "nf4",
        "compute_dtype": values.get("bnb_4bit_compute_dtype"),
        "quant_storage": values.get("bnb_4bit_quant_storage", "uint8"),
        "prepare_for_kbit_training": prepare,
    }


def _casts(data: Mapping[str, Any]) -> dict[str, Any]:
    """What train.py casts once there are adapters."""
    return {name: data[name] for name in ("peft_module_casting_to_bf16", "bf16_adapters") if data.get(name) is not None}


def _words(value: object) -> list[str]:
    """The options of ``fsdp``: text, a list, or true, which switches it on."""
    if isinstance(value, str):
        return value.lower().split()
    return [str(each).lower() for each in value] if isinstance(value, (list, tuple)) else []


def _truth(keys: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    return str(keys.get(name, default)).lower() in ("true", "1", "yes")


def _number(value: object, path: str) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise SpecError.at(path, value, "is not a number", "Write one.") from None
