"""An engine's play, apart from the tape: played once, it tells of batches of any size, and of the caching allocator.

An engine acts at the same moments, and places the same bytes, whatever the size of the batch. So a play is kept as a
log of the engine's own blocks, and where in it each leg of the course ran. The fullest moment of a phase is where the
engine's bytes and the tape's are most together: as a leg runs, or between two legs. With the log of every layer in the
place of legs, the same play is what the caching allocator sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from operator import add, sub
from typing import Literal, NamedTuple

from memplan.memory.allocator import CachingAllocator
from memplan.memory.course import DEFAULT_STREAM, WAITING, Block, Course, Ledger, Leg, Parts
from memplan.memory.depth import EveryLayer
from memplan.memory.timeline import COMPONENTS, Unrolled

_Kind = Literal["begin", "empty_cache", "confine", "reuse"]


class _Act(NamedTuple):
    """What happens between two legs, beside the engine's blocks."""

    position: int
    """In the engine's log."""
    leg: int
    """How many of the pass have run."""
    kind: _Kind
    phase: str = ""
    limit: int = 0
    blocks: tuple[int, ...] = ()
    """The engine's that can be reused."""


@dataclass(slots=True)
class _Pass:
    """A course that runs once, and what comes after it until the next one does."""

    start: int
    """Where in the engine's log it begins."""
    unrolled: Unrolled | None = None
    at: list[int] = field(default_factory=list)
    """Where in the engine's log each leg runs."""
    acts: list[_Act] = field(default_factory=list)
    taken: list[tuple[int, int]] = field(default_factory=list)
    """Legs whose gradient becomes a block of the engine, and that block."""


class PlayLedger(Ledger):
    """A ledger that keeps a log of what is on the GPU, and measures nothing there."""

    measures = False

    def __init__(self, ranks: int = 1) -> None:
        super().__init__(ranks=ranks)
        self.log: list[int] = []
        """``i`` when block i is allocated, or taken from the tape; ``~i`` when it is freed."""
        self.requested: list[int] = []
        """Bytes of each block."""
        self.components: list[str] = []
        self.waiting: list[int] = []
        """Blocks that the size of the batch decides."""
        self.streams: dict[int, int] = {}
        """Of each block that is not the default stream's, its stream."""
        self.deferred: set[int] = set()
        """Blocks that the allocator does not have back when they are freed."""
        self.passes = [_Pass(0)]

    @property
    def heights(self) -> list[int]:
        """Bytes on the GPU after so many entries of the log."""
        rounded = [(nbytes + 511) & -512 for nbytes in self.requested]
        signed = [*rounded, *(-nbytes for nbytes in reversed(rounded))]
        return list(accumulate(map(signed.__getitem__, self.log), initial=0))

    def allocate(self, component: str, nbytes: int, place: str = "gpu", name: str = "") -> Block:
        if place != "gpu":
            return super().allocate(component, nbytes, place, name)
        block = Block(place, component, nbytes, "", self.stream)
        block.address = number = len(self.requested)
        self.requested.append(nbytes)
        self.components.append(component)
        self.log.append(number)
        if name == WAITING:
            self.waiting.append(number)
        if self.stream != DEFAULT_STREAM:
            self.streams[number] = self.stream
        return block

    def free(self, *blocks: Block | None) -> None:
        for block in blocks:
            if block is None:
                continue
            if block.place != "gpu":
                super().free(block)
            elif block.nbytes:
                self.log.append(~block.address)
                block.nbytes = 0

    def defer(self, *blocks: Block | None) -> None:
        for block in blocks:
            if block is not None and block.nbytes:
                self.deferred.add(block.address)
                self.log.append(~block.address)
                block.nbytes = 0

    def reuse(self, blocks: Iterable[Block]) -> None:
        if numbers := tuple(block.address for block in blocks):
            self._act("reuse", blocks=numbers)

    def take(self, unrolled: Unrolled, leg: Leg) -> Block | None:
        if leg.event is None or leg.event.storage < 0:
            return None
        block = self.allocate("gradients", unrolled.tape.sizes[leg.event.storage])
        running = self.passes[-1]
        running.taken.append((len(running.at) - 1, block.address))
        return block

    def run(self, unrolled: Unrolled, leg: Leg) -> None:
        running = self.passes[-1]
        running.unrolled = unrolled
        running.at.append(len(self.log))

    def rewind(self) -> None:
        self.passes.append(_Pass(len(self.log)))

    def begin(self, phase: str) -> None:
        self._keep_host()
        self.phase = phase
        self._look("host")
        self._look("nvme")
        self._act("begin", phase=phase)

    def empty_cache(self) -> None:
        self._act("empty_cache")

    def confine(self, limit: int) -> None:
        self._act("confine", limit=limit)

    def _act(self, kind: _Kind, phase: str = "", limit: int = 0, blocks: tuple[int, ...] = ()) -> None:
        running = self.passes[-1]
        running.acts.append(_Act(len(self.log), len(running.at), kind, phase, limit, blocks))

    @property
    def returned(self) -> list[int]:
        """The log as the allocator has it: what is deferred is freed where it can be reused."""
        if not self.deferred:
            return self.log
        found: list[int] = []
        start = 0
        kept = {~number for number in self.deferred}
        for act in (act for each in self.passes for act in each.acts if act.blocks):
            found += [entry for entry in self.log[start : act.position] if entry not in kept]
            found += [~number for number in act.blocks]
            start = act.position
        return found + [entry for entry in self.log[start:] if entry not in kept]


