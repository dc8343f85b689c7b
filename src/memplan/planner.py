"""The ladder of setups that need less and less, what lies beside it, and the fastest of all that fits.

What a setup needs and how long its step takes is asked of functions that are passed in: nothing here knows a model.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias

from memplan.answers import Point, Rung, Searched
from memplan.errors import SpecError, UnsupportedError
from memplan.estimator import Least
from memplan.parallel import shared_out
from memplan.results import (
    Estimate,
    Verdict,
    best_verdict,
    verdict_by_place,
)
from memplan.space import (
    FSDP_LADDER,
    LADDER,
    Change,
    Family,
    Setup,
    Target,
    changed,
    families,
    levels,
    rungs,
    simplicity,
    with_micro_batch,
)
from memplan.units import gib

__all__ = [
    "FSDP_LADDER",
    "LADDER",
    "RESOLUTION",
    "Answers",
    "Bounder",
    "Change",
    "Done",
    "Estimator",
    "Found",
    "Objective",
    "Planned",
    "Setup",
    "Target",
    "Timer",
    "changed",
    "feasible",
    "first_that_fits",
    "least_host",
    "least_of",
    "needed",
    "nothing",
    "pace",
    "passed_over",
    "plan",
    "planned",
    "rungs",
    "wants_host",
]

Objective: TypeAlias = Literal["throughput", "memory", "gpus"]
Estimator: TypeAlias = Callable[[Setup, bool], Estimate]
Timer: TypeAlias = Callable[[Setup], float]
Bounder: TypeAlias = Callable[[Setup, bool], Least]
Done: TypeAlias = Callable[[int, int], None]
"""Is told how much of how much has been looked at."""

RESOLUTION = 0.02
"""Share of a step's time below which two setups count as equally fast. Between setups of one model on the same GPUs the
model's constants are the same, so they differ by less than its interval says; but docs/throughput.md has no pair of
measured runs that tells differences of a percent apart."""


def nothing(number: int, of: int) -> None:
    """Tell nobody."""


def pace(seconds: float) -> int:
    """Return the class of times that count as equal to ``seconds``: the larger, the slower."""
    return math.floor(math.log(seconds) / math.log1p(RESOLUTION)) if math.isfinite(seconds) else 1 << 32


@dataclass
class Answers:
    """What has been asked of an estimator, once each.

    ``estimate(setup, exact)`` answers for a setup, with the time of its step; if not ``exact`` a verdict of tight may
    mean anything but does-not-fit. ``seconds(setup)`` is the time alone. ``bound(setup, played)`` is what the setup
    cannot do without, or where that is not ``played`` less than that; without it ``estimate`` is asked instead.
    ``least_seconds(setup)`` is at the most the time, and sooner told; without it ``seconds`` is asked.
    """

    estimate: Estimator
    seconds: Timer
    bound: Bounder | None = None
    least_seconds: Timer | None = None
    floors: dict[Setup, Least | None] = field(default_factory=dict)
    lows: dict[Setup, Least | None] = field(default_factory=dict)
    exact: dict[Setup, Estimate | None] = field(default_factory=dict)
    times: dict[Setup, float] = field(default_factory=dict)
    least_times: dict[Setup, float] = field(default_factory=dict)

    def least(self, setup: Setup) -> Least | None:
        """What the setup cannot do without, and the best verdict that it may have. None if it is refused."""
        found = self.exact.get(setup)
        if found is not None:
            return Least(found.gpu.low, found.host.peak, found.nvme.bytes, found.verdict)
        return self.low(setup)

    def low(self, setup: Setup) -> Least | None:
        """What the setup cannot do without, whether or not it has been replayed."""
        if setup not in self.lows:
            self.lows[setup] = self._bounded(setup, True)
        return self.lows[setup]

    def floor(self, setup: Setup) -> Least | None:
        """At the most :meth:`least`, but sooner told."""
        if setup in self.exact or setup in self.lows or self.bound is None:
            return self.least(setup)
        if setup not in self.floors:
            self.floors[setup] = self._bounded(setup, False)
        return self.floors[setup]

    def replayed(self, setup: Setup) -> Estimate | None:
        """In full; None if the libraries refuse the setup, or it is not modelled."""
        if setup not in self.exact:
            try:
                self.exact[setup] = self.estimate(setup, True)
            except (SpecError, UnsupportedError):
                self.exact[setup] = None
        return self.exact[setup]

    def time(self, setup: Setup) -> float:
        """Seconds of a step; infinite if the setup is refused."""
        found = self.exact.get(setup)
        if found is not None and found.step is not None:
            return found.step.seconds
        if setup not in self.times:
            try:
                self.times[setup] = self.seconds(setup)
            except (SpecError, UnsupportedError):
                self.times[setup] = math.inf
        return self.times[setup]

    def least_time(self, setup: Setup) -> float:
        """At the most :meth:`time`."""
        if self.least_seconds is None or setup in self.times or setup in self.exact:
            return self.time(setup)
        if setup not in self.least_times:
            try:
                self.least_times[setup] = self.least_seconds(setup)
            except (SpecError, UnsupportedError):
                self.least_times[setup] = math.inf
        return self.least_times[setup]

    def may_fit(self, setup: Setup) -> bool:
        """Whether it is worth a closer look: without it the low end is already exact."""
        return self._best_verdict(setup) != "does-not-fit"

    def fits(self, setup: Setup) -> bool:
        """Whether the setup fits for certain."""
        floor = self.floor(setup)
        if floor is None or floor.verdict == "unknown" or self._best_verdict(setup) in ("does-not-fit", "unknown"):
            return False
        found = self.replayed(setup)
        return found is not None and found.verdict == "fits"

    def _best_verdict(self, setup: Setup) -> Verdict:
        """That a setup may have; one that is refused has the worst."""
        found = self.floor(setup)
        if found is not None and found.verdict != "does-not-fit":
            found = self.least(setup)
        return "does-not-fit" if found is None else found.verdict

    def may_fit_somehow(self, setup: Setup) -> bool:
        """Whether :meth:`may_fit` with DeepSpeed's own buffers, with which its time is asked too, or others."""
        for each in chain([setup], self.smallest(setup)):
            floor = self.floor(each)
            if floor is not None and floor.verdict == "unknown":
                return False  # whatever buffers: a place is used whose size is not known
            if self.may_fit(each):
                return True
        return False

    def may_go(self, setup: Setup) -> bool:
        """The same, as far as floors tell."""
        for each in chain([setup], self.smallest(setup)):
            floor = self.floor(each)
            if floor is not None and floor.verdict == "unknown":
                return False
            if floor is not None and floor.verdict != "does-not-fit":
                return True
        return False

    def may_be_sized(self, setup: Setup) -> bool:
        """Whether :meth:`sized` may find something."""
        return any(map(self.may_fit, self.smallest(setup)))

    def smallest(self, setup: Setup) -> Iterator[Setup]:
        """The setup with the buffers that may need the least: the smallest, and then larger ones that need less of the
        host, where what is pinned is rounded up to powers of two: in smaller pieces it can be more.
        """
        *larger, smallest = levels(setup)
        yield smallest
        if setup.strategy.offload_optimizer == setup.strategy.offload_param == "none":
            return
        floor = self.floor(smallest)
        if floor is None or floor.on_gpu == "does-not-fit":
            return
        for each in reversed(larger):
            found = self.floor(each)
            if found is not None and found.host < floor.host:
                yield each

    def sized(self, setup: Setup) -> Setup | None:
        """The setup with the largest buffers with which it fits, DeepSpeed's own at the most.

        Where the low end of the smallest does not fit, neither does the upper end of others: to be put into more
        pieces takes a few MiB at the most. Its upper end says nothing of others: less is lost between blocks of some
        sizes than of smaller ones.
        """
        choices = levels(setup)
        smallest = self._known(choices[-1])
        if smallest is not None and smallest.verdict == "does-not-fit" and not self.may_be_sized(setup):
            return None
        return next(filter(self.fits, choices), None)

    def nearest(self, setup: Setup) -> Setup:
        """The setup with the largest buffers with which it comes as near to fitting as with any."""
        smallest = levels(setup)[-1]
        own, floor = self.replayed(setup), self.floor(smallest)
        if own is not None and (floor is None or best_verdict((own.verdict, floor.verdict)) == own.verdict):
            return setup
        if not self.may_fit(smallest):
            return setup
        other = self.replayed(smallest)
        is_nearer = own is None or (other is not None and best_verdict((own.verdict, other.verdict)) != own.verdict)
        return smallest if is_nearer else setup

    def _known(self, setup: Setup) -> Least | None:
        """What is known already of what the setup cannot do without."""
        if setup in self.exact or setup in self.lows:
            return self.least(setup)
        return self.floors.get(setup)

    def _bounded(self, setup: Setup, played: bool) -> Least | None:
        try:
            if self.bound is not None:
                return self.bound(setup, played)
            found = self.estimate(setup, False)
        except (SpecError, UnsupportedError):
            return None
        return Least(found.gpu.low, found.host.peak, found.nvme.bytes, found.verdict)

    def share(self, number: int, ask: Callable[[Answers, int], object], processes: int, done: Done) -> None:
        """Ask ``ask(answers, place)`` for each of ``number`` places by several processes, so that answers are here.

        ``done`` is told by this process alone, of the places that anyone has begun with.
        """
        here = os.getpid()

        def asked(place: int) -> str:
            own = Answers(
                self.estimate,
                self.seconds,
                self.bound,
                self.least_seconds,
                dict(self.floors),
                dict(self.lows),
                dict(self.exact),
                dict(self.times),
            )
            ask(own, place)
            if os.getpid() == here and place + 1 < number:
                done(place + 1, number)
            return own.to_json(than=self)

        for text in shared_out(asked, range(number), processes):
            self.add_json(text)
        done(number, number)

    def to_json(self, than: Answers) -> str:
        """Return the answers that ``than`` has not, as text for :meth:`add_json`."""
        rows: dict[Setup, dict[str, Any]] = {}
        for name in ("floors", "lows"):
            for setup, least in getattr(self, name).items():
                if setup not in getattr(than, name):
                    rows.setdefault(setup, {})[name] = least
        for setup, estimate in self.exact.items():
            if setup not in than.exact:
                rows.setdefault(setup, {})["exact"] = None if estimate is None else estimate.model_dump_json()
        for setup, seconds in self.times.items():
            if setup not in than.times:
                rows.setdefault(setup, {})["times"] = seconds
        return json.dumps([{"setup": setup.to_dict(), **row} for setup, row in rows.items()])

    def add_json(self, text: str) -> None:
        """Add what :meth:`to_json` returned."""
        for row in json.loads(text):
            setup = Setup.from_dict(row["setup"])
            for name in ("floors", "lows"):
                if name in row:
                    getattr(self, name)[setup] = None if row[name] is None else Least(*row[name])
            if "exact" in row:
                self.exact[setup] = None if row["exact"] is None else Estimate.model_validate_json(row["exact"])
            if "times" in row:
                self.times[setup] = row["times"]

    def searched(self, setups: int) -> Searched:
        """How much of ``setups`` was looked at."""
        estimated = len({*self.floors, *self.lows, *self.exact, *self.times})
        return Searched(setups=setups, estimated=estimated, replayed=len(self.exact))


