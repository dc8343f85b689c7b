"""The engines that shard, played over a setup's micro-batches: what each place holds in every phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from memplan.adapters.quantization import Linear8bitLt, check_quant_storage
from memplan.architectures.nn import Module
from memplan.engines import bf16, checkpoint, fsdp, fsdp1, plain, zero, zero0, zero3
from memplan.engines.checkpoint import Loaded, from_pretrained, stored_dtype
from memplan.engines.layout import (
    MICRO_BATCHES,
    STEPS,
    Engine,
    EvaluationLoop,
    Layout,
    Played,
    StateDict,
    load,
    play,
)
from memplan.engines.plain import Parts, Run
from memplan.memory import loading
from memplan.memory.course import Course, ExplainingLedger, Ledger, Move, course
from memplan.memory.evaluation import Kept
from memplan.memory.play import Play, PlayLedger, most_on_tape
from memplan.memory.timeline import Unrolled
from memplan.memory.trace import Replayed, configured, engines_bound
from memplan.micro_batch import (
    MicroBatch,
    Setup,
    alike,
    all_layers,
    build,
    evaluation_batch,
    micro_batch,
    prepares_for_kbit_training,
    replayable,
    run_of,
)
from memplan.results import STEADY_PHASES, HostMemory, NvmeMemory, Phase
from memplan.specs.hardware import ClusterSpec, GPUSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import AllocatorSpec
from memplan.tape import tensor as dtypes
from memplan.tape.tape import Tape
from memplan.tape.tensor import Parameter

PHASES = ("load", "first_step", "forward", "loss", "backward", "step", "idle", "eval", "save")


@dataclass(frozen=True, slots=True)
class Sharded:
    """The fullest moments of the fullest rank."""

    gpu: dict[str, Parts]
    host: dict[str, Parts]
    """By phase and component; one node's."""
    pinned: dict[str, int]
    """The part of ``host`` that is page-locked."""
    nvme: Parts
    """The files, which are never taken away: one rank's, by component."""
    rank: int
    moves: tuple[Mapping[Move, int], ...]
    """What a step moves, by micro-batch: the first, one like all between, and the last with the step."""

    @property
    def peak(self) -> int:
        return max(map(plain.total, self.gpu.values()))


@lru_cache(maxsize=64)
def play_ranks(setup: Setup, gpu: GPUSpec | None, strategy: Strategy, ranks: int, per_node: int) -> Sharded:
    """Play the engine on the ranks one of which is the fullest; of the host all ``per_node`` hold as much."""
    run, _ = run_of(setup, gpu)
    batches = _closed(setup, run, strategy)
    phases = [phase for phase in PHASES if phase != "eval" or run.evaluation is not None]
    tapes, waiting = batches.unrolled, batches.waiting(run)
    played = _fullest(setup, gpu, strategy, ranks, per_node)
    fullest, ledger = played.fullest(tapes, waiting), played.ledger
    return Sharded(
        gpu={phase: fullest.get(phase, {}) for phase in phases},
        host={phase: ledger.fullest(phase, "host") for phase in phases},
        pinned={phase: plain.total(ledger.fullest(phase, "pinned")) for phase in phases},
        nvme=ledger.fullest("idle", "nvme"),
        rank=played.rank,
        moves=tuple(ledger.moves_of_step),
    )


@lru_cache(maxsize=512)
def _fullest(setup: Setup, gpu: GPUSpec | None, strategy: Strategy, ranks: int, per_node: int) -> Play:
    """The play of the fullest rank."""
    run, _ = run_of(setup, gpu)
    batches = _closed(setup, run, strategy)
    of_ranks = _ranks(strategy, batches.first, ranks)
    plays = [_played(setup, run, strategy, ranks, per_node, rank, batches) for rank in of_ranks]
    if len(plays) == 1:
        return plays[0]
    tapes, waiting = batches.unrolled, batches.waiting(run)
    return max(plays, key=lambda each: each.peak(tapes, waiting))