_NONE = -(1 << 62)
"""Less than any number of bytes."""


class _Part(NamedTuple):
    """What the engine has at each of some legs that follow each other in one pass."""

    when: int
    """The pass's number."""
    engine: list[int]
    """Its bytes as each leg runs; or the most of them after each."""
    log: list[int]
    """Where in the engine's log each begins, and where the last ends."""


class _Stretch(NamedTuple):
    """Legs that follow each other in a phase, in as many passes as it has."""

    course: int
    first: int
    """-1 is before all legs, where nothing is on the tape."""
    is_after: bool
    """What is meant is not as a leg runs, but from its end until the next one runs."""
    parts: list[_Part]
    engine: list[int]
    """The most of all parts."""


class _Moment(NamedTuple):
    """A phase's fullest."""

    height: int
    """Its bytes."""
    when: tuple[int, ...]
    """To be compared with others."""
    course: int
    leg: int
    is_after: bool
    position: int
    """In the engine's log."""


class Play:
    """An engine's play over one or several courses."""

    def __init__(self, ledger: PlayLedger, courses: Sequence[Course], rank: int) -> None:
        self.ledger = ledger
        self.rank = rank
        self.courses = courses
        self._spots = list(map(_spots, courses))
        self._parts: dict[int, Parts] = {}
        self._counts: dict[tuple[int, ...], list[dict[int, tuple[int, int]]]] = {}
        self._events: dict[tuple[int, ...], _Events] = {}
        self._peaked: tuple[Sequence[Unrolled], int] | None = None
        """The tapes that were asked for last, and their most bytes beside the engine's."""

    def over(self, courses: Sequence[Course]) -> Play:
        """The same over courses on which an engine finds the same (:attr:`Course.moments`)."""
        if all(own is other for own, other in zip(self.courses, courses, strict=True)):
            return self
        others = {id(own.unrolled): other.unrolled for own, other in zip(self.courses, courses, strict=True)}
        ledger = copy(self.ledger)
        ledger.passes = [
            each if each.unrolled is None else replace(each, unrolled=others[id(each.unrolled)])
            for each in self.ledger.passes
        ]
        found = Play(ledger, courses, self.rank)
        # What is the engine's alone.
        found._parts, found._counts = self._parts, self._counts
        found.__dict__.update(_bytes=self._bytes, _heights=self._heights, _stretches=self._stretches)
        return found

    # -- the engine's bytes --------------------------------------------------------------------------------------------

    @cached_property
    def _bytes(self) -> list[int]:
        """Bytes of each block, rounded up."""
        return [(nbytes + 511) & -512 for nbytes in self.ledger.requested]

    @cached_property
    def _heights(self) -> list[int]:
        """What the engine has after so many entries of its log."""
        return self.ledger.heights

    @cached_property
    def _stretches(self) -> dict[str, list[_Stretch]]:
        """By phase."""
        return _stretches(self)

    # -- on a tape -----------------------------------------------------------------------------------------------------

    def fullest(self, tapes: Sequence[Unrolled], waiting: Sequence[int]) -> dict[str, Parts]:
        """The fullest moment of each phase by component, on ``tapes`` in the place of the courses' own."""
        levels = self._levels(tapes)
        more = self._more(waiting)
        found: dict[str, Parts] = {}
        highest = self._highest(levels)
        engine = self._parts_at(moment.position for moment in highest.values())
        for phase, moment in highest.items():
            parts = dict(engine[moment.position])
            if moment.leg >= 0:
                for name, size in zip(COMPONENTS, levels[moment.course].parts(moment), strict=True):
                    parts[name] = parts.get(name, 0) + size
            if phase != "load" and more:
                parts["activations"] = parts.get("activations", 0) + more
            found[phase] = {name: size for name, size in parts.items() if size}
        return found

    def peak(self, tapes: Sequence[Unrolled], waiting: Sequence[int]) -> int:
        """Bytes at the fullest moment of all phases."""
        if self._peaked is None or any(a is not b for a, b in zip(self._peaked[0], tapes, strict=True)):
            levels = self._levels(tapes)
            _, after = self._of_all_phases
            most = max(max(levels[each.course].heights(each)) for each in after)
            self._peaked = tapes, most
        before, _ = self._of_all_phases
        return max(before, self._more(waiting) + self._peaked[1])

    @cached_property
    def _of_all_phases(self) -> tuple[int, list[_Stretch]]:
        """The most while the model is loaded, when no tape runs; and the most of all later phases, leg by leg."""
        before = max(max(each.engine) for each in self._stretches["load"])
        later: dict[tuple[int, bool], list[int]] = {}
        for phase, stretches in self._stretches.items():
            for each in stretches if phase != "load" else ():
                legs = 1 + len(self._spots[each.course].order)
                most = later.setdefault((each.course, each.is_after), [_NONE] * legs)
                first = each.first + 1
                own = slice(first, first + len(each.engine))
                most[own] = map(max, most[own], each.engine)
        return before, [_Stretch(course, -1, after, [], most) for (course, after), most in later.items()]

    @cached_property
    def host_peak(self) -> int:
        """Bytes of a node's host at its fullest moment."""
        phases = {act.phase for each in self.ledger.passes for act in each.acts if act.kind == "begin"}
        return max(sum(self.ledger.fullest(phase, "host").values()) for phase in phases)

    def _levels(self, tapes: Sequence[Unrolled]) -> list[_Levels]:
        return [spots.levels(tape) for spots, tape in zip(self._spots, tapes, strict=True)]

    def _more(self, waiting: Sequence[int]) -> int:
        """Bytes that the inputs of a step's other micro-batches take more than as it was played."""
        played = sum(self._bytes[number] for number in self.ledger.waiting)
        return sum((nbytes + 511) & -512 for nbytes in waiting) - played

    def _highest(self, levels: Sequence[_Levels]) -> dict[str, _Moment]:
        """The first of the fullest moments of each phase."""
        found: dict[str, _Moment] = {}
        for phase, stretches in self._stretches.items():
            heights = [levels[each.course].heights(each) for each in stretches]
            most = max(map(max, heights))
            found[phase] = min(
                (
                    self._first(each, own, most)
                    for each, own in zip(stretches, heights, strict=True)
                    if max(own) == most
                ),
                key=lambda moment: moment.when,
            )
        return found

    def _first(self, stretch: _Stretch, heights: list[int], most: int) -> _Moment:
        """The first moment of a stretch at which so many bytes are alive."""
        equal = [place for place, height in enumerate(heights) if height == most]
        part, place = next(
            (part, place) for part in stretch.parts for place in equal if part.engine[place] == stretch.engine[place]
        )
        start, end = part.log[place], part.log[place + 1] if stretch.is_after else part.log[place]
        position = self._heights.index(stretch.engine[place], start, end + 1)
        leg = stretch.first + place
        return _Moment(
            most, (part.when, leg, stretch.is_after, position), stretch.course, leg, stretch.is_after, position
        )

    def _parts_at(self, positions: Iterable[int]) -> dict[int, Parts]:
        """The engine's blocks by component, at places of its log."""
        parts: Parts = {}
        start = 0
        sizes, components = self._bytes, self.ledger.components
        for position in sorted(set(positions).difference(self._parts)):
            for entry in self.ledger.log[start:position]:
                if entry >= 0:
                    parts[components[entry]] = parts.get(components[entry], 0) + sizes[entry]
                else:
                    parts[components[~entry]] -= sizes[~entry]
            self._parts[position] = dict(parts)
            start = position
        return self._parts

    def size_counts(self, waiting: Sequence[int]) -> list[dict[int, tuple[int, int]]]:
        """Of the engine's blocks, for every size: the most alive at one time, and how many are allocated. First of the
        default stream's, then of each other's.
        """
        sizes = list(self._bytes)
        for number, nbytes in zip(self.ledger.waiting, waiting, strict=True):
            sizes[number] = (nbytes + 511) & -512
        key = tuple(sizes[number] for number in self.ledger.waiting)
        if key not in self._counts:
            log, streams = self.ledger.returned, self.ledger.streams
            self._counts[key] = [
                _size_counts(
                    log
                    if not streams
                    else [entry for entry in log if streams.get(max(entry, ~entry), DEFAULT_STREAM) == stream],
                    sizes,
                )
                for stream in (DEFAULT_STREAM, *sorted(set(streams.values())))
            ]
        return self._counts[key]

    # -- the caching allocator -----------------------------------------------------------------------------------------

    def replay(
        self,
        allocator: CachingAllocator,
        every: Sequence[EveryLayer],
        tapes: Sequence[Unrolled],
        waiting: Sequence[int],
        limit: int | None,
    ) -> tuple[dict[str, int], int]:
        """The most allocated in each phase, and the most reserved, with every layer's blocks among the engine's.

        ``limit`` is what CUDA has to give in evaluation, if that is known.
        """
        events = self._events_of(every)
        sizes = [*self.ledger.requested, 0]
        for number, nbytes in zip(self.ledger.waiting, waiting, strict=True):
            sizes[number] = nbytes
        own = [each.sizes(tape.tape) for each, tape in zip(every, tapes, strict=True)]
        for course in events.courses:
            sizes += own[course]
        addresses = [0] * len(sizes)
        peaks: dict[str, int] = {}
        phase, reserved = "load", 0
        for part, act in events.parts:
            allocator.run(
                part, sizes, addresses, streams=self.ledger.streams, deferred=events.deferred, regardless=True
            )
            if act is None or act.kind == "begin":
                peaks[phase] = max(peaks.get(phase, 0), allocator.peak_allocated)
                reserved = max(reserved, allocator.peak_reserved)
                allocator.reset_peak()
                phase = phase if act is None else act.phase
            elif act.kind == "reuse":
                allocator.reuse(act.blocks)
            elif act.kind == "empty_cache":
                allocator.empty_cache()
            elif limit is not None:
                allocator.confine(limit)
        return peaks, reserved

    def _events_of(self, every: Sequence[EveryLayer]) -> _Events:
        """The events of engine and tape in the order of time."""
        key = tuple(map(id, every))
        if key not in self._events:
            self._events[key] = _Events.of(self, every)
        return self._events[key]


