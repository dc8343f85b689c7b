"""Every layer's log, from a tape on which each kind of layer ran once: for the caching allocator, to which order and
place of every block matter.

What a layer allocates and frees follows from its code and from the state of what it is handed, hidden states in forward
and gradients in backward. So layers of one kind do the same wherever they stand, if what reaches them is always in the
same state, which is checked. Whose storages a layer frees is told by where they come from: they are its own, of forward
or backward; it was handed them; or they come from outside of all layers, and die with the last that uses them. Where
more is between layers - gradients that each adds to, as of T5's position bias - every layer has to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, groupby, pairwise
from typing import NamedTuple

from memplan.memory.timeline import Segment, Stacks, Unrolled
from memplan.tape.tape import BEFORE, Handed, LayerKey, Tape

OUTSIDE = -1
"""The layer of what is in none."""


@dataclass(frozen=True)
class EveryLayer:
    """The log of the whole model, as a tape has it on which every layer ran."""

    stretches: list[list[int]]
    """By leg of :class:`memplan.memory.course.Course`: what it allocates and frees, as in a tape's log."""
    gradients: list[int]
    """By leg: the storage of the gradient that is ready at its end, or -1."""
    made: list[int]
    """By storage: the one of the tape that it is as large as."""
    phases: list[tuple[str, int]]
    """Where forward, loss and backward begin in the log."""

    @cached_property
    def log(self) -> list[int]:
        """All stretches in one."""
        return list(chain.from_iterable(self.stretches))

    @cached_property
    def beside_engine(self) -> tuple[list[int], list[int]]:
        """The log without the frees of gradients, which an engine takes, and where in it each leg begins and ends."""
        taken = {~storage for storage in self.gradients if storage >= 0}
        stretches = [[entry for entry in stretch if entry not in taken] for stretch in self.stretches]
        return list(chain.from_iterable(stretches)), [0, *accumulate(map(len, stretches))]

    @cached_property
    def left_alive(self) -> list[int]:
        """The storages that are not freed, in the order of their allocation."""
        freed = {~entry for entry in self.log if entry < 0}
        return [storage for storage in range(len(self.made)) if storage not in freed]

    def sizes(self, tape: Tape) -> list[int]:
        """Bytes of every storage, on a batch of the tape's size."""
        return list(map(tape.sizes.__getitem__, self.made))


class _IrregularError(Exception):
    """There is more between layers than is known here."""


def executions(unrolled: Unrolled) -> Iterator[tuple[Segment, int, bool]]:
    """The segments of the whole model as they run, each with its layer, and whether it runs for the last time."""
    passed: dict[tuple[int, str], int] = {}
    final = {id(segment): place for place, (segment, _) in enumerate(unrolled.runs)}
    for place, (segment, count) in enumerate(unrolled.runs):
        for number in range(count):
            layer = OUTSIDE
            if segment.layer is not None:
                stack = segment.layer[0]
                depth = len(unrolled.stacks[stack])
                layer = passed.get((stack, segment.phase), 0) % depth
                passed[stack, segment.phase] = layer + 1
                if segment.phase == "backward":
                    layer = depth - 1 - layer
            yield segment, layer, number == count - 1 and final[id(segment)] == place


def cuts(tape: Tape) -> list[tuple[str, int]]:
    """Where forward, loss and backward begin in a tape's log."""
    found = [("forward", 0)]
    found += [(mark.name, mark.position) for mark in tape.marks if mark.name in ("loss", "backward")]
    return found


def as_it_ran(unrolled: Unrolled) -> EveryLayer:
    """The same of a tape on which every layer ran."""
    tape = unrolled.tape
    stretches: list[list[int]] = []
    gradients: list[int] = []
    for segment, _ in unrolled.runs:
        start = segment.start
        for event in tape.events[segment.events]:
            stretches.append(tape.log[start : event.position])
            gradients.append(event.storage)
            start = event.position
        stretches.append(tape.log[start : segment.end])
        gradients.append(-1)
    return EveryLayer(stretches, gradients, list(range(len(tape.sizes))), cuts(tape))


def every_layer(unrolled: Unrolled, numbers: Mapping[int, tuple[int, int]]) -> EveryLayer | None:
    """Unroll; None where every layer has to run. ``numbers`` are those of :func:`memplan.memory.course.course`."""
    try:
        return _Unroller(unrolled, numbers).run()
    except _IrregularError:
        return None