class Least(NamedTuple):
    """What a setup has at the fullest moments, in bytes."""

    gpu: int
    """Allocated on a GPU, without what the caching allocator does not split off."""
    host: int
    """Of one node."""
    steady: int
    """Of one node, in the phases that every further step repeats."""
    nvme: int
    """Files of one node."""


def least(setup: Setup, gpu: GPUSpec | None, strategy: Strategy, ranks: int, per_node: int) -> Least:
    """The totals of :func:`play_ranks`, in a tenth of the time."""
    run, _ = run_of(setup, gpu)
    batches = _closed(setup, run, strategy)
    played = _fullest(setup, gpu, strategy, ranks, per_node)
    ledger = played.ledger
    return Least(
        gpu=played.peak(batches.unrolled, batches.waiting(run)),
        host=played.host_peak,
        steady=max(plain.total(ledger.fullest(phase, "host")) for phase in STEADY_PHASES),
        nvme=plain.total(ledger.fullest("idle", "nvme")) * per_node,
    )


def floor(setup: Setup, gpu: GPUSpec | None, strategy: Strategy, ranks: int, per_node: int) -> Least:
    """What :func:`least` says at least, without a play: the engine as it is set up, and the tape beside it.

    What engines have when they are set up, and the optimizer's states, they keep to the end of training.
    """
    run, _ = run_of(setup, gpu)
    batches = _closed(setup, run, strategy)
    rank = _ranks(strategy, batches.first, ranks)[0]
    own = _besides(alike(setup), strategy)
    loaded = _loaded_least(
        replace(own, training=own.training.replace(gradient_checkpointing=False)),
        setup.training.optim,
        strategy,
        ranks,
        per_node,
        rank,
        batches.first.likeness,
        _Unkeyed(batches),
    )
    of_tape = max(most_on_tape(each.first.course, each.unrolled) for each in (batches.first, batches.later))
    waiting = sum((nbytes + 511) & -512 for nbytes in batches.waiting(run))
    return loaded.most._replace(gpu=max(loaded.most.gpu, loaded.kept + waiting + of_tape))


def moves(setup: Setup, gpu: GPUSpec, strategy: Strategy, ranks: int, per_node: int) -> Sequence[Mapping[Move, int]]:
    """What a step moves, by micro-batch: the first, one like all between, and the last with the step."""
    return _fullest(setup, gpu, strategy, ranks, per_node).ledger.moves_of_step


@lru_cache(maxsize=64)
def bound(setup: Setup, gpu: GPUSpec | None, strategy: Strategy, ranks: int, per_node: int) -> int:
    """What peak reserved cannot exceed on the fullest rank."""
    run, micro = run_of(setup, gpu)
    batches = _closed(setup, run, strategy)
    evaluated = {} if batches.evaluation is None else batches.evaluation.unrolled.size_counts()
    rank = play_ranks(setup, gpu, strategy, ranks, per_node).rank
    blocks = _played(setup, run, strategy, ranks, per_node, rank, batches).size_counts(batches.waiting(run))
    micro_batches = min(run.grad_accum_steps, MICRO_BATCHES) * STEPS
    return engines_bound(blocks, micro.unrolled.size_counts(), micro_batches, evaluated)


@lru_cache(maxsize=64)
def replay(
    setup: Setup, gpu: GPUSpec | None, strategy: Strategy, ranks: int, per_node: int, rank: int, limit: int | None
) -> Replayed:
    """The allocator under the engine: two steps, and evaluation in what CUDA has to give."""
    run, _ = run_of(setup, gpu)
    asked = [(False, False)]
    asked += [(True, False)] * (run.grad_accum_steps > 1 and _leaves_gradients(strategy))
    asked += [(False, True)] * (run.evaluation is not None)
    found = replayable(setup, asked)
    micros = [micro for micro, _ in found]
    evaluation = micros.pop() if run.evaluation is not None else None
    batches = _Batches(micros[0], micros[-1], evaluation)
    played = _played(setup, run, strategy, ranks, per_node, rank, batches)
    allocator = configured(setup.training.alloc_conf or AllocatorSpec())
    every = [each for _, each in found]
    peaks, reserved = played.replay(allocator, every, batches.unrolled, batches.waiting(run), limit)
    return Replayed(peaks, reserved)


