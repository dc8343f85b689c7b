"""Specs in, Estimate out: build the model on the tape, run one step, place it, measure it against the hardware."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from memplan.adapters.lora import DEFAULT_TARGETS
from memplan.adapters.prequantized import DEQUANTIZED_SOURCE, checkpoint_quantization, is_dequantized
from memplan.adapters.quantization import default_dtype
from memplan.architectures.moe import BUSIEST_EXPERT_LOAD, experts_are_modules
from memplan.architectures.nn import Inventory
from memplan.architectures.registry import attention_implementations, head_of
from memplan.constants import Constant
from memplan.engines import checkpoint, ddp, plain
from memplan.engines.plain import Parts, Run
from memplan.errors import SpecError, UnsupportedError
from memplan.memory.allocator import REPLAYABLE
from memplan.memory.broadcast import most_alive
from memplan.memory.course import Ledger
from memplan.memory.evaluation import to_host
from memplan.memory.optimizers import Optimizer, clip_grad_norm
from memplan.memory.runtime import cublas_workspaces, cuda_context, flash_attn, nccl
from memplan.memory.trace import (
    Batch,
    EvaluationLoop,
    Replayed,
    evaluation_bound,
    replay_steps,
    reserved_bound,
    sent_bound,
)
from memplan.micro_batch import (
    MicroBatch,
    Setup,
    Traced,
    all_layers,
    build,
    compute_dtype,
    evaluation_batch,
    finds_gradients,
    prepares_for_kbit_training,
    reference_gpu,
    replayable,
    run_of,
)
from memplan.results import (
    Assumption,
    Components,
    Estimate,
    GpuMemory,
    HostMemory,
    Lever,
    ModelInfo,
    NvmeMemory,
    Phase,
    Term,
    Verdict,
    verdict_by_place,
    verdict_for,
    worst_verdict,
)
from memplan.specs.hardware import ClusterSpec, GPUSpec
from memplan.specs.model import ModelSpec
from memplan.specs.precision import Precision, resolve_precision
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import STEPS_ONLY, AllocatorSpec, TrainingSpec
from memplan.tape.dispatch import CPU, DeviceRules, cuda
from memplan.tape.tape import Tape
from memplan.tape.tensor import Parameter, dtype_named
from memplan.units import MiB

if TYPE_CHECKING:
    from memplan.explanation import AliveBlock
    from memplan.inference import Inference


def estimate(
    model: ModelSpec,
    training: TrainingSpec,
    cluster: ClusterSpec,
    strategy: Strategy,
    software: SoftwareSpec,
    *,
    replay: bool = True,
    explain: bool = False,
    traced: Traced | None = None,
) -> Estimate:
    """Estimate one setup; ``cluster.gpu`` is a GPUSpec or None.

    With ``replay`` the caching allocator is simulated; without it ``peak_reserved`` is an upper bound. ``traced`` is
    what a trace saw of the setup that :func:`resolve` gives; it takes the place of the architecture file.
    Raises SpecError for a setup that the libraries refuse, UnsupportedError for what memplan does not model.
    """
    gpu = cluster.gpu if isinstance(cluster.gpu, GPUSpec) else None
    if training.task != "train":
        return _infer(model, training, cluster, strategy, software, gpu, explain=explain)
    setup = _checked(model, training, cluster, strategy, software, traced)
    run, micro = run_of(setup, gpu)
    outside = _outside(gpu, cluster, software, training.attn, communicators=2 if strategy.has_groups_of_nodes else 1)

    def on_gpu(setup: Setup) -> tuple[dict[str, Parts], Replayed | None, Any]:
        """What each phase holds, what the allocator makes of it, and the play of an engine that shards."""
        return _on_gpu(setup, training, cluster, strategy, gpu, outside, replay=replay)

    placed, replayed, played = on_gpu(setup)
    memory, assumptions = _gpu_memory(placed, replayed, cluster, gpu, software, outside)
    if _spread_matters(software, micro.tape):
        uneven, also_replayed, _ = on_gpu(replace(setup, busiest_experts=True))
        memory = _up_to(memory, _gpu_memory(uneven, also_replayed, cluster, gpu, software, outside)[0])
    nvme = NvmeMemory(capacity=cluster.nvme, bytes=0, components={})
    if played is None:
        host = _host_memory(setup, run, micro, cluster, placed)
    else:
        from memplan import sharded  # here, because other strategies do not need it, nor its engines

        host, nvme = sharded.host_memory(played, cluster), sharded.nvme_memory(played, cluster)
    return Estimate(
        model=_model_info(model, run),
        setup=_setup_dict(setup, strategy, cluster, gpu, replay=replay),
        cluster=_cluster_dict(cluster, gpu),
        software=software.to_dict(),
        gpu=memory,
        host=host,
        nvme=nvme,
        verdict=worst_verdict(verdict_by_place(memory, host, nvme).values()),
        assumptions=(
            *assumptions,
            *_of_checkpoint(model),
            *_paged(run),
            *_emulated(setup, gpu),
            *_quantized_in_partitions(training, strategy),
            *(Assumption.of(constant) for constant in micro.assumptions),
            *(traced.assumptions if traced is not None else ()),
        ),
        explanation=_explanation(setup, run, placed, memory, strategy, cluster, gpu) if explain else (),
        levers=_levers(setup, gpu, strategy, cluster) if explain and strategy.shards else (),
    )


def _on_gpu(
    setup: Setup,
    training: TrainingSpec,
    cluster: ClusterSpec,
    strategy: Strategy,
    gpu: GPUSpec | None,
    outside: _Outside,
    *,
    replay: bool,
) -> tuple[dict[str, Parts], Replayed | None, Any]:
    run, micro = run_of(setup, gpu)
    played = None
    if strategy.shards:
        from memplan import sharded

        played = sharded.play_ranks(setup, gpu, strategy, cluster.gpus, cluster.gpus_per_node)
        placed = {phase: dict(parts) for phase, parts in played.gpu.items()}
    else:
        placed = _placed(setup, training, run, micro, gpu, strategy, cluster)
    if setup.rules.kind == "cpu":
        return placed, None, played
    # No bound is known for other settings of the allocator.
    exact = (replay or training.alloc_conf is not None) and _fullest(placed) + _piled_up(run, cluster) < REPLAYABLE
    limit = _limit(cluster, gpu, outside) if run.evaluation is not None else None
    if played is not None:
        if exact:
            replayed = sharded.replay(setup, gpu, strategy, cluster.gpus, cluster.gpus_per_node, played.rank, limit)
        else:
            bound = sharded.bound(setup, gpu, strategy, cluster.gpus, cluster.gpus_per_node)
            replayed = Replayed({}, bound)
    elif exact:
        replayed = _replay(setup, gpu, strategy, cluster.gpus, limit)
    else:
        replayed = Replayed({}, _bound(setup, gpu, strategy, cluster.gpus))
    return placed, replayed, played


def _spread_matters(software: SoftwareSpec, tape: Tape) -> bool:
    """Whether bytes depend on how the tokens spread over experts."""
    return experts_are_modules(software) and BUSIEST_EXPERT_LOAD in tape.assumptions


def _up_to(memory: GpuMemory, other: GpuMemory) -> GpuMemory:
    """``memory``, whose upper end is the other's if that is more."""
    return memory.model_copy(update={"high": max(memory.high, other.high)})


