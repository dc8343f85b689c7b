"""LLaMA-Factory's arguments, in the terms of TrainingArguments and of the arguments that memplan knows.

Sources: LLaMA-Factory 0.9 ``hparams/model_args.py``, ``data_args.py``, ``finetuning_args.py``, ``parser.py``,
``model/adapter.py`` (init_adapter), ``model/model_utils/quantization.py``, ``checkpointing.py``. What it does on its
own: weights are loaded in the type of mixed precision, and those that are trained are made float32 unless ZeRO-3 or
FSDP shards them; gradient checkpointing is on; adapters sit on every linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.adapters.lora import ALL_LINEAR
from memplan.configs.section import quoted
from memplan.errors import SpecError, UnsupportedError

__all__ = ["KEYS", "is_llama_factory", "is_of_version_1", "known_names", "to_arguments"]

KEYS = {
    "seq_len": "cutoff_len",
    "lora.rank": "lora_rank",
    "lora.targets": "lora_target",
    "lora.modules_to_save": "additional_target",
    "quantization.kind": "quantization_bit",
}
"""Fields that have another name here than among TrainingArguments and TRL's."""
_MARKS = frozenset({"finetuning_type", "cutoff_len", "template", "dataset_dir", "lora_target", "quantization_bit"})
_STAGES = ("pt", "sft", "rm", "ppo", "dpo", "kto")
_OTHER_STAGES = {
    "rm": "a reward model's step has two sequences",
    "ppo": "a step of reinforcement learning has four models",
    "dpo": "a step of preference training has a reference model",
    "kto": "a step of preference training has a reference model",
}
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_galore": ((False, None), "GaLore's projected gradients"),
    "use_apollo": ((False, None), "APOLLO's projected gradients"),
    "use_badam": ((False, None), "BAdam's blocks"),
    "use_adam_mini": ((False, None), "Adam-mini's states"),
    "use_muon": ((False, None), "its Muon, with AdamW for the rest"),
    "use_llama_pro": ((False, None), "blocks that are added"),
    "use_unsloth": ((False, None), "unsloth's kernels"),
    "use_unsloth_gc": ((False, None), "unsloth's checkpoints on the host"),
    "use_mca": ((False, None), "Megatron-Core"),
    "tensor_model_parallel_size": ((None,), "Megatron-Core"),
    "pipeline_model_parallel_size": ((None,), "Megatron-Core"),
    "use_kt": ((False, None), "experts that KTransformers keeps on the host"),
    "use_dora": ((False, None), "DoRA's magnitudes"),
    "shift_attn": ((False, None), "LongLoRA's attention"),
    "mixture_of_depths": ((None,), "mixture of depths"),
    "neat_packing": ((False, None), "attention within the texts of a pack"),
    "use_dft_loss": ((False, None), "its own loss"),
    "use_eaft_loss": ((False, None), "its own loss"),
    "use_asft_loss": ((False, None), "its own loss"),
    "fp8": ((False, None), "training in 8 bits"),
    "use_ray": ((False, None), "Ray's placement"),
    "quantization_method": (("bnb", "bitsandbytes", None), "quantization other than bitsandbytes'"),
    "quantization_type": (("nf4", None), "4-bit types other than nf4"),
    "upcast_lmhead_output": ((False, None), "an output in float32"),
    "upcast_layernorm": ((False, None), "norms in float32"),
    "pure_bf16": ((False, None), "training without float32 weights"),
    "resize_vocab": (
        (False, None),
        "a vocabulary whose size the tokenizer decides: give --vocab-size, and leave it out",
    ),
}
"""Arguments that change memory and are not modelled: the values that are, and what the others are."""
_IDLE = frozenset(
    {
        *("template", "dataset", "dataset_dir", "eval_dataset", "media_dir", "train_on_prompt", "mask_history"),
        *("streaming", "buffer_size", "mix_strategy", "interleave_probs", "overwrite_cache", "max_samples", "val_size"),
        *("preprocessing_batch_size", "preprocessing_num_workers", "eval_num_beams", "ignore_pad_token_for_loss"),
        *("eval_on_each_dataset", "tool_format", "tokenized_path", "default_system", "enable_thinking"),
        *("cache_dir", "use_fast_tokenizer", "split_special_tokens", "add_tokens", "add_special_tokens"),
        *("model_revision", "low_cpu_mem_usage", "rope_scaling", "moe_aux_loss_coef"),
        *("train_from_scratch", "infer_backend", "offload_folder", "use_kv_cache", "infer_dtype", "hf_hub_token"),
        *("ms_hub_token", "om_hub_token", "print_param_status", "trust_remote_code", "adapter_name_or_path"),
        *("loraplus_lr_ratio", "loraplus_lr_embedding", "use_rslora", "pissa_init", "pissa_iter", "pissa_convert"),
        *("create_new_adapter", "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model"),
        *("compute_accuracy", "disable_shuffling", "early_stopping_steps", "plot_loss", "use_swanlab"),
        *("include_effective_tokens_per_second", "predict_with_generate", "generation_max_length", "do_sample"),
        *("temperature", "top_p", "top_k", "num_beams", "max_new_tokens", "image_max_pixels", "video_max_pixels"),
        *("overwrite_output_dir", "freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"),
        *("pref_beta", "pref_loss", "pref_ftx", "ref_model", "reward_model", "ray_run_name", "ray_num_workers"),
        *("resources_per_worker", "placement_strategy", "ray_storage_path", "ray_init_kwargs"),
    }
)
_READ = frozenset(
    {
        *("stage", "finetuning_type", "flash_attn", "packing", "enable_liger_kernel", "disable_gradient_checkpointing"),
        "use_reentrant_gc",
        *("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "quantization_bit"),
        *("double_quantization", "quantization_device_map", "cutoff_len", "use_v1_kernels"),
    }
)
_ATTENTION = {"auto": "sdpa", "disabled": "eager", "off": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}


def is_llama_factory(data: Mapping[str, Any]) -> bool:
    """Whether arguments are LLaMA-Factory's."""
    return data.get("stage") in _STAGES or not _MARKS.isdisjoint(data)


def is_of_version_1(data: Mapping[str, Any]) -> bool:
    """Whether values are those of LLaMA-Factory's rewrite, which has sections, and other names."""
    return "model" in data and not _OF_VERSION_1.isdisjoint(data)


_OF_VERSION_1 = frozenset({"dist_config", "kernel_config", "quant_config", "sample_backend", "train_dataset"})


def known_names() -> tuple[str, ...]:
    """Arguments that LLaMA-Factory has beside TrainingArguments."""
    return (*_IDLE, *_READ, *_REFUSED)


def to_arguments(data: Mapping[str, Any], source: str, *, shards: bool) -> dict[str, Any]:
    """Return the same arguments with LLaMA-Factory's own ones in memplan's names.

    ``shards`` says whether ZeRO-3 or FSDP holds the weights. Raises SpecError for what LLaMA-Factory refuses,
    UnsupportedError for what is not modelled.
    """
    stage, kind = data.get("stage", "sft"), data.get("finetuning_type", "lora")
    if stage not in _STAGES:
        raise SpecError.at(f"{source}: stage", stage, "is not a stage of LLaMA-Factory", f"Use {', '.join(_STAGES)}.")
    if stage in _OTHER_STAGES:
        raise UnsupportedError(f"{source}: stage: {stage!r} is not modelled: {_OTHER_STAGES[stage]}. Use sft or pt.")
    if not data.get("do_train"):  # as in its files for inference, evaluation and export
        given = "missing" if data.get("do_train") is None else quoted(data["do_train"])
        remedy = "Set it to true to check a training."
        raise UnsupportedError(f"{source}: do_train: {given}: LLaMA-Factory trains only if it is true. {remedy}")
    if kind not in ("lora", "full"):
        raise UnsupportedError(f"{source}: finetuning_type: {kind!r} is not modelled. Use lora or full.")
    for name, (modelled, why) in _REFUSED.items():
        if name in data and data[name] not in modelled:
            raise UnsupportedError(f"{source}: {name}: {quoted(data[name])} is not modelled: {why}.")
    bits = data.get("quantization_bit")
    if bits is not None and kind != "lora":
        remedy = "Use finetuning_type lora."
        raise SpecError.at(f"{source}: quantization_bit", bits, "is refused by LLaMA-Factory with full tuning", remedy)
    if bits not in (None, 4, 8):
        raise UnsupportedError(f"{source}: quantization_bit: {bits!r} is not modelled. Use 4 or 8.")
    own = {name for name in data if name in _READ or name in _REFUSED}
    found = {name: value for name, value in data.items() if name not in own}
    packing = bool(stage == "pt" if data.get("packing") is None else data["packing"])
    flash = str(data.get("flash_attn", "auto")).lower()
    if flash not in _ATTENTION:
        raise UnsupportedError(f"{source}: flash_attn: {flash!r} is not modelled. Use sdpa or fa2.")
    found |= {
        "seq_len": data.get("cutoff_len", 2048),
        "packed": packing,
        "attn_implementation": _ATTENTION[flash],
        "use_liger_kernel": bool(data.get("enable_liger_kernel")),
        "activation_checkpointing": not data.get("disable_gradient_checkpointing", False),
        "use_reentrant": data.get("use_reentrant_gc", True),
    }
    found.pop("gradient_checkpointing", None)
    compute = "bfloat16" if data.get("bf16") else "float16" if data.get("fp16") else "auto"
    casts = kind == "full" and not shards
    found["dtype"] = "float32" if casts else compute
    if kind == "lora":
        found["lora"] = _lora(data)
    if bits is not None:
        found["quantization"] = {"load_in_8bit": True} if bits == 8 else _four_bits(data, compute)
        found["prepare_for_kbit_training"] = False
    if kind == "lora" and "ddp_find_unused_parameters" not in data:
        found["ddp_find_unused_parameters"] = False
    return found


def _lora(data: Mapping[str, Any]) -> dict[str, Any]:
    rank = data.get("lora_rank", 8)
    targets = data.get("lora_target", "all")
    names = [name.strip() for name in targets.split(",")] if isinstance(targets, str) else targets
    return {
        "r": rank,
        "lora_alpha": data.get("lora_alpha"),
        "lora_dropout": data.get("lora_dropout", 0.0),
        "target_modules": ALL_LINEAR if names == ["all"] else names,
        **({"modules_to_save": data["additional_target"]} if data.get("additional_target") else {}),
    }


def _four_bits(data: Mapping[str, Any], compute: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_use_double_quant": data.get("double_quantization", True),
    }
    if compute != "auto":
        values |= {"bnb_4bit_compute_dtype": compute, "bnb_4bit_quant_storage": compute}
    return values