@dataclass(frozen=True, slots=True)
class _Batches:
    """The micro-batches of a step, and a batch of evaluation."""

    first: MicroBatch
    later: MicroBatch
    """One that finds gradients."""
    evaluation: MicroBatch | None

    @property
    def each(self) -> list[MicroBatch]:
        """Every one once."""
        later = [] if self.later is self.first else [self.later]
        return [self.first, *later, *([] if self.evaluation is None else [self.evaluation])]

    @property
    def unrolled(self) -> list[Unrolled]:
        return [each.unrolled for each in self.each]

    @property
    def gradients(self) -> list[int]:
        """Bytes of each that an engine takes."""
        tapes = (each.tape for each in self.each)
        return [tape.sizes[event.storage] for tape in tapes for event in tape.events if event.storage >= 0]

    @property
    def inputs(self) -> list[int]:
        """Bytes of each input of a micro-batch."""
        return self.first.tape.sizes[: self.first.tape.input_count]

    def waiting(self, run: Run) -> list[int]:
        """Those of the step's other micro-batches together, which are on the GPU before the first runs."""
        others = run.grad_accum_steps - 1
        return [size * others for size in self.inputs] if others else []


def _leaves_gradients(strategy: Strategy) -> bool:
    """Whether gradients stay where autograd put them, so that a later micro-batch adds to them."""
    flat = strategy.kind == "fsdp" and strategy.fsdp.version == 1  # autograd makes one gradient of a unit's
    return strategy.kind in ("zero0", "zero1", "fsdp") and not flat


def _closed(setup: Setup, run: Run, strategy: Strategy) -> _Batches:
    """With one layer of each kind."""
    first = micro_batch(setup, full_depth=False, accumulated=False)
    later = first
    if run.grad_accum_steps > 1 and _leaves_gradients(strategy):
        later = micro_batch(setup, full_depth=False, accumulated=True)
    evaluation = evaluation_batch(setup, full_depth=False) if run.evaluation is not None else None
    return _Batches(first, later, evaluation)


def _played(
    setup: Setup, run: Run, strategy: Strategy, ranks: int, per_node: int, rank: int, batches: _Batches
) -> Play:
    """The engine's play over batches of whatever size: those of the same structure have one."""
    evaluated = None
    if run.evaluation is not None:
        evaluated = Kept(tuple(run.evaluation.kept.predictions), run.evaluation.kept.steps), tuple(batches.inputs)
    optim, micro_batches = setup.training.optim, min(run.grad_accum_steps, MICRO_BATCHES)
    played = _Batches(batches.first.first, batches.later.first, batches.evaluation and batches.evaluation.first)
    if played.gradients != batches.gradients:  # torch keeps some as views of what the batch decides
        played = batches
    return _play(alike(setup), optim, strategy, ranks, per_node, rank, run.workspaces, micro_batches, played, evaluated)


@lru_cache(maxsize=256)
def _play(
    setup: Setup,
    optim: str,
    strategy: Strategy,
    ranks: int,
    per_node: int,
    rank: int,
    workspaces: Sequence[int],
    grad_accum_steps: int,
    batches: _Batches,
    evaluated: tuple[Kept, Sequence[int]] | None,
) -> Play:
    hooked = None if strategy.kind in ("zero0", "zero1", "zero2") else batches.first.hooked
    likeness = (batches.first.likeness, hooked, *(each.moments for each in batches.each))
    place = strategy, ranks, per_node, rank
    found = _play_alike(
        _besides(setup, strategy), optim, *place, workspaces, grad_accum_steps, evaluated, likeness, _Unkeyed(batches)
    )
    return found.over([each.course for each in batches.each])


