"""A run that is about to start, read off its own objects as its files would say it.

Nothing is imported that the script has not imported: objects are known by what they have. No weight is read.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memplan.catalog.detect import Device

__all__ = ["Live", "free_memory", "rank", "read", "world"]

_ALWAYS = ("per_device_train_batch_size", "gradient_accumulation_steps", "optim")
"""Of TrainingArguments, what is read even where it is the default."""
_LENGTHS = ("max_length", "max_seq_length")
"""Of trl's configs, tokens of a sequence."""
_FSDP_KEYS = {
    "fsdp_version": "fsdp_version",
    "reshard_after_forward": "fsdp_reshard_after_forward",
    "cpu_ram_efficient_loading": "fsdp_cpu_ram_efficient_loading",
    "activation_checkpointing": "fsdp_activation_checkpointing",
    "transformer_cls_names_to_wrap": "fsdp_transformer_layer_cls_to_wrap",
    "min_num_params": "fsdp_min_num_params",
    "use_orig_params": "fsdp_use_orig_params",
    "sync_module_states": "fsdp_sync_module_states",
    "forward_prefetch": "fsdp_forward_prefetch",
}
"""Fields of accelerate's FullyShardedDataParallelPlugin -> keys of its config file."""


@dataclass(frozen=True, slots=True)
class Live:
    """What a script is about to run."""

    model: Any
    """Values of a config, a name, or a module that has to be traced."""
    arguments: dict[str, Any] | None
    """TrainingArguments and what a script adds to them, by the names that files have; None without a Trainer."""
    engine: Any = None
    """A DeepSpeed or accelerate config, as values or as a path; None is what the arguments say."""
    training: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainingSpec that the objects know beside."""


def read(model: Any, args: Any = None, *, on_cpu: bool = True) -> Live:
    """Read a model (or a Trainer, which has both) and what it is trained by; unless ``on_cpu``, for a GPU anyway."""
    if args is None and hasattr(model, "args") and hasattr(model, "model"):
        return _beside(read(model.model, model.args, on_cpu=on_cpu), model)
    values, said = _model(model)
    if args is None:
        return Live(values, said or None, _of_environment(), {})
    if hasattr(args, "per_device_train_batch_size"):
        arguments = {**said, **_arguments(args)}
        if not on_cpu:
            arguments.pop("use_cpu", None)
        return Live(values, arguments, None if arguments.get("deepspeed") else _of_environment())
    if hasattr(args, "state") and hasattr(args, "gradient_accumulation_steps"):
        return _accelerator(values, said, args)
    if getattr(args, "deepspeed_config", None) is not None:  # accelerate's DeepSpeedPlugin
        return Live(values, said or None, args.deepspeed_config)
    if hasattr(args, "fsdp_version"):
        return Live(values, said or None, _fsdp(args))
    config = getattr(args, "config", args)  # HfDeepSpeedConfig has one
    return Live(values, said or None, config)


def _beside(live: Live, trainer: Any) -> Live:
    """What a Trainer knows beside its model and arguments: whether it will evaluate, and keep what that gives."""
    arguments = dict(live.arguments or {})
    if trainer.eval_dataset is None:
        arguments.pop("eval_strategy", None)
    elif trainer.compute_metrics is None:
        arguments.pop("eval_accumulation_steps", None)  # losses alone are kept
    return dataclasses.replace(live, arguments=arguments)


def _arguments(args: Any) -> dict[str, Any]:
    """The fields that are not at their defaults, as JSON has them."""
    values = args.to_dict() if hasattr(args, "to_dict") else dataclasses.asdict(args)
    defaults = {each.name: each.default for each in dataclasses.fields(args)} if dataclasses.is_dataclass(args) else {}
    found: dict[str, Any] = {}
    for name, value in values.items():
        default = defaults.get(name, dataclasses.MISSING)
        same = value == default or value == getattr(default, "value", default)
        if value is not None and (name in _ALWAYS or not same) and not name.startswith("_"):
            found[name] = value
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if found.get(name) is False:  # what it is unless somebody asks for it
            del found[name]
    for name in _LENGTHS:
        if getattr(args, name, None) is not None:
            found["seq_len"] = found.pop(name, None) or getattr(args, name)
    if getattr(args, "output_dir", None) is not None:
        found["output_dir"] = args.output_dir
    return found


def _accelerator(model: Any, said: dict[str, Any], accelerator: Any) -> Live:
    state = accelerator.state
    training = {
        "mixed_precision": accelerator.mixed_precision,
        "grad_accum_steps": accelerator.gradient_accumulation_steps,
    }
    plugin = getattr(state, "deepspeed_plugin", None)
    if plugin is not None:
        return Live(model, said or None, plugin.deepspeed_config, training)
    plugin = getattr(state, "fsdp_plugin", None)
    engine = None if plugin is None else _fsdp(plugin)
    return Live(model, said or None, engine, training)


def _fsdp(plugin: Any) -> dict[str, Any]:
    """accelerate's config file of a plugin."""
    found: dict[str, Any] = {}
    for name, key in _FSDP_KEYS.items():
        value = getattr(plugin, name, None)
        if value is not None:
            found[key] = ",".join(value) if isinstance(value, (list, tuple, set)) else value
    strategy = getattr(plugin, "sharding_strategy", None)
    if found.get("fsdp_version") == 1 and strategy is not None:
        found["fsdp_sharding_strategy"] = getattr(strategy, "name", str(strategy))
        found.pop("fsdp_reshard_after_forward", None)
    offload = getattr(plugin, "cpu_offload", None)
    named = type(offload).__name__ == "CPUOffloadPolicy"
    found["fsdp_offload_params"] = named or bool(getattr(offload, "offload_params", offload is True))
    policy = getattr(plugin, "auto_wrap_policy", None)
    name = getattr(getattr(policy, "func", policy), "__name__", "")
    if "size_based" in name:
        found["fsdp_auto_wrap_policy"] = "SIZE_BASED_WRAP"
    elif policy is None:
        found["fsdp_auto_wrap_policy"] = "NO_WRAP"
    else:
        found["fsdp_auto_wrap_policy"] = "TRANSFORMER_BASED_WRAP"
    kind = getattr(plugin, "state_dict_type", None)
    if kind is not None:
        found["fsdp_state_dict_type"] = getattr(kind, "name", str(kind))
    return {"distributed_type": "FSDP", "fsdp_config": found}