class Planned(NamedTuple):
    """What :func:`plan` comes to."""

    best: int | None
    """The place of the chosen one; None if nothing fits."""
    tried: tuple[tuple[Setup, Rung], ...]
    pareto: tuple[Point, ...]
    """The fastest setups for the memory they leave, from the fastest on."""
    searched: Searched


def plan(
    asked: Setup,
    estimate: Estimator,
    seconds: Timer,
    target: Target = "deepspeed",
    objective: Objective = "throughput",
    allow: Sequence[str] = (),
    done: Done = nothing,
    processes: int = 1,
    bound: Bounder | None = None,
    least_seconds: Timer | None = None,
) -> Planned:
    """Walk the ladder from ``asked`` on, look beside it, and choose among what fits.

    Every rung that fits has the fastest micro-batch with which it does, for the same global batch, unless memory is the
    objective, and the largest sizes of DeepSpeed's buffers. What was given up on the way down is tried without, and so
    are the engines that the ladder passes by, and the sides that ``allow`` names (:func:`memplan.space.families`). Of
    setups that are as fast as the fastest, but for ``RESOLUTION``, the one is chosen that gives up least. A rung that
    the libraries refuse for this run, or that is not modelled, is left out, and so is one that comes to a setup that is
    there already. ``done`` is told how many families of how many are, which ``processes`` share out. Raises what
    ``estimate`` raises for ``asked`` itself.
    """
    answers = Answers(estimate, seconds, bound, least_seconds)
    answers.exact[asked] = estimate(asked, True)
    every = families(asked, target, allow)
    names: dict[Setup, str] = {}
    tried: list[Found] = []
    choices: list[tuple[Setup, str]] = []
    if processes > 1:
        answers.share(len(every), lambda own, place: _explore(every[place], own, objective), processes, done)
    for number, family in enumerate(every):
        own = _candidates(family, answers, objective)
        choices += [(setup, family.name) for setup in own]
        if family.told == "always" or (family.told == "faster" and _is_faster(own, tried[-1:], answers)):
            setup = _chosen(own, answers, objective)
            if setup is None and family.told == "always":
                setup = answers.nearest(family.setup)
            found = None if setup is None else answers.replayed(setup)
            # Down the ladder the fastest batch may be that of a rung before.
            if setup is not None and found is not None and setup not in names:
                names[setup] = family.name
                tried.append(Found(family.name, setup, found))
        if processes == 1:
            done(number + 1, len(every))
    best = _best(tried, choices, answers, objective)
    if best is not None and best not in tried:
        tried.append(best)
    setups = sum(family.setups for family in every)
    return planned(
        tried,
        best,
        lambda each: passed_over(each, best, objective),
        _pareto(choices, tried, best, answers),
        answers.searched(setups),
    )


