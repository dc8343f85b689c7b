"""Every key of DeepSpeed's and accelerate's configs: the field it sets, why it does not matter, or why it is refused.

Sources: DeepSpeed 0.19.8 ``runtime/zero/config.py``, ``runtime/zero/offload_config.py``, ``runtime/config.py``,
``runtime/precision_config.py``, ``runtime/constants.py``, ``runtime/engine.py``; accelerate 1.15.0
``commands/launch.py``, ``commands/config/config_args.py``, ``utils/launch.py``, ``utils/dataclasses.py``.
``tests/configs`` compares the tables with what these libraries take, and "same bytes" is what the engine's ledger said
with and without the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

__all__ = [
    "ACCELERATE",
    "DEEPSPEED",
    "LENIENT",
    "OPTIMIZERS",
    "OPTIMIZER_PARAMS",
    "REMOVED",
    "RENAMED",
    "SCHEDULERS",
    "TORCH_SCHEDULERS",
    "Key",
]

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True, slots=True)
class Key:
    """What a library takes for a key, and what memplan does with it."""

    takes: Any
    """A type in pydantic's sense; the libraries validate with pydantic, or not at all (Any)."""
    field: str = ""
    """The field that it sets; empty where it sets none."""
    why: str = ""
    """Why it does not matter, or, with ``only``, why another value is refused."""
    only: tuple[Any, ...] = ()
    """The values that are modelled; empty is all."""
    stages: tuple[int, ...] = (0, 1, 2, 3)
    """The ZeRO stages in which it has an influence."""


def _sets(takes: Any, field: str) -> Key:
    return Key(takes, field=field)


def _idle(why: str, takes: Any = Any) -> Key:
    """A key without influence on memory."""
    return Key(takes, why=why)


def _only(takes: Any, *values: Any, why: str, stages: tuple[int, ...] = (0, 1, 2, 3)) -> Key:
    """A key that changes memory, which is modelled for some values."""
    return Key(takes, why=why, only=values, stages=stages)


_LOGS = "it writes logs"
_CHECKPOINTS = "it is about checkpoints"
_NUMBERS = "it changes numbers, not sizes"
_SAME = "same bytes"

_ZERO: dict[str, Key] = {
    "stage": _sets(int, "stage"),
    "contiguous_gradients": _sets(bool, "contiguous_gradients"),
    "reduce_scatter": _sets(bool, "reduce_scatter"),
    "reduce_bucket_size": _sets(Positive, "reduce_bucket_size"),
    "use_multi_rank_bucket_allreduce": _idle(_SAME, bool),
    "allgather_partitions": _sets(bool, "allgather_partitions"),
    "allgather_bucket_size": _sets(Count, "allgather_bucket_size"),
    "overlap_comm": _sets(bool | None, "overlap_comm"),
    "compute_grad_norm": _only(bool, True, why="a step without the norm is not modelled", stages=(1, 2)),
    "load_from_fp32_weights": _idle(_CHECKPOINTS, bool),
    "elastic_checkpoint": _idle(_CHECKPOINTS, bool),
    "offload_param": _sets(Any, "offload_param"),
    "offload_optimizer": _sets(Any, "offload_optimizer"),
    "zenflow": _only(Any, None, why="ZenFlow's optimizer on the GPU is not modelled"),
    "sub_group_size": _sets(Count, "sub_group_size"),
    "stage3_prefetch_bucket_size": _sets(Count, "stage3_prefetch_bucket_size"),
    "stage3_param_persistence_threshold": _sets(Count, "stage3_param_persistence_threshold"),
    "stage3_model_persistence_threshold": _sets(Count, "stage3_model_persistence_threshold"),
    "stage3_max_live_parameters": _sets(Count, "stage3_max_live_parameters"),
    "stage3_max_reuse_distance": _sets(Count, "stage3_max_reuse_distance"),
    "stage3_gather_16bit_weights_on_model_save": _sets(bool, "stage3_gather_16bit_weights_on_model_save"),
    "stage3_module_granularity_threshold": _only(
        int, 0, why="modules that are fetched as a whole are not modelled", stages=(3,)
    ),
    "stage3_use_all_reduce_for_fetch_params": _only(
        bool, False, why="its buffer for fetching is not modelled", stages=(3,)
    ),
    "stage3_allgather_sequential": _sets(bool, "stage3_allgather_sequential"),
    "ignore_unused_parameters": _idle(_SAME, bool),
    "legacy_stage1": _sets(bool, "legacy_stage1"),
    "round_robin_gradients": _sets(bool, "round_robin_gradients"),
    "parameter_alignment": _only(
        bool, False, why="the padding between weights in flat buffers is not modelled", stages=(1, 2)
    ),
    "zero_hpz_partition_size": _sets(Count, "zero_hpz_partition_size"),
    "zero_quantized_weights": _sets(bool, "zero_quantized_weights"),
    "zero_quantized_nontrainable_weights": _sets(bool, "zero_quantized_nontrainable_weights"),
    "zero_quantized_gradients": _sets(bool, "zero_quantized_gradients"),
    "memory_efficient_linear": _only(bool, True, why="torch's linear layer saves other tensors there", stages=(3,)),
    "pipeline_loading_checkpoint": _idle(_CHECKPOINTS, bool),
    "override_module_apply": _idle(_SAME, bool),
    "log_trace_cache_warnings": _idle(_LOGS, bool),
    "enable_sanity_checks": _idle(_SAME, bool),
    "save_muon_momentum_buffer_in_memory": _idle("it is about Muon, which is refused", bool),
    "leaf_module": _only(Any, None, {}, why="modules that are fetched as a whole are not modelled", stages=(3,)),
    "cpu_offload": _sets(bool | None, "cpu_offload"),
    "cpu_offload_param": _sets(bool | None, "cpu_offload_param"),
    "cpu_offload_use_pin_memory": _idle("DeepSpeed warns that it is deprecated, and ignores it", bool | None),
    "stage3_gather_fp16_weights_on_model_save": _sets(bool, "stage3_gather_fp16_weights_on_model_save"),
}

