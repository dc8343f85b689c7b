"""Every field of TrainingArguments, and the arguments of known scripts: what they set, or why they do not matter.

Sources: transformers 5.23 ``training_args.py`` (TrainingArguments), ``examples/pytorch/language-modeling/run_clm.py``
(ModelArguments, DataTrainingArguments), TRL ``trainer/model_config.py`` and ``trainer/sft_config.py``, FastChat
``train/train.py``. ``tests/configs/test_arguments.py`` compares the first table with the dataclass.
"""

from __future__ import annotations

from memplan.configs.keys import Key, _idle, _only, _sets

__all__ = [
    "DEFAULTS",
    "LENGTHS",
    "OF_TRL",
    "OTHER_TRAINERS",
    "REMOVED_ARGUMENTS",
    "SCRIPT_ARGUMENTS",
    "TRAINING_ARGUMENTS",
]

_DATA = "it is about the data"
_LOGS = "it writes logs"
_SCHEDULE = "it changes the learning rate, or how long"
_SAVES = "it says when and where something is saved"
_HUB = "it is about the hub"
_EVAL = "it says when or what is evaluated"
_NUMBERS = "it changes numbers, not sizes"
_LOADER = "it is about the data loader's processes"

TRAINING_ARGUMENTS: dict[str, Key] = {
    "per_device_train_batch_size": _sets(int, "micro_batch_size"),
    "gradient_accumulation_steps": _sets(int, "grad_accum_steps"),
    "optim": _sets(str, "optim"),
    "bf16": _sets(bool, "mixed_precision"),
    "fp16": _sets(bool, "mixed_precision"),
    "activation_checkpointing": _sets(bool, "gradient_checkpointing"),
    "gradient_checkpointing": _sets(bool, "gradient_checkpointing"),
    "use_liger_kernel": _sets(bool, "liger"),
    "eval_strategy": _sets(str, "eval_batch_size"),
    "per_device_eval_batch_size": _sets(int, "eval_batch_size"),
    "eval_accumulation_steps": _sets(int, "eval_accumulation_steps"),
    "deepspeed": _sets(str, "strategy"),
    "fsdp": _sets(str, "strategy"),
    "fsdp_config": _sets(str, "fsdp"),
    "ddp_bucket_cap_mb": _sets(int, "ddp"),
    "ddp_broadcast_buffers": _sets(bool, "ddp"),
    "ddp_find_unused_parameters": _sets(bool, "ddp"),
    "ddp_static_graph": _sets(bool, "ddp"),
    "label_smoothing_factor": _only(float, 0, None, why="the loss that LabelSmoother takes of all logits"),
    "torch_compile": _only(bool, False, None, why="torch.compile fuses operations and plans memory of its own"),
    "torch_compile_backend": _only(str, None, why="it switches torch_compile on"),
    "torch_compile_mode": _only(str, None, why="it switches torch_compile on"),
    "use_cpu": _only(bool, False, None, why="it trains on the CPU"),
    "parallelism_config": _only(dict, None, why="tensor, context and sequence parallelism"),
    "bf16_full_eval": _only(bool, False, None, why="evaluation that casts the model to 16 bit"),
    "fp16_full_eval": _only(bool, False, None, why="evaluation that casts the model to 16 bit"),
    "learning_rate": _idle(_NUMBERS, float),
    "weight_decay": _idle(_NUMBERS, float),
    "adam_beta1": _idle(_NUMBERS, float),
    "adam_beta2": _idle(_NUMBERS, float),
    "adam_epsilon": _idle(_NUMBERS, float),
    "max_grad_norm": _idle("the norm is taken with and without it", float),
    "optim_args": _idle(_NUMBERS, str),
    "optim_target_modules": _idle("optim says whether it is read", str),
    "tf32": _idle(_NUMBERS, bool),
    "average_tokens_across_devices": _idle(_NUMBERS, bool),
    "activation_checkpointing_kwargs": _sets(dict, "use_reentrant"),
    "gradient_checkpointing_kwargs": _sets(dict, "use_reentrant"),
    "liger_kernel_config": _idle("use_liger_kernel says whether it is read", dict),
    "use_cache": _idle("the Trainer's models have it off where it would matter", bool),
    "neftune_noise_alpha": _idle("its noise is one tensor as wide as the embeddings' output", float),
    "torch_empty_cache_steps": _idle("it gives cached memory back", int),
    "auto_find_batch_size": _idle("it starts with the batch that is given", bool),
    "local_rank": _idle("the launcher sets it", int),
    "max_steps": _idle(_SCHEDULE, int),
    **dict.fromkeys(("num_train_epochs", "warmup_steps"), _idle(_SCHEDULE, float)),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler_kwargs"), _idle(_SCHEDULE, str)),
    **dict.fromkeys(("eval_steps", "eval_delay"), _idle(_EVAL, float)),
    **dict.fromkeys(
        (
            *("prediction_loss_only", "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object"),
            *("batch_eval_metrics", "do_train", "do_eval", "do_predict"),
        ),
        _idle(_EVAL, bool),
    ),
    "include_for_metrics": _idle(_EVAL, str),
    **dict.fromkeys(("save_strategy", "resume_from_checkpoint", "output_dir"), _idle(_SAVES, str)),
    **dict.fromkeys(("save_steps",), _idle(_SAVES, float)),
    **dict.fromkeys(("save_total_limit",), _idle(_SAVES, int)),
    **dict.fromkeys(
        (
            *("save_only_model", "save_on_each_node", "enable_jit_checkpoint", "load_best_model_at_end"),
            *("ignore_data_skip", "restore_callback_states_from_checkpoint"),
        ),
        _idle(_SAVES, bool),
    ),
    **dict.fromkeys(("metric_for_best_model",), _idle(_SAVES, str)),
    **dict.fromkeys(("greater_is_better",), _idle(_SAVES, bool)),
    **dict.fromkeys(
        (
            *("logging_strategy", "log_level", "log_level_replica", "include_num_input_tokens_seen", "run_name"),
            *("report_to", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "debug"),
        ),
        _idle(_LOGS, str),
    ),
    "logging_steps": _idle(_LOGS, float),
    **dict.fromkeys(
        (
            *("logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "disable_tqdm"),
            "skip_memory_metrics",
        ),
        _idle(_LOGS, bool),
    ),
    **dict.fromkeys(
        ("hub_token", "hub_model_id", "hub_strategy", "hub_revision"),
        _idle(_HUB, str),
    ),
    **dict.fromkeys(("push_to_hub", "hub_private_repo", "hub_always_push"), _idle(_HUB, bool)),
    **dict.fromkeys(("seed", "data_seed"), _idle(_NUMBERS, int)),
    "full_determinism": _idle(_NUMBERS, bool),
    "accelerator_config": _idle("it is about how batches are made", dict),
    **dict.fromkeys(
        (
            *("dataloader_drop_last", "dataloader_pin_memory", "dataloader_persistent_workers"),
            *("dataloader_in_order", "remove_unused_columns"),
        ),
        _idle(_LOADER, bool),
    ),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_prefetch_factor", "ddp_timeout"), _idle(_LOADER, int)),
    **dict.fromkeys(("dataloader_multiprocessing_context", "ddp_backend"), _idle(_LOADER, str)),
    **dict.fromkeys(("label_names", "train_sampling_strategy", "length_column_name"), _idle(_DATA, str)),
}
"""Fields of TrainingArguments in transformers 5.23; ``only`` are the values that are modelled."""

DEFAULTS: dict[str, object] = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "optim": "adamw_torch_fused",
    "max_grad_norm": 1.0,
    "learning_rate": 5e-5,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "warmup_steps": 0,
}
"""What TrainingArguments are where nothing is given, as far as it matters here."""