def _besides(setup: Setup, strategy: Strategy) -> Setup:
    """What an engine knows of a setup besides the model and the batch as it finds them: DeepSpeed's know no kernels."""
    training = setup.training
    if not strategy.is_deepspeed or training.quantization is not None:
        return setup
    return replace(setup, training=training.replace(attn="sdpa", liger=False, gradient_checkpointing=False))


@lru_cache(maxsize=256)
def _play_alike(
    setup: Setup,
    optim: str,
    strategy: Strategy,
    ranks: int,
    per_node: int,
    rank: int,
    workspaces: Sequence[int],
    grad_accum_steps: int,
    evaluated: tuple[Kept, Sequence[int]] | None,
    likeness: object,
    batches: _Unkeyed,
) -> Play:
    """The play over batches whichever, of those in which the engine finds the same."""
    setup = replace(setup, training=setup.training.replace(optim=optim))
    ledger, own = PlayLedger(ranks=per_node), batches.value
    courses = _play_batches(
        setup, strategy, ranks, per_node, rank, ledger, own, workspaces, grad_accum_steps, evaluated, limit=0
    )
    return Play(ledger, courses, rank)


class _Loaded(NamedTuple):
    """What there is before the first micro-batch, and once a step without any has made the optimizer's states."""

    most: Least
    """At the fullest moments until then; ``steady`` and ``nvme`` are what is left in the end."""
    kept: int
    """Allocated on the GPU in the end."""


class _Unkeyed(NamedTuple):
    """An argument that an answer which is remembered does not depend on."""

    value: _Batches

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=1024)
def _loaded_least(
    setup: Setup,
    optim: str,
    strategy: Strategy,
    ranks: int,
    per_node: int,
    rank: int,
    likeness: object,
    batches: _Unkeyed,
) -> _Loaded:
    """Whatever batches, and checkpointing: what is there before does not depend on them."""
    setup = replace(setup, training=setup.training.replace(optim=optim))
    ledger = PlayLedger(ranks=per_node)
    engine, run, _ = _prepared(setup, strategy, ranks, per_node, rank, ledger, batches.value, (), 1, None, limit=0)
    load(engine, ledger, run)
    ledger.begin("step")
    engine.step()  # of no gradients
    heights = ledger.heights
    ledger.begin("idle")
    left = Least(
        gpu=max(heights),
        host=max(plain.total(ledger.fullest(phase, "host")) for phase in ("load", "step")),
        steady=plain.total(ledger.fullest("idle", "host")),
        nvme=plain.total(ledger.fullest("idle", "nvme")) * per_node,
    )
    return _Loaded(left, heights[-1])


def explained(
    setup: Setup, gpu: GPUSpec | None, strategy: Strategy, ranks: int, per_node: int, rank: int, phase: str
) -> ExplainingLedger:
    """What one rank has on its GPU at a phase's fullest moment, block by block."""
    ledger = ExplainingLedger(phase)
    play_engine(setup, gpu, strategy, ranks, per_node, rank, ledger, full_depth=True)
    return ledger


def play_engine(
    setup: Setup,
    gpu: GPUSpec | None,
    strategy: Strategy,
    ranks: int,
    per_node: int,
    rank: int,
    ledger: Ledger,
    *,
    full_depth: bool,
) -> None:
    """Play two steps, and evaluation, on one rank of ``ranks``, of which ``per_node`` are on a node; ``ledger`` keeps
    what it places.
    """
    run, _ = run_of(setup, gpu)
    batches = _every_layer(setup, run, strategy) if full_depth else _closed(setup, run, strategy)
    evaluated = None if run.evaluation is None else (run.evaluation.kept, batches.inputs)
    _play_batches(
        setup, strategy, ranks, per_node, rank, ledger, batches, run.workspaces, run.grad_accum_steps, evaluated
    )