_OFFLOAD: dict[str, Key] = {
    "device": _sets(Any, "device"),
    "nvme_path": _sets(str | None, "nvme_path"),
    "buffer_count": _sets(Count, "buffer_count"),
    "pin_memory": _sets(bool, "pin_memory"),
}

DEEPSPEED: dict[str, dict[str, Key]] = {
    "": {
        "train_batch_size": _sets(Any, "train_batch_size"),
        "train_micro_batch_size_per_gpu": _sets(Any, "train_micro_batch_size_per_gpu"),
        "gradient_accumulation_steps": _sets(Any, "gradient_accumulation_steps"),
        "optimizer": _sets(Any, "optimizer"),
        "zero_optimization": _sets(Any, "zero_optimization"),
        "bf16": _sets(Any, "bf16"),
        "bfloat16": _sets(Any, "bfloat16"),
        "fp16": _sets(Any, "fp16"),
        "data_types": _sets(Any, "data_types"),
        "communication_data_type": _sets(str | None, "communication_data_type"),
        "aio": _sets(Any, "aio"),
        "activation_checkpointing": _sets(Any, "activation_checkpointing"),
        "torch_autocast": _sets(Any, "torch_autocast"),
        "compile": _sets(Any, "compile"),
        "tensor_parallel": _sets(Any, "tensor_parallel"),
        "expert_parallel": _sets(Any, "expert_parallel"),
        "hybrid_engine": _sets(Any, "hybrid_engine"),
        "data_efficiency": _sets(Any, "data_efficiency"),
        "sequence_parallel_size": _only(Any, None, 1, why="sequence parallelism is not modelled"),
        "weight_quantization": _only(Any, None, why="its quantized weights are not modelled"),
        "zero_allow_untested_optimizer": _sets(bool, "zero_allow_untested_optimizer"),
        "zero_force_ds_cpu_optimizer": _sets(bool, "zero_force_ds_cpu_optimizer"),
        "gradient_allreduce_op": _sets(str, "gradient_allreduce_op"),
        "gradient_clipping": _idle("the norm is taken with and without it", Any),
        "managed_gradient_accumulation": _only(
            bool, True, why="gradients that DeepSpeed does not accumulate are not modelled"
        ),
        "scheduler": _idle("it changes the learning rate"),
        "prescale_gradients": _idle(_NUMBERS, bool),
        "gradient_predivide_factor": _only(
            float, 1.0, why="DeepSpeed refuses it with reduce_scatter, and without is not modelled", stages=(1, 2, 3)
        ),
        "seq_parallel_communication_data_type": _idle("there is no sequence parallelism"),
        "steps_per_print": _idle(_LOGS),
        "dump_state": _idle(_LOGS),
        "wall_clock_breakdown": _idle(_LOGS),
        "memory_breakdown": _idle(_LOGS),
        "log_level": _idle(_LOGS),
        "timers": _idle(_LOGS),
        "comms_logger": _idle(_LOGS),
        "flops_profiler": _idle("it counts operations"),
        "tensorboard": _idle(_LOGS),
        "wandb": _idle(_LOGS),
        "csv_monitor": _idle(_LOGS),
        "comet": _idle(_LOGS),
        "autotuning": _idle("the launcher reads it, not the engine"),
        "checkpoint": _idle(_CHECKPOINTS),
        "datastates": _idle(_CHECKPOINTS),
        "datastates_ckpt": _idle(_CHECKPOINTS),
        "dataloader_drop_last": _idle("it is about the last batch"),
        "disable_allgather": _idle("the engine does not read it"),
        "disable_python_gc": _idle("tensors are freed by their reference counts"),
        "use_data_before_expert_parallelism": _idle("there is no expert parallelism"),
        "pipeline": _idle("a model of transformers is no PipelineModule"),
        "vocabulary_size": _idle("DeepSpeed only looks at its alignment"),
    },
    "zero_optimization": _ZERO,
    "zero_optimization.offload_optimizer": {
        **_OFFLOAD,
        "pipeline_read": _sets(bool, "pipeline_read"),
        "pipeline_write": _sets(bool, "pipeline_write"),
        "fast_init": _sets(bool, "fast_init"),
        "ratio": _sets(Share, "ratio"),
        "super_offload": _only(bool, False, why="SuperOffload's worker is not modelled"),
        "cpuadam_cores_perc": _idle("it is about threads", Share),
    },
    "zero_optimization.offload_param": {
        **_OFFLOAD,
        "buffer_size": _sets(Count, "buffer_size"),
        "max_in_cpu": _sets(Count, "max_in_cpu"),
    },
    "bf16": {
        "enabled": _sets(bool, "enabled"),
        "immediate_grad_update": _only(
            bool, False, why="gradients that BF16_Optimizer takes over in the backward are not modelled", stages=(1,)
        ),
        "check_grad_overflow": _only(bool, True, why="a step without the check is not modelled", stages=(3,)),
        "bf16_master_weights_and_grads": _sets(bool, "bf16_master_weights_and_grads"),
        "bf16_optimizer_states": _sets(bool, "bf16_optimizer_states"),
    },
    "fp16": {
        "enabled": _sets(bool, "enabled"),
        "auto_cast": _idle("it casts inputs of floats, which token ids are not", bool),
        "loss_scale": _idle(_NUMBERS, float),
        "initial_scale_power": _idle(_NUMBERS, int),
        "loss_scale_window": _idle(_NUMBERS, int),
        "hysteresis": _idle(_NUMBERS, int),
        "consecutive_hysteresis": _idle(_NUMBERS, bool),
        "min_loss_scale": _idle(_NUMBERS, int),
        "fp16_master_weights_and_grads": _only(bool, False, why="16-bit master weights are not modelled"),
    },
    "data_types": {
        "grad_accum_dtype": _sets(str | None, "grad_accum_dtype"),
        "param_dtype": _sets(str | None, "param_dtype"),
        "buffer_dtype": _only(Any, None, why="buffers of another type are not modelled"),
        "keep_in_fp32_modules": _only(Any, "auto", why="buffers of another type are not modelled"),
    },
    "optimizer": {
        "type": _sets(str, "type"),
        "params": _sets(Any, "params"),
        "legacy_fusion": _only(bool, False, why="the old fusion is not modelled"),
    },
    "aio": {
        "block_size": _sets(Positive, "block_size"),
        "queue_depth": _sets(Positive, "queue_depth"),
        "intra_op_parallelism": _sets(Positive, "intra_op_parallelism"),
        "thread_count": _idle("DeepSpeed has renamed it to intra_op_parallelism, and ignores it"),
        "single_submit": _sets(bool, "single_submit"),
        "overlap_events": _sets(bool, "overlap_events"),
        "use_gds": _sets(bool, "use_gds"),
    },
    "activation_checkpointing": {
        name: _idle("it is for modules that call deepspeed.checkpointing, which transformers' do not")
        for name in (
            "partition_activations",
            "number_checkpoints",
            "contiguous_memory_optimization",
            "cpu_checkpointing",
            "profile",
            "synchronize_checkpoint_boundary",
        )
    },
    "torch_autocast": {
        "enabled": _only(bool, False, why="DeepSpeed's autocast is not modelled"),
        "dtype": _idle("it is off"),
        "lower_precision_safe_modules": _idle("it is off"),
    },
    "data_efficiency": {
        "enabled": _only(bool, False, why="curriculum learning and random-LTD are not modelled"),
        **{name: _idle("it is off") for name in ("seed", "data_sampling", "data_routing")},
    },
    "compile": {
        "deepcompile": _only(bool, False, why="DeepCompile's schedule is not modelled"),
        **{
            name: _idle("it is off")
            for name in (
                *("autoep_non_moe", "free_activation", "free_activation_threshold", "offload_activation"),
                *("offload_activation_pin_memory", "offload_opt_states", "double_buffer", "symmetric_memory"),
                *("debug_log", "offload_parameters", "sync_before_reduce", "sync_after_reduce"),
                *("sync_before_allgather", "sync_after_allgather", "keep_int_input_tensors"),
                *("keep_all_input_tensors", "passes"),
            )
        },
    },
    "tensor_parallel": {"autotp_size": _only(int, 0, 1, why="tensor parallelism is not modelled")},
    "expert_parallel": {"enabled": _only(bool, False, why="expert parallelism is not modelled")},
    "hybrid_engine": {"enabled": _only(bool, False, why="the hybrid engine is not modelled")},
}
"""Sections of a DeepSpeed config, by their path, and their keys."""