def _of_environment(environ: Mapping[str, str] = os.environ) -> Any:
    """What ``accelerate launch`` was told, as its config file has it; None without it."""

    def on(name: str) -> bool:
        return environ.get(name, "").lower() in ("1", "true", "yes")

    mixed = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if on("ACCELERATE_USE_FSDP"):
        keys = {
            name.lower(): _plain(value)
            for name, value in environ.items()
            if name.startswith("FSDP_") and value not in ("", "None")
        }
        return {"distributed_type": "FSDP", "mixed_precision": mixed, "fsdp_config": keys}
    if on("ACCELERATE_USE_DEEPSPEED"):
        path = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if path and path != "None":
            return path
        prefix = "ACCELERATE_DEEPSPEED_"
        keys = {
            name.removeprefix(prefix).lower(): _plain(value)
            for name, value in environ.items()
            if name.startswith(prefix) and value not in ("", "None", "none")
        }
        return {"distributed_type": "DEEPSPEED", "mixed_precision": mixed, "deepspeed_config": keys}
    return None


def _plain(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.isdigit() else text


# -- the model ---------------------------------------------------------------------------------------------------------


def _model(model: Any) -> tuple[Any, dict[str, Any]]:
    """What to resolve the model by, and what it says of the run."""
    if not hasattr(model, "named_parameters"):
        config = model.to_dict() if hasattr(model, "to_dict") and hasattr(model, "model_type") else model
        return (_values(config, model) if isinstance(config, Mapping) else config), {}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    if config is None or not getattr(config, "model_type", ""):
        return model, {}
    adapters, frozen = _adapters(model), _is_frozen_in_part(model)
    if frozen and adapters is None:
        return model, {}  # which weights are trained is known by a trace alone
    said: dict[str, Any] = {"attn_implementation": getattr(config, "_attn_implementation", None)}
    dtype = str(getattr(base, "dtype", "")).removeprefix("torch.")
    quantization = _quantization(config)
    if dtype and quantization is None:
        said["dtype"] = dtype
    if adapters is not None:
        said["lora"] = adapters
    if quantization is not None:
        said["quantization"] = quantization
    if getattr(base, "is_gradient_checkpointing", False):
        said["gradient_checkpointing"] = True
    values = _values(config.to_dict(), config)
    values["architectures"] = [type(base).__name__.removeprefix("FSDP")]
    values.pop("quantization_config", None)
    return values, {name: value for name, value in said.items() if value is not None}


def _values(values: Mapping[str, Any], config: Any) -> dict[str, Any]:
    found = {name: value for name, value in values.items() if name != "transformers_version"}
    for name in ("dtype", "torch_dtype"):
        if name in found and found[name] is not None:
            found[name] = str(found[name]).removeprefix("torch.")
    if not found.get("architectures") and hasattr(config, "model_type"):
        found["architectures"] = [_class_of(config.model_type)]
    found["_name_or_path"] = getattr(config, "_name_or_path", "") or found.get("_name_or_path") or "model"
    return found


def _class_of(model_type: str) -> str:
    """What the Auto classes would make of a config that names no class."""
    from transformers.models.auto import modeling_auto as auto  # whoever has a config has imported it

    for names in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ):
        if model_type in names:
            return str(names[model_type])
    return ""