def feasible(asked: Setup, answers: Answers, target: Target = "deepspeed") -> bool:
    """Whether :func:`plan` would find something that fits."""
    # What gives most up needs least, and so mostly do the smallest buffers.
    choices = [family.setup for family in reversed(families(asked, target))]
    return any(answers.may_be_sized(own) and any(map(answers.fits, reversed(levels(own)))) for own in choices)


def needed(asked: Setup, answers: Answers, target: Target = "deepspeed", *, on_ladder: bool = False) -> int | None:
    """Bytes of each GPU without which nothing fits, or nothing of the ladder; None is that nothing does with them."""
    every = _told(asked, target, on_ladder)
    floors = (answers.floor(each) for family in every for each in answers.smallest(family.setup))
    return min((found.gpu for found in floors if found is not None and found.verdict == "fits"), default=None)


def wants_host(asked: Setup, answers: Answers, host: int, target: Target = "deepspeed") -> bool:
    """Whether something needs more than ``host`` bytes of a node's memory, and does not fit for it."""
    floors = (answers.floor(setup) for setup in least_of(asked, target))
    return any(found is not None and found.host > host for found in floors)


def first_that_fits(asked: Setup, answers: Answers, target: Target = "deepspeed", processes: int = 1) -> Found | None:
    """Return the first rung of the ladder that fits, with its smallest micro-batch."""
    least = least_of(asked, target, on_ladder=True)
    if processes > 1:
        answers.share(len(least), lambda own, place: own.may_fit(least[place]), processes, nothing)
    for family in families(asked, target):
        if family.told == "always" and (setup := answers.sized(family.setup)) is not None:
            found = answers.replayed(setup)
            assert found is not None  # it fits
            return Found(family.name, setup, found)
    return None