LENIENT = frozenset(
    {
        *("", "data_types", "optimizer", "aio", "activation_checkpointing", "torch_autocast", "data_efficiency"),
        *("tensor_parallel", "expert_parallel", "hybrid_engine"),
    }
)
"""Sections in which DeepSpeed ignores a key that it does not know; elsewhere pydantic forbids it. The last three hold
further keys, which only matter once they are enabled."""

RENAMED: dict[str, str] = {
    name: f"stage3_{name}"
    for name in (
        "prefetch_bucket_size",
        "param_persistence_threshold",
        "model_persistence_threshold",
        "max_live_parameters",
        "max_reuse_distance",
        "gather_16bit_weights_on_model_save",
        "module_granularity_threshold",
        "use_all_reduce_for_fetch_params",
        "allgather_sequential",
    )
}
"""Names that ``zero_optimization`` takes in place of its aliases (``populate_by_name``)."""

REMOVED: dict[str, str] = {
    "nebula": "checkpoints",
    "compression_training": "compression",
    "amp": "fp16, bf16 or torch_autocast",
    "quantize_training": "quantization",
    "sparse_gradients": "gradients of an embedding made with sparse=True",
    "eigenvalue": "quantization",
    "sparse_attention": "attention",
    "elasticity": "train_batch_size, train_micro_batch_size_per_gpu and gradient_accumulation_steps",
    "graph_harvesting": "graphs",
    "curriculum_learning": "data_efficiency.data_sampling.curriculum_learning",
    "progressive_layer_drop": "layers",
    "zero_optimization.mics_shard_size": "zero_hpz_partition_size",
    "zero_optimization.mics_hierarchical_params_gather": "zero_hpz_partition_size",
    "zero_optimization.zeropp_loco_param": "zero_quantized_gradients",
}
"""Keys that DeepSpeed refuses as removed (``runtime/config.py``, ``_REMOVED_*``), and what is near to them today."""