def _every_layer(setup: Setup, run: Run, strategy: Strategy) -> _Batches:
    """With every layer on the tape."""
    first = later = all_layers(setup, False)
    if run.grad_accum_steps > 1 and _leaves_gradients(strategy):
        later = all_layers(setup, True)
    return _Batches(first, later, evaluation_batch(setup, full_depth=True) if run.evaluation is not None else None)


def _play_batches(
    setup: Setup,
    strategy: Strategy,
    ranks: int,
    per_node: int,
    rank: int,
    ledger: Ledger,
    batches: _Batches,
    workspaces: Sequence[int],
    grad_accum_steps: int,
    evaluated: tuple[Kept, Sequence[int]] | None,
    limit: int | None = None,
) -> list[Course]:
    """:func:`play_engine` over ``batches``; return their courses."""
    engine, played, courses = _prepared(
        setup, strategy, ranks, per_node, rank, ledger, batches, workspaces, grad_accum_steps, evaluated, limit
    )
    play(engine, ledger, played)
    return courses


def _prepared(
    setup: Setup,
    strategy: Strategy,
    ranks: int,
    per_node: int,
    rank: int,
    ledger: Ledger,
    batches: _Batches,
    workspaces: Sequence[int],
    grad_accum_steps: int,
    evaluated: tuple[Kept, Sequence[int]] | None,
    limit: int | None,
) -> tuple[Engine, Played, list[Course]]:
    """The engine, what it is played over, and the courses of ``batches``.

    Of evaluation it is told what is ``evaluated``: what is kept, and the inputs of the micro-batch before.
    """
    first, later = batches.first, batches.later
    model = first.layout(strategy.zero.ds_optimizer)
    courses = [
        course(each.unrolled, each.layout().numbers) if ledger.measures else each.course for each in batches.each
    ]
    evaluation = None
    if evaluated is not None:
        evaluation = EvaluationLoop(
            course=courses[-1], inputs=evaluated[1], kept=evaluated[0], ranks=ranks, limit=limit
        )
    others = grad_accum_steps - 1
    to_host = _takes_to_host(setup, strategy)
    played = Played(
        loaded=_loaded(setup, strategy, model),
        converted=_converted(setup, strategy, model),
        loaded_on="gpu" if setup.training.quantization is not None and not to_host else "host",
        quantizing=_quantizing(setup, one_by_one=to_host),
        quantized_on_host=_quantized_on_host(setup, first.root),
        state_dict=StateDict(
            [(key, model.parameters[key].nbytes) for key in model.names],
            [b.nbytes for b, count in first.inventory.buffers if not b.registered for _ in range(count)],
            model.split,
        ),
        held=first.inventory.buffer_blocks,
        outlived=_outlived(setup, strategy, model),
        workspaces=workspaces,
        first=courses[0],
        later=courses[1] if later is not first else courses[0],
        grad_accum_steps=grad_accum_steps,
        waiting=[size * others for size in batches.inputs if others],
        evaluation=evaluation,
    )
    return _engine(setup, strategy, first.root, model, ranks, per_node, rank, ledger), played, courses


def _loaded(setup: Setup, strategy: Strategy, model: Layout) -> list[Loaded]:
    """The model that the script hands to the Trainer, on the host, and what the engine makes of it there."""
    if setup.training.quantization is not None:
        sharded = [p for p in model.parameters.values() if strategy.kind != "fsdp" or p.dtype.is_floating]
        return [_loaded_on_gpu(p, casts=strategy.kind != "fsdp") for p in sharded]
    if strategy.kind == "zero3" and strategy.zero.zero3_init_flag:
        return []  # rank 0 copies from the mapped file to the GPU, where PEFT puts adapters too
    trained = {key for group in model.groups for key in group}
    adapted = setup.training.lora is not None
    asked, stored = dtypes.dtype_named(setup.precision.dtype), stored_dtype(setup.model.config)
    found = []
    for key, p in model.parameters.items():
        made = adapted and key in trained  # by PEFT
        loaded = checkpoint.loaded_dtype(p, asked)
        if strategy.kind == "fsdp":  # fsdp2_prepare_model upcasts what is trained, version 1 does once it is sharded
            loaded = fsdp.loaded_dtype(p, asked, setup.mixed)
            upcasts = strategy.fsdp.version == 2 and setup.mixed is not None
            wanted = dtypes.float32 if upcasts and key in trained else loaded
        elif strategy.kind == "zero3" and made:
            wanted = loaded
        else:
            wanted = setup.dtype
        cast = p.numel * wanted.itemsize if wanted is not loaded else None
        nbytes = p.numel * loaded.itemsize if made else from_pretrained(p, asked, stored)
        found.append(Loaded(nbytes, cast, merged=key in model.merged))
    return found


