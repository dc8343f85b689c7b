"""A run that is about to start, read off its own objects as its files would say it.

Nothing is imported that the script has not imported: objects are known by what they have. No weight is read.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memplan.architectures.registry import ALL_ATTENTION
from memplan.catalog.detect import Device
from memplan.configs.run import is_arguments
from memplan.errors import SpecError, UnsupportedError

__all__ = [
    "Live",
    "as_module",
    "asked_for",
    "counted",
    "free_memory",
    "made_whole",
    "rank",
    "read",
    "slice_memory",
    "world",
]

_ALWAYS = ("per_device_train_batch_size", "gradient_accumulation_steps", "optim", "bf16")
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
    said: dict[str, Any]
    """TrainingArguments and what the model adds to them, by the names that files have."""
    engine: Any = None
    """A DeepSpeed or accelerate config, as values or as a path; None is what the arguments say."""
    training: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainingSpec that the objects know beside."""
    module: Any = None
    """The model itself, where there is one."""
    on_cpu: bool = False
    """Whether it is to be trained on the CPU."""
    of_a_trainer: bool = False
    unread: str | None = None
    """Class of an optimizer that nothing is known of."""
    as_written: bool = False
    """Whether its arguments are values of a file, which may be wrong, and no object of transformers."""


def read(model: Any, args: Any = None) -> Live:
    """Read a model (or a Trainer, which has both) and what it is trained by.

    Raises UnsupportedError for what memplan does not model, SpecError for arguments beside a Trainer.
    """
    if hasattr(model, "args") and hasattr(model, "model"):
        if args is not None and args is not model.args:
            raise SpecError("args: are given beside a Trainer, which has its own. Leave them out.")
        return _beside(read(model.model, model.args), model)
    model = _unwrapped(model)
    values, said = _model(model)
    found = _trained_by(values, said, args)
    module = model if hasattr(model, "named_parameters") else None
    return dataclasses.replace(found, module=module)


def asked_for(training: Any) -> dict[str, Any]:
    """The fields that a ``training=`` says, whatever it is written as. Raises SpecError."""
    from memplan.case import training_spec

    spec = training_spec(training)
    return {name: getattr(spec, name) for name in spec.model_fields_set}


_OF_THE_MODEL = frozenset(
    {"attn_implementation", "dtype", "lora", "autocast_adapter_dtype", "quantization", "prepare_for_kbit_training"}
)


def as_module(live: Live) -> Live:
    """The same run, whose model is to be traced as it is."""
    said = {name: value for name, value in live.said.items() if name not in _OF_THE_MODEL}
    return dataclasses.replace(live, model=live.module, said=said)


def _trained_by(values: Any, said: dict[str, Any], args: Any) -> Live:
    if args is None:
        return Live(values, said, _of_environment(), _precision_of_environment())
    written = isinstance(args, Mapping) and is_arguments(args)
    if written or hasattr(args, "per_device_train_batch_size"):
        arguments = {**said, **(args if written else _arguments(args))}
        on_cpu = bool(arguments.pop("use_cpu", False))
        training = {} if arguments.get("bf16") or arguments.get("fp16") else _precision_of_environment()
        engine = None if arguments.get("deepspeed") or arguments.get("fsdp") else _of_environment()
        return Live(values, arguments, engine, training, on_cpu=on_cpu, of_a_trainer=True, as_written=written)
    if hasattr(args, "state") and hasattr(args, "gradient_accumulation_steps"):
        return _accelerator(values, said, args)
    if getattr(args, "deepspeed_config", None) is not None:  # accelerate's DeepSpeedPlugin
        return Live(values, said, args.deepspeed_config)
    if hasattr(args, "fsdp_version"):
        return Live(values, said, _fsdp(args))
    return Live(values, said, getattr(args, "config", args))  # HfDeepSpeedConfig has one


def _unwrapped(model: Any) -> Any:
    """The model within DistributedDataParallel, a DeepSpeedEngine or what torch.compile made."""
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if hasattr(model, "named_parameters") and hasattr(inner, "named_parameters"):
            return _unwrapped(inner)
    return model


def _beside(live: Live, trainer: Any) -> Live:
    """What a Trainer knows beside its model and arguments: whether it will evaluate, and keep what that gives."""
    arguments = dict(live.said)
    if trainer.eval_dataset is None:
        arguments.pop("eval_strategy", None)
    elif trainer.compute_metrics is None:
        arguments.pop("eval_accumulation_steps", None)  # losses alone are kept
    optimizer = getattr(trainer, "optimizer", None)  # one that was given: the Trainer makes its own as it trains
    unread = None
    if optimizer is not None:
        known = _optim(optimizer)
        unread = type(optimizer).__name__ if known is None else None
        arguments["optim"] = known or arguments["optim"]
    return dataclasses.replace(live, said=arguments, unread=unread)