OPTIMIZERS: dict[str, str] = {"SGD": "sgd", "RMSprop": "rmsprop", "adagrad": "adagrad"}
"""``optimizer.type`` of torch, as ``DeepSpeedEngine._configure_basic_optimizer`` looks it up; Adam and AdamW depend on
``params``."""

_OF_TORCH = ("lr", "weight_decay", "foreach", "maximize", "differentiable")
OPTIMIZER_PARAMS: dict[str, tuple[str, ...]] = {
    "torch_adam": (*_OF_TORCH, "betas", "eps", "amsgrad", "capturable", "fused", "torch_adam", "adam_w_mode",
                   "fp32_optimizer_states"),
    "cpu_adam": ("lr", "bias_correction", "betas", "eps", "weight_decay", "amsgrad", "torch_adam", "adam_w_mode",
                 "fp32_optimizer_states"),
    "adam": ("lr", "bias_correction", "betas", "eps", "weight_decay", "amsgrad", "set_grad_none", "torch_adam",
             "adam_w_mode", "fp32_optimizer_states"),
    "cpu_adagrad": ("lr", "eps", "weight_decay", "amsgrad", "fp32_optimizer_states"),
    "adagrad": (*_OF_TORCH, "lr_decay", "initial_accumulator_value", "eps", "fused"),
    "cpu_lion": ("lr", "betas", "weight_decay", "fp32_optimizer_states"),
    "lion": ("lr", "betas", "weight_decay", "set_grad_none"),
    "SGD": (*_OF_TORCH, "momentum", "dampening", "nesterov", "fused"),
    "RMSprop": (*_OF_TORCH, "alpha", "eps", "momentum", "centered", "capturable"),
}  # fmt: skip
"""``optimizer.params`` that the optimizer takes which DeepSpeed makes; ``cpu_`` is what it makes where it is offloaded,
``torch_adam`` where the params ask for it. All are handed over: a name that it does not take is a TypeError."""

