"""The ladder of setups that need less and less, and the fastest one that fits.

What a setup needs and how long its step takes is asked of functions that are passed in: nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from memplan.errors import SpecError, UnsupportedError
from memplan.results import Assumption, Estimate, Rung, verdict_by_place
from memplan.specs.strategy import Kind, Offload, OffloadParamSpec, Strategy, ZeroSpec
from memplan.specs.training import TrainingSpec
from memplan.units import gib

__all__ = ["FSDP_LADDER", "LADDER", "Change", "Objective", "Planned", "Setup", "Target", "changed", "plan", "rungs"]

Target: TypeAlias = Literal["deepspeed", "fsdp", "auto"]
Objective: TypeAlias = Literal["throughput", "memory"]


@dataclass(frozen=True, slots=True)
class Setup:
    """What the ladder may change, and on how many GPUs; model, hardware and software stay as they are."""

    training: TrainingSpec
    strategy: Strategy
    gpus: int = 1
    is_gpu_known: bool = True
    nvme_buffer_size: int | None = None
    """Elements of the largest partition of a weight, which a buffer must hold if weights are offloaded to NVMe; None
    where there is no NVMe."""
    notes: tuple[Assumption, ...] = ()
    """Where an option has won over a config, and what else the config's engine does."""


Estimator: TypeAlias = Callable[[Setup, bool], Estimate]
Timer: TypeAlias = Callable[[Setup], float]
Change: TypeAlias = Callable[[Setup], "Setup | None"]
"""A setup that needs less memory, or None where the change does not apply."""


def changed(setup: Setup, **fields: Any) -> Setup:
    """The setup with other fields of its TrainingSpec."""
    return replace(setup, training=setup.training.replace(**fields))


def _as_asked(setup: Setup) -> Setup:
    return setup


def micro_batch_1(setup: Setup) -> Setup | None:
    """The same global batch, one sequence at a time."""
    training = setup.training
    if training.task != "train" or training.micro_batch_size == 1:
        return None
    steps = training.grad_accum_steps * training.micro_batch_size
    return changed(setup, micro_batch_size=1, grad_accum_steps=steps)


def checkpointed(setup: Setup) -> Setup | None:
    # Switched off by hand, it stays off.
    if setup.training.task != "train" or "gradient_checkpointing" in setup.training.model_fields_set:
        return None
    return changed(setup, gradient_checkpointing=True)


def _under(kind: Kind, offload_optimizer: Offload = "none", offload_param: Offload = "none") -> Change:
    """The change to an engine that shards. One GPU has nobody to share with, and may offload if it is too small."""
    offloads = (offload_optimizer, offload_param)

    def change(setup: Setup) -> Setup | None:
        if setup.training.task != "train":
            return None
        if setup.gpus == 1 and (offload_optimizer == "none" or not setup.is_gpu_known):
            return None
        if "nvme" in offloads and setup.nvme_buffer_size is None:
            return None
        strategy = Strategy(kind=kind, offload_optimizer=offload_optimizer, offload_param=offload_param)
        return replace(setup, strategy=strategy)

    return change


def _all_on_nvme(setup: Setup) -> Setup | None:
    """With keys under which host memory holds little: buffers that all weights fit into, and none in their place."""
    less = _under("zero3", "nvme", "nvme")(setup)
    if less is None or setup.nvme_buffer_size is None:
        return None
    param = OffloadParamSpec(max_in_cpu=0, buffer_size=max(setup.nvme_buffer_size, OffloadParamSpec().buffer_size))
    # Weights that stay gathered keep a buffer each, of which there are five; prefetching can ask for one twice.
    unkept = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    zero = ZeroSpec(offload_param=param, sub_group_size=100_000_000, **unkept)
    return replace(less, strategy=less.strategy.replace(zero=zero))