def borders(tape: Tape, stacks: Stacks) -> list[bool]:
    """For each border between two layers of the model, whether what is handed over is in the state in which the tape
    handed it to the second of them.
    """
    found: list[bool] = []
    for stack, sequence in stacks.items():
        pairs: list[tuple[Sequence[Handed], Sequence[Handed]]] = []
        for in_backward in (False, True):
            for before, after in sorted(set(pairwise(reversed(sequence) if in_backward else sequence))):
                goes = _goes(tape, (stack, before), in_backward)
                pairs.append((goes, _comes(tape, stacks, (stack, after), in_backward)))
        # On the tape the last layer is the last that was made; in the model another one may be.
        top, last = (stack, max(sequence)), (stack, sequence[-1])
        pairs.append((_goes(tape, top, False), _goes(tape, last, False)))
        pairs.append((_comes(tape, stacks, top, True), _comes(tape, stacks, last, True)))
        found += [[each.state for each in one] == [each.state for each in other] for one, other in pairs]
    return found


def _comes(tape: Tape, stacks: Stacks, layer: LayerKey, in_backward: bool) -> Sequence[Handed]:
    """What the tape has handed to a layer."""
    stack, made = layer
    others = set(stacks[stack])
    if in_backward:
        return tape.handed_back.get((stack, min((i for i in others if i > made), default=BEFORE)), ())
    before = max((i for i in others if i < made), default=None)
    return tape.handed_on.get((stack, before), ()) if before is not None else ()


def _goes(tape: Tape, layer: LayerKey, in_backward: bool) -> Sequence[Handed]:
    """What a layer of the tape has handed on."""
    return (tape.handed_back if in_backward else tape.handed_on).get(layer, ())


class _Ran(NamedTuple):
    """The first storage that a segment has made in the same layer, or in another one."""

    segment: int
    layer: int | None
    """None: in the one that runs."""


class _HandedOver(NamedTuple):
    """A storage that has been handed from layer to layer of a stack, to the one that runs or to what comes after."""

    stack: int
    in_backward: bool
    place: int


_Anchor = _Ran | _HandedOver
_OWN = 0
OF_MODULES = ("pre_forward", "post_forward", "pre_backward", "post_backward", "end_backward")
"""Kinds of events whose subject is a module. A weight may be shared, and so be of no layer."""
_Way = tuple[int, bool]
"""Through which stack, and whether backward."""