REMOVED_ARGUMENTS: dict[str, str] = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps, which takes a share below 1",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "use_mps_device": "nothing",
    "fp16_backend": "fp16",
    "fp16_opt_level": "fp16",
    "half_precision_backend": "fp16 or bf16",
    "fsdp_min_num_params": "fsdp_config: min_num_params",
    "fsdp_transformer_layer_cls_to_wrap": "fsdp_config: transformer_layer_cls_to_wrap",
    "sharded_ddp": "fsdp",
    "tpu_num_cores": "nothing",
    "tpu_metrics_debug": "debug",
    "past_index": "nothing",
    "ray_scope": "nothing",
    "overwrite_output_dir": "another output_dir",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "save_safetensors": "nothing: weights are saved so",
    "adafactor": "optim: adafactor",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_organization": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "include_inputs_for_metrics": "include_for_metrics",
    "include_tokens_per_second": "include_num_input_tokens_seen",
    "dispatch_batches": "accelerator_config",
    "split_batches": "accelerator_config",
    "jit_mode_eval": "nothing",
    "use_ipex": "nothing",
    "mp_parameters": "nothing",
    "xpu_backend": "ddp_backend",
    "torchdynamo": "torch_compile_backend",
    "use_legacy_prediction_loop": "nothing",
    "eval_use_gather_objects": "eval_use_gather_object",
}
"""Arguments of earlier TrainingArguments, which HfArgumentParser refuses with 5.23, and what has their place."""

LENGTHS: tuple[str, ...] = ("seq_len", "max_seq_length", "max_length", "model_max_length", "block_size", "cutoff_len")
"""Arguments that say how many tokens a sequence has, of which the first that is there counts."""

_MODEL = "it is about where the model comes from"
_ADAPTER = "use_peft says whether it is read"

