"""One optimizer step in seconds: what the GPU computes, what is passed between ranks, places and disks, and what of it
hides behind the rest.

A step is its micro-batches' forwards and backwards, or the host's time to ask for them if that is longer; what engines
move (:class:`memplan.memory.course.Ledger` counts it as they are played), less what runs beside kernels; and the
optimizer, on the GPU or on the host. Every number is computed three times, with the fast and the slow end of all
constants' ranges: an interval that is wide, since ends do not meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from memplan.constants import Constant
from memplan.engines.ddp import bucket_bytes
from memplan.errors import SpecError, UnsupportedError
from memplan.memory.course import COLLECTIVES, Move
from memplan.memory.optimizers import AdamW
from memplan.micro_batch import Setup, as_on_tape, run_in_full, run_of
from memplan.results import StepTime
from memplan.specs.hardware import ClusterSpec, GPUSpec
from memplan.specs.strategy import Strategy
from memplan.throughput.kernels import STAGES, Stage, Work, work_of
from memplan.throughput.rates import (
    CALL,
    CASES,
    DEFAULT_MACHINE,
    HOST_BACKWARD,
    HOST_FORWARD,
    HOST_FSDP,
    HOST_ZERO3,
    HOST_ZERO12,
    OVERLAP,
    Case,
    Machine,
    Rates,
)


@dataclass(frozen=True, slots=True)
class Span:
    """A number with its interval, in the unit of the field that holds it."""

    low: float
    expected: float
    high: float


PARTS = (
    "forward", "backward", "recomputation", "host", "flattening", "communication", "copies", "nvme",
    "optimizer", "overlap",
)  # fmt: skip
"""What a step may spend time on: the GPU's kernels, waiting for the host to ask for them, the engine's copies of
gradients and weights, collectives, copies over PCIe, reads and writes of NVMe, the optimizer. overlap is negative."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a step spends time on."""

    name: str
    """One of ``PARTS``."""
    seconds: Span
    made_of: str
    """What it is computed from, in words."""


@dataclass(frozen=True, slots=True)
class StepTiming:
    """The time of one optimizer step. The parts' expected seconds add up to the step's."""

    parts: tuple[Part, ...]
    seconds: Span
    tokens: int
    """That all ranks train on in one step; padding counts, and of images their patches and class tokens."""
    flops: float
    """That one rank's kernels compute in one step, recomputation included."""
    bound_by: str
    """What most of the time goes to: compute, bandwidth, host, communication, pcie, cpu or nvme."""

    @property
    def tokens_per_second(self) -> Span:
        """Of all ranks together."""
        return Span(
            self.tokens / self.seconds.high, self.tokens / self.seconds.expected, self.tokens / self.seconds.low
        )

    @property
    def interval(self) -> Constant:
        """The seconds as an assumption, to three digits: the fast and the slow ends of all rates together."""
        value, low, high = (float(f"{x:.3g}") for x in (self.seconds.expected, self.seconds.low, self.seconds.high))
        source = "the fast and the slow ends of the rates in docs/throughput.md, all at once"
        return Constant("step", value, low, high, "s", source)

    def result(self) -> StepTime:
        """The expected values, as an estimate's JSON has them."""
        return StepTime(
            seconds=self.seconds.expected,
            tokens_per_second=self.tokens_per_second.expected,
            flops=self.flops,
            bound_by=self.bound_by,
        )


def step_time(setup: Setup, cluster: ClusterSpec, strategy: Strategy, machine: Machine = DEFAULT_MACHINE) -> StepTiming:
    """The time of one optimizer step of a resolved setup (:func:`memplan.estimator.resolve`).

    ``cluster.gpu`` is a GPUSpec. Raises SpecError without one, UnsupportedError for a CPU's.

    ``machine`` says of the nodes what the cluster's spec does not; what it leaves out is assumed.
    """
    gpu = _timed(cluster)
    work = _work(as_on_tape(setup), gpu)
    moves = _moves(setup, gpu, strategy, cluster)
    rates = {case: Rates(gpu, cluster, machine, case) for case in CASES}
    times = {case: _Step(setup, gpu, strategy, cluster, rates[case], work, moves) for case in CASES}
    made_of = {name: words for case in CASES for name, words in times[case].made_of.items()}
    made_of |= times["expected"].made_of
    parts = tuple(
        Part(name, _span({case: step.parts.get(name, 0.0) for case, step in times.items()}), made_of[name])
        for name in PARTS
        if name in made_of
    )
    training = setup.training
    tokens = training.micro_batch_size * _length(setup, gpu) * training.grad_accum_steps * cluster.gpus
    return StepTiming(
        parts=parts,
        seconds=_span({case: step.seconds for case, step in times.items()}),
        tokens=tokens,
        flops=training.grad_accum_steps * sum(each.computed for each in work.values()),
        bound_by=times["expected"].bound_by,
    )