class _Unroller:
    def __init__(self, unrolled: Unrolled, numbers: Mapping[int, tuple[int, int]]) -> None:
        self.unrolled = unrolled
        self.numbers = numbers
        tape = self.tape = unrolled.tape
        self.number = {id(segment): number for number, segment in enumerate(unrolled.segments)}
        self.made: list[list[int]] = []
        """By segment, the storages that it makes."""
        self.born: dict[int, tuple[int, int]] = {}
        """Storage -> its segment, and its place among those that this makes."""
        for number, segment in enumerate(unrolled.segments):
            self.made.append([entry for entry in tape.log[segment.start : segment.end] if entry >= 0])
            self.born.update((storage, (number, place)) for place, storage in enumerate(self.made[-1]))
        self.first: dict[tuple[int, int], int] = {}
        """(segment, layer) -> the number of the first storage that it has made there."""
        self.handed: dict[_Way, list[int]] = {}
        """What is on its way through a stack, by numbers."""
        self.comes: dict[tuple[_Way, int], list[int]] = {}
        """What has been handed to a layer."""

    def run(self) -> EveryLayer:
        self._check()
        stretches: list[list[int]] = []
        gradients: list[int] = []
        made: list[int] = []
        told: dict[tuple[int, bool], tuple[list[_Anchor], list[list[tuple[int, int]]]]] = {}
        phases: list[tuple[str, int]] = []
        coming = cuts(self.tape)
        length = 0
        for segment, layer, is_last in executions(self.unrolled):
            number = self.number[id(segment)]
            while coming and coming[0][1] <= segment.start:
                phases.append((coming.pop(0)[0], length))
            self.first[number, layer] = start = len(made)
            made += self.made[number]
            if segment.layer is not None:
                self._enter(segment, layer)
            if (number, is_last) not in told:
                told[number, is_last] = self._told(segment, is_last)
            anchors, legs = told[number, is_last]
            at = [start, *(~self._at(anchor, layer) for anchor in anchors)]
            stretches += [[at[anchor] + offset for anchor, offset in leg] for leg in legs]
            length += sum(map(len, legs))
            ready = (event.storage for event in self.tape.events[segment.events])
            gradients += [-1 if storage < 0 else self._ready(segment, layer, storage) for storage in ready]
            gradients.append(-1)
            if segment.last and is_last:  # the course has a leg for what dies with it
                stretches.append([])
                gradients.append(-1)
            if segment.layer is not None:
                self._leave(segment, layer)
        phases += [(phase, length) for phase, _ in coming]
        return EveryLayer(stretches, gradients, made, phases)

    # -- what is handed over -----------------------------------------------------------------------------------------

    def _comes(self, layer: LayerKey, in_backward: bool) -> Sequence[Handed]:
        return _comes(self.tape, self.unrolled.stacks, layer, in_backward)

    def _goes(self, layer: LayerKey, in_backward: bool) -> Sequence[Handed]:
        return _goes(self.tape, layer, in_backward)

    def _check(self) -> None:
        """What reaches a layer is in the same state wherever it stands, and no event of a layer is outside of it: the
        backward of a module that does nothing has no place of its own.
        """
        for segment in self.unrolled.segments:
            made = OUTSIDE if segment.layer is None else segment.layer[1]
            for event in self.tape.events[segment.events]:
                layer = made if event.kind == "step" else self.numbers[event.subject][1]
                if layer != made and (layer != OUTSIDE or event.kind in OF_MODULES):
                    raise _IrregularError
        if not all(borders(self.tape, self.unrolled.stacks)):
            raise _IrregularError

    def _enter(self, segment: Segment, layer: int) -> None:
        """A layer is about to run; to the first of a stack comes what is made outside."""
        assert segment.layer is not None
        stack, in_backward = way = segment.layer[0], segment.phase == "backward"
        if way not in self.handed:
            made = max(self.unrolled.stacks[stack]) if in_backward else 0
            comes = self._comes((stack, made), in_backward)
            self.handed[way] = [self._number(*self._only(each.storage)) for each in comes]
        self.comes[way, layer] = self.handed[way]

    def _leave(self, segment: Segment, layer: int) -> None:
        """What the layer hands on: what it has made, or has been handed."""
        assert segment.layer is not None
        in_backward = segment.phase == "backward"
        way = segment.layer[0], in_backward
        comes = [each.storage for each in self._comes(segment.layer, in_backward)]
        found: list[int] = []
        for each in self._goes(segment.layer, in_backward):
            owner, place = self.born[each.storage]
            if owner == self.number[id(segment)]:
                found.append(self.first[owner, layer] + place)
            elif each.storage in comes:
                found.append(self.handed[way][comes.index(each.storage)])
            else:
                found.append(self._number(*self._only(each.storage)))
        self.handed[way] = found

    def _number(self, anchor: _Anchor, place: int) -> int:
        return self._at(anchor, OUTSIDE) + place

    def _at(self, anchor: _Anchor, layer: int) -> int:
        """The number of an anchor's storage, where ``layer`` runs."""
        if isinstance(anchor, _Ran):
            return self.first[anchor.segment, layer if anchor.layer is None else anchor.layer]
        way = anchor.stack, anchor.in_backward
        handed = self.handed[way] if layer == OUTSIDE else self.comes[way, layer]
        return handed[anchor.place]

    # -- segments ----------------------------------------------------------------------------------------------------

    def _told(self, segment: Segment, is_last: bool) -> tuple[list[_Anchor], list[list[tuple[int, int]]]]:
        """A segment, leg by leg, for whichever layer it runs: entry by entry an anchor, and what is added to it.

        The first anchor is the first storage that it makes; of the others it is ``~`` that counts, as of what is freed.
        """
        anchors: dict[_Anchor, int] = {}
        legs: list[list[tuple[int, int]]] = []

        def freed(anchor: _Anchor, place: int) -> tuple[int, int]:
            return anchors.setdefault(anchor, len(anchors) + 1), -place

        def is_of_all(entry: int) -> bool:
            return segment.layer is None and entry in self.unrolled.frees

        start = segment.start
        for end in (*(event.position for event in self.tape.events[segment.events]), segment.end):
            leg: list[tuple[int, int]] = []
            for of_all, entries in groupby(self.tape.log[start:end], is_of_all):
                if of_all:
                    leg += [freed(*each) for each in self._of_every_layer(list(entries))]
                    continue
                for entry in entries:
                    if entry >= 0:
                        leg.append((_OWN, self.born[entry][1]))
                    elif self.unrolled.frees.get(entry) != 0 or is_last:
                        leg.append(freed(*self._freed(segment, entry)))
            legs.append(leg)
            start = end
        return list(anchors), legs

    def _freed(self, segment: Segment, entry: int) -> tuple[_Anchor, int]:
        """What an entry frees: an anchor, and how many storages after it."""
        storage, layer = ~entry, segment.layer
        owner, place = self.born[storage]
        made_in = self.unrolled.segments[owner].layer
        in_backward = self.unrolled.segments[owner].phase == "backward"
        if owner == self.number[id(segment)] or (layer is not None and made_in == layer):
            return _Ran(owner, None), place
        if layer is None:
            if made_in is None:
                return _Ran(owner, OUTSIDE), place
            sequence = self.unrolled.stacks[made_in[0]]
            goes = self._goes((made_in[0], 0 if in_backward else max(sequence)), in_backward)
            return self._handed_over(made_in[0], goes, storage, in_backward) or self._only(storage)
        if self.unrolled.frees.get(entry) == 0:
            # In backward a kind's last layer is the first of the model, and no other kind comes after it but to use it.
            if segment.phase != "backward" and self.unrolled.stacks[layer[0]][-1] != layer[1]:
                raise _IrregularError
            return self._only(storage)
        comes = self._comes(layer, in_backward)
        handed = self._handed_over(layer[0], comes, storage, in_backward)
        if handed is None and self.unrolled.stacks[layer[0]].count(layer[1]) > 1:
            raise _IrregularError
        return handed or self._only(storage)

    def _handed_over(
        self, stack: int, handed: Sequence[Handed], storage: int, in_backward: bool
    ) -> tuple[_HandedOver, int] | None:
        place = next((place for place, each in enumerate(handed) if each.storage == storage), None)
        return None if place is None else (_HandedOver(stack, in_backward, place), 0)

    def _only(self, storage: int) -> tuple[_Ran, int]:
        """A storage of which the whole model has one."""
        owner, place = self.born[storage]
        layer = self.unrolled.segments[owner].layer
        if layer is None:
            return _Ran(owner, OUTSIDE), place
        sequence = self.unrolled.stacks[layer[0]]
        if sequence.count(layer[1]) > 1:
            raise _IrregularError
        return _Ran(owner, sequence.index(layer[1])), place

    def _of_every_layer(self, entries: list[int]) -> Iterator[tuple[_Ran, int]]:
        """What is freed together after all layers, which stands for what every layer has made: layer by layer."""
        by_layer: dict[LayerKey, list[tuple[int, int]]] = {}
        for layer, same in groupby(entries, lambda entry: self.unrolled.segments[self.born[~entry][0]].layer):
            if layer is None or layer in by_layer:
                raise _IrregularError
            by_layer[layer] = [self.born[~entry] for entry in same]
        stacks = {stack for stack, _ in by_layer}
        if len(stacks) > 1 or any(~entry in self.tape.flowing for entry in entries):
            raise _IrregularError
        (stack,) = stacks
        numbers = [made for _, made in by_layer]
        layers = list(enumerate(self.unrolled.stacks[stack]))
        if numbers == sorted(numbers, reverse=True) and len(numbers) > 1:
            layers.reverse()
        elif numbers != sorted(numbers):
            raise _IrregularError
        for index, made in layers:
            for owner, place in by_layer.get((stack, made), ()):
                yield _Ran(owner, index), place

    def _ready(self, segment: Segment, layer: int, storage: int) -> int:
        """The number of a gradient that is ready."""
        anchor, place = self._freed(segment, ~storage)
        return self._at(anchor, layer) + place