class Least(NamedTuple):
    """What a training run cannot do without, in bytes."""

    gpu: int
    """Of each GPU: ``Estimate.gpu.low``, as it is without the replay."""
    host: int
    """Of a node: ``Estimate.host.peak``."""
    nvme: int
    """Of a node: ``Estimate.nvme.bytes``."""
    verdict: Verdict
    """The best that an estimate may come to: fits, unknown or does-not-fit."""
    on_gpu: Verdict = "unknown"
    """The same of the GPU alone."""


def least(
    model: ModelSpec,
    training: TrainingSpec,
    cluster: ClusterSpec,
    strategy: Strategy,
    software: SoftwareSpec,
    *,
    played: bool = True,
) -> Least:
    """What :func:`estimate` says at least of a training run, for a search that asks for thousands: no composition, no
    bound of what is reserved. Where the engine is not ``played`` it may be less, which is sooner told: the engine as it
    is set up, and the batch beside it. Raises as :func:`estimate`.
    """
    gpu = cluster.gpu if isinstance(cluster.gpu, GPUSpec) else None
    setup = _checked(model, training, cluster, strategy, software, None)
    outside = _outside(gpu, cluster, software, training.attn, communicators=2 if strategy.has_groups_of_nodes else 1)
    held = sum(int(each.low) for each in outside)
    if strategy.shards:
        from memplan import sharded

        ask = sharded.least if played else sharded.floor
        found = ask(setup, gpu, strategy, cluster.gpus, cluster.gpus_per_node)
        return _judged(cluster, gpu, held + found.gpu, found.host, found.steady, found.nvme)
    run, micro = run_of(setup, gpu)
    placed = _placed(setup, training, run, micro, gpu, strategy, cluster)
    host = _host_memory(setup, run, micro, cluster, placed)
    return _judged(cluster, gpu, held + _fullest(placed), host.peak, host.steady, 0)


def _judged(cluster: ClusterSpec, gpu: GPUSpec | None, needed: int, host: int, steady: int, nvme: int) -> Least:
    """:func:`memplan.results.verdict_by_place` of what is needed at least."""
    verdicts = [verdict_for(needed, needed, _capacity(cluster, gpu))]
    on_host = steady if cluster.host_memory is None else host
    for used, capacity in ((on_host, cluster.host_memory), (nvme, cluster.nvme)):
        if used:
            verdicts.append(verdict_for(used, used, capacity))
    return Least(needed, host, nvme, worst_verdict(verdicts), verdicts[0])


def _checked(
    model: ModelSpec,
    training: TrainingSpec,
    cluster: ClusterSpec,
    strategy: Strategy,
    software: SoftwareSpec,
    traced: Traced | None,
) -> Setup:
    """:func:`resolve`, and what it leaves to be checked."""
    if strategy.shards:
        _check_sharded(strategy, traced)
        _check_nvme(strategy, cluster)
    if traced is not None and training.keeps_outputs:
        raise UnsupportedError("keeps_outputs: a trace ends with the loss. Leave one of them out.")
    if strategy.kind == "single" and cluster.gpus != 1:
        raise SpecError.at(
            "gpus", cluster.gpus, "is more than strategy single uses", "Use --strategy ddp, or --gpus 1."
        )
    return replace(resolve(model, training, cluster, strategy, software), traced=traced)


def _placed(
    setup: Setup,
    training: TrainingSpec,
    run: Run,
    micro: MicroBatch,
    gpu: GPUSpec | None,
    strategy: Strategy,
    cluster: ClusterSpec,
) -> dict[str, Parts]:
    """The fullest moment of every phase, where every GPU has one whole copy of everything; ``training`` as asked."""
    placed = ddp.phases(run, strategy.ddp, cluster.gpus) if strategy.kind == "ddp" else plain.phases(run)
    if training.lora is None and _has_experts(run):
        split = micro.layout().split * setup.dtype.itemsize  # save_pretrained, of rank 0
        placed["save"]["temporaries"] = placed["save"].get("temporaries", 0) + split
    load = placed["load"]
    if training.quantization is not None:
        load |= _loading(setup, gpu, cluster, load["weights"])
    copies = most_alive(_sent(micro, strategy)) - load["communication"]  # DDP's buckets of gradients follow them
    if copies > load.get("temporaries", 0):
        load["temporaries"] = copies
    return placed


