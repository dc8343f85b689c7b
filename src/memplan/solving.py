"""The longest sequence and the largest micro-batch that fit, on each rung of the ladder.

As in :mod:`memplan.planner`, what a setup needs and how long its step takes is asked of functions that are passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from memplan.estimator import Least
from memplan.planner import (
    Answers,
    Bounder,
    Done,
    Estimator,
    Found,
    Planned,
    Timer,
    nothing,
    pace,
    passed_over,
    planned,
)
from memplan.results import GpuMemory
from memplan.space import Setup, Target, changed, divisors, families, levels, sequences, simplicity, with_micro_batch

__all__ = ["LONGEST", "MOST", "STEP", "Scale", "micro_batches", "seq_lens", "solve"]

STEP = 64
"""Tokens between the lengths that are tried. Tensor cores are used best with multiples of 128 bytes on an A100, which
are 64 elements of 16 bits (NVIDIA, Matrix Multiplication Background User's Guide)."""
LONGEST = 131_072
"""Tokens up to which lengths are tried for a model that has no longest."""
MOST = 4_096
"""Sequences up to which micro-batches are tried."""


class Scale(NamedTuple):
    """The values that a question may have for an answer."""

    values: Sequence[int]
    """The smallest first."""
    apply: Callable[[Setup, int], Setup]
    limit: str
    """Why there is none after the last, in words."""


def micro_batches(asked: Setup, *, of_batch: bool) -> Scale:
    """Any size up to ``MOST``, or with ``of_batch`` those that divide the sequences of a rank's step."""
    if of_batch:
        return Scale(divisors(sequences(asked)), with_micro_batch, "the global batch")
    return Scale(range(1, MOST + 1), lambda setup, size: changed(setup, micro_batch_size=size), "memplan's own limit")


def seq_lens(longest: int | None) -> Scale:
    """Multiples of ``STEP`` up to ``longest``, the model's, which is one of them whatever it is."""
    last = longest or LONGEST
    values = [*range(STEP, last, STEP), last]
    limit = "the model's max_position_embeddings" if longest else "memplan's own limit"
    return Scale(values, lambda setup, length: changed(setup, seq_len=length), limit)


def solve(
    asked: Setup,
    scale: Scale,
    estimate: Estimator,
    seconds: Timer,
    target: Target = "deepspeed",
    done: Done = nothing,
    processes: int = 1,
    bound: Bounder | None = None,
) -> tuple[Planned, int | None]:
    """Find the largest value with which a rung of the ladder fits; the plan has every rung at its own largest.

    ``asked`` has the smallest value. Of rungs that come equally far the fastest is taken. The value fits, and the next
    does not; None is that nothing fits. Raises what ``estimate`` raises for ``asked`` itself.
    """
    answers = Answers(estimate, seconds, bound)
    answers.exact[asked] = estimate(asked, True)
    every = [family for family in families(asked, target) if family.told == "always"]
    if processes > 1:
        answers.share(len(every), lambda own, place: _farthest(every[place].setup, scale, own), processes, done)
    tried: list[Found] = []
    values: dict[Setup, int] = {}
    for number, family in enumerate(every):
        place, sized = _farthest(family.setup, scale, answers)
        found = None if sized is None else answers.replayed(sized)
        if sized is not None and found is not None and all(sized != each.setup for each in tried):
            tried.append(Found(family.name, sized, found))
            if place >= 0:
                values[sized] = scale.values[place]
        if processes == 1:
            done(number + 1, len(every))
    most = max(values.values(), default=None)
    farthest = [each for each in tried if values.get(each.setup) == most is not None]
    best = min(farthest, key=lambda each: (pace(answers.time(each.setup)), simplicity(each.setup)), default=None)

    def reason(each: Found) -> str:
        value = values.get(each.setup)
        return passed_over(each, best) if value in (None, most) else f"ends at {value:,}"

    counted = sum(len(levels(each.setup)) for each in every) * len(scale.values)
    return planned(tried, best, reason, (), answers.searched(counted)), most


def _farthest(setup: Setup, scale: Scale, answers: Answers) -> tuple[int, Setup | None]:
    """The place of the largest value that fits, or -1, and the setup with it, or what comes nearest to fitting."""
    place = _largest(setup, scale, answers)
    least = scale.apply(setup, scale.values[max(place, 0)])
    sized = answers.nearest(least) if place < 0 else answers.sized(least)
    if sized is not None:
        answers.replayed(sized)
    return place, sized


def _largest(setup: Setup, scale: Scale, answers: Answers) -> int:
    """The place of the largest value that fits with any sizes of buffers; -1 if not even the first does."""

    def choices(place: int) -> tuple[Setup, ...]:
        return levels(scale.apply(setup, scale.values[place]))

    def fits(place: int) -> bool:
        return answers.sized(scale.apply(setup, scale.values[place])) is not None

    def needs(place: int) -> GpuMemory | None:
        """Of the GPU with the smallest buffers, by a replay."""
        found = answers.replayed(choices(place)[-1])
        return None if found is None else found.gpu

    if not fits(0):
        return -1
    failing = 1 + _boundary(0, len(scale.values), lambda place: answers.may_fit(choices(place)[-1]))
    fitting = 0
    # The smallest buffers need least, nearly: what is left is for the last line. A guess by a straight line through
    # what two values need lands within a few percent, and every second probe halves what is between.
    guesses = True
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if guesses and (least := needs(fitting)) is not None:
            middle = _guess(fitting, failing, least, answers.least(choices(min(failing, len(scale.values) - 1))[-1]))
        guesses = not guesses
        if answers.fits(choices(middle)[-1]):
            fitting = middle
        else:
            failing = middle
    while fitting + 1 < len(scale.values) and fits(fitting + 1):
        fitting += 1
    return fitting


def _guess(fitting: int, failing: int, needs: GpuMemory, failed: Least | None) -> int:
    """Where the upper end meets the capacity, if it grows as the lower end does."""
    middle = (fitting + failing) // 2
    if failed is None or needs.capacity is None or failed.gpu <= needs.low:
        return middle
    share = (needs.capacity - needs.high) / (failed.gpu - needs.low)
    return min(max(fitting + int((failing - fitting) * share), fitting + 1), failing - 1)


def _boundary(fitting: int, failing: int, fits: Callable[[int], bool]) -> int:
    """A place that fits and whose next does not, between one that does and one that does not, or is past the end."""
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if fits(middle):
            fitting = middle
        else:
            failing = middle
    return fitting