def _optim(optimizer: Any) -> str | None:
    """What TrainingArguments call a torch optimizer."""
    inner = getattr(optimizer, "optimizer", optimizer)  # AcceleratedOptimizer
    groups = getattr(inner, "param_groups", None) or [{}]
    name = type(inner).__name__ if type(inner).__module__.startswith("torch.") else ""
    if name == "AdamW" and not groups[0].get("amsgrad"):
        return "adamw_torch_fused" if groups[0].get("fused") else "adamw_torch"
    return "sgd" if name == "SGD" and not groups[0].get("momentum") else None


def _arguments(args: Any) -> dict[str, Any]:
    """The fields that are not at the defaults of TrainingArguments, as JSON has them.

    A trl config has defaults of its own, which are asked for as much as what is written.
    """
    values = args.to_dict() if hasattr(args, "to_dict") else dataclasses.asdict(args)
    own = _defaults(type(args))
    base = next((each for each in type(args).__mro__ if each.__name__ == "TrainingArguments"), type(args))
    defaults = {**own, **_defaults(base)}
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


def _defaults(cls: type) -> dict[str, Any]:
    return {each.name: each.default for each in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}


def _accelerator(model: Any, said: dict[str, Any], accelerator: Any) -> Live:
    state = accelerator.state
    training = {
        "mixed_precision": accelerator.mixed_precision,
        "grad_accum_steps": accelerator.gradient_accumulation_steps,
    }
    on_cpu = getattr(getattr(accelerator, "device", None), "type", "") == "cpu"
    plugin = getattr(state, "deepspeed_plugin", None)
    if plugin is not None:
        return Live(model, said, plugin.deepspeed_config, training, on_cpu=on_cpu)
    plugin = getattr(state, "fsdp_plugin", None)
    engine = None if plugin is None else _fsdp(plugin)
    return Live(model, said, engine, training, on_cpu=on_cpu)


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
            _RENAMED.get(name, name.lower()): _plain(value)
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
            _RENAMED.get(name, name.removeprefix(prefix).removeprefix("ACCELERATE_").lower()): _plain(value)
            for name, value in environ.items()
            if (name.startswith(prefix) or name in _RENAMED) and value not in ("", "None", "none")
        }
        return {"distributed_type": "DEEPSPEED", "mixed_precision": mixed, "deepspeed_config": keys}
    return None


_RENAMED = {
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "fsdp_transformer_layer_cls_to_wrap",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "zero3_init_flag",
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "deepspeed_moe_layer_cls_names",
}
"""Variables that are not called as the key of accelerate's config file, from which ``accelerate launch`` sets them
(accelerate 1.15, ``utils/launch.py``)."""