def resolve(
    model: ModelSpec, training: TrainingSpec, cluster: ClusterSpec, strategy: Strategy, software: SoftwareSpec
) -> Setup:
    """Return what decides the tape, with the defaults that strategy and GPU decide. Raises as :func:`estimate`."""
    gpu = cluster.gpu if isinstance(cluster.gpu, GPUSpec) else None
    quantization = checkpoint_quantization(model, training.quantization)
    if quantization != training.quantization:
        training = training.replace(quantization=quantization)
    if training.quantization is not None and training.dtype is None:
        dtype = default_dtype(software, _checkpoint_dtype(model))
        training = training if dtype is None else training.replace(dtype=dtype)
    precision = resolve_precision(training, strategy, gpu, _checkpoint_dtype(model))
    if strategy.shards and strategy.kind != "fsdp" and training.quantization is not None:
        _check_quantized(training, precision, strategy)
    rules = device_rules(gpu, software)
    implementations = attention_implementations(model.model_type)
    if training.attn not in implementations:
        if "attn" in training.model_fields_set:
            remedy = f"Use {' or '.join(implementations)}."
            raise SpecError.at("attn", training.attn, f"does not exist for {model.model_type} in transformers", remedy)
        training = training.replace(attn="eager")  # as transformers does
    _check_attention(training, precision, rules)
    casts = strategy.kind != "zero3" or not strategy.zero.zero3_init_flag
    if strategy.kind == "fsdp":
        casts = precision.mixed_precision != "no"
    if strategy.shards and casts and training.quantization is None and training.lora is not None:
        # DeepSpeedEngine casts all parameters to the 16-bit type, unless zero.Init has, before there were adapters.
        # FSDP gathers all of them in that of mixed precision.
        training = training.replace(lora=training.lora.replace(autocast_adapter_dtype=False))
    if strategy.kind == "fsdp" and strategy.fsdp.activation_checkpointing:
        training = _activation_checkpointing(training, strategy)
    engine: Literal["torch", "zero12", "zero3", "fsdp", "fsdp1"] = "torch"
    if strategy.is_deepspeed:
        engine = "zero3" if strategy.kind == "zero3" else "zero12"
    elif strategy.kind == "fsdp":
        engine = "fsdp" if strategy.fsdp.version == 2 else "fsdp1"
    copies = strategy.kind == "ddp" and strategy.ddp.gradient_as_bucket_view and training.grad_accum_steps == 1
    return Setup(model, training, precision, rules, software, engine, copies)


def _activation_checkpointing(training: TrainingSpec, strategy: Strategy) -> TrainingSpec:
    """fsdp2_apply_ac, and prepare_model for version 1, wrap the layers that ``gradient_checkpointing`` would."""
    name = "activation_checkpointing"
    if training.gradient_checkpointing:
        remedy = "Leave one of them out."
        raise SpecError.at(name, True, "and gradient_checkpointing are both set, which the Trainer refuses", remedy)
    keys = strategy.fsdp
    if keys.auto_wrap_policy == "SIZE_BASED_WRAP" or keys.transformer_layer_cls_to_wrap:
        raise UnsupportedError(
            f"{name}: of units other than the blocks it is not modelled. Use gradient_checkpointing, or "
            "TRANSFORMER_BASED_WRAP without classes of your own."
        )
    if keys.auto_wrap_policy == "NO_WRAP" and keys.version == 1:
        raise UnsupportedError(
            f"{name}: with NO_WRAP version 1 checkpoints every module by itself, which is not modelled. Use "
            "gradient_checkpointing, or TRANSFORMER_BASED_WRAP."
        )
    if keys.auto_wrap_policy == "NO_WRAP":
        remedy = "Use gradient_checkpointing, or TRANSFORMER_BASED_WRAP."
        raise SpecError.at(name, True, "checkpoints what auto_wrap_policy wraps, and NO_WRAP wraps nothing", remedy)
    if training.lora is not None:
        raise UnsupportedError(
            f"{name}: with LoRA the first layer's input gets no gradient, unlike under gradient_checkpointing; that is "
            "not modelled. Use gradient_checkpointing."
        )
    return training.replace(gradient_checkpointing=True, use_reentrant=False)


def _check_sharded(strategy: Strategy, traced: Traced | None) -> None:
    """What is not modelled under the engines that shard yet."""
    reasons = {
        "zero3": "gathers weights as modules begin, forward and backward, and computes linear layers by a function of "
        "its own: a trace has neither",
        "fsdp": "gathers units as modules begin, forward and backward, which a trace does not record",
    }
    if traced is not None and strategy.kind in reasons:
        reason = f"{strategy.kind} {reasons[strategy.kind]}"
        raise UnsupportedError(f"trace: under {strategy.kind} it is not modelled. {reason}. Use zero2 or ddp.")


def _check_quantized(training: TrainingSpec, precision: Precision, strategy: Strategy) -> None:
    """What of quantized weights is not modelled under the engines that shard."""
    if precision.mixed_precision == "no" and precision.dtype != "float32":
        raise UnsupportedError(
            "quantization: without mixed precision adapters and norms stay in float32 beside 16-bit products, which is "
            f"not modelled under {strategy.kind}. Use --mixed-precision bf16, or --dtype float32."
        )
    if "nvme" in (strategy.offload_optimizer, strategy.offload_param):
        name = "offload_param" if strategy.offload_param == "nvme" else "offload_optimizer"
        raise UnsupportedError(f"{name}: 'nvme' is not modelled with quantized weights. Use cpu.")