def least_host(asked: Setup, answers: Answers, target: Target = "deepspeed") -> Found | None:
    """Return what needs the least host memory of all that fits."""
    hosts: list[tuple[int, tuple[int, ...], Family, Setup]] = []
    for family in families(asked, target):
        for setup in levels(family.setup):
            found = answers.least(setup)
            if found is not None and found.verdict != "does-not-fit":
                hosts.append((found.host, simplicity(setup), family, setup))
    for _, _, family, setup in sorted(hosts, key=lambda each: each[:2]):
        replayed = answers.replayed(setup) if answers.fits(setup) else None
        if replayed is not None:
            return Found(family.name, setup, replayed)
    return None


def least_of(asked: Setup, target: Target = "deepspeed", *, on_ladder: bool = False) -> list[Setup]:
    """Return the setups that need least of each engine, or of each rung: the smallest micro-batch and buffers."""
    return [levels(family.setup)[-1] for family in _told(asked, target, on_ladder)]


def _told(asked: Setup, target: Target, on_ladder: bool) -> list[Family]:
    return [family for family in families(asked, target) if family.told == "always" or not on_ladder]


def planned(
    tried: Sequence[Found],
    best: Found | None,
    reason: Callable[[Found], str],
    pareto: tuple[Point, ...],
    searched: Searched,
) -> Planned:
    """Put an answer together; ``reason`` says why one was not chosen."""
    rungs = (
        Rung(name=each.name, estimate=each.estimate, reason_passed_over=None if each == best else reason(each))
        for each in tried
    )
    place = None if best is None else tried.index(best)
    return Planned(place, tuple((each.setup, rung) for each, rung in zip(tried, rungs, strict=True)), pareto, searched)