def _size_counts(log: Iterable[int], sizes: Sequence[int]) -> dict[int, tuple[int, int]]:
    """For every size: the most alive at one time, and how many are allocated."""
    alive: dict[int, int] = {}
    most: dict[int, int] = {}
    made: dict[int, int] = {}
    for entry in log:
        if entry >= 0:
            size = sizes[entry]
            alive[size] = now = alive.get(size, 0) + 1
            made[size] = made.get(size, 0) + 1
            if now > most.get(size, 0):
                most[size] = now
        else:
            alive[sizes[~entry]] -= 1
    return {size: (most[size], made[size]) for size in most}


# -- the tape's bytes --------------------------------------------------------------------------------------------------


class _Spots:
    """The legs of a course, run by run of its segments."""

    def __init__(self, course: Course) -> None:
        self._last: tuple[Unrolled, _Levels] | None = None
        self.legs: list[Leg] = []
        """Each that is made, and each that only dies."""
        self.dying: set[int] = set()
        """Of them, those of what dies with a segment's last repetition."""
        self.runs: list[tuple[list[int], int]] = []
        """Places in ``legs`` of what runs together, and how often."""
        self.firsts: list[int] = []
        """For each run its first leg of the course."""
        self.order: list[int] = []
        """For each leg of the course its place in ``legs``."""
        tape, runs = course.unrolled.tape, course.unrolled.runs
        final = {id(segment): place for place, (segment, _) in enumerate(runs)}
        known: dict[int, list[int]] = {}
        for place, (segment, count) in enumerate(runs):
            length = len(tape.events[segment.events]) + 1
            first = len(self.order)
            if id(segment) not in known:
                known[id(segment)] = list(range(len(self.legs), len(self.legs) + length))
                self.legs += [each for each, _ in course.legs[first : first + length]]
            self._add(known[id(segment)], count)
            if segment.last and final[id(segment)] == place:
                self.dying.add(len(self.legs))
                self.legs.append(course.legs[len(self.order)][0])
                self._add([len(self.legs) - 1], 1)
        assert len(self.order) == len(course.legs)

    def levels(self, unrolled: Unrolled) -> _Levels:
        """The bytes of a tape at the legs; those of the last one are kept, for plays of other ranks and engines."""
        if self._last is None or self._last[0] is not unrolled:
            self._last = unrolled, _Levels(self, unrolled)
        return self._last[1]

    def _add(self, legs: list[int], count: int) -> None:
        self.runs.append((legs, count))
        self.firsts.append(len(self.order))
        self.order += legs * count