def _check_nvme(strategy: Strategy, cluster: ClusterSpec) -> None:
    """DeepSpeed asks for an nvme_path; a capacity will do for an estimate."""
    if "nvme" in (strategy.offload_optimizer, strategy.offload_param) and (
        cluster.nvme_path is None and cluster.nvme is None
    ):
        remedy = "Use --nvme-path DIR, or --nvme GIB."
        raise SpecError.at("nvme_path", None, "is no folder, and offloading to nvme needs one", remedy)


def _explanation(
    setup: Setup,
    run: Run,
    placed: dict[str, Parts],
    memory: GpuMemory,
    strategy: Strategy,
    cluster: ClusterSpec,
    gpu: GPUSpec | None,
) -> tuple[Term, ...]:
    """Run every layer once more and name what is alive at the peak."""
    from memplan.explanation import explain, explain_sharded

    if strategy.shards:
        from memplan import sharded

        rank = sharded.play_ranks(setup, gpu, strategy, cluster.gpus, cluster.gpus_per_node).rank
        found = sharded.explained(setup, gpu, strategy, cluster.gpus, cluster.gpus_per_node, rank, memory.peak_phase)
        return explain_sharded(strategy, found, memory)

    tape = all_layers(setup, finds_gradients(setup)).tape
    return explain(run, tape, memory.peak_phase, placed[memory.peak_phase], memory)


def alive_blocks(
    model: ModelSpec,
    training: TrainingSpec,
    cluster: ClusterSpec,
    strategy: Strategy,
    software: SoftwareSpec,
    phase: str,
) -> list[AliveBlock]:
    """What :func:`estimate` says is alive on the GPU at the fullest moment of a phase, block by block: they sum to its
    bytes, but for what the allocator does not split off. Raises as that does.
    """
    from memplan.explanation import blocks, blocks_sharded

    gpu = cluster.gpu if isinstance(cluster.gpu, GPUSpec) else None
    setup = _checked(model, training, cluster, strategy, software, None)
    run, micro = run_of(setup, gpu)
    if strategy.shards:
        from memplan import sharded

        played = sharded.play_ranks(setup, gpu, strategy, cluster.gpus, cluster.gpus_per_node)
        ranks = (cluster.gpus, cluster.gpus_per_node, played.rank)
        return blocks_sharded(sharded.explained(setup, gpu, strategy, *ranks, phase), dict(played.gpu[phase]))
    placed = _placed(setup, training, run, micro, gpu, strategy, cluster)
    every = all_layers(setup, finds_gradients(setup))
    trainable = [(p, 1) for p in every.layout().parameters.values() if p.node is not None]
    return blocks(run, every.tape, every.inventory.buffer_blocks, _buckets(trainable, strategy), phase, placed[phase])


def _levers(setup: Setup, gpu: GPUSpec | None, strategy: Strategy, cluster: ClusterSpec) -> tuple[Lever, ...]:
    from memplan.levers import levers

    return levers(setup, gpu, strategy, cluster)


def device_rules(gpu: GPUSpec | None, software: SoftwareSpec) -> DeviceRules:
    """The dispatch rules of a GPU; without one, of a GPU with flash attention (compute capability 8.0)."""
    if gpu is None:
        rules = cuda((8, 0))
    elif gpu.is_cpu:
        rules = CPU
    else:
        rules = cuda(
            gpu.compute_capability or (8, 0),
            software.at_least("cudnn", "9.15.1"),
            gpu.sm_count,
            cudnn_wide_attention=software.at_least("cudnn", "9.22.1"),
        )
    return rules if software.at_least("torch", "1.11") else replace(rules, softmax_keeps_input=True)


def _checkpoint_dtype(model: ModelSpec) -> Any:
    name = model.config.get("dtype") or model.config.get("torch_dtype")
    return name if name in ("float32", "bfloat16", "float16") else None


def _check_attention(training: TrainingSpec, precision: Precision, rules: DeviceRules) -> None:
    """What the flash-attn package refuses, and what of it is not modelled."""
    if training.attn != "flash_attention_2":
        return
    if rules.kind != "cuda" or rules.compute_capability < (8, 0):
        raise SpecError.at("attn", training.attn, "needs an NVIDIA GPU of compute capability 8.0", "Use sdpa.")
    if precision.dtype == "float32" and precision.mixed_precision == "no":
        raise SpecError.at("attn", training.attn, "has no float32 kernels", "Use sdpa, or 16-bit precision.")
    if not training.packed:
        raise UnsupportedError(
            "attn: 'flash_attention_2' with padding (unpadding copies) is not modelled. Use --packed."
        )


# -- the tape --------------------------------------------------------------------------------------------------------


def _held(run: Run) -> list[int]:
    """What lives from loading on besides the weights."""
    return [run.buffer_bytes] if run.buffer_bytes else []


def _buckets(trainable: list[tuple[Parameter, int]], strategy: Strategy) -> list[int]:
    """DDP's, of gradients."""
    return ddp.bucket_bytes(trainable, strategy.ddp) if strategy.kind == "ddp" else []


def _sent(micro: MicroBatch, strategy: Strategy) -> Sequence[int]:
    """Copies in which DDP sends the model."""
    return micro.sent(strategy.ddp.broadcast_buffers) if strategy.kind == "ddp" else ()


def _inputs(tape: Tape) -> list[int]:
    return tape.sizes[: tape.input_count]


def _waiting(run: Run, tape: Tape) -> list[int]:
    """The inputs of the micro-batches that the replay leaves out, like with like in one block."""
    others = max(0, run.grad_accum_steps - 2)
    return [size * others for size in _inputs(tape) if others]