def _is_frozen_in_part(model: Any) -> bool:
    return not all(parameter.requires_grad for parameter in model.parameters())


def _adapters(model: Any) -> dict[str, Any] | None:
    """Arguments of the active LoraConfig; None without adapters."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    active = model.active_adapter if isinstance(getattr(model, "active_adapter", None), str) else next(iter(configs))
    config = configs[active]
    found: dict[str, Any] = {
        "peft_type": str(getattr(config.peft_type, "value", config.peft_type)),
        "r": getattr(config, "r", None),
        "lora_alpha": getattr(config, "lora_alpha", None),
        "lora_dropout": getattr(config, "lora_dropout", None),
        "bias": getattr(config, "bias", None),
        "modules_to_save": config.modules_to_save and sorted(config.modules_to_save),
    }
    targets = getattr(config, "target_modules", None)
    found["target_modules"] = targets if isinstance(targets, str) or not targets else sorted(targets)
    if found["peft_type"].upper() == "LORA":
        del found["peft_type"]
    return {name: value for name, value in found.items() if value is not None}


def _quantization(config: Any) -> dict[str, Any] | None:
    """Arguments of BitsAndBytesConfig, for what bitsandbytes has quantized."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    values = given if isinstance(given, Mapping) else given.to_dict()
    if not (values.get("load_in_4bit") or values.get("load_in_8bit")):
        return None
    names = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    found = {name: values[name] for name in names if values.get(name)}
    for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
        if values.get(name) is not None:
            found[name] = str(values[name]).removeprefix("torch.")
    return found


# -- where it runs -----------------------------------------------------------------------------------------------------


def world(environ: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Ranks in all and on each node, as the launcher says; None without one."""
    total = environ.get("WORLD_SIZE", "")
    if not total.isdigit() or int(total) < 1:
        return None
    local = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or total
    return int(total), int(local) if local.isdigit() and int(local) else int(total)


def rank(environ: Mapping[str, str] = os.environ) -> int:
    """This process's, 0 without a launcher."""
    number = environ.get("RANK", "0")
    return int(number) if number.isdigit() else 0


def free_memory(device: Device, context: int) -> int:
    """Bytes that this process may have of a GPU: what nobody uses, and what it has itself.

    ``context`` is what a CUDA context takes, of which the process has one if torch has been put to use.
    """
    seen = device.memory - (device.reserved or 0)
    torch = sys.modules.get("torch")
    own, fraction = 0, 1.0
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        own = torch.cuda.memory_reserved() + context
        fraction = torch.cuda.get_per_process_memory_fraction()
    free = min(seen, device.free + own)
    return min(free, int(seen * fraction) + (context if fraction < 1 else 0))