@lru_cache(maxsize=64)
def _spots(course: Course) -> _Spots:
    """Plays have courses in common."""
    return _Spots(course)


def most_on_tape(course: Course, unrolled: Unrolled) -> int:
    """Bytes of a tape, in the place of the course's own, at its fullest moment beside an engine."""
    return _spots(course).levels(unrolled).most


class _Levels:
    """The bytes of a tape at the spots of a course."""

    def __init__(self, spots: _Spots, unrolled: Unrolled) -> None:
        self._spots = spots
        self._unrolled = unrolled
        self._nets: dict[int, list[int]] = {}
        """By a leg; by ``~`` of the first leg of a run, those of all its legs together."""
        tape = unrolled.tape
        sizes = tape.sizes
        changes = list(unrolled.changes)
        for storage in unrolled.taken:  # the engine frees them
            changes[~storage] = 0
        alive = list(accumulate(map(changes.__getitem__, tape.log), initial=0))
        totals: list[int] = []
        peaks: list[int] = []
        for number, leg in enumerate(spots.legs):
            if number in spots.dying:
                totals.append(-sum(sizes[storage] for storage in leg.segment.last))
                peaks.append(0)
                continue
            before = alive[leg.start]
            taken = leg.event.storage if leg.event is not None else -1
            totals.append(alive[leg.end] - before - (sizes[taken] if taken >= 0 else 0))
            peaks.append(max(alive[leg.start : leg.end + 1]) - before)
        after = list(accumulate(map(totals.__getitem__, spots.order), initial=0))
        running = [0, *map(add, after, map(peaks.__getitem__, spots.order))]
        self._bytes: tuple[list[int], list[int]] = running, after
        """As each leg of the course runs, and after it; first of all what is there before."""

    @property
    def most(self) -> int:
        """Bytes of the tape alone at its fullest moment."""
        return max(self._bytes[0])

    def heights(self, stretch: _Stretch) -> list[int]:
        """The bytes of tape and engine at each leg."""
        first = stretch.first + 1
        own = self._bytes[stretch.is_after][first : first + len(stretch.engine)]
        return list(map(add, own, stretch.engine))

    def parts(self, moment: _Moment) -> list[int]:
        """What is alive at a moment, by the tape's component."""
        parts = [0] * len(COMPONENTS)
        last = 0
        for (legs, count), first in zip(self._spots.runs, self._spots.firsts):
            if first > moment.leg:
                break
            whole, left = divmod(min(moment.leg + 1 - first, count * len(legs)), len(legs))
            if whole:
                parts = [part + whole * size for part, size in zip(parts, self._net_of_all(legs))]
            for number in legs[:left]:
                parts = list(map(add, parts, self._net(number)))
            last = legs[left - 1]
        if not moment.is_after:  # what comes after the last leg's peak is not there yet
            parts = list(map(sub, parts, self._net(last)))
            for component, size in self._until_peak(last):
                parts[component] += size
        return parts

    def _net_of_all(self, legs: list[int]) -> list[int]:
        key = ~legs[0]
        if key not in self._nets:
            self._nets[key] = [sum(sizes) for sizes in zip(*map(self._net, legs))]
        return self._nets[key]

    def _net(self, number: int) -> list[int]:
        """By how much a leg grows, by the tape's component."""
        if number not in self._nets:
            leg, tape = self._spots.legs[number], self._unrolled.tape
            self._nets[number] = net = [0] * len(COMPONENTS)
            for component, size in () if number in self._spots.dying else self._changes(leg):
                net[component] += size
            for storage in leg.segment.last if number in self._spots.dying else ():
                net[tape.components[storage]] -= tape.sizes[storage]
            if leg.event is not None and leg.event.storage >= 0:
                net[tape.components[leg.event.storage]] -= tape.sizes[leg.event.storage]
        return self._nets[number]

    def _changes(self, leg: Leg) -> Iterator[tuple[int, int]]:
        """Every allocation and free of a leg: its component, and the bytes. What an engine takes, it frees itself."""
        tape, taken = self._unrolled.tape, self._unrolled.taken
        for entry in tape.log[leg.start : leg.end]:
            if entry >= 0:
                yield tape.components[entry], tape.sizes[entry]
            elif ~entry not in taken:
                yield tape.components[~entry], self._unrolled.changes[entry]

    def _until_peak(self, number: int) -> Iterator[tuple[int, int]]:
        changes = list(self._changes(self._spots.legs[number]))
        heights = list(accumulate((size for _, size in changes), initial=0))
        yield from changes[: heights.index(max(heights))]