_WARMUP = ("warmup_num_steps", "warmup_type", "last_batch_iteration")
SCHEDULERS: dict[str, tuple[str, ...]] = {
    "LRRangeTest": ("lr_range_test_min_lr", "lr_range_test_step_size", "lr_range_test_step_rate",
                    "lr_range_test_staircase", "last_batch_iteration"),
    "OneCycle": ("cycle_min_lr", "cycle_max_lr", "decay_lr_rate", "cycle_first_step_size", "cycle_second_step_size",
                 "cycle_first_stair_count", "cycle_second_stair_count", "decay_step_size", "cycle_momentum",
                 "cycle_min_mom", "cycle_max_mom", "decay_mom_rate", "last_batch_iteration"),
    "WarmupLR": ("warmup_min_lr", "warmup_max_lr", *_WARMUP),
    "WarmupDecayLR": ("total_num_steps", "warmup_min_lr", "warmup_max_lr", *_WARMUP),
    "WarmupCosineLR": ("total_num_steps", "warmup_min_ratio", "cos_min_ratio", *_WARMUP),
}  # fmt: skip
"""DeepSpeed's own schedules (``runtime/lr_schedules.py``), and the ``params`` that each takes."""
TORCH_SCHEDULERS = frozenset(
    {
        *("LambdaLR", "MultiplicativeLR", "StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR"),
        *("SequentialLR", "CosineAnnealingLR", "ChainedScheduler", "ReduceLROnPlateau", "CyclicLR"),
        *("CosineAnnealingWarmRestarts", "OneCycleLR", "PolynomialLR", "LRScheduler"),
    }
)
"""``torch.optim.lr_scheduler``, in which DeepSpeed looks for all others."""

_DEVICE = "it is about another kind of device"
_LAUNCH = "it is about starting processes"