def _piled_up(run: Run, cluster: ClusterSpec) -> int:
    """Bytes that evaluation allocates for predictions: a replay never gives out an address twice, and what is kept of
    all batches is made anew with each.
    """
    if run.evaluation is None:
        return 0
    kept = run.evaluation.kept
    return sum(nbytes for nbytes, _ in kept.predictions) * cluster.gpus * kept.steps * (kept.steps + 1) // 2


@lru_cache(maxsize=64)
def _bound(setup: Setup, gpu: GPUSpec | None, strategy: Strategy, ranks: int) -> int:
    """What peak reserved cannot exceed, without running every layer."""
    run, micro = run_of(setup, gpu)
    stepped = run.stepped
    kept = [(size, count) for p, count in stepped for size in run.optimizer.state_bytes(p)]
    kept += [(size, 1) for size in (*run.optimizer.shared_bytes(stepped), *run.workspaces)]
    if finds_gradients(setup):
        kept += [(p.nbytes, count) for p, count in stepped]
    if run.grad_accum_steps > 1:
        kept += [(size, 1) for size in (*_inputs(micro.tape), *_waiting(run, micro.tape))]
    kept += clip_grad_norm(stepped, run.rules)
    others = [(size, count, count) for size, count in kept]
    others += [(size, *counts) for size, counts in run.optimizer.temporaries.counts.items()]
    counts = micro.unrolled.size_counts()
    micro_batches = min(run.grad_accum_steps, 2)
    held = [*_held(run), *_buckets(run.trainable, strategy)]
    bound = reserved_bound(run.parameters, held, counts, micro_batches, others)
    if strategy.kind == "ddp":
        conf = setup.training.alloc_conf or AllocatorSpec()
        bound += _sent_bound(micro.first, tuple(_held(run)), run.optimizer, strategy.ddp.broadcast_buffers, conf)
    if run.evaluation is not None:
        batch = evaluation_batch(setup, full_depth=False)
        bound += evaluation_bound(run.evaluation.kept, ranks, batch.unrolled.size_counts())
    return bound


@lru_cache(maxsize=64)
def _sent_bound(
    micro: MicroBatch, held: tuple[int, ...], optimizer: Optimizer, with_buffers: bool, conf: AllocatorSpec
) -> int:
    """:func:`sent_bound`, which is the same for batches of every size."""
    return sent_bound(list(micro.layout().parameters.values()), held, optimizer, micro.sent(with_buffers), conf)


@lru_cache(maxsize=64)
def _replay(setup: Setup, gpu: GPUSpec | None, strategy: Strategy, ranks: int, limit: int | None) -> Replayed:
    """The allocator on every layer's allocations: two steps, and evaluation in what CUDA has to give."""
    run, micro = run_of(setup, gpu)
    asked = [(False, False)] + [(True, False)] * finds_gradients(setup)
    asked += [(False, True)] * (run.evaluation is not None)
    batches = [Batch(every, every.sizes(each.tape), each.tape.input_count) for each, every in replayable(setup, asked)]
    parameters = list(micro.layout().parameters.values())
    trainable = [(p, 1) for p in parameters if p.node is not None]
    evaluation = None
    if run.evaluation is not None:
        evaluation = EvaluationLoop(batches.pop(), run.evaluation.kept, ranks, limit)
    return replay_steps(
        parameters,
        _held(run),
        batches,
        min(run.grad_accum_steps, 2),
        run.optimizer,
        run.workspaces,
        setup.training.alloc_conf,
        _waiting(run, micro.tape),
        evaluation,
        sent=_sent(micro, strategy),
        buckets=_buckets(trainable, strategy),
        keeps_gradients=run.keeps_gradients,
        gradients_in_buckets=strategy.kind == "ddp" and strategy.ddp.gradient_as_bucket_view,
    )


# -- loading ---------------------------------------------------------------------------------------------------------


def _capacity(cluster: ClusterSpec, gpu: GPUSpec | None) -> int | None:
    """Bytes that torch sees on each GPU; None is unknown."""
    return cluster.gpu_memory or (gpu.memory_bytes if gpu is not None and not gpu.is_cpu else None)


def _limit(cluster: ClusterSpec, gpu: GPUSpec | None, outside: _Outside) -> int | None:
    """Of them, those that the process leaves to torch's allocator for certain."""
    capacity = _capacity(cluster, gpu)
    if capacity is None:
        return None
    return max(0, capacity - sum(int(each.high) for each in outside))


def _loading(setup: Setup, gpu: GPUSpec | None, cluster: ClusterSpec, weights: int) -> Parts:
    """The fullest moment while a quantized model is loaded and prepared on one GPU, ``weights`` being the result."""
    from memplan.memory import loading  # here, because only quantizing takes more than the weights do

    root = build(setup, Tape(setup.rules), full_depth=False, as_loaded=True)
    loaded = loading.load(
        loading.tensors(root),
        direct=True,
        capacity=_capacity(cluster, gpu),
        prepare=prepares_for_kbit_training(setup.training),
    )
    return {"weights": weights, "temporaries": max(0, loaded.peak_allocated - weights)}