def _precision_of_environment(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What ``accelerate launch`` was told; TrainingArguments that ask for none take it."""
    asked = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return {"mixed_precision": asked} if asked in ("bf16", "fp16") else {}


def _plain(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


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
    _refuse_spread(base)
    adapters, quantization = _adapters(model), _quantization(config)
    if adapters is None and quantization is None and (_is_frozen_in_part(model) or len(_dtypes(base)) > 1):
        return model, _checkpointing(base)  # which weights are trained, and in what, is known by a trace alone
    said: dict[str, Any] = {"attn_implementation": _attention(config)} | _checkpointing(base)
    dtype = str(getattr(base, "dtype", "")).removeprefix("torch.")
    if dtype and quantization is None:
        said["dtype"] = dtype
    if adapters is not None:
        said["lora"] = adapters
        if dtype != "float32" and quantization is None and _trained_in(model) == {dtype}:
            said["autocast_adapter_dtype"] = False
    if quantization is not None:
        said["quantization"] = quantization
        said["prepare_for_kbit_training"] = _dtypes(base) == {"float32"}
    values = _values(config.to_dict(), config)
    values["architectures"] = [type(base).__name__.removeprefix("FSDP")]
    values.pop("quantization_config", None)
    return values, {name: value for name, value in said.items() if value is not None}


def _refuse_spread(model: Any) -> None:
    """A model that ``device_map`` has put on several devices is trained by all of them in turn."""
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(places) > 1:
        listed = ", ".join(sorted(places))
        remedy = "Leave device_map out: every rank puts the model on its own GPU."
        raise UnsupportedError.at(
            "device_map", listed, "are several devices, on which training is not modelled", remedy
        )


def _attention(config: Any) -> str | None:
    name = getattr(config, "_attn_implementation", None)
    if name is not None and name not in ALL_ATTENTION:  # the model has it, so transformers does
        raise UnsupportedError.at("attn_implementation", name, "is not modelled", f"Known: {', '.join(ALL_ATTENTION)}.")
    return name


def _checkpointing(model: Any) -> dict[str, Any]:
    """What ``gradient_checkpointing_enable`` has left; a Trainer is asked by its arguments."""
    on = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    if not on:
        return {}
    how = getattr(getattr(on[0], "_gradient_checkpointing_func", None), "keywords", {})
    kwargs = {"gradient_checkpointing_kwargs": dict(how)} if "use_reentrant" in how else {}
    return {"gradient_checkpointing": True, **kwargs}


def _dtypes(model: Any) -> set[str]:
    """Of the weights that nobody has adapted or quantized, nor transformers keeps in float32 by itself."""
    kept = [
        name
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for name in getattr(model, attribute, None) or ()
    ]
    return {
        str(parameter.dtype).removeprefix("torch.")
        for name, parameter in model.named_parameters()
        if parameter.dtype.is_floating_point
        and not hasattr(parameter, "quant_state")
        and "lora_" not in name
        and not any(part in name for part in kept)
    }


def _trained_in(model: Any) -> set[str]:
    return {str(each.dtype).removeprefix("torch.") for each in model.parameters() if each.requires_grad}


def counted(model: Any) -> tuple[int, int]:
    """Elements of all parameters and of those that are trained, whoever has packed or sharded them."""

    def elements(parameter: Any) -> int:
        for whole in (getattr(parameter, "ds_numel", None), getattr(parameter, "quant_state", None)):
            if isinstance(whole, int):  # ZeRO-3
                return whole
            if whole is not None:  # bitsandbytes
                return math.prod(whole.shape)
        return int(parameter.numel())

    sizes = [(elements(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


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


def made_whole(model: Any) -> bool:
    """Whether a model's weights are there, none of them partitioned by DeepSpeed's ``zero.Init``."""
    weights = list(model.parameters())
    return any(not each.is_meta for each in weights) and not any(hasattr(each, "ds_id") for each in weights)


# -- where it runs -----------------------------------------------------------------------------------------------------


def world(environ: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Ranks in all and at most on each node, as the process group, the launcher or SLURM says; None without one."""
    group = _process_group()
    total = group.get_world_size() if group is not None else _number(environ, "WORLD_SIZE")
    if not total:
        return None
    local = _number(environ, "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    nodes = _number(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    if not local and nodes:
        local = -(-total // nodes)
    elif not local and _number(environ, "SLURM_NTASKS", "SLURM_NPROCS") == total:
        local = _number(environ, "SLURM_NTASKS_PER_NODE")
    return total, min(local or total, total)


def rank(environ: Mapping[str, str] = os.environ) -> int:
    """This process's, 0 without a launcher."""
    group = _process_group()
    return group.get_rank() if group is not None else _number(environ, "RANK") or 0


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    """The first of these variables that is a number; what is none is no launcher's."""
    found = (environ.get(name, "") for name in names)
    return next((int(text) for text in found if text.isascii() and text.isdigit() and len(text) < 10), None)


def _process_group() -> Any:
    distributed = sys.modules.get("torch.distributed")
    return (
        distributed if distributed is not None and distributed.is_available() and distributed.is_initialized() else None
    )


def free_memory(device: Device, context: int) -> int:
    """Bytes that this process may have of a GPU: what nobody uses, and what it has itself.

    ``context`` is what a CUDA context takes, of which the process has one if torch has been put to use.
    """
    seen = device.memory - (device.reserved or 0)
    return _of_this_process(seen, device.free, context)


def slice_memory(context: int, environ: Mapping[str, str] = os.environ) -> int:
    """Bytes that this process may have of its MIG instance, as in :func:`free_memory`; it has one, which torch knows.

    NVML names instances only to who asks for each by its UUID. Starts torch's CUDA context, as the run will.
    Raises UnsupportedError without torch.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        remedy = "Say what the instance has, by cluster=memplan.ClusterSpec(gpu=..., gpu_memory=...)."
        raise UnsupportedError(f"gpu: is split by MIG, and torch is not there to ask. {remedy}")
    free, total = torch.cuda.mem_get_info()
    return _of_this_process(total, free, context)


def _of_this_process(seen: int, free: int, context: int) -> int:
    torch = sys.modules.get("torch")
    own, fraction = 0, 1.0
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        own = torch.cuda.memory_reserved() + context
        fraction = torch.cuda.get_per_process_memory_fraction()
    free = min(seen, free + own)
    return min(free, int(seen * fraction) + (context if fraction < 1 else 0))