def expected_seconds(setup: Setup, cluster: ClusterSpec, strategy: Strategy) -> float:
    """Those of :func:`step_time` that are expected, without the interval: for a search. Raises as that."""
    gpu = _timed(cluster)
    work, moves = _work(as_on_tape(setup), gpu), _moves(setup, gpu, strategy, cluster)
    return _Step(setup, gpu, strategy, cluster, Rates(gpu, cluster, DEFAULT_MACHINE, "expected"), work, moves).seconds


def least_seconds(setup: Setup, cluster: ClusterSpec, strategy: Strategy) -> float:
    """At the most :func:`expected_seconds`, without a play of the engine: the kernels, and waiting for the host."""
    if not strategy.shards:
        return expected_seconds(setup, cluster, strategy)
    gpu = _timed(cluster)
    rates, work = Rates(gpu, cluster, DEFAULT_MACHINE, "expected"), _work(as_on_tape(setup), gpu)
    # Less than the rounding of a sum, in which what is hidden is taken off again.
    return (1 - 1e-9) * _Step(setup, gpu, strategy, cluster, rates, work, None).seconds


def _timed(cluster: ClusterSpec) -> GPUSpec:
    """The GPU whose time is told."""
    gpu = cluster.gpu
    if not isinstance(gpu, GPUSpec):
        raise SpecError.at("gpu", gpu, "is no GPU whose speed is known", "Name one, as in A100-80GB.")
    if gpu.is_cpu:
        raise UnsupportedError("gpu: how fast a CPU trains is not modelled. Name a GPU, as in A100-80GB.")
    return gpu


def _length(setup: Setup, gpu: GPUSpec) -> int:
    """Tokens of a sequence. Of an image they are its patches and the class token, where the model tells them apart."""
    head = setup.training.head or setup.model.architecture
    if head != "image-classification" and not head.endswith("ForImageClassification"):
        return setup.training.seq_len
    shapes = (p.shape for p, _ in run_of(setup, gpu)[0].parameters)
    # position_embeddings are [1, positions, hidden]; without them an image is one
    return next((shape[1] for shape in shapes if len(shape) == 3 and shape[0] == 1 < shape[1]), 1)


def _span(by_case: Mapping[Case, float]) -> Span:
    return Span(by_case["fast"], by_case["expected"], by_case["slow"])


@lru_cache(maxsize=512)
def _work(setup: Setup, gpu: GPUSpec) -> dict[Stage, Work]:
    """The kernels of one micro-batch."""
    _, micro = run_of(setup, gpu)
    if not micro.tape.births:  # recorded: it does not tell what its storages are
        micro = run_in_full(setup)
    return work_of(micro.unrolled)


@lru_cache(maxsize=2048)
def _kernel_seconds(setup: Setup, gpu: GPUSpec, case: Case) -> dict[Stage, tuple[float, float]]:
    """Of one micro-batch, by stage: seconds of products and attention, and of the other kernels."""
    package = setup.training.attn == "flash_attention_2"
    rates = Rates(gpu, ClusterSpec(gpu=gpu), DEFAULT_MACHINE, case, package)
    return {stage: rates.gpu_seconds(work) for stage, work in _work(setup, gpu).items()}


