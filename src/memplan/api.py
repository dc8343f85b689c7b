"""The facade: names, paths and configs in, estimates out.

It resolves what a user writes (a hub id, ``"2xA100-80GB"``, nothing at all) to specs, and hands them to the
estimator. What it adds of its own is data: the rungs of the ladder, and the remedies for a setup that does not fit.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard, TypeVar, Union, get_args

from memplan import estimator, micro_batch, planner, solving
from memplan.architectures.registry import FAMILIES
from memplan.catalog import hub
from memplan.catalog.detect import detect_cluster, free_disk, host_memory
from memplan.catalog.gpus import all_gpus, find_gpu, parse_cluster
from memplan.errors import MemplanError, PreflightError, ResolutionError, SpecError, UnsupportedError
from memplan.parallel import shared_out
from memplan.planner import Done, Objective, nothing
from memplan.results import (
    ENGINE_CONFIG,
    Assumption,
    Check,
    Comparison,
    Estimate,
    EstimateList,
    Finding,
    Plan,
    Preflight,
    Question,
    Remedy,
    Rung,
    Solved,
    StepTime,
    verdict_by_place,
)
from memplan.space import (
    LADDER,
    SIDES,
    Change,
    Setup,
    Target,
    changed,
    checkpointed,
    in_nf4,
    micro_batch_1,
    rungs,
    with_8bit_adam,
    with_liger,
    with_lora,
)
from memplan.specs._base import Spec
from memplan.specs.hardware import ClusterSpec, GPUSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import LoraSpec, QuantizationSpec, TrainingSpec
from memplan.units import GiB, gib

if TYPE_CHECKING:
    from torch import nn

    from memplan.configs.run import Run
    from memplan.configs.setup import EngineConfig
    from memplan.integrations.live import Live
    from memplan.introspect.extrapolate import Inputs
    from memplan.introspect.measure import Start
    from memplan.introspect.measurement import Boundary, Measured, Measurement
    from memplan.lengths import Batches, Lengths

__all__ = [
    "BOUNDARIES",
    "LADDER",
    "REMEDIES",
    "Advice",
    "Setup",
    "advise",
    "check",
    "compare",
    "estimate",
    "estimate_again",
    "ladder",
    "measure",
    "measure_boundary",
    "plan",
    "preflight",
    "rungs",
]

ModelLike: TypeAlias = Union[str, os.PathLike[str], ModelSpec, Mapping[str, Any], "nn.Module"]
"""A hub id, a path, a ModelSpec, the values of a config.json, or a module of torch."""

TrainingLike: TypeAlias = TrainingSpec | Mapping[str, Any] | None
ClusterLike: TypeAlias = str | ClusterSpec | Mapping[str, Any] | None
StrategyLike: TypeAlias = str | Strategy | Mapping[str, Any] | None
SoftwareLike: TypeAlias = str | SoftwareSpec | Mapping[str, Any] | None
"""A spec, its fields as a mapping, or the text that is short for it; None is its defaults."""
LengthsLike: TypeAlias = Any
"""A path, a list, an array or a column of numbers of tokens."""
EngineConfigLike: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | None
"""A path, or the values of the file."""


def estimate(
    model: ModelLike,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    strategy: StrategyLike = None,
    *,
    engine_config: EngineConfigLike = None,
    software: SoftwareLike = None,
    replay: bool = True,
    explain: bool = False,
    trace: bool = False,
    inputs: Inputs | None = None,
) -> Estimate:
    """Estimate the memory of one setup, in bytes per GPU, and the time of its step where the GPU is known.

    Args:
        model: a hub id, a folder, a ``config.json``, its values as a mapping, a ModelSpec, or an ``nn.Module``.
        training: the run, a TrainingSpec or its fields as a mapping; None is the defaults (full fine-tuning,
            1 x 2048 tokens).
        cluster: ``"2xA100-80GB"``, ``"2x8xH100-80GB"`` (2 nodes of 8), a ClusterSpec or its fields; without a GPU
            this machine's are used, and where there is none the capacity and the verdict are unknown.
        strategy: a Strategy, its fields, or its kind as text; None is plain training on one GPU and DDP on several.
        engine_config: a DeepSpeed JSON or accelerate YAML, as a path or as its values. What the other arguments say
            wins over it, and ``Estimate.assumptions`` name it.
        software: versions, as text (``"transformers=4.46"``), a SoftwareSpec or its fields.
        replay: simulate the caching allocator, and time a step; without it ``peak_reserved`` is an upper bound, and
            ``step`` is None.
        explain: fill ``Estimate.explanation``.
        trace: trace the real model, with the ``train`` extra, instead of running its architecture file. An
            ``nn.Module`` is always traced, and left as it is.
        inputs: for a trace, what forward takes: a function of micro-batch size and sequence length that makes its
            keyword arguments, tensors on the CPU. None is input_ids and labels, or pixel_values and labels, as
            transformers' models take them. The loss must be what forward returns, or the first or the ``loss`` of it.

    Raises:
        ResolutionError: the model or the GPU is not found.
        SpecError: a value or a combination is wrong.
        UnsupportedError: memplan does not model it.
    """
    config = None if engine_config is None else _engine_config(engine_config)
    case = _resolved(model, cluster, software, config, trace=trace, inputs=inputs)
    asked = _asked(case, case.decided(_training(training)), strategy, config)
    result = case.answer(asked, replay=replay, explain=explain)
    return result.model_copy(update={"assumptions": (*result.assumptions, *asked.notes)}) if asked.notes else result


def ladder(
    model: ModelLike,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    *,
    software: SoftwareLike = None,
    replay: bool = True,
    explain: bool = False,
    trace: bool = False,
    inputs: Inputs | None = None,
    processes: int = 1,
) -> EstimateList:
    """Estimate every rung of the ladder, from the setup as asked to the one that needs the least memory.

    Arguments and errors are those of :func:`estimate`; :data:`LADDER` lists the rungs. One that the libraries refuse
    for this run, or that is not modelled for it, is left out. ``processes`` share the rungs out: copies of this one,
    which a process with threads or a GPU should not make.
    """
    case = _resolved(model, cluster, software, trace=trace, inputs=inputs)
    first, *others = rungs(case.with_nvme(_asked(case, case.decided(_training(training)), None)))

    def answered(setup: Setup) -> Estimate | None:
        with suppress(SpecError, UnsupportedError):
            return case.answer(setup, replay=replay, explain=explain)
        return None

    if processes > 1 and others and not trace:
        # What is asked for comes last, and so falls to this process or another: its refusal is raised here.
        texts = shared_out(lambda setup: _as_text(answered(setup)), [*others, first], processes)
        found = [None if not text else Estimate.model_validate_json(text) for text in texts]
        asked = found.pop() or case.estimate(first, replay=replay, explain=explain)  # raises
    else:
        asked = case.answer(first, replay=replay, explain=explain)
        found = [answered(setup) for setup in others]
    return EstimateList(estimates=(asked, *(each for each in found if each is not None)))


def _as_text(estimate: Estimate | None) -> str:
    return "" if estimate is None else estimate.model_dump_json()


def compare(
    model: ModelLike,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    strategy: StrategyLike = None,
    *,
    engine_config: EngineConfigLike = None,
    software: SoftwareLike = None,
    replay: bool = True,
) -> Comparison:
    """Compare what DeepSpeed's and accelerate's estimators, the rule of thumb and memplan say, in bytes.

    Arguments and errors are those of :func:`estimate`, for a training run of a model that is not a module. Without a
    strategy or an engine's config, plain training (or DDP) and the setups that DeepSpeed's estimators print are
    compared. One that memplan does not model gets a row that says so.
    """
    from memplan import comparison  # here, because estimates do not need it

    if _is_module(model):
        remedy = "Give its hub id or its config."
        raise UnsupportedError(f"model: a module is traced, and compare counts by the architecture files. {remedy}")
    config = None if engine_config is None else _engine_config(engine_config)
    case, run = _resolved(model, cluster, software, config), _training(training)
    if run.task != "train":
        remedy = "Leave it out: accelerate's total size is what loading takes."
        raise SpecError.at("task", run.task, "is not a training run, which compare is for", remedy)
    asked = _asked(case, run, strategy, config)
    others = comparison.DEEPSPEEDS if strategy is None and config is None else ()
    return comparison.compare(
        case.model, asked.training, case.cluster, (asked.strategy, *others), case.software, replay=replay
    )


def plan(
    model: ModelLike,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    *,
    global_batch_size: int | None = None,
    target: Target = "deepspeed",
    objective: Objective = "throughput",
    solve: Question | None = None,
    allow: Sequence[str] = (),
    software: SoftwareLike = None,
    advise: bool = True,
    processes: int = 1,
    done: Done = nothing,
) -> Plan:
    """Look for the best setup that fits: on the ladder, and beside it.

    Args:
        model: as in :func:`estimate`.
        training: as in :func:`estimate`.
        cluster: as in :func:`estimate`; the GPU must be known.
        global_batch_size: the sequences of one step over all ranks, which stay as they are; None is what ``training``
            comes to.
        target: whose rungs the ladder has: ``deepspeed``, ``fsdp``, or ``auto`` for both.
        objective: ``throughput``, the least time of a step; ``memory``, the least of each GPU; ``gpus``, the fewest of
            the cluster's GPUs, with the least time on them.
        solve: ask for a value, which ``Plan.solved`` has: the largest ``micro-batch``, the longest sequence
            (``seq-len``), the fewest ``gpus``, or the smallest ``gpu`` of the catalog, with which a rung fits. What is
            asked for must not be given.
        allow: what else a plan may choose, of :data:`memplan.space.SIDES`: ``liger``, ``flash_attention_2``,
            ``adamw_8bit``, ``lora``, ``qlora``. A question has no use for it.
        software: as in :func:`estimate`.
        advise: where nothing fits for certain, look for changes with which something does (``Plan.remedies``).
        processes: share the search: copies of this one, which a process with threads or a GPU should not make.
        done: is told how many of how many families of setups have been looked at.

    Raises SpecError for a setup that the libraries refuse, UnsupportedError for what memplan does not model.
    """
    for name, value, choices in (
        ("target", target, get_args(Target)),
        ("objective", objective, get_args(Objective)),
        ("solve", solve, (None, *get_args(Question))),
    ):
        if value not in choices:
            remedy = f"Use {' or '.join(filter(None, choices))}."
            raise SpecError.at(name, value, "is not known", remedy)
    allow = tuple(dict.fromkeys(allow))
    unknown = next((name for name in allow if name not in SIDES), None)
    if unknown is not None:
        raise SpecError.at("allow", unknown, "is nothing that a plan may change", f"Use {' or '.join(SIDES)}.")
    if allow and solve is not None:
        problem = f"is for a plan, and --solve {solve} takes the setup as it is"
        raise SpecError.at("allow", ",".join(allow), problem, "Leave one of them out.")
    run, hardware = _training(training), _cluster_spec(cluster)
    if run.task != "train":
        raise SpecError.at("task", run.task, "is not a training run, which a plan is for", "Leave it out.")
    if solve is not None:
        _check_asked(solve, objective, run, hardware)
    case = _resolved(model, hardware.replace(gpu="T4") if solve == "gpu" else hardware, software)
    gpu = case.cluster.gpu
    if not isinstance(gpu, GPUSpec):
        raise SpecError.at("gpu", None, "is not known, and a plan is for a GPU", "Name it, as in --gpu A100-80GB.")
    if gpu.is_cpu:
        raise SpecError.at("gpu", gpu.name, "is none, and a plan is for a GPU", "Name one, as in --gpu A100-80GB.")
    search = _Search(case, run, global_batch_size, target, objective, allow, done, advise, processes)
    if solve == "gpus":
        return search.fewest_gpus(_counts(hardware))
    if objective == "gpus":
        return search.fewest_of(case.cluster)
    if solve == "gpu":
        return search.smallest_gpu()
    return search.plan(case) if solve is None else search.largest(solve)


def _check_asked(solve: Question, objective: Objective, run: TrainingSpec, hardware: ClusterSpec) -> None:
    """Refuse a value for what is asked for."""
    if objective != "throughput":
        problem = f"is for a plan, and --solve {solve} has an objective of its own"
        raise SpecError.at("objective", objective, problem, "Leave one of them out.")
    asked: Mapping[Question, tuple[Spec, tuple[str, ...]]] = {
        "micro-batch": (run, ("micro_batch_size",)),
        "seq-len": (run, ("seq_len",)),
        "gpus": (hardware, ("gpus",) if hardware.nodes == 1 else ()),  # several nodes say what a node is
        "gpu": (hardware, ("gpu", "gpu_memory")),
    }
    spec, names = asked[solve]
    for name in names:
        if name in spec.model_fields_set and getattr(spec, name) is not None:
            value = getattr(spec, name)
            shown = value.name if isinstance(value, GPUSpec) else value
            raise SpecError.at(name, shown, f"is given, and --solve {solve} asks for it", "Leave one of them out.")


def _counts(cluster: ClusterSpec) -> list[tuple[int, int]]:
    """Numbers of GPUs and nodes up to 64 GPUs: of one node, then whole nodes of 8; or whole nodes as they are given."""
    if cluster.nodes > 1:
        return [(cluster.gpus_per_node * nodes, nodes) for nodes in range(1, max(64 // cluster.gpus_per_node, 1) + 1)]
    return [*((gpus, 1) for gpus in range(1, 9)), *((8 * nodes, nodes) for nodes in range(2, 9))]


@dataclass(frozen=True, slots=True)
class _Search:
    """The plans of one call."""

    case: _Case
    run: TrainingSpec
    global_batch_size: int | None
    target: Target
    objective: Objective
    allow: tuple[str, ...]
    done: Done
    advises: bool
    processes: int

    def asked(self, case: _Case) -> Setup:
        run = _with_global_batch(self.run, case.cluster.gpus, self.global_batch_size)
        return case.with_nvme(_asked(case, run, None))

    def plan(self, case: _Case, solved: Solved | None = None) -> Plan:
        asked, objective = self.asked(case), self.objective
        if objective == "gpus":
            objective = "throughput"
        options = (self.target, objective, self.allow, self.done, self.processes)
        found = planner.plan(asked, case.timed, case.seconds, *options)
        return self.result(case, found, solved)

    def largest(self, question: Question) -> Plan:
        """The plan with the largest micro-batch, or the longest sequence."""
        asked, case = self.asked(self.case), self.case
        if question == "micro-batch":
            scale = solving.micro_batches(asked, of_batch=self.global_batch_size is not None)
        else:
            scale = solving.seq_lens(_longest(case.model, self.run))
        asked = scale.apply(asked, scale.values[0])
        found, value = solving.solve(asked, scale, case.timed, case.seconds, self.target, self.done, self.processes)
        place = -1 if value is None else scale.values.index(value)
        is_last = place == len(scale.values) - 1
        following = None if is_last else scale.values[place + 1]
        solved = Solved(question=question, value=value, next=following, limit=scale.limit if is_last else "")
        return self.result(case, found, solved)

    def fewest_gpus(self, counts: Sequence[tuple[int, int]]) -> Plan:
        """The plan on the fewest GPUs on which something fits, of these numbers of GPUs and nodes."""
        cases: list[_Case] = []
        refused: SpecError | None = None
        for gpus, nodes in counts:
            case = replace(self.case, cluster=self.case.cluster.replace(gpus=gpus, nodes=nodes))
            try:
                self.asked(case)
            except SpecError as error:
                refused = refused or error
            else:
                cases.append(case)
        if not cases and refused is not None:
            raise refused  # no number of them shares the batch evenly
        for number, case in enumerate(cases):
            answers = planner.Answers(case.timed, case.seconds)
            if planner.feasible(self.asked(case), answers, self.target, self.processes):
                fewer = cases[number - 1].cluster.gpus if number else None
                return self.plan(case, Solved(question="gpus", value=case.cluster.gpus, next=fewer, limit=""))
        most = cases[-1]
        limit = f"{most.cluster.gpus} are the most that were tried"
        return self.plan(most, Solved(question="gpus", value=None, next=most.cluster.gpus, limit=limit))

    def fewest_of(self, cluster: ClusterSpec) -> Plan:
        """The plan on the fewest of a cluster's GPUs: of one node, or of whole nodes."""
        run = _with_global_batch(self.run, cluster.gpus, self.global_batch_size)
        size = run.micro_batch_size * run.grad_accum_steps * cluster.gpus
        # As many sequences for each rank as there are ranks to share them.
        given = {name: getattr(self.run, name) for name in self.run.model_fields_set - {"grad_accum_steps"}}
        counts = [(gpus, 1) for gpus in range(1, cluster.gpus_per_node + 1)]
        counts += [(cluster.gpus_per_node * nodes, nodes) for nodes in range(2, cluster.nodes + 1)]
        return replace(self, run=TrainingSpec(**given), global_batch_size=size).fewest_gpus(counts)

    def smallest_gpu(self) -> Plan:
        """The plan on the GPU of the catalog with the least memory on which something fits, the slower of equals."""
        gpus = sorted(all_gpus(), key=lambda gpu: (gpu.memory_bytes, gpu.bf16_tflops or gpu.fp16_tflops or 0.0))
        asked = self.asked(self.case)
        kinds: dict[object, list[GPUSpec]] = {}
        for gpu in gpus:
            kinds.setdefault(self.case.kind_of(gpu, asked), []).append(gpu)
        kinds.pop(None, None)
        floors = {kind: self.floor(self.case.on(alike[-1])) for kind, alike in kinds.items()}
        # Where nothing fits on the largest of a kind, such as for want of host memory, it does not on smaller ones:
        # their contexts differ by less than a GiB.
        hopeless = {kind: 0 if self.fits(alike[-1]) else alike[-1].memory_bytes - GiB for kind, alike in kinds.items()}
        smaller: GPUSpec | None = None
        for gpu in gpus:
            kind = self.case.kind_of(gpu, asked)
            if kind in kinds and gpu.memory_bytes >= max(floors[kind], hopeless[kind]) and self.fits(gpu):
                below, limit = smaller and smaller.name, "" if smaller else "the smallest of the catalog"
                return self.plan(self.case.on(gpu), Solved(question="gpu", value=gpu.name, next=below, limit=limit))
            smaller = gpu
        limit = "the largest of the catalog is too small"
        return self.plan(self.case.on(gpus[-1]), Solved(question="gpu", value=None, next=gpus[-1].name, limit=limit))

    def fits(self, gpu: GPUSpec) -> bool:
        """Whether something fits on a GPU."""
        case = self.case.on(gpu)
        return planner.feasible(
            self.asked(case), planner.Answers(case.timed, case.seconds), self.target, self.processes
        )

    def floor(self, case: _Case, *, on_ladder: bool = False) -> int:
        """What GPUs of a kind have allocated at the peak whatever is chosen."""
        least_of = planner.least_of(self.asked(case), self.target, on_ladder=on_ladder)
        held = (case.floor(least) for least in least_of)
        return min(filter(None, held), default=0)  # what is refused holds nothing

    def result(self, case: _Case, found: planner.Planned, solved: Solved | None = None) -> Plan:
        rungs = tuple(rung for _, rung in found.tried)
        best = None if found.best is None else rungs[found.best]
        result = Plan(best=best, rungs=rungs, pareto=found.pareto, searched=found.searched, solved=solved)
        if self.advises and solved is None and result.verdict != "fits":
            result = result.model_copy(update={"remedies": tuple(self.remedies(case, rungs))})
        if found.best is not None:
            result._recipe.files = partial(_files, case, found.tried[found.best][0])
        return result

    # -- what would fit ------------------------------------------------------------------------------------------------

    def remedies(self, case: _Case, rungs: Sequence[Rung]) -> Iterator[Remedy]:
        """Changes with which a rung fits: more of the host, then what trains the same, more hardware, and less."""
        asked = self.asked(case)
        if any(_lacks_host(rung.estimate) for rung in rungs):
            # More than all of them need: what fits then fits the GPU.
            enough = 2 * max(rung.estimate.host.peak for rung in rungs)
            hosted = replace(case, cluster=case.cluster.replace(host_memory=enough))
            found = planner.least_host(asked, planner.Answers(hosted.timed, hosted.seconds), self.target)
            if found is not None:
                yield _remedy(f"--host-memory {-(-found.estimate.host.peak // GiB)}", found.name, found.estimate)
        for change in (with_liger, with_8bit_adam):
            less = change(asked)
            if less is not None and less != asked:
                yield from self.remedy(_options(asked, less), case, less)
        yield from self.shorter(case, asked)
        for gpus in (2, 4, 8, 16, 32, 64):
            if gpus <= case.cluster.gpus or (gpus > 8 and gpus % 8) or case.cluster.nodes > 1:
                continue
            more = replace(case, cluster=case.cluster.replace(gpus=gpus, nodes=max(gpus // 8, 1)))
            with suppress(SpecError):  # a batch that they cannot share
                spread = list(self.remedy(_gpus_options(gpus), more, self.asked(more)))
                yield from spread
                if spread:
                    break
        yield from self.larger(case, asked)
        for changes in ((with_lora,), (with_lora, in_nf4)):
            less = _allchanged(asked, changes)
            adapted = [] if less is None else list(self.remedy(_options(asked, less), case, less))
            yield from adapted
            if adapted:
                break

    def remedy(self, options: str, case: _Case, asked: Setup) -> Iterator[Remedy]:
        """The change, if a rung fits with it."""
        answers = planner.Answers(case.timed, case.seconds)
        found = planner.first_that_fits(asked, answers, self.target, self.processes)
        if found is not None:
            yield _remedy(options, found.name, found.estimate)

    def shorter(self, case: _Case, asked: Setup) -> Iterator[Remedy]:
        """The longest sequence below the one that was asked for."""
        if case.model.architecture.endswith("ForImageClassification") or asked.training.seq_len <= solving.STEP:
            return
        scale = solving.seq_lens(asked.training.seq_len)
        start = scale.apply(asked, scale.values[0])
        found, value = solving.solve(start, scale, case.timed, case.seconds, self.target, processes=self.processes)
        if value is not None and found.best is not None:
            rung = found.tried[found.best][1]
            yield _remedy(f"--seq-len {value}", rung.name, rung.estimate)

    def larger(self, case: _Case, asked: Setup) -> Iterator[Remedy]:
        """The smallest GPU of the catalog that is larger."""
        own = case.cluster.gpu_memory or (case.cluster.gpu.memory_bytes if isinstance(case.cluster.gpu, GPUSpec) else 0)
        floors: dict[object, int] = {}
        for gpu in sorted(all_gpus(), key=lambda gpu: gpu.memory_bytes):
            on, kind = case.on(gpu), case.kind_of(gpu, asked)
            if gpu.memory_bytes <= own or kind is None:
                continue
            if kind not in floors:
                floors[kind] = self.floor(on, on_ladder=True)
            if gpu.memory_bytes >= floors[kind]:
                found = list(self.remedy(f"--gpu {gpu.name}", on, self.asked(on)))
                yield from found
                if found:
                    return


def _lacks_host(found: Estimate) -> bool:
    """Whether a setup wants for host memory."""
    return verdict_by_place(found.gpu, found.host, found.nvme).get("host", "fits") != "fits"


def _gpus_options(gpus: int) -> str:
    return f"--gpus {gpus}" + (f" --nodes {gpus // 8}" if gpus > 8 else "")


def _remedy(options: str, rung: str, found: Estimate) -> Remedy:
    seconds = None if found.step is None else found.step.seconds
    return Remedy(options=options, rung=rung, high=found.gpu.high, host=found.host.peak, seconds=seconds)


def _longest(model: ModelSpec, run: TrainingSpec) -> int | None:
    """Tokens that a model has positions for; None if it has no end of them."""
    config = model.config
    if (run.head or model.architecture).lower().replace("-", "").endswith("imageclassification"):
        raise SpecError.at("solve", "seq-len", "has no answer: images have no length", "Use --solve micro-batch.")
    if "relative_attention_num_buckets" in config:  # T5: n_positions is what it was trained on
        return None
    found = next((config[name] for name in _POSITIONS if isinstance(config.get(name), int)), None)
    if found is not None and model.model_type in ("roberta", "xlm-roberta", "camembert"):
        return int(found) - int(config.get("pad_token_id") or 1) - 1  # the padding's position, and those before it
    return found


_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
"""What configs call the number of positions."""


def _files(case: _Case, setup: Setup) -> dict[str, str]:
    from memplan.configs import launch  # here, because most plans are not written

    return launch.files(case.model, setup.training, case.cluster, setup.strategy, case.software)


def check(
    path: str | os.PathLike[str] | Mapping[str, Any] | Sequence[str],
    model: ModelLike | None = None,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    *,
    software: SoftwareLike = None,
    lengths: LengthsLike = None,
) -> Check:
    """Say what the files of a run need, and what is wrong with them.

    ``path`` is a DeepSpeed JSON, an accelerate YAML, TrainingArguments as a JSON or a YAML, a LLaMA-Factory YAML, a
    file with the command that starts a run, or a folder that a plan has written; or the values of one of them, or a
    list of arguments. ``model`` is needed where they name none. What the other arguments say wins over the files.
    ``lengths`` are the tokens of the dataset's texts, or a file of them (:mod:`memplan.lengths`): the estimate is then
    of the longest batch, and a finding says how likely one is that does not fit.

    Raises SpecError for files that cannot be read or whose values the libraries refuse, UnsupportedError for what
    memplan does not model. A mistake beside which the rest can still be read is a finding.
    """
    from memplan.configs.run import read_run  # here, because most estimates have no files
    from memplan.lengths import read_lengths

    known = None if lengths is None else read_lengths(lengths)
    _, _, result = _checked(read_run(path), model, training, cluster, software, known)
    return result


def _checked(
    run: Run,
    model: ModelLike | None,
    training: TrainingLike,
    cluster: ClusterLike,
    software: SoftwareLike,
    lengths: Lengths | None = None,
) -> tuple[_Case, Setup | None, Check]:
    """What is checked, the setup that files come to, and what is found; no setup if none can be estimated."""
    from memplan import findings
    from memplan.configs import run as runs
    from memplan.configs.setup import EngineConfig, with_cluster

    model = run.model if model is None else model
    if model is None:
        raise SpecError.at("model", None, "is not in the files", "Name it, as in --model MODEL.")
    asked, hardware = _training(training), _cluster_spec(cluster)
    if asked.task != "train":
        problem = "is not a training run, which files are of"
        raise SpecError.at("task", asked.task, problem, "Leave it out, or use memplan estimate.")
    fixed = dict(run.engine.cluster) if run.engine is not None else {}
    refused = run.engine.refused if run.engine is not None else {}
    if "gpus" in run.cluster:
        fixed |= run.cluster
        refused = {name: error for name, error in refused.items() if name not in run.cluster}
    keys = run.engine.keys if run.engine is not None else {}
    fixing = EngineConfig(run.source, {}, cluster=fixed, refused=refused, keys=keys)
    hardware, notes = with_cluster(fixing, hardware)
    case = _resolved(model, hardware, software)
    found = list(run.findings)
    if not case.software.at_least("transformers", "5"):
        found = [each for each in found if each.code != "removed-argument"]
    if "gpus" not in hardware.model_fields_set and case.cluster.gpus == 1:
        notes.append(_noted("the files do not say on how many GPUs: give --gpus"))
    unadapted = findings.quantized_full(run, asked)
    if unadapted is not None:
        check = Check(estimate=None, verdict="unknown", findings=findings.sorted_by_severity([unadapted, *found]))
        return case, None, check
    merged, spread, said = runs.setup_of(run, asked, {}, case.cluster.gpus, found)
    notes = [*notes, *said, *(_noted(note) for note in run.notes)]
    batches = None
    if lengths is not None and not ("packed" in merged.model_fields_set and merged.packed):
        from memplan.lengths import collated

        merged = merged.replace(packed=False)
        arguments = run.raw["arguments"].data if "arguments" in run.raw else {}
        batches = collated(lengths, arguments, merged.seq_len if "seq_len" in merged.model_fields_set else None)
        merged = merged.replace(seq_len=max(batches.padded.longest, 1))
    setup = Setup(merged, spread, case.cluster.gpus)
    try:
        estimated = case.with_time(setup, case.estimate(setup))
    except SpecError as error:
        raise runs.as_written(run, asked, error) from None
    estimated = estimated.model_copy(update={"assumptions": (*estimated.assumptions, *notes)})
    if batches is not None:
        batches = _limited(case, setup, estimated, batches)
    checked = findings.Checked(run, merged, spread, case.cluster, case.model, case.software, estimated, batches)
    found += findings.find(checked)
    check = Check(estimate=estimated, verdict=estimated.verdict, findings=findings.sorted_by_severity(found))
    return case, setup, check


def _limited(case: _Case, setup: Setup, estimated: Estimate, batches: Batches) -> Batches:
    """The batches with the length up to which they fit for certain, where it is known how much there is."""
    if estimated.gpu.capacity is None:
        return batches
    if case.fits_where_known(setup):
        return replace(batches, limit=batches.padded.longest)
    tokens = [length for length, _ in batches.padded.counts if length]
    # A mask whose rows are no multiple of 8 is copied, so that 1,545 tokens may need more than 1,600.
    kinds = [[each for each in tokens if each % 8 == 0], [each for each in tokens if each % 8]]
    limits = [_first_that_fails(case, setup, each) for each in kinds if each]
    limit = max((each for each in tokens if all(failing is None or each < failing for failing in limits)), default=0)
    rest = batches.padded.texts % setup.training.micro_batch_size
    last = None
    if setup.gpus == 1 and 0 < batches.padded.beyond(limit) <= rest and not batches.drop_last:
        fits = case.fits_where_known(changed(setup, micro_batch_size=rest))
        last = batches.padded.longest if fits else None
    return replace(batches, limit=limit, limit_of_last=last)


def _first_that_fails(case: _Case, setup: Setup, tokens: Sequence[int]) -> int | None:
    """The shortest of these lengths that does not fit for certain; None if all do."""
    fitting, failing = -1, len(tokens)
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if case.fits_where_known(changed(setup, seq_len=tokens[middle])):
            fitting = middle
        else:
            failing = middle
    return tokens[failing] if failing < len(tokens) else None


def preflight(
    model: Any,
    args: Any = None,
    *,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    software: SoftwareLike = None,
    lengths: LengthsLike = None,
    on_failure: OnFailure = "raise",
) -> Preflight:
    """Check a run from within its script, before a weight is loaded; return what is found, the worst first.

    Args:
        model: an ``nn.Module``, a config of transformers, what :func:`estimate` takes, or a Trainer, which has args.
        args: TrainingArguments; a DeepSpeed config as a mapping, a path or an HfDeepSpeedConfig; an Accelerator or one
            of its plugins; or any file of a run that :func:`check` takes, or its values. None is plain training, or
            what the launcher has set.
        training: what the others do not say, ``seq_len`` above all; it wins over them.
        cluster: as for :func:`estimate`; without one, the GPUs that are visible, with the memory that is free on them
            now, the ranks that the launcher has started, and this machine's memory.
        software: versions; None are those that are installed.
        lengths: tokens of the dataset's texts, as for :func:`check`.
        on_failure: what is done about an error: ``raise`` PreflightError, ``warn``, or ``exit`` with 1. On the first
            rank only: the launcher ends the others.

    Raises PreflightError, whose ``findings`` hold all, and SpecError for a wrong argument. What memplan does not model
    is a warning.
    """
    from memplan.integrations import live
    from memplan.lengths import read_lengths

    if on_failure not in get_args(OnFailure):
        raise SpecError.at("on_failure", on_failure, "is not known", f"Use {' or '.join(get_args(OnFailure))}.")
    asked, hardware = _training(training), _cluster_spec(cluster)
    if isinstance(hardware.gpu, str):
        hardware = _cluster(hardware)
    versions = None if software is None else _software(software)
    known = None if lengths is None else read_lengths(lengths)
    with _uncollected():
        try:
            found = _found_before(live.read(model, args), asked, hardware, versions or _installed(), known)
        except UnsupportedError as error:
            found = Preflight([_excused("not-modelled", "warning", error)])
        except ResolutionError as error:
            found = Preflight([_excused("unknown-model", "warning", error)])
        except SpecError as error:
            found = Preflight([_excused("refused", "error", error)])
        except Exception as error:
            # Whatever is wrong with memplan, a training script must not end of it.
            found = Preflight([_of_memplan(error)])
    if live.rank() == 0:
        _act_on(found, on_failure)
    return found


OnFailure: TypeAlias = Literal["raise", "warn", "exit"]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collections, each of which walks the million objects of torch and transformers: 0.3 s."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _excused(code: str, severity: Literal["error", "warning"], error: MemplanError) -> Finding:
    path, _, rest = str(error).partition(": ")
    return Finding(code=code, severity=severity, path=path, message=rest or str(error), remedy="")


def _of_memplan(error: Exception) -> Finding:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Finding(
        code="memplan-error",
        severity="warning",
        path="memplan",
        message=f"The run was not checked: {type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno}).",
        remedy="Please report it. The run itself is not touched.",
    )


def _act_on(found: Preflight, on_failure: OnFailure) -> None:
    """Say what is found, and end what cannot work."""
    import warnings

    if found.errors and on_failure == "raise":
        message = "\n".join(("This run is stopped before it starts.", str(found)))
        estimate = None if found.check is None else found.check.estimate
        raise PreflightError(message, report=estimate, findings=found)
    for each in found:
        if each.severity != "info":
            warnings.warn(f"memplan: {each.path}: {each.message} {each.remedy}".strip(), stacklevel=3)
    if found.errors and on_failure == "exit":
        raise SystemExit(1)


_LEGAL = frozenset({"removed-argument", "misspelt-argument"})
"""Findings on names that an object of transformers has, so that they exist."""


@dataclass(frozen=True, slots=True)
class Examined:
    """A run that a script has in its hands, estimated as its files would be."""

    case: _Case
    setup: Setup | None
    """None if there can be no estimate."""
    check: Check
    beside: tuple[Finding, ...]
    """What is to be said of the machine and of the objects."""


def examine(
    run: Live,
    training: TrainingSpec,
    cluster: ClusterSpec,
    software: SoftwareSpec,
    lengths: Lengths | None = None,
) -> Examined:
    """Estimate a run that is about to start, on the machine that is there. Raises SpecError and UnsupportedError."""
    from memplan.integrations import live

    if lengths is not None:  # of the texts is known how long they are
        run = replace(run, assumed={name: value for name, value in run.assumed.items() if name != "seq_len"})
    hardware, beside = _here(cluster, run)
    case, setup, check = _of_objects(run, training, hardware, software, lengths)
    if run.unread is not None:
        beside.append(_not_read(run.unread))
    if run.module is not None and run.model is not run.module and check.estimate is not None:
        model, (weights, trained) = check.estimate.model, live.counted(run.module)
        if (model.parameters, model.trainable_parameters) != (weights, trained):
            try:
                files = _as_files(live.as_module(run), training)
                case, setup, check = _checked(*files, hardware, software, lengths)
            except MemplanError as error:
                beside.append(_other_model(model.parameters, model.trainable_parameters, weights, trained, error))
    return Examined(case, setup, check, tuple(beside))


def _found_before(
    run: Live,
    training: TrainingSpec,
    cluster: ClusterSpec,
    software: SoftwareSpec,
    lengths: Lengths | None = None,
) -> Preflight:
    from memplan import findings

    examined = examine(run, training, cluster, software, lengths)
    case, setup, check = examined.case, examined.setup, examined.check
    found = [*examined.beside, *(each for each in check.findings if each.code not in _LEGAL or run.as_written)]
    if check.estimate is not None and setup is not None:
        if "seq_len" not in setup.training.model_fields_set - run.assumed.keys() and _has_tokens(case):
            found.append(_unknown_length(setup.training.seq_len))
        memory = memory_said(examined)
        if memory is not None and not (run.on_cpu and memory.severity == "info"):
            found.insert(0, memory)
    of_model = {"id": case.model.id, "config": case.model.config}
    asked = {} if setup is None else _as_asked(case, setup)
    return Preflight(findings.sorted_by_severity(found), check, of_model, asked)


def memory_said(examined: Examined) -> Finding | None:
    """Return what is to be said of a run's memory, with what would fit; nothing if it fits."""
    from memplan import findings

    check, setup = examined.check, examined.setup
    if check.estimate is None or setup is None:
        return None
    cures = _cures(examined.case, setup) if check.verdict in ("does-not-fit", "tight") else ()
    return findings.memory_finding(check.estimate, cures)


def _of_objects(
    run: Live,
    training: TrainingSpec,
    cluster: ClusterSpec,
    software: SoftwareSpec,
    lengths: Lengths | None = None,
) -> tuple[_Case, Setup | None, Check]:
    """What is checked. A model that is there is legal: if memplan has no words for it, it is traced.

    Raises SpecError for what is wrong whatever the model is, UnsupportedError for the rest.
    """
    from memplan.integrations import live

    try:
        return _checked(*_as_files(run, training), cluster, software, lengths)
    except MemplanError as error:
        if run.module is None or run.model is run.module:
            raise
        try:
            return _checked(*_as_files(live.as_module(run), training), cluster, software, lengths)
        except MemplanError as other:
            if str(other) == str(error):
                raise error from None
            raise UnsupportedError(str(error)) from None


def _not_read(optimizer: str) -> Finding:
    return Finding(
        code="not-read",
        severity="warning",
        path="optimizer",
        message=f"The Trainer was given a {optimizer}, of whose states memplan knows nothing: optim was estimated.",
        remedy="Take the estimate with care.",
    )


def _as_files(run: Live, training: TrainingSpec) -> tuple[Run, Any, TrainingSpec]:
    """What the files of a run would say, its model, and what is known beside: what is asked for wins."""
    from memplan.configs.arguments import parse_arguments
    from memplan.configs.run import Run, read_run

    known = dict(run.assumed)
    if run.of_a_trainer:
        files = read_run(run.said, "TrainingArguments")
        if files.arguments is not None:
            known = {name: value for name, value in known.items() if name not in files.arguments.training}
    else:
        files = Run("the script")
        of_a_trainer = parse_arguments({}, "model").training
        said = parse_arguments(run.said, "model").training
        known |= {name: value for name, value in said.items() if name not in of_a_trainer}
    if run.engine is not None:
        engine = read_run(run.engine, "config")
        if engine.arguments is not None:  # a file with TrainingArguments, or a folder
            known = {name: value for name, value in known.items() if name not in engine.arguments.training}
            files = replace(files, arguments=engine.arguments, cluster=engine.cluster, alloc_conf=engine.alloc_conf)
        raw = {**engine.raw, **files.raw}
        files = replace(files, engine=engine.engine, raw=raw, launcher=files.launcher or engine.launcher)
        files = replace(files, findings=(*files.findings, *engine.findings))
    known |= run.training
    known = {name: value for name, value in known.items() if name not in training.model_fields_set}
    return files, run.model, training.replace(**known)


def _other_model(weights: int, trained: int, real: int, really_trained: int, error: MemplanError) -> Finding:
    return Finding(
        code="other-model",
        severity="warning",
        path="model",
        message=f"It has {real:,} weights, {really_trained:,} of them trained; what was estimated has {weights:,} and "
        f"{trained:,}, and the model itself could not be traced ({error})",
        remedy="Take the estimate with care.",
    )


def _has_tokens(case: _Case) -> bool:
    return "vocab_size" in case.model.config


def _unknown_length(taken: int) -> Finding:
    return Finding(
        code="seq-len-unknown",
        severity="info",
        path="seq_len",
        message=f"Nothing says how many tokens a sequence has: {taken} are taken.",
        remedy='Say it by training={"seq_len": ...}.',
    )


def _here(spec: ClusterSpec, run: Live) -> tuple[ClusterSpec, list[Finding]]:
    """The cluster that is given, or this machine with what is free now, and the launcher's ranks; and what is to be
    said of it.
    """
    from memplan.integrations import live

    fields: dict[str, Any] = {}
    found: list[Finding] = []
    launched = live.world()
    if launched is not None and "gpus" not in spec.model_fields_set:
        fields |= {"gpus": launched[0], "nodes": max(1, launched[0] // launched[1])}
    if spec.gpu is None and spec.gpu_memory is None:
        fields |= {"gpu": find_gpu("cpu")} if run.on_cpu else _free_gpus()
        if spec.host_memory is None and "gpu" in fields:
            fields["host_memory"] = host_memory()
    count = fields.pop("devices", 1)
    if launched is None and "gpus" not in spec.model_fields_set:
        fields["gpus"] = 1
        if count > 1 and run.of_a_trainer:
            found.append(_data_parallel(count))
    return spec.replace(**fields), found


def _free_gpus() -> dict[str, Any]:
    """Fields of ClusterSpec, and how many ``devices`` there are: the fullest of those that are visible decides."""
    from memplan.catalog.detect import read_nvml, visible_devices
    from memplan.catalog.gpus import match_device
    from memplan.integrations import live
    from memplan.memory.runtime import cuda_context

    devices = read_nvml()
    sliced = any(device.mig for device in devices) or "MIG-" in os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not devices:
        return {}
    gpu = match_device(devices[0].name, devices[0].memory) if sliced else detect_cluster().gpu
    if not isinstance(gpu, GPUSpec):
        if not sliced:
            return {}
        remedy = "Say which one is near to it, by cluster=memplan.ClusterSpec(gpu=..., gpu_memory=...)."
        raise UnsupportedError.at("gpu", devices[0].name, "is not in the catalog", remedy)
    context = int(cuda_context(gpu, SoftwareSpec()).value)
    if sliced:
        return {"gpu": gpu, "gpu_memory": live.slice_memory(context), "devices": 1}
    visible = visible_devices(devices)
    free = min(live.free_memory(device, context) for device in visible)
    return {"gpu": gpu, "gpu_memory": free, "devices": len(visible)}


def _data_parallel(count: int) -> Finding:
    return Finding(
        code="data-parallel",
        severity="warning",
        path="launcher",
        message=f"{count} GPUs are visible and no launcher has started ranks: the Trainer takes nn.DataParallel, whose "
        "first GPU holds more than the others. What one GPU needs by itself was estimated.",
        remedy="Start the script by torchrun or accelerate launch, or leave one GPU by CUDA_VISIBLE_DEVICES.",
    )


def _installed() -> SoftwareSpec:
    from importlib import metadata

    found: dict[str, str] = {}
    for library in SoftwareSpec.model_fields:
        with suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library).partition("+")[0]
    return SoftwareSpec(**found)


def _cures(case: _Case, asked: Setup) -> tuple[str, ...]:
    """Setups that fit, in words: what they change, need, and cost. First two that train the same, then one that does
    not.
    """
    if not isinstance(case.cluster.gpu, GPUSpec):
        return ()
    changed_in_place = [_allchanged(asked, changes) for changes in REMEDIES]
    others = [less for less in changed_in_place if less is not None and case.computes_in(less)]
    alike = [less for less in others if _trains_alike(asked, less)]
    alike += [less for less in rungs(case.with_nvme(asked))[1:] if less not in alike and not _is_back(asked, less)]
    others = [less for less in others if less not in alike]
    before: list[float] = []

    def fitting(setups: Sequence[Setup], limit: int) -> list[str]:
        found: list[tuple[float, str]] = []
        for less in setups:
            if len(found) < limit and (needs := _needs(case, less)) is not None:
                before[:] = before or [case.seconds(asked)]
                seconds = case.seconds(less)
                cost = f"about {abs(seconds / before[0] - 1):.0%} {'slower' if seconds > before[0] else 'faster'}"
                found.append((seconds, f"{_in_arguments(asked, less)}: {gib(needs)} GiB, fits, {cost}"))
        return [said for _, said in sorted(found)]

    return (*fitting(alike, 2), *fitting(others, 1))


def _needs(case: _Case, setup: Setup) -> int | None:
    """Bytes of each GPU if the setup fits for certain; None if it does not, or is refused."""
    try:
        roughly = case.estimate(setup, replay=False)
        places = verdict_by_place(roughly.gpu, roughly.host, roughly.nvme)
        # The replay can only tell what is between the two ends on the GPU.
        if places["gpu"] == "does-not-fit" or any(places[name] != "fits" for name in places if name != "gpu"):
            return None
        found = case.estimate(setup)
    except MemplanError:
        return None
    return found.gpu.high if found.verdict == "fits" else None


def _is_back(asked: Setup, less: Setup) -> bool:
    """Whether a rung is one that the run has left behind: it shards less, and offloads no more."""
    kinds = [strategy.kind for strategy in (asked.strategy, less.strategy)]
    if not all(kind in _SHARDING for kind in kinds):
        return False
    now, then = (_SHARDING.index(kind) for kind in kinds)
    offloads = [getattr(less.strategy, name) for name in _OFFLOADS]
    return then < now and all(
        each in ("none", getattr(asked.strategy, name)) for name, each in zip(_OFFLOADS, offloads)
    )


_SHARDING = ("ddp", "zero0", "zero1", "zero2", "zero3")


def _trains_alike(asked: Setup, less: Setup) -> bool:
    """Whether the same weights are trained, in the same types."""
    before, after = asked.training, less.training
    return all(getattr(before, name) == getattr(after, name) for name in ("lora", "quantization", "dtype"))


_ARGUMENTS = {
    "micro_batch_size": "per_device_train_batch_size",
    "grad_accum_steps": "gradient_accumulation_steps",
    "liger": "use_liger_kernel",
    "seq_len": "max_length",
}
"""Options whose name in TrainingArguments is another."""


def _in_arguments(asked: Setup, less: Setup) -> str:
    """What makes one setup of the other, as a training script would have it."""
    before, after = _named(asked), _named(less)
    said: list[str] = []
    for name, value in after.items():
        if before[name] == value:
            continue
        if isinstance(value, LoraSpec):
            said.append(f"LoRA of rank {value.rank}")
        elif isinstance(value, QuantizationSpec):
            said.append(f"{value.kind} weights")
        else:
            said.append(f"{_ARGUMENTS.get(name, name)}={value}")
    return ", ".join(said)


def _noted(note: str) -> Assumption:
    return Assumption(name=ENGINE_CONFIG, value=0, low=0, high=0, source=note)


def measure(
    model: ModelLike,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    strategy: StrategyLike = None,
    *,
    engine_config: EngineConfigLike = None,
    software: SoftwareLike = None,
    cap: int | None = None,
    steps: int = 3,
    save: bool = False,
    pretrained: bool = False,
    snapshot: bool = False,
    timeout: float = 3600,
    start: Start | None = None,
) -> Measured:
    """Run real steps of a setup on this machine's GPU, in a process of its own, and compare them with the estimate.

    The first arguments are those of :func:`estimate`; the GPU is this machine's, or ``cpu``, where tensors are counted.
    Of several ranks the first one runs, and a process group stands in for the others. ``cap`` are the bytes of a
    smaller GPU to be; ``steps`` are the optimizer steps; ``save`` writes a checkpoint at their end; ``pretrained``
    loads weights that are random too by ``from_pretrained``; ``snapshot`` keeps the blocks at the peak. A run that
    dies is a measurement, and so is one that takes longer than ``timeout`` seconds. ``start`` begins the process.

    Raises SpecError without a GPU and for what :func:`estimate` refuses, UnsupportedError for what is not installed.
    """
    from memplan.configs import launch
    from memplan.introspect import measure as instrument
    from memplan.introspect.extrapolate import installed
    from memplan.introspect.measurement import beside

    for option, value, smallest in (("steps", steps, 2), ("cap", cap, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < smallest):
            raise SpecError.at(option, value, "is not a number that can be", f"Use a whole number from {smallest} on.")
    config = None if engine_config is None else _engine_config(engine_config)
    given = _cluster_spec(cluster)
    case = _resolved(model, given if cap is None else given.replace(gpu_memory=cap), software, config)
    asked = _asked(case, _training(training), strategy, config)
    gpu = case.cluster.gpu
    on_cpu = isinstance(gpu, GPUSpec) and gpu.is_cpu
    if asked.training.task != "train":
        raise SpecError.at("task", asked.training.task, "has no steps to measure", "Leave it out.")
    if given.gpu is not None and not on_cpu and detect_cluster().gpu not in (None, gpu):
        name = gpu.name if isinstance(gpu, GPUSpec) else gpu
        raise SpecError.at("gpu", name, "is not the GPU of this machine", "Leave it out, or use cpu.")
    written = replace(asked, strategy=launch.as_written(asked.strategy))
    resolved = estimator.resolve(case.model, written.training, case.cluster, written.strategy, case.software)
    quantized = asked.training.quantization is not None
    job = instrument.Job(
        device="cpu" if on_cpu else "cuda",
        engine=asked.strategy.kind,
        ranks=case.cluster.gpus,
        nodes=case.cluster.nodes,
        dtype=resolved.precision.dtype,
        config=case.model.config,
        steps=steps,
        cap=cap,
        pretrained=pretrained or quantized,  # quantizing is a part of loading
        evaluates=asked.training.eval_batch_size is not None,
        save=save,
        snapshot=snapshot,
    )
    instrument.needs(job)
    case = replace(case, software=installed(case.software))
    # Files are for GPUs, and of a checkpoint: here there may be neither, and nothing of them is used.
    cluster = case.cluster.replace(gpu=find_gpu("A100-80GB")) if on_cpu else case.cluster
    files = launch.files(
        case.model.replace(source="random"), written.training, cluster, written.strategy, case.software
    )
    estimated = case.estimate(written)
    fields = _as_asked(case, written)
    return beside(estimated, instrument.measure(job, files, estimated, fields, timeout, start))


def _as_asked(case: _Case, setup: Setup) -> dict[str, Any]:
    """Fields of a setup, with which :func:`estimate_again` makes it again."""
    gpu = case.cluster.gpu
    specs = {"training": setup.training, "cluster": case.cluster, "strategy": setup.strategy}
    fields = {name: spec.model_dump(mode="json", exclude_unset=True) for name, spec in specs.items()}
    fields["cluster"]["gpu"] = gpu.name if isinstance(gpu, GPUSpec) else None
    return fields


def estimate_again(measurement: Measurement) -> Measured:
    """Estimate what was measured, with the versions that were, and put both beside each other."""
    from memplan.introspect.measurement import beside

    asked, versions = measurement.asked, measurement.versions
    software = SoftwareSpec(
        **{name: versions[name].partition("+")[0] for name in SoftwareSpec.model_fields if name in versions}
    )
    result = estimate(
        {**measurement.model["config"], "_name_or_path": measurement.model["id"]},
        dict(asked["training"]), dict(asked["cluster"]), dict(asked["strategy"]), software=software,
    )  # fmt: skip
    return beside(result, measurement)


BOUNDARIES = {"micro-batch": ("micro_batch_size", 1, 1024), "seq-len": ("seq_len", 64, 131_072)}
"""What :func:`measure_boundary` searches -> the option, the step of its values, and the largest."""


def measure_boundary(
    model: ModelLike,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    strategy: StrategyLike = None,
    *,
    boundary: str = "micro-batch",
    **options: Any,
) -> Boundary:
    """Search the largest ``micro-batch`` (or ``seq-len``, in steps of 64 tokens) that runs, beside the predicted one.

    Arguments are those of :func:`measure`. Raises SpecError for a boundary that is not known, and as that does.
    """
    from memplan.introspect.measure import boundary as search
    from memplan.introspect.measurement import Boundary, Measured, Tried

    if boundary not in BOUNDARIES:
        raise SpecError.at("boundary", boundary, "is not known", f"Use {' or '.join(BOUNDARIES)}.")
    option, step, largest = BOUNDARIES[boundary]
    values = range(step, largest + 1, step)
    run, found = _training(training), dict[int, Measured]()
    hardware = _cluster_spec(cluster)
    capped = hardware if options.get("cap") is None else hardware.replace(gpu_memory=options["cap"])
    shared = {name: options[name] for name in ("engine_config", "software") if name in options}

    def estimated(value: int) -> Estimate:
        return estimate(model, run.replace(**{option: value}), capped, strategy, **shared)

    def fits(value: int) -> bool:
        return estimated(value).verdict == "fits"

    def lives(value: int) -> bool:
        found[value] = measure(model, run.replace(**{option: value}), cluster, strategy, **options)
        status = found[value].measurement.status
        if status == "failed":
            raise UnsupportedError(f"measure: {option}={value} failed: {found[value].measurement.message}")
        return status == "ok"

    predicted = search(values, 0, fits)
    measured = search(values, predicted, lives)
    return Boundary(
        option=option,
        step=step,
        predicted=None if predicted < 0 else values[predicted],
        measured=None if measured < 0 else values[measured],
        tried=tuple(
            Tried(value=value, status=each.measurement.status, peak_reserved=each.measurement.peak("reserved"))
            for value, each in found.items()
        ),
        estimate=estimated(values[max(predicted, 0)]),
        measurement=None if measured < 0 else found[values[measured]].measurement,
    )


def _with_global_batch(training: TrainingSpec, gpus: int, size: int | None) -> TrainingSpec:
    """The training with the micro-batches that ``size`` sequences on ``gpus`` ranks are."""
    if size is None:
        return training
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise SpecError.at("global_batch_size", size, "is no number of sequences", "Use a whole number from 1 on.")
    if size % gpus:
        remedy = f"Use a multiple of {gpus}, such as {-(-size // gpus) * gpus}."
        raise SpecError.at("global_batch_size", size, f"cannot be shared evenly by {gpus} GPUs", remedy)
    sequences, given = size // gpus, training.model_fields_set
    if {"micro_batch_size", "grad_accum_steps"} <= given:
        if training.micro_batch_size * training.grad_accum_steps != sequences:
            remedy = "Leave one of the three out."
            product = f"{training.micro_batch_size} x {training.grad_accum_steps} x {gpus}"
            raise SpecError.at("global_batch_size", size, f"is not {product}, as the others say", remedy)
        return training
    known = "grad_accum_steps" if "grad_accum_steps" in given else "micro_batch_size"
    number = getattr(training, known)
    if sequences % number:
        remedy = f"Use a divisor of {sequences}."
        raise SpecError.at(known, number, f"does not divide the {sequences} sequences of a rank", remedy)
    other = "micro_batch_size" if known == "grad_accum_steps" else "grad_accum_steps"
    return training.replace(**{known: number, other: sequences // number})


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do about answers that do not fit, or whose GPU is not known."""

    gpus: tuple[tuple[str, ...], ...] = ()
    """The smallest GPUs of the catalog that the setup as asked fits on; where the GPU is not known, the smallest one
    for each further estimate too."""
    options: tuple[str, ...] = ()
    """Command line options, each of which makes the run fit."""


def advise(
    result: Estimate | EstimateList,
    model: ModelLike,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    strategy: StrategyLike = None,
    *,
    engine_config: EngineConfigLike = None,
    software: SoftwareLike = None,
) -> Advice:
    """Return what to do next about ``result``, which the other arguments gave; nothing if it fits.

    GPUs are estimated by their own rules, and options by estimating the setup with them: what is named fits.
    """
    if result.verdict == "fits":
        return Advice()
    config = None if engine_config is None else _engine_config(engine_config)
    case = _resolved(model, cluster, software, config)
    asked = _asked(case, _training(training), strategy, config)
    estimates = result.estimates if isinstance(result, EstimateList) else (result,)
    if result.verdict != "unknown":
        options = _remedies(case, asked)
        if isinstance(result, EstimateList):
            options = options or _remedies(case, asked, rungs(asked)[-1])
        elif config is None:
            options += _fitting_rung(case, asked)
        return Advice(gpus=(_fitting_gpus(case, asked, estimates[0]),), options=options)
    if case.cluster.gpu is not None:
        return Advice()  # a device without a size of its own
    gpus = [_fitting_gpus(case, asked, estimates[0])]
    # Rungs that were left out come last.
    for setup, estimated in zip(rungs(case.with_nvme(asked))[1:], estimates[1:], strict=False):
        # An engine that shards takes too long to be tried on every GPU.
        gpus.append(("-",) if setup.strategy.shards else _fitting_gpus(case, setup, estimated, limit=1))
    return Advice(gpus=tuple(gpus))


def _asked(case: _Case, training: TrainingSpec, strategy: StrategyLike, config: EngineConfig | None = None) -> Setup:
    if config is not None:
        from memplan.configs.setup import with_training

        if training.task != "train":
            problem = f"has no use in task {training.task}: it is of a training run"
            raise SpecError.at("engine_config", config.source, problem, "Leave it out, or use --task train.")
        training, spread, notes = with_training(config, training, _strategy_fields(strategy), case.cluster.gpus)
        return Setup(training, spread, case.cluster.gpus, notes=(*case.notes, *notes, *config.assumptions))
    spread = _default_strategy(training, case.cluster) if strategy is None else _strategy(strategy)
    return Setup(training, spread, case.cluster.gpus, is_gpu_known=case.cluster.gpu is not None)


def _default_strategy(training: TrainingSpec, cluster: ClusterSpec) -> Strategy:
    """Return plain training on one GPU and DDP on several; loading and generation have one copy of the model."""
    return Strategy(kind="ddp" if cluster.gpus > 1 and training.task == "train" else "single")


# -- remedies --------------------------------------------------------------------------------------------------------


def _in_bfloat16(setup: Setup) -> Setup | None:
    """Frozen weights in 16 bit; to train them so is another matter."""
    if setup.training.quantization is not None or (setup.training.task == "train" and setup.training.lora is None):
        return None
    return changed(setup, dtype="bfloat16")


REMEDIES: tuple[tuple[Change, ...], ...] = (
    (micro_batch_1,),
    (checkpointed,),
    (micro_batch_1, checkpointed),
    (checkpointed, with_liger),
    (checkpointed, with_liger, with_8bit_adam),
    (with_lora,),
    (with_lora, checkpointed),
    (with_lora, _in_bfloat16),
    (with_lora, _in_bfloat16, checkpointed),
    (with_lora, in_nf4),
    (with_lora, in_nf4, checkpointed),
    (_in_bfloat16,),
    (in_nf4,),
)
"""What may make a setup fit; of several changes all are made. The later change what is trained, so they are offered,
never taken."""


def _remedies(case: _Case, asked: Setup, setup: Setup | None = None, limit: int = 2) -> tuple[str, ...]:
    """Options that make ``setup`` fit, which is the one asked for if None."""
    setup = setup or asked
    enough: list[Sequence[Change]] = []
    found: list[str] = []
    for changes in REMEDIES:
        less = _allchanged(setup, changes)
        if less is None or any(set(fewer) <= set(changes) for fewer in enough) or not case.computes_in(less):
            continue
        if len(found) < limit and case.fits(less):
            enough.append(changes)
            found.append(_options(asked, less))
    return tuple(found)


def _fitting_rung(case: _Case, asked: Setup) -> tuple[str, ...]:
    """Options for the first rung of the ladder that fits, where a run was asked for that does not."""
    ladder = rungs(replace(asked, strategy=_default_strategy(asked.training, case.cluster)))
    found = next((setup for setup in ladder if setup.strategy.shards and case.fits(setup)), None)
    return () if found is None else (_options(asked, found),)


def _fitting_gpus(case: _Case, setup: Setup, estimated: Estimate, limit: int = 3) -> tuple[str, ...]:
    """The smallest GPUs that a setup fits on, which ``estimated`` is an estimate of on any GPU."""
    idle = [phase.allocated for phase in estimated.gpu.phases if phase.name == "idle"]
    # Weights and optimizer states are the same on every GPU: one too small for them need not be tried.
    held = max(idle, default=0) - estimated.gpu.components.workspace
    floors: dict[object, int] = {}
    found: list[str] = []
    for gpu in sorted(all_gpus(), key=lambda gpu: gpu.memory_bytes):
        on, kind = case.on(gpu), case.kind_of(gpu, setup)
        if len(found) == limit or gpu.memory_bytes < floors.get(kind, held):
            continue
        if on.fits(setup):
            found.append(gpu.name)
        else:
            floors[kind] = max(held, on.floor(setup))
    return tuple(found)


def _allchanged(setup: Setup, changes: Sequence[Change]) -> Setup | None:
    for change in changes:
        less = change(setup)
        if less is None or less == setup:
            return None
        setup = less
    return setup


def _options(asked: Setup, less: Setup) -> str:
    """The command line options that turn one run into the other."""
    before, after = _named(asked), _named(less)
    return " ".join(_option(name, value) for name, value in after.items() if before[name] != value)


def _named(setup: Setup) -> dict[str, object]:
    """What options say, by their names."""
    training, strategy = setup.training, setup.strategy
    spread = {"strategy": strategy.kind, **{name: getattr(strategy, name) for name in _OFFLOADS}}
    return spread | {name: getattr(training, name) for name in TrainingSpec.model_fields}


_OFFLOADS = ("offload_optimizer", "offload_param")


def _option(name: str, value: object) -> str:
    if isinstance(value, LoraSpec):
        return f"--lora-rank {value.rank}"
    option = f"--{name.replace('_', '-')}"
    if value is True:
        return option
    return f"{option} {value.kind if isinstance(value, QuantizationSpec) else value}"


# -- resolving -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Case:
    """What every setup of one call shares, resolved."""

    model: ModelSpec
    cluster: ClusterSpec
    software: SoftwareSpec
    tracer: _Tracer | None = None
    notes: tuple[Assumption, ...] = ()

    def estimate(self, setup: Setup, *, replay: bool = True, explain: bool = False) -> Estimate:
        specs = (self.model, setup.training, self.cluster, setup.strategy, self.software)
        if self.tracer is None:
            return estimator.estimate(*specs, replay=replay, explain=explain)
        if setup.training.task != "train":
            remedy = "Leave --trace out and name the model or give its config, or use --task train."
            raise UnsupportedError(f"trace: a training step can be traced, task {setup.training.task} cannot. {remedy}")
        traced = self.tracer.trace(estimator.resolve(*specs))
        result = estimator.estimate(*specs, replay=replay, explain=explain, traced=traced)
        return self.tracer.beside_the_written(result, *specs) if replay else result

    def answer(self, setup: Setup, *, replay: bool, explain: bool) -> Estimate:
        """The estimate, with its step's time; but not where haste is asked for: the time takes longer than the rest."""
        found = self.estimate(setup, replay=replay, explain=explain)
        return self.with_time(setup, found) if replay else found

    def with_time(self, setup: Setup, found: Estimate) -> Estimate:
        """The estimate with its step's time, of a training run on a GPU that is known, and the time's interval."""
        gpu = self.cluster.gpu
        if setup.training.task != "train" or not isinstance(gpu, GPUSpec) or gpu.is_cpu:
            return found
        from memplan import throughput  # here, because an estimate without a GPU does not need it

        resolved = estimator.resolve(self.model, setup.training, self.cluster, setup.strategy, self.software)
        if self.tracer is not None:
            resolved = replace(resolved, traced=self.tracer.trace(resolved))
        timing = throughput.step_time(resolved, self.cluster, setup.strategy)
        assumptions = (*found.assumptions, Assumption.of(timing.interval))
        return found.model_copy(update={"step": timing.result(), "assumptions": assumptions})

    def timed(self, setup: Setup, exact: bool) -> Estimate:
        """The estimate as the files that are written have it; with the time of a step, if it is ``exact``."""
        from memplan.configs import launch

        setup = replace(setup, strategy=launch.as_written(setup.strategy))
        found = self.estimate(setup, replay=exact)
        return found.model_copy(update={"step": self._step(setup)}) if exact else found

    def seconds(self, setup: Setup) -> float:
        """The time of a step, as in :meth:`timed`."""
        from memplan.configs import launch

        return self._step(replace(setup, strategy=launch.as_written(setup.strategy))).seconds

    def _step(self, setup: Setup) -> StepTime:
        from memplan import throughput  # here, because one estimate does not need it

        resolved = estimator.resolve(self.model, setup.training, self.cluster, setup.strategy, self.software)
        return throughput.step_time(resolved, self.cluster, setup.strategy).result()

    def decided(self, training: TrainingSpec) -> TrainingSpec:
        """The training with what the model itself decides, if it is a module."""
        return training if self.tracer is None else self.tracer.decided(training)

    def with_nvme(self, setup: Setup) -> Setup:
        """The setup with what offloading to NVMe asks for, where there is one."""
        if self.cluster.nvme is None or setup.training.task != "train" or self.tracer is not None:
            return setup
        strategy = Strategy(kind="zero3")
        resolved = estimator.resolve(self.model, setup.training, self.cluster, strategy, self.software)
        run, _ = micro_batch.run_of(resolved, self.cluster.gpu if isinstance(self.cluster.gpu, GPUSpec) else None)
        largest = max(p.numel for p, _ in run.parameters)
        return replace(setup, nvme_buffer_size=-(-largest // self.cluster.gpus))

    def on(self, gpu: GPUSpec) -> _Case:
        """The same on another GPU."""
        return replace(self, cluster=self.cluster.replace(gpu=gpu, gpu_memory=None))

    def kind_of(self, gpu: GPUSpec, setup: Setup) -> object:
        """What a setup's tensors on a GPU depend on, but for the partial sums of kernels; None if it is refused."""
        try:
            spec = self.on(gpu)
            resolved = estimator.resolve(spec.model, setup.training, spec.cluster, setup.strategy, spec.software)
        except MemplanError:
            return None
        return resolved.precision, replace(resolved.rules, multiprocessors=1)

    def floor(self, setup: Setup) -> int:
        """What every GPU of this one's kind has allocated at the peak; nothing if the setup is refused."""
        try:
            memory = self.estimate(setup, replay=False).gpu
        except MemplanError:
            return 0
        return memory.peak_allocated - memory.components.workspace - memory.components.temporaries

    def computes_in(self, setup: Setup) -> bool:
        """Whether the GPU has units for the setup's dtype."""
        gpu = self.cluster.gpu
        return not (isinstance(gpu, GPUSpec) and setup.training.dtype == "bfloat16" and not gpu.supports_bf16)

    def fits_where_known(self, setup: Setup) -> bool:
        """Whether the setup fits for certain on the GPU, and wherever else it is known how much there is.

        Raises what :meth:`estimate` raises.
        """
        found = self.estimate(setup, replay=False)
        places = verdict_by_place(found.gpu, found.host, found.nvme)
        if places["gpu"] == "tight" and "does-not-fit" not in places.values():  # an upper bound without the replay
            found = self.estimate(setup)
            places = verdict_by_place(found.gpu, found.host, found.nvme)
        return not {"does-not-fit", "tight"} & set(places.values())

    def fits(self, setup: Setup) -> bool:
        """Whether the setup fits for certain; what the estimator refuses does not."""
        try:
            verdict = self.estimate(setup, replay=False).verdict
            # Without the replay, high is an upper bound: between the two only the replay can tell.
            return verdict == "fits" or (verdict == "tight" and self.estimate(setup).verdict == "fits")
        except MemplanError:
            return False


@dataclass(frozen=True, slots=True)
class _Tracer:
    """Traces the setups of one call, each once."""

    module: nn.Module | None
    inputs: Inputs | None
    traced: dict[tuple[object, ...], micro_batch.Traced] = field(default_factory=dict)

    def trace(self, setup: micro_batch.Setup) -> micro_batch.Traced:
        from memplan.introspect.extrapolate import trace_model

        key = (setup.training.replace(optim="sgd"), setup.precision, setup.rules, setup.engine, setup.copies_gradients)
        if key not in self.traced:
            self.traced[key] = trace_model(setup, self.module, self.inputs)
        return self.traced[key]

    def decided(self, training: TrainingSpec) -> TrainingSpec:
        from memplan.introspect.extrapolate import decided_by

        return training if self.module is None else decided_by(self.module, training)

    def beside_the_written(
        self,
        result: Estimate,
        model: ModelSpec,
        training: TrainingSpec,
        cluster: ClusterSpec,
        strategy: Strategy,
        software: SoftwareSpec,
    ) -> Estimate:
        """Name what the architecture file says, where there is one that disagrees with the trace."""
        if self.module is not None or model.model_type not in FAMILIES:
            return result
        try:
            written = estimator.estimate(model, training, cluster, strategy, software, replay=False)
        except SpecError as error:
            if str(error).startswith("seq_len:"):  # positions end with their table: without data no trace sees it
                raise
            return result
        except MemplanError:
            return result
        own, other = result.gpu.steady_allocated, written.gpu.steady_allocated
        if abs(other / own - 1) <= DISAGREEMENT:
            return result
        assumption = Assumption(
            name="written family",
            value=other,
            low=min(own, other),
            high=max(own, other),
            source=f"steady_allocated by the architecture file {FAMILIES[model.model_type]}.py, "
            f"{other / own - 1:+.1%} beside the trace, which is shown",
        )
        return result.model_copy(update={"assumptions": (*result.assumptions, assumption)})


DISAGREEMENT = 0.03
"""How far trace and architecture file may be apart before the answer says so: ten times what they should be."""


def _resolved(
    model: ModelLike,
    cluster: ClusterLike,
    software: SoftwareLike,
    config: EngineConfig | None = None,
    *,
    trace: bool = False,
    inputs: Inputs | None = None,
) -> _Case:
    versions = _software(software)
    notes: list[Assumption] = []
    if config is not None:
        from memplan.configs.setup import with_cluster

        cluster, notes = with_cluster(config, _cluster_spec(cluster))
    if not trace and not _is_module(model):
        if inputs is not None:
            raise SpecError.at("inputs", inputs, "are for a trace", "Use trace=True, or leave them out.")
        return _Case(_model(model), _cluster(cluster), versions, notes=tuple(notes))
    from memplan.introspect import extrapolate

    known = extrapolate.known_model_types()
    module = model if _is_module(model) else None
    spec = _model(model, known) if module is None else extrapolate.module_spec(module)
    return _Case(spec, _cluster(cluster), extrapolate.installed(versions), _Tracer(module, inputs), notes=tuple(notes))


def _is_module(model: object) -> TypeGuard[nn.Module]:
    # Whoever holds a module has imported torch.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def _model(model: ModelLike, known_model_types: Container[str] = FAMILIES) -> ModelSpec:
    if isinstance(model, ModelSpec):
        return model
    if isinstance(model, Mapping):
        name = str(model.get("_name_or_path") or "config")
        return hub._spec(name, dict(model), "mapping", known_model_types)
    if isinstance(model, (str, os.PathLike)):
        return hub.resolve_config(model, known_model_types=known_model_types)
    remedy = "Give a hub id, a path, a config as a mapping, a ModelSpec or an nn.Module."
    raise SpecError.at("model", model, "is not a model", remedy)


def _training(training: TrainingLike) -> TrainingSpec:
    remedy = "Give a TrainingSpec, or its fields as a mapping."
    return _spec(TrainingSpec, training, "training", remedy)


def _strategy(strategy: StrategyLike) -> Strategy:
    if isinstance(strategy, str):
        strategy = {"kind": strategy}
    return _spec(Strategy, strategy, "strategy", "Give a kind, as in ddp, a Strategy, or its fields as a mapping.")


def _strategy_fields(strategy: StrategyLike) -> Mapping[str, Any]:
    """What a strategy says beside a config, which may be what makes it whole."""
    if isinstance(strategy, Strategy):
        return {name: getattr(strategy, name) for name in strategy.model_fields_set}
    if isinstance(strategy, Mapping):
        return strategy
    return {} if strategy is None else {"kind": strategy}


def _engine_config(config: EngineConfigLike) -> EngineConfig:
    from memplan.configs.read import read_engine_config  # here, because most runs have none

    return read_engine_config(config)


def _software(software: SoftwareLike) -> SoftwareSpec:
    if isinstance(software, str):
        return SoftwareSpec.parse(software)
    remedy = "Write it as torch=2.13, or give a SoftwareSpec, or its fields as a mapping."
    return _spec(SoftwareSpec, software, "software", remedy)


S = TypeVar("S", bound=Spec)


def _spec(cls: type[S], value: object, field: str, remedy: str) -> S:
    if isinstance(value, cls):
        return value
    if value is not None and not isinstance(value, Mapping):
        raise SpecError.at(field, value, "is not a spec", remedy)
    return cls.from_dict(value or {})


def _cluster_spec(cluster: ClusterLike) -> ClusterSpec:
    if isinstance(cluster, str):
        return parse_cluster(cluster)
    remedy = "Write it as 2xA100-80GB, or give a ClusterSpec, or its fields as a mapping."
    return _spec(ClusterSpec, cluster, "cluster", remedy)


def _cluster(cluster: ClusterLike) -> ClusterSpec:
    spec = _cluster_spec(cluster)
    if isinstance(spec.gpu, str):
        return spec.replace(gpu=find_gpu(spec.gpu))
    return _on_this_machine(spec) if spec.gpu is None else spec


def _on_this_machine(spec: ClusterSpec) -> ClusterSpec:
    """Fill in this machine's GPU, and its host memory and disk if the run is on it alone."""
    here = detect_cluster()
    if here.gpu is None:
        return spec
    gpus = spec.gpus if "gpus" in spec.model_fields_set else here.gpus
    found: dict[str, Any] = {"gpu": here.gpu, "gpus": gpus, "gpu_memory": spec.gpu_memory or here.gpu_memory}
    if spec.nodes == 1 and gpus <= here.gpus:
        found["host_memory"] = spec.host_memory or here.host_memory
        if spec.nvme is None and spec.nvme_path is not None:
            found["nvme"] = free_disk(spec.nvme_path)
    return spec.replace(**found)