LADDER: tuple[tuple[str, Change], ...] = (
    ("as asked", _as_asked),
    ("micro-batch 1", micro_batch_1),
    ("gradient checkpointing", checkpointed),
    ("ZeRO-1", _under("zero1")),
    ("ZeRO-2", _under("zero2")),
    ("ZeRO-2, optimizer offloaded", _under("zero2", "cpu")),
    ("ZeRO-3", _under("zero3")),
    ("ZeRO-3, parameters offloaded", _under("zero3", "none", "cpu")),
    ("ZeRO-3, all offloaded", _under("zero3", "cpu", "cpu")),
    ("ZeRO-3, optimizer on NVMe", _under("zero3", "nvme", "cpu")),
    ("ZeRO-3, all on NVMe", _all_on_nvme),
)
"""The rungs, each a change to the one before it; the faster comes first."""


FSDP_LADDER: tuple[tuple[str, Change], ...] = (
    *LADDER[:3],
    ("FSDP", _under("fsdp")),
    ("FSDP, parameters offloaded", _under("fsdp", "none", "cpu")),
)
"""The rungs for who would rather have FSDP."""


def rungs(setup: Setup) -> tuple[Setup, ...]:
    """Return the setups of the ladder that apply to a run, from ``setup`` on."""
    return tuple(rung for _, rung in _climbed(setup, LADDER))


def _climbed(setup: Setup, ladder: Iterable[tuple[str, Change]]) -> Iterator[tuple[str, Setup]]:
    for name, change in ladder:
        less = change(setup)
        if less is not None:
            yield name, less
            setup = less


# -- the plan --------------------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """What :func:`plan` comes to."""

    best: int | None
    """The place of the chosen one; None if nothing fits."""
    tried: tuple[tuple[Setup, Rung], ...]


def plan(
    asked: Setup,
    estimate: Estimator,
    seconds: Timer,
    target: Target = "deepspeed",
    objective: Objective = "throughput",
) -> Planned:
    """Walk the ladder from ``asked`` on, and choose among what fits.

    ``estimate(setup, exact)`` answers for a setup, with the time of its step; if not ``exact`` a verdict of tight may
    mean anything but does-not-fit. ``seconds(setup)`` is the time alone. Every rung that fits has the fastest
    micro-batch with which it does, for the same global batch, unless memory is the objective; then what was given up on
    the way down is tried without. A rung that the libraries refuse for this run, or that is not modelled, is left out,
    and so is one that comes to a setup that is there already. Raises what ``estimate`` raises for ``asked`` itself.
    """
    tried: list[tuple[str, Setup, Estimate]] = []
    for name, setup in _of_target(asked, target):
        try:
            found = estimate(setup, True)
        except (SpecError, UnsupportedError):
            if setup == asked:
                raise
            continue
        if objective == "throughput":
            setup, found = _with_fastest_batch(setup, found, estimate, seconds)
        # Down the ladder the fastest batch may be that of a rung before.
        if not _is_tried(setup, tried):
            tried.append((name, setup, found))
    for name, setup, found in list(tried):
        if found.verdict == "fits" and setup.training.gradient_checkpointing and not _is_given(asked, setup):
            less = changed(setup, gradient_checkpointing=asked.training.gradient_checkpointing, micro_batch_size=1)
            less = changed(less, grad_accum_steps=_sequences(setup))
            if not _may_fit(less, estimate):
                continue
            again = estimate(less, True)
            if again.verdict == "fits" and objective == "throughput":
                less, again = _with_fastest_batch(less, again, estimate, seconds)
            if again.verdict == "fits" and not _is_tried(less, tried):
                tried.append((f"{name}, without checkpointing", less, again))
    best = _best([found for _, _, found in tried], objective)
    reasons = [_reason(found, None if best is None else tried[best][2], objective) for _, _, found in tried]
    return Planned(
        best,
        tuple(
            (setup, Rung(name=name, estimate=found, reason_passed_over=None if number == best else reason))
            for number, ((name, setup, found), reason) in enumerate(zip(tried, reasons, strict=True))
        ),
    )


def _of_target(asked: Setup, target: Target) -> Iterator[tuple[str, Setup]]:
    yield from _climbed(asked, FSDP_LADDER if target == "fsdp" else LADDER)
    if target == "auto":
        for name, setup in _climbed(asked, FSDP_LADDER):
            if setup.strategy.kind == "fsdp":
                yield name, setup