def _infer(
    model: ModelSpec,
    training: TrainingSpec,
    cluster: ClusterSpec,
    strategy: Strategy,
    software: SoftwareSpec,
    gpu: GPUSpec | None,
    *,
    explain: bool,
) -> Estimate:
    """Tasks load and generate: one copy of the model, in one process."""
    from memplan.inference import Machine, infer  # here, because training needs neither
    from memplan.memory import loading

    if strategy.kind != "single":
        remedy = "Leave it out, or use --task train; --device-map spreads one copy over several GPUs."
        raise SpecError.at("strategy", strategy.kind, f"has no use in task {training.task}", remedy)
    if cluster.nodes != 1:
        problem = f"is more than task {training.task} uses: one process on one machine holds the model"
        raise SpecError.at("nodes", cluster.nodes, problem, "Use --nodes 1, or leave it out.")
    head = training.head or head_of(model.architecture)
    if training.task == "generate" and head not in ("causal-lm", "seq2seq-lm"):
        raise SpecError.at("head", head, "does not generate text", "Use --head causal-lm.")
    setup = resolve(model, training, cluster, strategy, software)
    process = cluster.replace(gpus=1, nodes=1)
    capacity = _capacity(cluster, gpu)
    tape = Tape(setup.rules)
    root = build(setup, tape, full_depth=False)
    inventory = Inventory(root)
    workspaces = cublas_workspaces(
        gpu or reference_gpu(), software, training=False, bias=inventory.linear_bias, gradient_checkpointing=False
    )
    outside = _outside(gpu, process, software, training.attn)
    machine = Machine(
        rules=setup.rules,
        gpus=cluster.gpus,
        capacity=capacity,
        free=None if capacity is None else capacity - int(outside.context.value),
        limit=_limit(cluster, gpu, outside),
        host=cluster.host_memory,
        workspaces=workspaces,
    )
    found = infer(root, partial(build, setup, full_depth=True), training, machine)
    memory, assumptions = _gpu_memory(found.placed, found.replayed, process, gpu, software, outside)
    if training.task == "generate" and _spread_matters(software, tape):
        uneven = replace(setup, busiest_experts=True)
        other = infer(root, partial(build, uneven, full_depth=True), training, machine)
        memory = _up_to(memory, _gpu_memory(other.placed, other.replayed, process, gpu, software, outside)[0])
        assumptions.append(Assumption.of(tape.assumptions[BUSIEST_EXPERT_LOAD]))
    on_host, on_disk = found.on_host, found.on_disk
    host = HostMemory(
        capacity=cluster.host_memory,
        peak=on_host,
        pinned=0,
        ranks=1,
        components={"weights": on_host} if on_host else {},
    )
    nvme = NvmeMemory(capacity=cluster.nvme, bytes=on_disk, components={"weights": on_disk} if on_disk else {})
    verdict = worst_verdict(verdict_by_place(memory, host, nvme).values())
    return Estimate(
        model=ModelInfo(
            id=model.id,
            architecture=model.architecture,
            parameters=sum(p.elements * count for p, count in inventory.parameters),
            trainable_parameters=sum(p.elements * count for p, count in inventory.parameters if p.node is not None),
            source=model.source,
        ),
        setup=_setup_dict(setup, strategy, cluster, gpu, replay=True),
        cluster=_cluster_dict(cluster, gpu),
        software=software.to_dict(),
        gpu=memory,
        host=host,
        nvme=nvme,
        verdict="does-not-fit" if found.refused else verdict,
        assumptions=(*assumptions, *_of_checkpoint(model)),
        footprint=loading.footprint(found.held),
        device_map=found.device_map,
        kv_cache=found.kv_cache,
        explanation=_explanation_of_inference(found, memory) if explain else (),
    )


def _new_tokens(training: TrainingSpec) -> int | None:
    if training.max_new_tokens is not None or training.task != "generate":
        return training.max_new_tokens
    from memplan.memory.generation import DEFAULT_NEW_TOKENS

    return DEFAULT_NEW_TOKENS


def _explanation_of_inference(found: Inference, memory: GpuMemory) -> tuple[Term, ...]:
    from memplan.explanation import explain_inference

    return explain_inference(found, memory)


# -- the hardware ----------------------------------------------------------------------------------------------------


class _Outside(NamedTuple):
    """What a process takes outside torch's counters."""

    context: Constant
    nccl: Constant
    flash_attn: Constant


def _outside(
    gpu: GPUSpec | None, cluster: ClusterSpec, software: SoftwareSpec, attn: str, communicators: int = 1
) -> _Outside:
    context = NO_GPU_CONTEXT if gpu is None else cuda_context(gpu, software)
    gpu = reference_gpu() if gpu is None else gpu
    between = nccl(gpu, cluster.gpus, cluster.gpus_per_node, software, communicators=communicators)
    return _Outside(context, between, flash_attn(gpu, attn))


NO_GPU_CONTEXT = Constant(
    "cuda_context",
    491 * MiB,
    94 * MiB,
    740 * MiB,
    "B",
    "no GPU named: an A100's, between the least (T4) and the most (B200) of memory/runtime.py",
)


def _host_memory(setup: Setup, run: Run, micro: MicroBatch, cluster: ClusterSpec, phases: Iterable[str]) -> HostMemory:
    """Of one node: the model on its way to the GPUs, what the main process saves, and paged optimizer states, as far as
    the driver does not find room for them on the GPU.
    """
    ranks = cluster.gpus_per_node
    paged = sum(run.optimizer.paged_bytes(p) * count for p, count in run.stepped) * ranks
    parts: dict[str, Parts] = {phase: {"optimizer": paged} if paged and phase != "load" else {} for phase in phases}
    if setup.rules.kind != "cpu":
        parts["load"] |= {name: size * ranks for name, size in _loaded(setup, run, micro).items()}
        model, state = _saved(setup, run)
        saving = {"weights": model} if model >= state else {"temporaries": state}
        parts["save"] |= saving
        if run.evaluation is not None:
            ledger = Ledger()
            to_host(ledger, run.evaluation.kept, cluster.gpus)
            parts["eval"] |= {name: size * ranks for name, size in ledger.fullest("load", "host").items()}
    totals = {phase: plain.total(each) for phase, each in parts.items()}
    fullest = max(totals, key=lambda phase: totals[phase])
    return HostMemory(
        capacity=cluster.host_memory,
        peak=totals[fullest],
        pinned=0,
        ranks=ranks,
        components={name: size for name, size in parts[fullest].items() if size},
        phases=tuple(Phase(name=phase, allocated=size) for phase, size in totals.items()),
    )