ACCELERATE: dict[str, dict[str, Key]] = {
    "": {
        "compute_environment": _only(Any, "LOCAL_MACHINE", 0, why="SageMaker's runs are not modelled"),
        "distributed_type": _sets(str | bool, "distributed_type"),
        "mixed_precision": _sets(Any, "mixed_precision"),
        "fp16": _sets(bool | None, "fp16"),
        "num_processes": _sets(Any, "gpus"),
        "num_machines": _sets(Any, "nodes"),
        "use_cpu": _only(bool | None, False, None, why="it trains on the CPU"),
        "deepspeed_config": _sets(Any, "deepspeed_config"),
        "fsdp_config": _sets(Any, "fsdp_config"),
        "parallelism_config": _sets(Any, "parallelism_config"),
        "dynamo_config": _sets(Any, "dynamo_config"),
        "dynamo_backend": _only(Any, None, "NO", "no", False, why="torch.compile is not modelled"),
        "megatron_lm_config": _idle("distributed_type says whether Megatron-LM is used"),
        "fp8_config": _idle("mixed_precision says whether fp8 is used"),
        "mpirun_config": _idle(_LAUNCH),
        "debug": _idle(_LOGS),
        **{
            name: _idle(_LAUNCH)
            for name in (
                *("machine_rank", "gpu_ids", "main_process_ip", "main_process_port", "rdzv_backend", "same_network"),
                *("main_training_function", "enable_cpu_affinity"),
            )
        },
        **{
            name: _idle(_DEVICE)
            for name in (
                *("downcast_bf16", "tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "command_file"),
                *("commands", "tpu_vm", "tpu_env"),
            )
        },
    },
    "deepspeed_config": {
        "deepspeed_config_file": _sets(str | None, "deepspeed_config_file"),
        "zero_stage": _sets(int, "zero_stage"),
        "offload_optimizer_device": _sets(str | None, "offload_optimizer_device"),
        "offload_param_device": _sets(str | None, "offload_param_device"),
        "offload_optimizer_nvme_path": _sets(str | None, "offload_optimizer_nvme_path"),
        "offload_param_nvme_path": _sets(str | None, "offload_param_nvme_path"),
        "gradient_accumulation_steps": _sets(Any, "gradient_accumulation_steps"),
        "gradient_clipping": _idle("the norm is taken with and without it"),
        "zero3_init_flag": _sets(bool | None, "zero3_init_flag"),
        "zero3_save_16bit_model": _sets(bool | None, "zero3_save_16bit_model"),
        "deepspeed_moe_layer_cls_names": _only(
            Any, None, why="modules that are fetched as a whole are not modelled", stages=(3,)
        ),
        "deepspeed_hostfile": _idle(_LAUNCH),
        "deepspeed_exclusion_filter": _idle(_LAUNCH),
        "deepspeed_inclusion_filter": _idle(_LAUNCH),
        "deepspeed_multinode_launcher": _idle(_LAUNCH),
    },
    "fsdp_config": {
        "fsdp_version": _sets(int, "version"),
        "fsdp_sharding_strategy": _sets(Any, "sharding_strategy"),
        "fsdp_reshard_after_forward": _sets(Any, "reshard_after_forward"),
        "fsdp_offload_params": _sets(bool, "offload_params"),
        "fsdp_auto_wrap_policy": _sets(str | None, "auto_wrap_policy"),
        "fsdp_transformer_layer_cls_to_wrap": _sets(str | None, "transformer_layer_cls_to_wrap"),
        "fsdp_min_num_params": _sets(Count, "min_num_params"),
        "fsdp_backward_prefetch": _sets(Any, "backward_prefetch"),
        "fsdp_backward_prefetch_policy": _idle("an earlier name, which accelerate 1.15 ignores"),
        "fsdp_state_dict_type": _sets(str | None, "state_dict_type"),
        "fsdp_forward_prefetch": _sets(bool, "forward_prefetch"),
        "fsdp_use_orig_params": _sets(bool, "use_orig_params"),
        "fsdp_cpu_ram_efficient_loading": _sets(bool, "cpu_ram_efficient_loading"),
        "fsdp_sync_module_states": _sets(bool, "sync_module_states"),
        "fsdp_activation_checkpointing": _sets(bool, "activation_checkpointing"),
        "fsdp_activation_checkpointing_offload": _only(bool, False, why="inputs kept on the host are not modelled"),
        "fsdp_ignored_modules": _only(Any, None, why="modules that are not sharded are not modelled"),
    },
    "parallelism_config": {
        f"parallelism_config_{name}": _only(Any, None, 1, why=f"{kind} parallelism is not modelled")
        for name, kind in (
            ("tp_size", "tensor"),
            ("cp_size", "context"),
            ("sp_size", "sequence"),
        )
    }
    | {
        "parallelism_config_dp_replicate_size": _sets(Positive | None, "dp_replicate_size"),
        "parallelism_config_dp_shard_size": _sets(Positive | None, "dp_shard_size"),
    }
    | {
        f"parallelism_config_{name}": _idle("its kind of parallelism is off")
        for name in (
            *("cp_backend", "cp_comm_strategy", "sp_backend", "sp_seq_length"),
            *("sp_seq_length_is_variable", "sp_attn_implementation"),
        )
    },
    "dynamo_config": {
        "dynamo_backend": _only(Any, None, "NO", "no", False, why="torch.compile is not modelled"),
        **{
            f"dynamo_{name}": _idle("it is off")
            for name in ("mode", "use_fullgraph", "use_dynamic", "use_regional_compilation")
        },
    },
}
"""Sections of an accelerate config and their keys; accelerate puts ``fsdp_`` in front of FSDP's where it is missing."""
