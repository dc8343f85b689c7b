"""From the tape's log to peaks: block by block, with repeated layers in closed form.

A tape runs the first layer and one more of each kind. What such a layer allocates and frees is the same wherever it
stands, so the log of the whole model is the tape's log with the layer's segment repeated: the peak of a repetition is
its start plus the segment's own peak. Running every layer gives the same numbers; the tests say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby

from memplan.tape.tape import GRADIENT, LayerKey, Tape

COMPONENTS = ("temporaries", "activations", "logits", "gradients", "workspace", "activations")
"""The result's component for each of the tape's (TEMPORARY, ACTIVATION, LOGITS, GRADIENT, WORKSPACE, INPUT)."""

PHASES = ("forward", "loss", "backward")


@dataclass(slots=True)
class Moment:
    """Bytes alive at one moment, by the tape's component."""

    total: int = 0
    parts: list[int] = field(default_factory=lambda: [0] * len(COMPONENTS))


@dataclass(slots=True)
class StepProfile:
    """What forward and backward of one micro-batch need on top of weights, optimizer states and old gradients."""

    peaks: dict[str, Moment]
    """The fullest moment of each phase."""
    saved: Moment
    """Alive between forward and backward: inputs, saved activations, the loss."""
    end: Moment
    """Alive after backward: inputs and the new gradients."""
    forward_flops: int
    backward_flops: int


@dataclass(slots=True)
class Segment:
    """A part of the tape's log between two marks: a layer, or what lies between layers."""

    phase: str
    layer: LayerKey | None
    start: int
    end: int
    flops: int
    events: slice
    """Of the tape's, those that lie in it."""
    crossing: list[int] = field(default_factory=list)
    """Entries of the log whose storage lives before it or after it."""
    net: int = 0
    peak: int = 0
    parts: list[int] = field(default_factory=lambda: [0] * len(COMPONENTS))
    last: list[int] = field(default_factory=list)
    """Storages made elsewhere that die with the segment's last repetition: a mask, the rotary tables."""


Stacks = Mapping[int, Sequence[int]]
"""Stack number -> for every layer of the model in order, the made layer that stands for it."""