def _loaded_on_gpu(p: Parameter, *, casts: bool) -> Loaded:
    """A weight as quantizing and preparing the model has left it, and as DeepSpeed casts it."""
    assert p.loaded is not None
    nbytes = p.numel * p.loaded.itemsize
    return Loaded(nbytes, p.nbytes if casts and p.dtype is not p.loaded else None)


def _takes_to_host(setup: Setup, strategy: Strategy) -> bool:
    """Whether a quantized weight leaves the GPU again as it is loaded: transformers before 5.0, is_fsdp_enabled()."""
    is_fsdp_enabled = strategy.kind == "fsdp" and strategy.fsdp.cpu_ram_efficient_loading
    return is_fsdp_enabled and not setup.software.at_least("transformers", "5")


def _quantizing(setup: Setup, *, one_by_one: bool) -> int:
    """Bytes on the GPU at the fullest moment of quantizing the model and preparing it."""
    if setup.training.quantization is None:
        return 0
    root = build(setup, Tape(setup.rules), full_depth=False, as_loaded=True)
    if one_by_one:
        return max(loading.load([each], direct=False).peak_allocated for each in loading.tensors(root))
    prepare = prepares_for_kbit_training(setup.training)
    return loading.load(loading.tensors(root), direct=True, prepare=prepare).peak_allocated


def _outlived(setup: Setup, strategy: Strategy, model: Layout) -> list[tuple[int, str]]:
    """torch's Adagrad makes its states as it is made. DeepSpeed then gives it masters or flat partitions, for which it
    makes others; those of the weights stay, where and in the type in which the weights were.
    """
    keys, zero3_init = strategy.zero, strategy.kind == "zero3" and strategy.zero.zero3_init_flag
    has_masters = strategy.kind != "zero0" or setup.dtype is not dtypes.float32
    if setup.training.optim != "adagrad" or not strategy.is_deepspeed or not has_masters:
        return []
    if strategy.offload_optimizer != "none" and keys.ds_optimizer:  # DeepSpeedCPUAdagrad
        return []
    adapted = setup.training.lora is not None
    if zero3_init and not adapted:
        return []  # they are cut into partitions: nothing is left of them
    asked = dtypes.dtype_named(setup.precision.dtype)
    place = "gpu" if keys.ds_optimizer or zero3_init else "host"
    weights = [model.parameters[key] for group in model.groups for key in group]
    return [
        (p.numel * (setup.dtype if keys.ds_optimizer else checkpoint.loaded_dtype(p, asked)).itemsize, place)
        for p in weights
    ]


def _quantized_on_host(setup: Setup, root: Module) -> int:
    """Bytes of the largest weight that Bnb8bitQuantize takes to the host and back, as it is loaded."""
    layers = [module for _, module in root.named_modules() if isinstance(module, Linear8bitLt)]
    itemsize = dtypes.dtype_named(setup.precision.dtype).itemsize
    return max((module.weight.numel * itemsize for module in layers), default=0)


def _converted(setup: Setup, strategy: Strategy, model: Layout) -> int:
    """_apply_weight_conversions_to_state_dict, on rank 0 alone: the stacks, and both put together."""
    is_made_whole = setup.training.quantization is not None or not strategy.zero.zero3_init_flag
    if strategy.kind != "zero3" or is_made_whole:
        return 0
    itemsize = (stored_dtype(setup.model.config) or dtypes.float32).itemsize
    return 2 * itemsize * max((model.parameters[key].numel for key in model.merged), default=0)