@lru_cache(maxsize=256)
def _stepped_bytes(setup: Setup, gpu: GPUSpec, strategy: Strategy) -> float:
    """Bytes that clipping and stepping all weights move, on however many ranks."""
    run, _ = run_of(setup, gpu)
    masters = strategy.is_deepspeed or (strategy.kind == "fsdp" and setup.mixed is not None)
    found = 0.0
    for p, count in run.stepped:
        itemsize = 4 if masters else p.nbytes / p.numel  # the optimizer's own copy is in float32
        own = itemsize * p.numel
        if isinstance(run.optimizer, AdamW):
            stepped = _ACCESSES["fused" if run.optimizer.fused else "foreach"] * own
        else:
            states = sum(run.optimizer.states(p)) + run.optimizer.paged_bytes(p)  # paged: once they have come over
            stepped = 3 * own + 2 * own / p.nbytes * states
            stepped += 3 * own if run.optimizer.has_temporaries else 0
        found += count * (stepped + (_SHARDED_STEP * p.numel if strategy.is_deepspeed else 3 * own))
    return found


def _moves(setup: Setup, gpu: GPUSpec, strategy: Strategy, cluster: ClusterSpec) -> dict[Move, int]:
    """What one rank moves in a step, all micro-batches of it."""
    if strategy.kind == "ddp":
        buckets = bucket_bytes(run_of(setup, gpu)[0].trainable, strategy.ddp)
        return {"all_reduce": sum(buckets), "calls": len(buckets)}
    if not strategy.shards:
        return {}
    from memplan import sharded

    played = sharded.moves(setup, gpu, strategy, cluster.gpus, cluster.gpus_per_node)
    first, last = dict(played[0]), dict(played[-1])
    found: dict[Move, int] = dict(last)
    if len(played) > 1:  # the first, those between, of which one was played, and the last
        between = played[1] if len(played) > 2 else {}
        others = setup.training.grad_accum_steps - 2
        for kind in {*first, *between, *last}:
            found[kind] = first.get(kind, 0) + others * between.get(kind, 0) + last.get(kind, 0)
    return found


_ACCESSES = {"fused": 7, "foreach": 18}
"""AdamW's passes over tensors of a weight's size: one kernel reads gradient, weight and moments and writes the latter
three; torch._foreach's do it by lerp_, mul_, addcmul_, sqrt, div_, add_ and addcdiv_ (torch/optim/adam.py, 2.13)."""

_COPIES = {"zero0": 4, "zero12": 8, "zero3": 4, "fsdp": 2}
"""Passes over gradients for their reduction: into a bucket, divided, flattened, back, and to the partition
(stage_1_and_2.py: average_tensor, allreduce_and_scatter; stage3.py: __avg_scatter_grads; _fsdp_collectives.py)."""

_GATHERED = 2
"""Passes over gathered weights: read from what the collective has filled, and written to where they are used."""

_SHARDED_STEP = 38
"""Bytes per parameter that DeepSpeed's step moves beside the optimizer: the norm in float64 (2 + 8 + 8), the gradient
in float32 (2 + 4), unscaled and clipped (4 + 4), the 16-bit weight (4 + 2) (stage_1_and_2.py, stage3.py)."""


_SPANS = ("forward", "backward")
"""What the GPU does in turn; a backward's recomputation is in it."""