SCRIPT_ARGUMENTS: dict[str, Key] = {
    "model_name_or_path": _sets(str, "model"),
    "model_class": _sets(str, "head"),
    "dtype": _sets(str, "dtype"),
    "torch_dtype": _sets(str, "dtype"),
    "attn_implementation": _sets(str, "attn"),
    "use_flash_attn": _sets(bool, "attn"),
    "use_flash_attention_2": _sets(bool, "attn"),
    "vocab_size": _sets(int, "vocab_size"),
    "packed": _sets(bool, "packed"),
    "packing": _sets(bool, "packed"),
    "use_liger": _sets(bool, "liger"),
    "use_liger_kernel": _sets(bool, "liger"),
    "device_map": _sets(str, "device_map"),
    **dict.fromkeys(LENGTHS, _sets(int, "seq_len")),
    "lora": _sets(dict, "lora"),
    "autocast_adapter_dtype": _sets(bool, "lora"),
    "use_peft": _sets(bool, "lora"),
    "use_lora": _sets(bool, "lora"),
    "use_peft_lora": _sets(bool, "lora"),
    "lora_r": _sets(int, "lora"),
    "lora_alpha": _sets(int, "lora"),
    "lora_dropout": _sets(float, "lora"),
    "lora_target_modules": _sets(list, "lora"),
    "lora_modules_to_save": _sets(list, "lora"),
    "q_lora": _sets(bool, "quantization"),
    "lora_bias": _sets(str, "lora"),
    "use_dora": _only(bool, False, None, why="DoRA's magnitudes"),
    "use_rslora": _idle(_NUMBERS, bool),
    "lora_task_type": _idle(_ADAPTER, str),
    "quantization": _sets(dict, "quantization"),
    "prepare_for_kbit_training": _sets(bool, "quantization"),
    "peft_module_casting_to_bf16": _sets(bool, "quantization"),
    "bf16_adapters": _sets(bool, "quantization"),
    "load_in_8bit": _sets(bool, "quantization"),
    "load_in_4bit": _sets(bool, "quantization"),
    "bnb_4bit_quant_type": _only(str, "nf4", None, why="4-bit types other than nf4"),
    "bnb_4bit_quant_storage": _sets(str, "quantization"),
    "bnb_4bit_compute_dtype": _sets(str, "quantization"),
    "use_bnb_nested_quant": _sets(bool, "quantization"),
    "use_8bit_quantization": _sets(bool, "quantization"),
    "use_4bit_quantization": _sets(bool, "quantization"),
    "use_nested_quant": _sets(bool, "quantization"),
    "bnb_4bit_quant_storage_dtype": _sets(str, "quantization"),
    "use_unsloth": _only(bool, False, None, why="unsloth's kernels"),
    "use_reentrant": _sets(bool, "use_reentrant"),
    **dict.fromkeys(
        (
            *("model_revision", "config_name", "tokenizer_name", "tokenizer_name_or_path", "cache_dir", "token"),
            *("config_overrides", "model_type", "model_id"),
        ),
        _idle(_MODEL, str),
    ),
    **dict.fromkeys(
        ("trust_remote_code", "use_fast_tokenizer", "low_cpu_mem_usage", "use_auth_token"), _idle(_MODEL, bool)
    ),
    **dict.fromkeys(
        (
            *("dataset", "dataset_config", "dataset_split", "text_column", "target_column", "dataset_name"),
            *("dataset_config_name", "train_file", "validation_file", "data_path", "eval_data_path", "chat_template"),
            *("dataset_mixer", "dataset_splits", "dataset_kwargs", "dataset_text_field", "dataset_train_split"),
            *("dataset_test_split", "dataset_configs", "conversation_template"),
        ),
        _idle(_DATA, str),
    ),
    **dict.fromkeys(
        (
            *("max_train_samples", "max_eval_samples", "preprocessing_num_workers", "validation_split_percentage"),
            "dataset_num_proc",
        ),
        _idle(_DATA, int),
    ),
    **dict.fromkeys(
        ("streaming", "overwrite_cache", "lazy_preprocess", "dataset_streaming", "keep_linebreaks", "trust_dataset"),
        _idle(_DATA, bool),
    ),
}
"""Arguments of scripts that are known: memplan's train.py, transformers' run_clm.py, TRL's, alignment-handbook's,
FastChat's, Qwen's, peft's examples/sft. One script's name means the same in the others."""

OF_TRL = frozenset(
    {
        *(
            "use_peft",
            "packing",
            "packing_strategy",
            "padding_free",
            "eval_packing",
            "eos_token",
            "use_bnb_nested_quant",
        ),
        *("dataset_text_field", "dataset_train_split", "dataset_test_split", "dataset_streaming", "dataset_kwargs"),
        *("assistant_only_loss", "completion_only_loss", "dataset_num_proc"),
    }
)
"""Arguments that TRL's ModelConfig, ScriptArguments and SFTConfig have, and TrainingArguments have not."""

OTHER_TRAINERS: dict[str, str] = {
    "vision_tower": "a model of images and text",
    "beta": "preference training (DPO)",
    "loss_type": "preference training (DPO)",
    "max_prompt_length": "preference training (DPO)",
    "ref_model": "preference training",
    "num_generations": "reinforcement learning (GRPO)",
    "num_ppo_epochs": "reinforcement learning (PPO)",
    "reward_model_path": "reinforcement learning (PPO)",
}
"""Arguments by which another step than a plain one is told."""
