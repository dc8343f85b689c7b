"""How the run is spread: the part of a setup that the planner may choose.

Each engine has a nested model with its own keys, named and defaulted as in its library.
"""

from __future__ import annotations

import sys
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, model_validator

from memplan.errors import SpecError
from memplan.specs._base import Names, NonNegativeInt, PositiveInt, Spec, integer

__all__ = ["AioSpec", "DdpSpec", "FsdpSpec", "OffloadOptimizerSpec", "OffloadParamSpec", "Strategy", "ZeroSpec"]

Kind: TypeAlias = Literal["single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"]
Offload: TypeAlias = Literal["none", "cpu", "nvme"]


def _count_or_auto(value: object) -> object:
    return value if value == "auto" else _count(value)


def _count(value: object) -> int:
    # DeepSpeed's files write counts as 5e8, and sys.maxsize is its "no limit".
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return sys.maxsize if value == sys.maxsize and not isinstance(value, bool) else integer(value, 0)


Count = Annotated[int, BeforeValidator(_count)]
"""A number of elements, not bytes; 5e8 will do."""
CountOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)]
"""As Count, or ``auto``: transformers' Trainer fills it in from the hidden size."""


class DdpSpec(Spec):
    """``torch.nn.parallel.DistributedDataParallel``; defaults of torch 2.13."""

    bucket_cap_mb: PositiveInt = 25
    """MiB of gradients per bucket."""
    gradient_as_bucket_view: bool = False
    """Gradients are views of the buckets, which saves a second copy of all gradients."""
    broadcast_buffers: bool = True
    """Buffers are broadcast from rank 0 before each forward."""
    find_unused_parameters: bool | None = None
    """Look for parameters without a gradient after each forward, which also keeps DDP from rebuilding its
    buckets in the order of the backward. None is the Trainer's rule: on, but off with gradient checkpointing."""
    static_graph: bool = False
    """The graph is the same in each step."""


class OffloadOptimizerSpec(Spec):
    """``zero_optimization.offload_optimizer`` of DeepSpeed 0.19.8, less its device, which is ``Strategy``'s."""

    pin_memory: bool = True
    """Keep the host copies in page-locked memory."""
    buffer_count: PositiveInt = 4
    """NVMe: pinned buffers, one per state of a sub-group; 4 at least."""
    pipeline_read: bool = False
    """NVMe: read the next sub-group while this one is updated."""
    pipeline_write: bool = False
    """NVMe: write the last sub-group while this one is updated."""
    fast_init: bool = False
    """NVMe: initialise the states on NVMe in one go."""
    ratio: float = 1.0
    """Stage 3: share of the sub-groups that are updated on the CPU, the last ones (Twin-Flow of ZeRO-Offload++); the
    others' masters, gradients and states are on the GPU."""

    @model_validator(mode="after")
    def _legal(self) -> OffloadOptimizerSpec:
        if not 0 <= self.ratio <= 1:
            raise SpecError.at("ratio", self.ratio, "is not a share", "Use a number from 0 to 1.")
        if self.buffer_count < 4:
            remedy = "Use 4 or more: three states and the gradient."
            raise SpecError.at("buffer_count", self.buffer_count, "is too few", remedy)
        return self


class OffloadParamSpec(Spec):
    """``zero_optimization.offload_param`` of DeepSpeed 0.19.8, less its device, which is ``Strategy``'s."""

    pin_memory: bool = True
    """Keep the host copies in page-locked memory."""
    buffer_count: PositiveInt = 5
    """NVMe: pinned buffers."""
    buffer_size: Count = 100_000_000
    """NVMe: elements per buffer; the largest partition must fit."""
    max_in_cpu: Count = 1_000_000_000
    """NVMe: elements that stay in host memory."""