def _has_experts(run: Run) -> bool:
    """Whether weights of a checkpoint are stacked when they are read, and taken apart when they are written."""
    return any(len(p.shape) == checkpoint.STACKED for p, _ in run.parameters)


def _loaded(setup: Setup, run: Run, micro: MicroBatch) -> Parts:
    """The most that from_pretrained leaves one process, before the Trainer moves the model to the GPU."""
    if setup.training.quantization is not None:
        return {}  # tensor by tensor straight to the GPU
    stored, asked = checkpoint.stored_dtype(setup.model.config), dtype_named(setup.precision.dtype)
    adapted = setup.training.lora is not None

    def nbytes(p: Parameter) -> int:
        return p.nbytes if adapted and p.node is not None else checkpoint.from_pretrained(p, asked, stored)

    if not _has_experts(run):
        return {"weights": sum(nbytes(p) * count for p, count in run.parameters)}
    model = micro.layout()
    ledger = Ledger()
    checkpoint.load(
        ledger,
        [checkpoint.Loaded(nbytes(p), merged=key in model.merged) for key, p in model.parameters.items()],
    )
    return ledger.fullest("load", "host")


def _saved(setup: Setup, run: Run) -> tuple[int, int]:
    """Bytes that the main process copies to the host to write the fullest file of the model, then the largest state."""
    model = run.trainable if setup.training.lora is not None else run.parameters
    states = [nbytes for p, _ in run.stepped for nbytes in run.optimizer.state_bytes(p)]
    whole = sum(p.nbytes * count for p, count in model)
    if whole > checkpoint.MAX_SHARD_SIZE:
        whole = checkpoint.largest_file(p.nbytes for p, count in model for _ in range(count))
    return whole, max(states, default=0)


def _gpu_memory(
    placed: dict[str, Parts],
    replayed: Replayed | None,
    cluster: ClusterSpec,
    gpu: GPUSpec | None,
    software: SoftwareSpec,
    outside: _Outside,
) -> tuple[GpuMemory, list[Assumption]]:
    """Peaks, their composition and their interval on the device."""
    allocated = {name: plain.total(parts) for name, parts in placed.items()}
    if replayed is not None:
        for name, peak in replayed.peak_allocated.items():
            if name in allocated:
                # Blocks are not split for a remainder of up to 1 MiB, which the allocator counts as allocated.
                slack = max(0, peak - allocated[name])
                placed[name]["temporaries"] = placed[name].get("temporaries", 0) + slack
                allocated[name] += slack
    peak_phase = max(allocated, key=lambda name: (allocated[name], name in _STEADY))
    peak = allocated[peak_phase]
    reserved = max(peak, replayed.peak_reserved) if replayed is not None else peak
    device = reserved + sum(int(c.value) for c in outside)
    parts = placed[peak_phase]
    memory = GpuMemory(
        capacity=_capacity(cluster, gpu),
        peak_allocated=peak,
        peak_reserved=reserved,
        peak_device=device,
        low=peak + sum(int(c.low) for c in outside),
        high=reserved + sum(int(c.high) for c in outside),
        peak_phase=peak_phase,
        steady_allocated=max((size for name, size in allocated.items() if name in _STEADY), default=peak),
        components=Components(
            **{name: size for name, size in parts.items() if size},
            fragmentation=reserved - peak,
            context=int(outside.context.value) + int(outside.flash_attn.value),
            nccl=int(outside.nccl.value),
        ),
        phases=tuple(Phase(name=name, allocated=size) for name, size in allocated.items()),
    )
    return memory, [*(Assumption.of(c) for c in outside if c.high), *_other_versions(software)]


def _of_checkpoint(model: ModelSpec) -> list[Assumption]:
    if not is_dequantized(model):
        return []
    return [Assumption(name="fp8 checkpoint", value=0, low=0, high=0, source=DEQUANTIZED_SOURCE)]


def _paged(run: Run) -> list[Assumption]:
    """What a paged optimizer leaves to the driver."""
    paged = sum(run.optimizer.paged_bytes(p) * count for p, count in run.stepped)
    if not paged:
        return []
    source = (
        "states in unified memory, of weights of 100,000 elements or more: not in torch's memory, and on the host when "
        "the GPU is full (bitsandbytes/optim/optimizer.py). A weight that grows past that size takes less of the GPU"
    )
    return [Assumption(name="paged optimizer states", value=paged, low=paged, high=paged, source=source)]


def _emulated(setup: Setup, gpu: GPUSpec | None) -> list[Assumption]:
    """A GPU without bf16 units takes it all the same: torch.cuda.is_bf16_supported says yes, and the engines ask it."""
    if gpu is None or gpu.is_cpu or gpu.supports_bf16:
        return []
    if setup.precision.mixed_precision != "bf16" and setup.precision.dtype != "bfloat16":
        return []
    source = f"{gpu.name} has no units for it: torch emulates it, slowly. Use --mixed-precision fp16"
    return [Assumption(name="bf16", value=0, low=0, high=0, source=source)]