def _engine(
    setup: Setup,
    strategy: Strategy,
    root: Module,
    model: Layout,
    ranks: int,
    per_node: int,
    rank: int,
    ledger: Ledger,
) -> Engine:
    hidden_size, optim = setup.model.hidden_size, setup.training.optim
    if setup.training.quantization is not None and (strategy.kind != "fsdp" or setup.mixed is not None):
        check_quant_storage(setup.training.quantization, setup.dtype)
    if strategy.kind == "fsdp":
        placed = fsdp.fsdp_setup(
            strategy,
            root,
            model,
            fsdp.shard_group(strategy.fsdp, ranks, per_node),
            dtypes.dtype_named(setup.precision.dtype),
            setup.mixed,
            setup.training,
            setup.training.gradient_checkpointing and setup.training.reentrant(setup.software),
            setup.model.model_type,
            setup.rules,
        )
        return fsdp1.Fsdp1(placed, ledger) if isinstance(placed, fsdp1.Fsdp1Setup) else fsdp.Fsdp(placed, ledger)
    if strategy.kind == "zero3":
        sharded = zero3.zero3_setup(
            strategy,
            model,
            ranks,
            per_node,
            setup.dtype,
            hidden_size,
            optim,
            setup.rules,
            setup.software,
            adapted=setup.training.lora is not None,
            quantized=setup.training.quantization is not None,
        )
        return zero3.Zero3(sharded, ledger)
    frozen = [p.nbytes for p in model.parameters.values() if p.node is None]
    if strategy.kind == "zero0":
        zero.master_dtype(strategy, setup.dtype)
        communication = zero.named(strategy.zero.communication_data_type, setup.dtype)
        return zero0.Zero0(zero0.zero0_setup(model, frozen, setup.dtype, communication, optim, setup.rules), ledger)
    groups = zero.parameter_groups(model, ranks, strategy.zero.round_robin_gradients)
    places = zero.zero_setup(strategy, groups, frozen, rank, setup.dtype, hidden_size, optim, setup.rules)
    if zero.uses_bf16_optimizer(strategy, setup.dtype):
        return bf16.Bf16(places, ledger)
    return zero.Zero12(places, ledger)


def _ranks(strategy: Strategy, micro: MicroBatch, ranks: int) -> list[int]:
    """Those among which the fullest is. Stage 3 cuts every weight alike, and the first has no padding."""
    if strategy.kind in ("zero0", "zero3", "fsdp"):
        return [0]
    return _fullest_ranks(micro.first, strategy.zero.ds_optimizer, ranks, strategy.zero.round_robin_gradients)


@lru_cache(maxsize=256)
def _fullest_ranks(micro: MicroBatch, one_group: bool, ranks: int, round_robin: bool) -> list[int]:
    return zero.fullest_ranks(zero.parameter_groups(micro.layout(one_group), ranks, round_robin))


def host_memory(played: Sharded, cluster: ClusterSpec) -> HostMemory:
    """What the ranks of one node hold together, the main process among them."""
    totals = {phase: plain.total(parts) for phase, parts in played.host.items()}
    fullest = max(totals, key=lambda phase: totals[phase])
    return HostMemory(
        capacity=cluster.host_memory,
        peak=totals[fullest],
        pinned=played.pinned[fullest],
        ranks=cluster.gpus_per_node,
        components={name: size for name, size in played.host[fullest].items() if size},
        phases=tuple(Phase(name=phase, allocated=size) for phase, size in totals.items()),
    )


def nvme_memory(played: Sharded, cluster: ClusterSpec) -> NvmeMemory:
    """The files of one node's ranks."""
    components = {name: size * cluster.gpus_per_node for name, size in played.nvme.items() if size}
    return NvmeMemory(capacity=cluster.nvme, bytes=sum(components.values()), components=components)