@dataclass
class Unrolled:
    """The log of the whole model: the tape's segments, in the order and as often as every layer makes them."""

    tape: Tape
    segments: list[Segment]
    runs: list[tuple[Segment, int]]
    """Segments, each with how often it repeats."""
    frees: dict[int, int]
    """Entries of the log that free another number of storages of the whole model than one, each time that their segment
    runs: every layer's, or none, where ``Segment.last`` tells them."""
    stacks: Stacks
    _is_measured: bool = False
    """Whether the segments know how they grow."""

    @cached_property
    def changes(self) -> list[int]:
        """By an entry of the log, the bytes by which it changes what is alive."""
        return self._signed(self.tape.sizes)

    @cached_property
    def component_of(self) -> list[int]:
        """By an entry of the log, the tape's component of its storage."""
        return self.tape.components + self.tape.components[::-1]

    def _signed(self, values: list[int]) -> list[int]:
        """Values of storages by an entry of the log: negative, and as often as it frees, for ``~i``, which counts from
        the end, as Python's indices do.
        """
        signed = values + [-value for value in reversed(values)]
        for entry, number in self.frees.items():
            signed[entry] *= number
        return signed

    @cached_property
    def taken(self) -> frozenset[int]:
        """Storages of gradients that an engine takes, and frees."""
        return frozenset(event.storage for event in self.tape.events if event.storage >= 0)

    def profile(self) -> StepProfile:
        """Compute the peaks of the whole model. A tape without marks has one segment per phase."""
        if not self._is_measured:
            self._measure()
        peaks: dict[str, Moment] = {}
        best: dict[str, tuple[int, Segment, list[int]]] = {}
        total = 0
        parts = [0] * len(COMPONENTS)
        saved = Moment()
        forward_flops = backward_flops = 0
        final = {id(segment): i for i, (segment, _) in enumerate(self.runs) if segment.last}
        for position, (segment, count) in enumerate(self.runs):
            if segment.phase == "backward" and not saved.total:
                saved = Moment(total, list(parts))
            # Repetitions rise or fall evenly, so the highest is the first or the last.
            highest = count - 1 if segment.net > 0 else 0
            height = total + highest * segment.net + segment.peak
            found = best.get(segment.phase)
            if found is None or height > found[0]:
                before = [size + highest * net for size, net in zip(parts, segment.parts)]
                best[segment.phase] = (height, segment, before)
            total += count * segment.net
            for i, size in enumerate(segment.parts):
                parts[i] += count * size
            if segment.last and final[id(segment)] == position:
                for storage in segment.last:
                    total -= self.tape.sizes[storage]
                    parts[self.tape.components[storage]] -= self.tape.sizes[storage]
            if segment.phase == "backward":
                backward_flops += count * segment.flops
            else:
                forward_flops += count * segment.flops
        for phase, (height, segment, before) in best.items():
            peaks[phase] = Moment(height, self._at_peak(segment, before))
        if not saved.total:
            saved = Moment(total, list(parts))
        for storage in self.tape.passed_gradients:
            parts[self.tape.components[storage]] -= self.tape.sizes[storage]
            parts[GRADIENT] += self.tape.sizes[storage]
        return StepProfile(peaks, saved, Moment(total, parts), forward_flops, backward_flops)

    def size_counts(self) -> dict[int, tuple[int, int]]:
        """For every size of tensor: the most alive at one time, and how many are allocated."""
        numbers: dict[int, int] = {}
        made = [numbers.setdefault(size, len(numbers)) for size in self.tape.sizes]
        number_of = made + made[::-1]
        weights = self._signed([1] * len(made))
        live, most, allocated = ([0] * len(numbers) for _ in range(3))
        counted: dict[int, list[tuple[int, int, int, int]]] = {}
        for segment, repeats in self.runs:
            counts = counted.get(id(segment))
            if counts is None:
                counts = counted[id(segment)] = self._count(segment, number_of, weights, len(numbers))
            for number, net, peak, allocations in counts:
                before = live[number]
                highest = before + peak + ((repeats - 1) * net if net > 0 else 0)
                if highest > most[number]:
                    most[number] = highest
                allocated[number] += repeats * allocations
                live[number] = before + repeats * net
        return {size: (most[number], allocated[number]) for size, number in numbers.items()}

    def _count(
        self, segment: Segment, number_of: list[int], weights: list[int], sizes: int
    ) -> list[tuple[int, int, int, int]]:
        """Of every size in a segment: its number, growth, peak and allocations."""
        net, peak, allocations = ([0] * sizes for _ in range(3))
        for event in self.tape.log[segment.start : segment.end]:
            number = number_of[event]
            net[number] = now = net[number] + weights[event]
            if event >= 0:
                allocations[number] += 1
                if now > peak[number]:
                    peak[number] = now
        return [found for found in zip(range(sizes), net, peak, allocations) if found[1] or found[3]]

    def resized(self, tape: Tape) -> Unrolled:
        """The same of ``tape``, which is this one's, resized."""
        segments = _segments(tape)
        for segment, same in zip(segments, self.segments, strict=True):
            segment.crossing, segment.last = same.crossing, same.last
        return Unrolled(tape, segments, _runs(segments, self.stacks), self.frees, self.stacks)

    def _measure(self) -> None:
        """Fill in each segment's net growth and its peak above its start."""
        self._is_measured = True
        changes, component_of, log = self.changes, self.component_of, self.tape.log
        for segment in self.segments:
            segment.peak = max(accumulate(map(changes.__getitem__, log[segment.start : segment.end]), initial=0))
            for event in segment.crossing:
                segment.parts[component_of[event]] += changes[event]
            segment.net = sum(segment.parts)

    def _at_peak(self, segment: Segment, before: list[int]) -> list[int]:
        """The composition at the segment's peak, with ``before`` at its start."""
        changes, component_of = self.changes, self.component_of
        parts = list(before)
        total = 0
        for event in self.tape.log[segment.start : segment.end]:
            if total == segment.peak:
                break
            parts[component_of[event]] += changes[event]
            total += changes[event]
        return parts