class Found(NamedTuple):
    """A family's best."""

    name: str
    setup: Setup
    estimate: Estimate


def _explore(family: Family, answers: Answers, objective: Objective) -> None:
    """Ask for what :func:`plan` asks of a family, as far as it does not depend on others."""
    own = _candidates(family, answers, objective)
    for setup in own:
        answers.least_time(setup) if family.told == "chosen" else answers.time(setup)
    if family.told == "always":
        answers.replayed(_chosen(own, answers, objective) or answers.nearest(family.setup))


def _candidates(family: Family, answers: Answers, objective: Objective) -> list[Setup]:
    """The micro-batches up to the largest that may fit, the smallest first; what is allocated grows with them.

    A step can take longer with a larger one, so those below the largest count too: with less memory one of them would
    be the largest, and more memory never makes a plan slower. Of families that are not told of anyway the floors have
    to do: most of them are too slow to be looked at closer.
    """
    if objective == "memory":
        return [family.setup]
    sizes = family.micro_batches()
    looked_at = answers.may_go if family.told == "chosen" else answers.may_fit_somehow

    def may_fit(place: int) -> bool:
        return looked_at(with_micro_batch(family.setup, sizes[place]))

    if not may_fit(0):
        return []
    fitting, failing = 0, len(sizes)
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if may_fit(middle):
            fitting = middle
        else:
            failing = middle
    return [with_micro_batch(family.setup, size) for size in sizes[: fitting + 1]]


def _is_faster(choices: Sequence[Setup], others: Sequence[Found], answers: Answers) -> bool:
    """Whether one of the setups may take less time than others that fit."""
    least = min((_pace(each.estimate) for each in others if each.estimate.verdict == "fits"), default=1 << 62)
    return any(pace(answers.time(each)) < least for each in choices)


def _chosen(choices: Sequence[Setup], answers: Answers, objective: Objective) -> Setup | None:
    """The best that fits: of the least memory, or the fastest, and of equals the one that gives up least."""
    if objective == "memory":
        return _least([each for setup in choices for each in levels(setup)], answers)
    # First by bounds of their times; what comes to be the first is looked at closer, and smaller buffers take no less.
    waiting = [
        (pace(answers.least_time(each)), simplicity(each), number, 0, each) for number, each in enumerate(choices)
    ]
    heapify(waiting)
    while waiting:
        _, simple, number, looks, setup = heappop(waiting)
        if looks == 2:
            return setup
        if looks == 1:
            closer = answers.sized(setup)
        else:
            closer = setup if answers.may_fit_somehow(setup) else None
        if closer is not None:
            heappush(waiting, (pace(answers.time(closer)), simple, number, looks + 1, closer))
    return None


def _least(choices: Sequence[Setup], answers: Answers) -> Setup | None:
    """The one that needs the least of each GPU, of those that fit."""
    lows = [(found.gpu, simplicity(each), each) for each in choices if (found := answers.least(each)) is not None]
    best: tuple[int, Setup] | None = None
    for low, _, setup in sorted(lows, key=lambda each: each[:2]):
        if best is not None and low >= best[0]:
            break
        replayed = answers.replayed(setup) if answers.fits(setup) else None
        if replayed is not None and (best is None or replayed.gpu.high < best[0]):
            best = replayed.gpu.high, setup
    return None if best is None else best[1]


def _best(
    tried: Sequence[Found], choices: Sequence[tuple[Setup, str]], answers: Answers, objective: Objective
) -> Found | None:
    """The best of all that fits, or else of the rungs that may."""
    chosen = _chosen([setup for setup, _ in choices], answers, objective)
    if chosen is not None:
        found = answers.replayed(chosen)
        assert found is not None  # it fits
        told = next((each for each in tried if each.setup == chosen), None)
        alike = (name for setup, name in choices if chosen in levels(setup))
        return told or Found(next(alike), chosen, found)
    tight = [each for each in tried if each.estimate.verdict == "tight"]
    if objective == "memory":
        return min(tight, key=lambda each: (each.estimate.gpu.high, simplicity(each.setup)), default=None)
    return min(tight, key=lambda each: (_pace(each.estimate), simplicity(each.setup)), default=None)