class AioSpec(Spec):
    """``aio`` of a DeepSpeed config, 0.19.8: how it reads and writes NVMe."""

    block_size: PositiveInt = 1024**2
    """Bytes of a request; tensors smaller than this, or than 1 MiB, are not offloaded to NVMe."""
    intra_op_parallelism: PositiveInt = 1
    """Threads that share a transfer, which is padded to 1 KiB for each."""
    queue_depth: PositiveInt = 8
    """Requests at once; no memory."""
    single_submit: bool = False
    """Submit requests one by one; no memory."""
    overlap_events: bool = True
    """Submit and wait at the same time; no memory."""
    use_gds: bool = False
    """Read into the GPU's memory (GPUDirect Storage)."""


class ZeroSpec(Spec):
    """``zero_optimization`` of a DeepSpeed config; names and defaults of DeepSpeed 0.19.8, in elements."""

    contiguous_gradients: bool = True
    """Copy gradients into one bucket buffer as they come."""
    reduce_scatter: bool = True
    """Reduce each gradient to its owner only; False is all-reduce."""
    reduce_bucket_size: CountOrAuto = 500_000_000
    """Elements of gradients reduced at once; auto: hidden_size squared."""
    allgather_partitions: bool = True
    """Gather updated parameters with one collective."""
    allgather_bucket_size: Count = 500_000_000
    """Elements gathered at once."""
    overlap_comm: bool | None = None
    """Reduce during the backward; None is True for stage 3 only."""
    round_robin_gradients: bool = False
    """Order of partitioning; no memory."""
    sub_group_size: Count = 1_000_000_000
    """Stage 3: elements updated at once."""
    stage3_prefetch_bucket_size: CountOrAuto = 50_000_000
    """Stage 3: elements fetched ahead; auto: 0.9 x hidden_size squared."""
    stage3_param_persistence_threshold: CountOrAuto = 100_000
    """Stage 3: parameters up to this stay gathered; auto: 10 x hidden_size."""
    stage3_model_persistence_threshold: Count = sys.maxsize
    """Stage 3: elements that may stay gathered over the whole model."""
    stage3_max_live_parameters: Count = 1_000_000_000
    """Stage 3: elements that prefetching may keep gathered."""
    stage3_max_reuse_distance: Count = 1_000_000_000
    """Stage 3: a parameter used again within this many elements stays gathered."""
    zero3_init_flag: bool = True
    """Stage 3: the model is made under ``zero.Init``, as it is after TrainingArguments; False makes it whole on every
    rank. accelerate's name; in a DeepSpeed config there is no such key."""
    stage3_gather_16bit_weights_on_model_save: bool = False
    """Stage 3: gather the whole 16-bit model to save it."""
    stage3_allgather_sequential: bool = False
    """Stage 3: gather one parameter at a time, without a coalesced copy."""
    zero_hpz_partition_size: NonNegativeInt = 1
    """Stage 3: ranks that have a second partition of the weights together, a node's (ZeRO++)."""
    zero_quantized_weights: bool = False
    """Stage 3: gather weights in 8 bits (ZeRO++)."""
    zero_quantized_gradients: bool = False
    """Stage 3: reduce gradients in 4 bits (ZeRO++), if there are several nodes."""
    zero_quantized_nontrainable_weights: bool = False
    """Stage 3: keep weights in 8 bits that are not trained when they are partitioned (ZeRO++): under zero.Init none."""
    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """``data_types.grad_accum_dtype``; None is the model's type."""
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    """``communication_data_type``: what gradients are reduced in; None is the model's type."""
    bf16_master_weights_and_grads: bool = False
    """``bf16.bf16_master_weights_and_grads``: masters, and the gradients that are stepped, in bfloat16."""
    bf16_optimizer_states: bool = False
    """``bf16.bf16_optimizer_states``: the optimizer's states too."""
    zero_force_ds_cpu_optimizer: bool = True
    """An offloaded optimizer is DeepSpeedCPUAdam, whatever the Trainer was asked for; False takes torch's own on
    the CPU. It is beside ``zero_optimization`` in the file."""
    ds_optimizer: bool = False
    """The file has a section ``optimizer``: DeepSpeed makes it, and the Trainer hands it all weights as one group, not
    those with weight decay and those without (``deepspeed_optim_sched``)."""
    offload_optimizer: OffloadOptimizerSpec = OffloadOptimizerSpec()
    """Details of ``Strategy.offload_optimizer``."""
    offload_param: OffloadParamSpec = OffloadParamSpec()
    """Details of ``Strategy.offload_param``."""
    aio: AioSpec = AioSpec()
    """``aio``, which is beside ``zero_optimization`` in the file: offload to NVMe."""

    @model_validator(mode="after")
    def _legal(self) -> ZeroSpec:
        if self.bf16_optimizer_states and not self.bf16_master_weights_and_grads:
            remedy = "Set bf16_master_weights_and_grads too."
            raise SpecError.at("bf16_optimizer_states", True, "is refused by DeepSpeed with masters in float32", remedy)
        return self