def unroll(tape: Tape, stacks: Stacks) -> Unrolled:
    """Lay out the whole model's log, from a tape on which each kind of layer ran once."""
    segments = _segments(tape)
    frees = _frees(tape, segments, _multiplicities(stacks))
    return Unrolled(tape, segments, _runs(segments, stacks), frees, stacks)


def _multiplicities(stacks: Stacks) -> dict[LayerKey, int]:
    return {(stack, made): sequence.count(made) for stack, sequence in stacks.items() for made in set(sequence)}


def _segments(tape: Tape) -> list[Segment]:
    """Cut the log at the marks; a backward mark names the layer that it ends."""
    segments: list[Segment] = []
    phase = "forward"
    start = flops = events = 0
    layer: LayerKey | None = None
    for mark in tape.marks:
        ended = mark.layer if mark.name == "layer_backward_end" else layer
        if mark.position > start or mark.flops > flops or mark.events > events or ended is not None:
            segments.append(Segment(phase, ended, start, mark.position, mark.flops - flops, slice(events, mark.events)))
            events = mark.events
        start, flops = mark.position, mark.flops
        layer = mark.layer if mark.name == "layer" else None
        if mark.name in PHASES:
            phase = mark.name
    segments.append(Segment(phase, None, start, len(tape.log), tape.flops - flops, slice(events, len(tape.events))))
    return segments


def _frees(tape: Tape, segments: list[Segment], multiplicity: dict[LayerKey, int]) -> dict[int, int]:
    """:attr:`Unrolled.frees`. Also fills in what crosses each segment's borders, and what dies with its last
    repetition.
    """
    flowing = tape.flowing
    frees: dict[int, int] = {}
    repeated: dict[int, int] = {}
    """Storage made in a repeated layer -> how many storages of the whole model it stands for."""
    owner: dict[int, LayerKey] = {}
    for segment in segments:
        layer = segment.layer
        entries = tape.log[segment.start : segment.end]
        present = set(entries)
        segment.crossing = [entry for entry in entries if ~entry not in present]
        for entry in segment.crossing:
            if layer is None:
                if ~entry in repeated:
                    frees[entry] = repeated[~entry]  # every layer's, freed at once: autocast's cache
            elif entry < 0:
                if multiplicity[layer] > 1 and owner.get(~entry) != layer and ~entry not in flowing:
                    frees[entry] = 0
                    segment.last.append(~entry)
            elif entry not in flowing or entry in tape.held:
                repeated[entry] = multiplicity[layer]
                owner[entry] = layer
            elif (keeper := tape.kept.get(entry)) is not None and keeper[0] == layer[0]:
                # What a layer is given and keeps: as many as there are layers to keep it.
                repeated[entry] = multiplicity[keeper]
    return frees


def _runs(segments: list[Segment], stacks: Stacks) -> list[tuple[Segment, int]]:
    """The segments of the whole model, each with how often it repeats: every run of a stack's layers is replaced by
    all of them.
    """
    result: list[tuple[Segment, int]] = []
    i = 0
    while i < len(segments):
        layer = segments[i].layer
        if layer is None:
            result.append((segments[i], 1))
            i += 1
            continue
        stack = layer[0]
        made: dict[int, Segment] = {}
        while i < len(segments) and (layer := segments[i].layer) is not None and layer[0] == stack:
            made[layer[1]] = segments[i]
            i += 1
        backward = segments[i - 1].phase == "backward"
        order = reversed(stacks[stack]) if backward else stacks[stack]
        result += [(made[index], len(list(same))) for index, same in groupby(order)]
    return result