def _stretches(play: Play) -> dict[str, list[_Stretch]]:
    """The play, phase by phase."""
    log, heights = play.ledger.log, play._heights
    found: dict[tuple[str, int, int, bool, int], list[_Part]] = {}
    """(phase, course, first leg, is_after, number of legs) -> passes"""
    phase, course = "load", 0

    def keep(phase: str, number: int, first: int, is_after: bool, at: list[int]) -> None:
        """Of legs that run at these places of the log; or that have ended there, each until the next place."""
        if is_after:
            engine = [heights[a] if a == b else max(heights[a : b + 1]) for a, b in pairwise(at)]
        else:
            engine = [heights[a] for a in at]
        if engine:
            key = phase, course, first, is_after, len(engine)
            found.setdefault(key, []).append(_Part(number, engine, at))

    for number, each in enumerate(play.ledger.passes):
        end = play.ledger.passes[number + 1].start if number + 1 < len(play.ledger.passes) else len(log)
        course = next((i for i, c in enumerate(play.courses) if c.unrolled is each.unrolled), 0)
        first, start = 0, each.start
        for act in (*(act for act in each.acts if act.kind == "begin"), None):
            # The legs that run before it; then what comes between the last of them and it.
            last = len(each.at) if act is None else act.leg
            position = end if act is None else act.position
            if last > first:
                keep(phase, number, first - 1, True, [start, each.at[first]])
                keep(phase, number, first, False, each.at[first:last])
                keep(phase, number, first, True, each.at[first:last])
                start = each.at[last - 1]
            keep(phase, number, last - 1, True, [start, position])
            first, start = last, position
            if act is not None:
                phase = act.phase
    result: dict[str, list[_Stretch]] = {}
    for (phase, course, first, is_after, _), parts in found.items():
        engine = parts[0].engine if len(parts) == 1 else list(map(max, *(part.engine for part in parts)))
        result.setdefault(phase, []).append(_Stretch(course, first, is_after, parts, engine))
    return result