class FsdpSpec(Spec):
    """``fsdp_config``; names of accelerate 1.15, defaults of the Trainer of transformers 5.23."""

    version: Literal[1, 2] = 2
    """``fsdp_version``: 2 is ``fully_shard``, 1 is ``FullyShardedDataParallel``."""
    reshard_after_forward: bool = True
    """Version 2: free a block's gathered parameters after its forward."""
    sharding_strategy: (
        Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2"] | None
    ) = None
    """Version 1; None is FULL_SHARD. accelerate takes it from its own configuration only, not from the Trainer's.
    The hybrid ones shard over the GPUs of a node, and every node has all shards."""
    dp_replicate_size: PositiveInt = 1
    """Version 2: groups of ranks that have all shards each (``ParallelismConfig`` of accelerate); 1 is no hybrid."""
    dp_shard_size: PositiveInt | None = None
    """Version 2: ranks of such a group; None is as many as there are."""
    auto_wrap_policy: Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"] = "TRANSFORMER_BASED_WRAP"
    """What becomes a unit of sharding."""
    transformer_layer_cls_to_wrap: Names = ()
    """Block classes; empty means the model's ``_no_split_modules``."""
    min_num_params: NonNegativeInt = 0
    """Elements per unit, for SIZE_BASED_WRAP."""
    activation_checkpointing: bool = False
    """Let FSDP do the checkpointing; not together with ``gradient_checkpointing``."""
    cpu_ram_efficient_loading: bool = False
    """Weights are sharded without memory, and rank 0 sends them one by one. With transformers 5.23 every rank reads the
    whole checkpoint nevertheless: on the host it saves nothing."""
    state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"] = "FULL_STATE_DICT"
    """How a checkpoint is saved; a full one gathers the model."""
    backward_prefetch: Literal["BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"] = "NO_PREFETCH"
    """Version 1: when the next unit of the backward is gathered."""
    forward_prefetch: bool = False
    """Version 1: gather the next unit of the forward ahead."""
    limit_all_gathers: bool = True
    """Version 1: keep the CPU from asking for further units while the GPU is busy with the last ones."""
    use_orig_params: bool = True
    """Version 1: keep the parameters as they were; needed for frozen ones beside trained ones."""
    sync_module_states: bool = True
    """Version 1: rank 0 broadcasts its parameters at the start."""

    @model_validator(mode="after")
    def _legal(self) -> FsdpSpec:
        if self.version == 1 and not self.reshard_after_forward:
            # accelerate/utils/dataclasses.py: a bool "is not supported with FSDP1"
            remedy = "Use sharding_strategy: SHARD_GRAD_OP, or version 2."
            raise SpecError.at("reshard_after_forward", False, "cannot go with version 1", remedy)
        if self.version == 2 and self.sharding_strategy is not None:
            remedy = "Use reshard_after_forward and dp_replicate_size, or version 1."
            raise SpecError.at("sharding_strategy", self.sharding_strategy, "cannot go with version 2", remedy)
        if self.version == 1 and (self.dp_replicate_size > 1 or self.dp_shard_size is not None):
            # accelerate/parallelism_config.py: "only compatible DistributedType.FSDP (version 2) ..."
            name = "dp_replicate_size" if self.dp_replicate_size > 1 else "dp_shard_size"
            remedy = "Use sharding_strategy: HYBRID_SHARD, or version 2."
            raise SpecError.at(name, getattr(self, name), "cannot go with version 1", remedy)
        return self

    @property
    def is_hybrid(self) -> bool:
        """Whether several groups of ranks have all shards."""
        return self.dp_replicate_size > 1 or (self.sharding_strategy or "").startswith("HYBRID")