def _quantized_in_partitions(training: TrainingSpec, strategy: Strategy) -> list[Assumption]:
    """Where an engine that shards weights saves less of quantized ones than one would think, and does not say so."""
    quantization = training.quantization
    if quantization is None:
        return []
    if strategy.kind == "zero3" and quantization.kind == "int8":
        source = (
            "whole on every rank beside their partitions: bitsandbytes computes with MatmulLtState.CB, which DeepSpeed "
            "does not know of. Use --strategy zero2, or --quantization nf4"
        )
    elif strategy.kind == "zero3":
        source = (
            "whole on every rank from forward to step: bitsandbytes' MatMul4Bit holds weights as DeepSpeed has "
            "gathered them. Use --strategy zero2"
        )
    elif strategy.kind == "fsdp" and quantization.quant_storage == "uint8":
        source = (
            "whole on every rank: accelerate keeps what is packed into uint8 out of FSDP. Set bnb_4bit_quant_storage "
            "to the compute dtype, as QuantizationSpec(quant_storage='bfloat16')"
        )
    else:
        return []
    return [Assumption(name=f"{quantization.kind} weights", value=0, low=0, high=0, source=source)]


def _other_versions(software: SoftwareSpec) -> list[Assumption]:
    return [
        Assumption(name=f"{library} {given}", value=0, low=0, high=0, source=f"rules were read from {known}")
        for library, (given, known) in software.others().items()
    ]


_STEADY = ("forward", "loss", "backward", "step", "idle")


def _fullest(placed: Mapping[str, Parts]) -> int:
    return max(map(plain.total, placed.values()))


def _model_info(model: ModelSpec, run: Run) -> ModelInfo:
    return ModelInfo(
        id=model.id,
        architecture=model.architecture,
        parameters=sum(p.elements * count for p, count in run.parameters),
        trainable_parameters=sum(p.elements * count for p, count in run.trainable),
        source=model.source,
    )


def _setup_dict(
    setup: Setup, strategy: Strategy, cluster: ClusterSpec, gpu: GPUSpec | None, *, replay: bool
) -> dict[str, Any]:
    """Every option that decides the estimate by its name on the command line, resolved; then what only specs have."""
    training, precision, model = setup.training, setup.precision, setup.model
    lora, quantization = training.lora, training.quantization
    data: dict[str, Any] = {
        "gpus": cluster.gpus,
        "nodes": cluster.nodes,
        "gpu": gpu.name if gpu is not None else None,
        "gpu_memory": cluster.gpu_memory,
        "host_memory": cluster.host_memory,
        "nvme": cluster.nvme,
        "nvme_path": cluster.nvme_path,
        "strategy": strategy.kind,
        "offload_optimizer": strategy.offload_optimizer,
        "offload_param": strategy.offload_param,
        "engine_config": _engine_settings(strategy),
        "dtype": precision.dtype,
        "mixed_precision": precision.mixed_precision,
        "micro_batch_size": training.micro_batch_size,
        "seq_len": training.seq_len,
        "grad_accum_steps": training.grad_accum_steps,
        "optim": training.optim,
        "packed": training.packed,
        "attn": training.attn,
        "gradient_checkpointing": training.gradient_checkpointing,
        "use_reentrant": training.reentrant(setup.software) if training.gradient_checkpointing else None,
        "liger": training.liger,
        "keeps_outputs": training.keeps_outputs,
        "head": training.head or declared_head(model),
        "vocab_size": training.vocab_size or model.config.get("vocab_size"),
        "lora_rank": lora.rank if lora is not None else None,
        "lora_targets": list(lora.targets or DEFAULT_TARGETS[model.model_type]) if lora is not None else None,
        "lora_dropout": lora.dropout if lora is not None else None,
        "quantization": quantization.kind if quantization is not None else "none",
        "eval_batch_size": training.eval_batch_size,
        "eval_accumulation_steps": training.eval_accumulation_steps,
        "alloc_conf": alloc_conf(training),
        "peft_type": "lora" if lora is not None else None,
        "task": training.task,
        "device_map": training.device_map,
        "max_new_tokens": _new_tokens(training),
        "trace": setup.traced is not None,
        "no_replay": not replay,
    }
    if training.task != "train":
        data |= dict.fromkeys(STEPS_ONLY)
    if lora is not None:
        data["lora_bias"] = lora.bias
        data["lora_modules_to_save"] = list(lora.modules_to_save)
        data["lora_autocast_adapter_dtype"] = lora.autocast_adapter_dtype
    if quantization is not None:
        data["prepare_for_kbit_training"] = prepares_for_kbit_training(training)
        data["peft_module_casting_to_bf16"] = quantization.peft_module_casting_to_bf16
        data["bf16_adapters"] = quantization.bf16_adapters
        data["bnb_4bit_compute_dtype"] = compute_dtype(setup).name if quantization.kind != "int8" else None
        data["bnb_4bit_quant_storage"] = quantization.quant_storage if quantization.kind != "int8" else None
    return data


def _engine_settings(strategy: Strategy) -> dict[str, Any] | None:
    """The engine's own keys, as its library names them."""
    if strategy.kind == "single":
        return None
    engine = "zero" if strategy.is_deepspeed else strategy.kind
    settings: dict[str, Any] = getattr(strategy, engine).to_dict()
    return settings


def declared_head(model: ModelSpec) -> str | None:
    """What the config's architecture says; a traced class may have a name of its own."""
    try:
        return head_of(model.architecture)
    except UnsupportedError:
        return None


def alloc_conf(training: TrainingSpec) -> str | None:
    """As the environment variable has it."""
    if training.alloc_conf is None:
        return None
    settings = training.alloc_conf.model_dump(exclude_defaults=True)
    return ",".join(f"{name}:{value}" for name, value in settings.items())


def _cluster_dict(cluster: ClusterSpec, gpu: GPUSpec | None) -> dict[str, Any]:
    data: dict[str, Any] = cluster.to_dict()
    data["gpu"] = gpu.name if gpu is not None else None
    return data