# -- the events of a replay --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Events:
    """What the caching allocator sees, and the acts between; blocks first, then a block of no bytes, then each pass's
    storages.
    """

    parts: list[tuple[list[int], _Act | None]]
    courses: list[int]
    """Of each pass that is in it."""
    deferred: frozenset[int]
    """Frees of what is not given back by them."""

    @classmethod
    def of(cls, play: Play, every: Sequence[EveryLayer]) -> _Events:
        ledger = play.ledger
        nothing = len(ledger.requested)
        number = nothing + 1
        courses: list[int] = []
        storages: list[int] = []
        """For each pass the number of its first storage."""
        as_event = {}
        """A block that was taken from the tape is the tape's storage."""
        for each in ledger.passes:
            storages.append(number)
            if each.unrolled is not None:
                courses.append(next(i for i, c in enumerate(play.courses) if c.unrolled is each.unrolled))
                for leg, block in each.taken:
                    as_event[block], as_event[~block] = nothing, ~(number + every[courses[-1]].gradients[leg])
                number += len(every[courses[-1]].made)
        log = [as_event.get(entry, entry) for entry in ledger.log]
        parts: list[tuple[list[int], _Act | None]] = []
        events: list[int] = []
        left: list[int] = []
        of_pass = iter(courses)
        for place, each in enumerate(ledger.passes):
            end = ledger.passes[place + 1].start if place + 1 < len(ledger.passes) else len(log)
            events += left
            left = []
            own_log: list[int] = []
            cuts = [0]
            if each.unrolled is not None:
                own, base = every[next(of_pass)], storages[place]
                own_log, cuts = own.beside_engine
                own_log = [entry + base if entry >= 0 else entry - base for entry in own_log]
                taken = {storage for storage in own.gradients if storage >= 0}
                left = [~(base + storage) for storage in own.left_alive if storage not in taken]
            acts = iter(each.acts)
            act = next(acts, None)
            start = each.start
            for leg in range(len(cuts)):
                while act is not None and act.leg == leg:
                    events += log[start : act.position]
                    start = act.position
                    if act.blocks:
                        freed = (~as_event.get(~number, ~number) for number in act.blocks)
                        act = act._replace(blocks=tuple(freed))
                    parts.append((events, act))
                    events = []
                    act = next(acts, None)
                if leg < len(each.at):
                    events += log[start : each.at[leg]]
                    start = each.at[leg]
                    events += own_log[cuts[leg] : cuts[leg + 1]]
            events += log[start:end]
        parts.append((events, None))
        return cls(parts, courses, frozenset(as_event.get(~number, ~number) for number in ledger.deferred))