class Strategy(Spec):
    """A way to spread a run over ranks, host memory and NVMe. Raises SpecError for an impossible combination."""

    kind: Kind = "single"
    """Plain training on one GPU, DDP, DeepSpeed's ZeRO stages, or FSDP."""
    offload_optimizer: Offload = "none"
    """Where ZeRO's optimizer states live: DeepSpeed's ``offload_optimizer.device``."""
    offload_param: Offload = "none"
    """Where sharded parameters live: DeepSpeed's ``offload_param.device``; FSDP's CPU offload, optimizer included."""
    ddp: DdpSpec = DdpSpec()
    """Keys of DDP."""
    zero: ZeroSpec = ZeroSpec()
    """Keys of DeepSpeed's ZeRO."""
    fsdp: FsdpSpec = FsdpSpec()
    """Keys of FSDP."""

    @model_validator(mode="after")
    def _legal(self) -> Strategy:
        if self.kind == "fsdp":
            self._legal_fsdp()
            return self
        if self.offload_optimizer != "none" and self.kind not in ("zero1", "zero2", "zero3"):
            remedy = "Use --strategy zero1, zero2 or zero3, or none."
            raise SpecError.at("offload_optimizer", self.offload_optimizer, self._cannot_offload(), remedy)
        if self.offload_optimizer == "nvme" and self.kind != "zero3":
            # deepspeed/runtime/zero/config.py: "`nvme` ... Valid only with stage 3."
            remedy = "Use --strategy zero3, or cpu."
            raise SpecError.at("offload_optimizer", "nvme", self._cannot_offload(), remedy)
        if self.offload_param != "none" and self.kind != "zero3":
            remedy = "Use --strategy zero3 or fsdp, or none."
            raise SpecError.at("offload_param", self.offload_param, self._cannot_offload(), remedy)
        ratio = self.zero.offload_optimizer.ratio
        if self.offload_optimizer != "none" and ratio < 1 and self.kind != "zero3":
            # deepspeed/runtime/zero/config.py: "Partial offloading only supported for ZeRO Stage 3."
            remedy = "Leave it out, or use --strategy zero3."
            raise SpecError.at(
                "zero.offload_optimizer.ratio", ratio, f"is refused by DeepSpeed with {self.kind}", remedy
            )
        return self

    def _cannot_offload(self) -> str:
        return f"cannot go with {self.kind}" if "kind" in self.model_fields_set else "needs an engine that offloads it"

    def _legal_fsdp(self) -> None:
        if self.offload_optimizer != "none":
            remedy = "Use --offload-param cpu: FSDP keeps the optimizer where it keeps the parameters."
            raise SpecError.at("offload_optimizer", self.offload_optimizer, "cannot go with fsdp", remedy)
        if self.offload_param == "nvme":
            raise SpecError.at("offload_param", "nvme", "cannot go with fsdp", "Use cpu, or --strategy zero3.")

    @property
    def zero_stage(self) -> int | None:
        """DeepSpeed's stage, 0 .. 3; None for other engines."""
        return int(self.kind[-1]) if self.is_deepspeed else None

    @property
    def has_groups_of_nodes(self) -> bool:
        """Whether ranks have a group within nodes, and one between them, beside that of all."""
        if self.kind == "fsdp":
            return self.fsdp.is_hybrid
        keys = self.zero
        return self.kind == "zero3" and (keys.zero_hpz_partition_size > 1 or keys.zero_quantized_gradients)

    @property
    def shards(self) -> bool:
        """Whether the engine is DeepSpeed or FSDP, and not plain PyTorch."""
        return self.is_deepspeed or self.kind == "fsdp"

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed is the engine, which loads the model in 16 bit by default."""
        return self.kind.startswith("zero")
