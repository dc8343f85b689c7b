"""Plans: the search for the best setup that fits, and for the largest or the smallest that does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

from memplan import planner, solving
from memplan.advice import all_changed, options_between
from memplan.answers import Plan, Question, Remedy, Rung, Solved
from memplan.case import (
    Case,
    ClusterLike,
    ModelLike,
    SoftwareLike,
    TrainingLike,
    asked_setup,
    case_of,
    cluster_spec,
    training_spec,
)
from memplan.catalog.gpus import all_gpus
from memplan.errors import SpecError
from memplan.parallel import uncollected
from memplan.planner import Done, Objective, nothing
from memplan.results import (
    Estimate,
    verdict_by_place,
)
from memplan.space import SIDES, Setup, Target, divisors, in_nf4, with_8bit_adam, with_liger, with_lora
from memplan.specs._base import Spec
from memplan.specs.hardware import ClusterSpec, GPUSpec
from memplan.specs.model import ModelSpec
from memplan.specs.training import TrainingSpec
from memplan.units import GiB


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
    run, hardware = training_spec(training), cluster_spec(cluster)
    if run.task != "train":
        raise SpecError.at("task", run.task, "is not a training run, which a plan is for", "Leave it out.")
    if solve is not None:
        _check_asked(solve, objective, run, hardware)
    case = case_of(model, hardware.replace(gpu="T4") if solve == "gpu" else hardware, software)
    gpu = case.cluster.gpu
    if not isinstance(gpu, GPUSpec):
        raise SpecError.at("gpu", None, "is not known, and a plan is for a GPU", "Name it, as in --gpu A100-80GB.")
    if gpu.is_cpu:
        raise SpecError.at("gpu", gpu.name, "is none, and a plan is for a GPU", "Name one, as in --gpu A100-80GB.")
    search = _Search(case, run, global_batch_size, target, objective, allow, done, advise, processes)
    with uncollected():
        if solve == "gpus":
            return search.fewest_gpus(_counts(hardware), most_nodes=8 if hardware.nodes == 1 else 1)
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


_UNBOUNDED = 1 << 62
"""More than any GPU has."""


@dataclass(frozen=True, slots=True)
class _Search:
    """The plans of one call."""

    case: Case
    run: TrainingSpec
    global_batch_size: int | None
    target: Target
    objective: Objective
    allow: tuple[str, ...]
    done: Done
    advises: bool
    processes: int

    def asked(self, case: Case) -> Setup:
        run = _with_global_batch(self.run, case.cluster.gpus, self.global_batch_size)
        return case.with_nvme(asked_setup(case, run, None))

    def plan(self, case: Case, solved: Solved | None = None) -> Plan:
        asked, objective = self.asked(case), self.objective
        if objective == "gpus":
            objective = "throughput"
        options = (self.target, objective, self.allow, self.done, self.processes, case.bound, case.least_seconds)
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
        found, value = solving.solve(
            asked, scale, case.timed, case.seconds, self.target, self.done, self.processes, case.bound
        )
        place = -1 if value is None else scale.values.index(value)
        is_last = place == len(scale.values) - 1
        following = None if is_last else scale.values[place + 1]
        solved = Solved(question=question, value=value, next=following, limit=scale.limit if is_last else "")
        return self.result(case, found, solved)

    def fewest_gpus(self, counts: Sequence[tuple[int, int]], most_nodes: int) -> Plan:
        """The plan on the fewest GPUs on which something fits, of these numbers of GPUs and nodes."""
        cases: list[Case] = []
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
        fewer: int | None = None
        for case in cases:
            for spread in self.spreads(case, most_nodes):
                answers = planner.Answers(spread.timed, spread.seconds, spread.bound)
                if planner.feasible(self.asked(spread), answers, self.target):
                    is_least = case.cluster.gpus == counts[0][0]
                    limit = "" if fewer else "there are no fewer" if is_least else "no fewer share the batch"
                    return self.plan(spread, Solved(question="gpus", value=case.cluster.gpus, next=fewer, limit=limit))
            fewer = case.cluster.gpus
        most = cases[-1]
        limit = f"{most.cluster.gpus} are the most that were tried"
        return self.plan(most, Solved(question="gpus", value=None, next=most.cluster.gpus, limit=limit))

    def spreads(self, case: Case, most_nodes: int) -> Iterator[Case]:
        """The GPUs on as few nodes as are given, then on more, as long as a node's host is too small."""
        yield case
        gpus, host = case.cluster.gpus, case.cluster.host_memory
        for nodes in divisors(gpus):
            answers = planner.Answers(case.timed, case.seconds, case.bound)
            if host is None or not planner.wants_host(self.asked(case), answers, host, self.target):
                return
            if case.cluster.nodes < nodes <= most_nodes:
                case = replace(case, cluster=case.cluster.replace(nodes=nodes))
                yield case

    def fewest_of(self, cluster: ClusterSpec) -> Plan:
        """The plan on the fewest of a cluster's GPUs: of one node, or of whole nodes."""
        run = _with_global_batch(self.run, cluster.gpus, self.global_batch_size)
        size = run.micro_batch_size * run.grad_accum_steps * cluster.gpus
        # As many sequences for each rank as there are ranks to share them.
        given = {name: getattr(self.run, name) for name in self.run.model_fields_set - {"grad_accum_steps"}}
        counts = [(gpus, 1) for gpus in range(1, cluster.gpus_per_node + 1)]
        counts += [(cluster.gpus_per_node * nodes, nodes) for nodes in range(2, cluster.nodes + 1)]
        return replace(self, run=TrainingSpec(**given), global_batch_size=size).fewest_gpus(counts, cluster.nodes)

    def smallest_gpu(self) -> Plan:
        """The plan on the GPU of the catalog with the least memory on which something fits, the slower of equals."""
        gpus = sorted(all_gpus(), key=lambda gpu: (gpu.memory_bytes, gpu.bf16_tflops or gpu.fp16_tflops or 0.0))
        asked = self.asked(self.case)
        kinds: dict[object, list[GPUSpec]] = {}
        for gpu in gpus:
            kinds.setdefault(self.case.kind_of(gpu, asked), []).append(gpu)
        kinds.pop(None, None)
        floors = {kind: self.floor(self.case.on(alike[-1])) for kind, alike in kinds.items()}
        smaller: GPUSpec | None = None
        tried: set[object] = set()
        for gpu in gpus:
            kind = self.case.kind_of(gpu, asked)
            if kind in kinds and gpu.memory_bytes >= floors[kind]:
                if self.fits(gpu):
                    below, limit = smaller and smaller.name, "" if smaller else "the smallest of the catalog"
                    return self.plan(self.case.on(gpu), Solved(question="gpu", value=gpu.name, next=below, limit=limit))
                largest = kinds[kind][-1]
                if kind not in tried and not self.fits(largest):
                    # Where nothing fits on the largest of a kind it does not on smaller ones.
                    floors[kind] = largest.memory_bytes - GiB
                tried.add(kind)
            smaller = gpu
        limit = "the largest of the catalog is too small"
        return self.plan(self.case.on(gpus[-1]), Solved(question="gpu", value=None, next=gpus[-1].name, limit=limit))

    def fits(self, gpu: GPUSpec) -> bool:
        """Whether something fits on a GPU."""
        case = self.case.on(gpu)
        return planner.feasible(self.asked(case), planner.Answers(case.timed, case.seconds, case.bound), self.target)

    def floor(self, case: Case, *, on_ladder: bool = False) -> int:
        """Bytes that a GPU of the kind of this one, which is none smaller, has to have whatever is chosen."""
        answers = planner.Answers(case.timed, case.seconds, case.bound)
        needed = planner.needed(self.asked(case), answers, self.target, on_ladder=on_ladder)
        # Contexts, and partial sums of kernels, differ by less than a GiB.
        return _UNBOUNDED if needed is None else needed - GiB

    def result(self, case: Case, found: planner.Planned, solved: Solved | None = None) -> Plan:
        rungs = tuple(rung for _, rung in found.tried)
        best = None if found.best is None else rungs[found.best]
        result = Plan(best=best, rungs=rungs, pareto=found.pareto, searched=found.searched, solved=solved)
        if self.advises and solved is None and result.verdict != "fits":
            result = result.model_copy(update={"remedies": tuple(self.remedies(case, rungs))})
        if found.best is not None:
            result._recipe.files = partial(_files, case, found.tried[found.best][0])
        return result

    # -- what would fit ------------------------------------------------------------------------------------------------

    def remedies(self, case: Case, rungs: Sequence[Rung]) -> Iterator[Remedy]:
        """Changes with which a rung fits: more of the host, then what trains the same, more hardware, and less."""
        asked = self.asked(case)
        if any(_lacks_host(rung.estimate) for rung in rungs):
            # More than all of them need: what fits then fits the GPU.
            enough = 2 * max(rung.estimate.host.peak for rung in rungs)
            hosted = replace(case, cluster=case.cluster.replace(host_memory=enough))
            found = planner.least_host(asked, planner.Answers(hosted.timed, hosted.seconds, hosted.bound), self.target)
            if found is not None:
                yield _remedy(f"--host-memory {-(-found.estimate.host.peak // GiB)}", found.name, found.estimate)
        for change in (with_liger, with_8bit_adam):
            less = change(asked)
            if less is not None and less != asked:
                yield from self.remedy(options_between(asked, less), case, less)
        yield from self.shorter(case, asked)
        for gpus, nodes in _counts(case.cluster):
            if gpus <= case.cluster.gpus or (gpus if case.cluster.nodes == 1 else nodes).bit_count() > 1:
                continue  # powers of two tell enough
            more = replace(case, cluster=case.cluster.replace(gpus=gpus, nodes=nodes))
            options = f"--gpus {gpus}" if nodes == 1 else f"--gpus {gpus} --nodes {nodes}"
            with suppress(SpecError):  # a batch that they cannot share
                spread = list(self.remedy(options, more, self.asked(more)))
                yield from spread
                if spread:
                    break
        yield from self.larger(case, asked)
        for changes in ((with_lora,), (with_lora, in_nf4)):
            less = all_changed(asked, changes)
            adapted = [] if less is None else list(self.remedy(options_between(asked, less), case, less))
            yield from adapted
            if adapted:
                break

    def remedy(self, options: str, case: Case, asked: Setup) -> Iterator[Remedy]:
        """The change, if a rung fits with it."""
        answers = planner.Answers(case.timed, case.seconds, case.bound)
        found = planner.first_that_fits(asked, answers, self.target, self.processes)
        if found is not None:
            yield _remedy(options, found.name, found.estimate)

    def shorter(self, case: Case, asked: Setup) -> Iterator[Remedy]:
        """The longest sequence below the one that was asked for."""
        if case.model.architecture.endswith("ForImageClassification") or asked.training.seq_len <= solving.STEP:
            return
        scale = solving.seq_lens(asked.training.seq_len)
        start = scale.apply(asked, scale.values[0])
        found, value = solving.solve(
            start, scale, case.timed, case.seconds, self.target, processes=self.processes, bound=case.bound
        )
        if value is not None and found.best is not None:
            rung = found.tried[found.best][1]
            yield _remedy(f"--seq-len {value}", rung.name, rung.estimate)

    def larger(self, case: Case, asked: Setup) -> Iterator[Remedy]:
        """The smallest GPU of the catalog that is larger."""
        given = case.cluster.gpu_memory
        own = given or (case.cluster.gpu.memory_bytes if isinstance(case.cluster.gpu, GPUSpec) else 0)
        floors: dict[object, int] = {}
        for gpu in sorted(all_gpus(), key=lambda gpu: gpu.memory_bytes):
            on, kind, options = case.on(gpu), case.kind_of(gpu, asked), f"--gpu {gpu.name}"
            if gpu.memory_bytes <= own or kind is None:
                continue
            if given is not None:  # which would be taken in place of the larger one's
                size = f"{gpu.memory_bytes * 100 // GiB / 100:.2f}"
                on = replace(on, cluster=on.cluster.replace(gpu_memory=f"{size}GiB"))
                options += f" --gpu-memory {size}"
            if kind not in floors:
                largest = [each for each in all_gpus() if case.kind_of(each, asked) == kind]
                floors[kind] = self.floor(case.on(max(largest, key=lambda each: each.memory_bytes)), on_ladder=True)
            if gpu.memory_bytes >= floors[kind]:
                found = list(self.remedy(options, on, self.asked(on)))
                yield from found
                if found:
                    return


def _lacks_host(found: Estimate) -> bool:
    """Whether a setup wants for host memory."""
    return verdict_by_place(found.gpu, found.host, found.nvme).get("host", "fits") != "fits"


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


def _files(case: Case, setup: Setup) -> dict[str, str]:
    from memplan.configs import launch  # here, because most plans are not written

    return launch.files(case.model, setup.training, case.cluster, setup.strategy, case.software)


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