def _pace(estimate: Estimate) -> int:
    return pace(_seconds(estimate))


def _seconds(estimate: Estimate) -> float:
    return math.inf if estimate.step is None else estimate.step.seconds


def _pareto(
    choices: Sequence[tuple[Setup, str]], tried: Sequence[Found], best: Found | None, answers: Answers
) -> tuple[Point, ...]:
    """The fastest setup that fits, and then each that is the fastest of those that leave more memory; the chosen one
    is among them, unless another is both faster and smaller.

    What was ``tried`` counts too. Each has the largest buffers with which it fits, or the smallest. What a setup leaves
    is told by what it has allocated, which needs no replay; the ones taken are replayed. In the order of time come
    first setups whose time and memory are bounds, which are looked at closer if they may be taken.
    """
    waiting: list[tuple[int, int, tuple[int, ...], int, bool, Setup, str]] = []
    smallest = [(levels(setup)[-1], name, setup) for setup, name in choices if setup.training.micro_batch_size == 1]
    own = [(setup, name, setup) for setup, name in choices]
    for number, (setup, name, sized) in enumerate(dict.fromkeys((*own, *smallest))):
        floor = answers.floor(levels(setup)[-1])
        if floor is not None and answers.may_go(setup):
            # Smaller buffers take no less time.
            pace_at_least = pace(answers.least_time(sized))
            waiting.append((pace_at_least, floor.gpu, simplicity(setup), number, False, setup, name))
    heapify(waiting)
    points = [point for each in tried if (point := _point(each.name, each.estimate)) is not None]
    chosen = best and _point(best.name, best.estimate)
    taken: list[tuple[Point, int]] = []
    while waiting:
        _, low, simple, number, is_exact, setup, name = heappop(waiting)
        if taken and low > taken[-1][1] - RESOLUTION * (taken[-1][0].high + taken[-1][0].headroom):
            continue
        if not is_exact:
            if answers.may_fit_somehow(setup):
                least = answers.low(setup if answers.may_fit(setup) else levels(setup)[-1])
                assert least is not None  # one of the two may fit
                heappush(waiting, (pace(answers.time(setup)), least.gpu, simple, number, True, setup, name))
            continue
        largest = answers.sized(setup)
        if largest is None:
            continue
        if largest != setup:
            least = answers.low(largest)
            assert least is not None  # it fits
            heappush(waiting, (pace(answers.time(largest)), least.gpu, simple, number, True, largest, name))
        elif (point := _point(name, answers.replayed(setup))) is not None:
            taken.append((point, low))
            points.append(point)
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (each.seconds, -each.headroom)):
        if not front or point.headroom >= front[-1].headroom + RESOLUTION * (point.high + point.headroom):
            front.append(point)
        elif point == chosen and point.headroom > front[-1].headroom:
            front[-1] = point
    return tuple(front)


def _point(name: str, found: Estimate | None) -> Point | None:
    if found is None or found.verdict != "fits" or found.step is None or found.gpu.capacity is None:
        return None
    return Point(
        name=name,
        setup=dict(found.setup),
        seconds=found.step.seconds,
        tokens_per_second=found.step.tokens_per_second,
        high=found.gpu.high,
        headroom=found.gpu.capacity - found.gpu.high,
    )


def passed_over(each: Found, best: Found | None, objective: Objective = "throughput") -> str:
    """Why a rung was not chosen."""
    estimate = each.estimate
    gpu, host, nvme = estimate.gpu, estimate.host, estimate.nvme
    if estimate.verdict == "fits" and best is not None:
        other = best.estimate
        if objective == "memory":
            return f"needs {gib(gpu.high)} GiB of each GPU, the chosen one {gib(other.gpu.high)} GiB"
        seconds = f"{_seconds(estimate):.3g} s a step, the chosen one {_seconds(other):.3g} s"
        if pace(_seconds(estimate)) > pace(_seconds(other)):
            return f"slower: {seconds}"
        return f"as fast, and gives up more: {seconds}"
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