def _sequences(setup: Setup) -> int:
    """That a rank trains on in one step."""
    return setup.training.micro_batch_size * setup.training.grad_accum_steps


def _with_fastest_batch(setup: Setup, found: Estimate, estimate: Estimator, seconds: Timer) -> tuple[Setup, Estimate]:
    """The setup with the micro-batch that is fastest of those that fit, if it does; memory grows with it.

    A step can take longer with a larger one, so those below the largest are timed too: with less memory one of them
    would be the largest, and more memory never makes a plan slower.
    """
    if found.verdict != "fits":
        return setup, found
    sequences, now = _sequences(setup), setup.training.micro_batch_size
    larger = [
        changed(setup, micro_batch_size=size, grad_accum_steps=sequences // size)
        for size in _divisors(sequences)
        if size > now
    ]
    answers = {-1: found}

    def fits(place: int) -> bool:
        if not _may_fit(larger[place], estimate) or (again := estimate(larger[place], True)).verdict != "fits":
            return False
        answers[place] = again
        return True

    fitting, failing = -1, len(larger)
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if fits(middle):
            fitting = middle
        else:
            failing = middle
    best = min(sorted(answers, reverse=True), key=lambda place: _seconds(answers[place]))  # the larger of equals
    untried = [(seconds(larger[place]), place) for place in range(fitting) if place not in answers]
    for needed, place in sorted(untried):
        if needed >= _seconds(answers[best]):
            break
        if fits(place):
            best = place
            break
    return (setup if best < 0 else larger[best]), answers[best]


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _may_fit(setup: Setup, estimate: Estimator) -> bool:
    """Whether it is worth a closer look: without it the low end is already exact."""
    try:
        return estimate(setup, False).verdict != "does-not-fit"
    except (SpecError, UnsupportedError):
        return False


def _is_given(asked: Setup, setup: Setup) -> bool:
    return asked.training.gradient_checkpointing == setup.training.gradient_checkpointing


def _is_tried(setup: Setup, tried: Sequence[tuple[str, Setup, Estimate]]) -> bool:
    return any(setup == each for _, each, _ in tried)


def _seconds(estimate: Estimate) -> float:
    return math.inf if estimate.step is None else estimate.step.seconds


def _best(estimates: Sequence[Estimate], objective: Objective) -> int | None:
    """The place of the best of those that fit, or else of those that may; the earlier of equals."""

    def cost(place: int) -> float:
        return _seconds(estimates[place]) if objective == "throughput" else estimates[place].gpu.high

    for verdict in ("fits", "tight"):
        places = [place for place, each in enumerate(estimates) if each.verdict == verdict]
        if places:
            return min(places, key=cost)
    return None


def _reason(estimate: Estimate, best: Estimate | None, objective: Objective) -> str:
    """Why a rung was not chosen."""
    gpu, host, nvme = estimate.gpu, estimate.host, estimate.nvme
    if estimate.verdict == "fits" and best is not None:
        if objective == "memory":
            return f"needs {gib(gpu.high)} GiB of each GPU, the chosen one {gib(best.gpu.high)} GiB"
        mine, other = _seconds(estimate), _seconds(best)
        return f"slower: {mine:.3g} s a step, the chosen one {other:.3g} s"
    places = verdict_by_place(gpu, host, nvme)
    place = next((place for place, found in places.items() if found == estimate.verdict), None)
    what = {"host": "host memory", "nvme": "NVMe"}.get(place or "", "GPU memory")
    needed = {"host": host.peak, "nvme": nvme.bytes}.get(place or "", gpu.low)
    capacity = {"host": host.capacity, "nvme": nvme.capacity}.get(place or "", gpu.capacity)
    if estimate.verdict == "unknown" or capacity is None:
        return f"needs {gib(needed)} GiB of {what}, and how much there is is not known"
    if estimate.verdict == "tight":
        return f"needs {gib(gpu.low)} to {gib(gpu.high)} GiB of {what}, and there are {gib(capacity)} GiB"
    least = "at least " if what == "GPU memory" else ""
    return f"needs {least}{gib(needed)} GiB of {what}, and there are {gib(capacity)} GiB"