class _Step:
    """One case's seconds."""

    def __init__(
        self,
        setup: Setup,
        gpu: GPUSpec,
        strategy: Strategy,
        cluster: ClusterSpec,
        rates: Rates,
        work: Mapping[Stage, Work],
        moves: Mapping[Move, int] | None,
    ) -> None:
        """Without ``moves`` it is kernels, and waiting for the host, alone."""
        self.setup, self.gpu, self.strategy, self.cluster = setup, gpu, strategy, cluster
        self.rates, self.work, self.moves = rates, work, moves or {}
        self.micro_batches = setup.training.grad_accum_steps
        self.parts: dict[str, float] = {}
        self.made_of: dict[str, str] = {}
        self._spans: dict[str, float] = {}
        """Seconds of each, kernels and waiting for the host."""
        self._by_cause: dict[str, float] = dict.fromkeys(
            ("compute", "bandwidth", "host", "communication", "pcie", "cpu", "nvme"), 0.0
        )
        self._kernels()
        if moves is None:
            return
        self._optimizer()
        hidden = self._communication()
        hidden += self._copies(hidden)
        if hidden:
            self._add("overlap", -hidden, "transfers beside kernels")

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())

    @property
    def bound_by(self) -> str:
        """The largest cause; what is hidden does not count."""
        return max(self._by_cause, key=lambda cause: self._by_cause[cause])

    def _add(self, name: str, seconds: float, made_of: str, cause: str | None = None) -> None:
        self.parts[name] = seconds
        self.made_of[name] = made_of
        if cause is not None:
            self._by_cause[cause] += seconds

    # -- kernels ---------------------------------------------------------------------------------------------------

    def _kernels(self) -> None:
        """Add a forward's and a backward's kernels, and how long the GPU waits for the host to ask for them.

        The host runs ahead of the GPU in one of them only by what it has run ahead itself: each takes as long as the
        slower of both.
        """
        computed, moved, asked = (dict.fromkeys(_SPANS, 0.0) for _ in range(3))
        kernel_seconds = _kernel_seconds(as_on_tape(self.setup), self.gpu, self.rates.case)
        for stage in STAGES:
            work, span = self.work[stage], "forward" if stage == "forward" else "backward"
            computing, moving = kernel_seconds[stage]
            seconds = self.micro_batches * (computing + moving)
            per_result = HOST_BACKWARD if stage == "backward" else HOST_FORWARD
            asked[span] += self.micro_batches * work.results * self.rates.cost(per_result)
            computed[span] += self.micro_batches * computing
            moved[span] += self.micro_batches * moving
            if not work.results:
                continue
            tera, giga = self.micro_batches * work.computed / 1e12, self.micro_batches * work.moved / 1e9
            self._add(
                stage, seconds, f"{tera:,.4g} TFLOP in {computing * self.micro_batches:.3g} s, {giga:,.4g} GB moved"
            )
        for span, seconds in self._asked_by_hooks().items():
            asked[span] += seconds
        waited = 0.0
        for span in _SPANS:
            kernels = computed[span] + moved[span]
            self._spans[span] = max(kernels, asked[span])
            if asked[span] > kernels:
                waited += asked[span] - kernels
                self._by_cause["host"] += asked[span]  # the GPU waits for it throughout
            else:
                self._by_cause["compute"] += computed[span]
                self._by_cause["bandwidth"] += moved[span]
        if waited:
            results = self.micro_batches * sum(work.results for work in self.work.values())
            self._add("host", waited, f"{results:,} results, and hooks, take the host {sum(asked.values()):.3g} s")

    def _asked_by_hooks(self) -> dict[str, float]:
        """Seconds of the host in what an engine does where modules begin and end and gradients come."""
        cost, kind = self.rates.cost, self.strategy.kind
        if kind == "zero3":
            each = cost(HOST_ZERO3) * self.micro_batches
            forward, hooks = self.work["forward"].hooks, sum(work.hooks for work in self.work.values())
            return {"forward": each * forward, "backward": each * (hooks - forward)}
        if kind in ("zero1", "zero2"):
            times = self.micro_batches if kind == "zero2" else 1
            gradients = sum(work.gradients for work in self.work.values())
            return {"backward": cost(HOST_ZERO12) * times * gradients}
        if kind == "fsdp":  # a unit is gathered for its forward, gathered for its backward, and reduced
            calls = cost(HOST_FSDP) * self.moves.get("calls", 0)
            return {"forward": calls / 3, "backward": calls * 2 / 3}
        return {}

    # -- the optimizer ---------------------------------------------------------------------------------------------

    def _optimizer(self) -> None:
        """Add the step: of a rank's partition some on the host, which kernels for the rest run beside (ratio)."""
        trained = run_of(self.setup, self.gpu)[0].trainable
        shared = self.cluster.gpus if self.strategy.kind in ("zero1", "zero2", "zero3", "fsdp") else 1
        on_host, elements = self.moves.get("host_step", 0), sum(p.numel * count for p, count in trained) / shared
        stays = max(0.0, 1 - on_host / elements) if elements else 0.0
        nbytes = stays * _stepped_bytes(self.setup, self.gpu, self.strategy) / shared
        if not self.strategy.shards and self.micro_batches > 1:  # .grad += of each later micro-batch
            nbytes += 3 * (self.micro_batches - 1) * sum(p.nbytes * count for p, count in trained)
        here, there = nbytes / self.rates.bandwidth, on_host * self.rates.cpu_step
        words = [f"{on_host / 1e9:.3g} G parameters of a rank on the host"] if on_host else []
        words += [f"{nbytes / 1e9:.3g} GB moved"] if nbytes > 0 else []
        if words:
            self._add("optimizer", max(here, there), ", ".join(words), "cpu" if there > here else "bandwidth")

    # -- between ranks ---------------------------------------------------------------------------------------------

    def _communication(self) -> float:
        """Add what collectives take; return what of it runs beside kernels."""
        ranks, link, bandwidth = self.cluster.gpus, self.rates.link, self.rates.bandwidth
        passed = (ranks - 1) / ranks
        amount = {kind: self.moves.get(kind, 0) for kind in sorted(COLLECTIVES)}
        reduced = (2 * amount["all_reduce"] + amount["reduce_scatter"]) * passed / link
        gathered = amount["all_gather"] * passed / link
        if self.strategy.shards:
            engine = "zero12" if self.strategy.kind in ("zero1", "zero2") else self.strategy.kind
            copied = _COPIES[engine] * (amount["all_reduce"] + amount["reduce_scatter"])
            copied += _GATHERED * amount["all_gather"] if self.strategy.kind in ("zero3", "fsdp") else 0
            if copied:
                self._add("flattening", copied / bandwidth, f"{copied / 1e9:.3g} GB moved", "bandwidth")
        if ranks == 1 or not reduced + gathered:
            return 0.0
        calls = self.moves.get("calls", 0)
        longer = 1 + calls * self.rates.cost(CALL) / (reduced + gathered)
        reduced, gathered = longer * reduced, longer * gathered
        words = [f"{name.replace('_', '-')} of {nbytes / 1e9:.3g} GB" for name, nbytes in amount.items() if nbytes]
        self._add(
            "communication", reduced + gathered, f"{', '.join(words)} over {link / 1e9:.3g} GB/s, {calls:,} calls"
        )
        beside = self._beside_kernels(reduced, gathered)
        self._by_cause["communication"] += reduced + gathered - beside
        return beside

    def _beside_kernels(self, reduced: float, gathered: float) -> float:
        """What of the collectives is hidden: as far as there are kernels to run beside."""
        strategy, share = self.strategy, self.rates.of(OVERLAP)
        backward, whole = self._spans["backward"], sum(self._spans.values())
        last = backward / self.micro_batches
        if strategy.kind == "ddp":  # the reducer's hooks, in the last micro-batch's backward
            return share * min(reduced, last)
        if strategy.kind in ("zero1", "zero2"):
            if not strategy.zero.overlap_comm:
                return 0.0  # on the stream of the kernels
            return share * min(reduced, backward if strategy.kind == "zero2" else last)
        if strategy.kind == "zero3":
            if strategy.zero.overlap_comm is False:
                return 0.0
            return share * min(reduced + gathered, whole)
        if strategy.kind == "fsdp":
            keys = strategy.fsdp
            waits = keys.version == 1 and keys.backward_prefetch == "NO_PREFETCH"
            return share * min(reduced + (gathered / 2 if waits else gathered), whole)
        return 0.0

    # -- between places --------------------------------------------------------------------------------------------

    def _copies(self, beside: float) -> float:
        """Add what goes over PCIe and to NVMe; return what of it runs beside kernels, as collectives do ``beside``."""
        down, up = self.moves.get("to_host", 0), self.moves.get("to_gpu", 0)
        read, write = self.moves.get("nvme_read", 0), self.moves.get("nvme_write", 0)
        hidden = 0.0
        if down + up:
            seconds = (down + up) / self.rates.pcie
            words = f"{down / 1e9:.3g} GB to the host, {up / 1e9:.3g} GB to the GPU at {self.rates.pcie / 1e9:.3g} GB/s"
            self._add("copies", seconds, words)
            if self.strategy.kind in ("zero3", "fsdp"):
                # A weight is copied before it is gathered. No kernel hides both, or less to compute would take longer.
                share = self.rates.of(OVERLAP)
                hidden = min(share * seconds, max(share * sum(self._spans.values()) - beside, 0.0))
            self._by_cause["pcie"] += seconds - hidden
        if read + write:
            reads, writes = self.rates.nvme
            words = f"{read / 1e9:.3g} GB read, {write / 1e9:.3g} GB written by a rank"
            self._add("nvme", read / reads + write / writes, words, "nvme")
        return hidden
