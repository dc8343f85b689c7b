"""What a trace saw of one micro-batch: allocations, cut where a layer begins or ends, and repeated to a full depth.

The forward is cut by hooks on the layers. Autograd numbers its nodes as the forward makes them and runs them from the
newest to the oldest, so the backward is cut where it comes to a node older than a layer.

A short model stands for a deep one if its layers repeat: every layer of the deep one has a template in the short one
with equal neighbours. An allocation is then named by its place in its layer's segment, and a free by the place of what
it frees, counted in layers from where it happens. :func:`expand` writes the deep model's log from these names; what it
cannot name (a free of another layer's storage that no place describes, a storage freed twice) it refuses.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from memplan.errors import UnsupportedError
from memplan.introspect.trace import Listener
from memplan.tape.dispatch import DeviceRules
from memplan.tape.tape import ACTIVATION, GRADIENT, INPUT, LOGITS, TEMPORARY, Event, EventKind, LayerKey, Tape
from memplan.tape.tensor import DTYPES, DType

__all__ = ["NotRepeating", "Recorder", "Recording", "Segment", "Templates", "expand", "same_log", "to_tape"]

Templates = Mapping[int, Sequence[int]]
"""Stack -> for every layer of the deep model, the layer of the short one that stands for it."""

_LEAF = 2**63
"""Sinks of leaf gradients have the largest sequence number and run at once, whatever layer they belong to."""


MOST_OPERATIONS = 200_000
"""In one micro-batch, about half a minute: 256 layers of a decoder with checkpointing run fewer."""


class NotRepeating(Exception):
    """The layers of a model do not repeat as a short trace needs; only a trace of all of them tells."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A weight or a module that an engine hooks into."""

    layer: LayerKey | None
    """The layer that it is in."""
    name: str
    """Its path in the model, with ``{}`` for the layer's number."""

    @property
    def path(self) -> str:
        return self.name if self.layer is None else self.name.replace("{}", str(self.layer[1]))


_NOTHING = Subject(None, "")


@dataclass(frozen=True, slots=True)
class Act:
    """A moment at which an engine acts, as :class:`memplan.tape.tape.Event`."""

    position: int
    """In the events of its segment."""
    kind: EventKind
    subject: Subject
    storage: int = -1


@dataclass(slots=True)
class Segment:
    """What was allocated (``i``) and freed (``~i``) within a layer's forward or backward, or outside of layers."""

    phase: str
    """forward, loss or backward; an evaluation is all forward."""
    layer: LayerKey | None
    events: list[int] = field(default_factory=list)
    flops: int = 0
    acts: list[Act] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Birth:
    """A storage as it came to be."""

    nbytes: int
    """Not rounded."""
    name: str
    """The operation that made it."""
    shape: tuple[int, ...]
    dtype: str
    """Both of the tensor that it was made for."""


@dataclass(slots=True)
class Recording:
    """One micro-batch: its segments in the order of time, and its storages in the order of birth."""

    segments: list[Segment]
    births: list[Birth]
    components: list[int]
    """Of each storage, as on a tape."""
    input_count: int
    """The first storages are the batch."""


# -- recording -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Storage:
    serial: int
    birth: Birth
    phase: str
    in_head: bool
    recomputed: bool
    """Born while a checkpointed block runs again."""
    freed_in: str = ""
    freed_recomputing: bool = False


class Recorder(Listener):
    """Listens to a tracker for one micro-batch at a time.

    ``adds_in_place`` undoes what a dispatch mode changes: autograd's engine adds a gradient into the one that is
    there, if nobody else holds it, but not where tensors are subclasses.
    """

    def __init__(self, adds_in_place: bool) -> None:
        self._adds_in_place = adds_in_place
        self.tracker: Any = None
        self._clear()

    def _clear(self) -> None:
        self._on = False
        self._segments = [Segment("forward", None)]
        self._storages: list[_Storage] = []
        self._index: dict[int, int] = {}
        self._bounds: list[tuple[int, LayerKey | None]] = [(-1, None)]
        self._at = 0
        self._head: int | None = None
        self._leaving = False
        self._replaced: int | None = None
        self._kernel = ""
        self._inputs = 0
        self._operations = 0

    # What the trace says.

    def begin(self, phase: str) -> None:
        """Record from here on, in ``phase``; what is allocated until :meth:`has_inputs` is the batch."""
        self.tracker.enter(phase)
        self._clear()
        self._on = True

    def has_inputs(self) -> None:
        """The batch is there."""
        self._inputs = len(self._storages)

    def enter_layer(self, layer: LayerKey) -> None:
        """The forward enters a layer."""
        if self._on and self._phase() == "forward":
            self._leaving = False
            self._cut("forward", layer)
            self._bounds.append((_sequence_number(), layer))

    def leave_stack(self) -> None:
        """The forward leaves the last layer of a stack. What dies until something is born belongs to that layer, as
        what dies before the next layer does to every other.
        """
        if self._on and self._phase() == "forward":
            self._leaving = True
            self._bounds.append((_sequence_number(), None))

    def enter_head(self) -> None:
        """The forward comes to the output embeddings."""
        if self._on and self._head is None and self._phase() == "forward":
            self._head = _sequence_number()

    def gradient(self, weight: Subject, gradient: Any) -> bool:
        """A weight has its gradient. Return whether it is new; one of a micro-batch before has no storage here."""
        storage = self._index.get(self.tracker.serial_of(gradient) or 0, -1)
        if self._on:
            self._act("gradient", weight, storage)
        return storage >= 0

    def step(self) -> None:
        """The optimizer steps here, where the graph is still alive: inside of accelerate's backward."""
        if self._on:
            self._arrive()
            self._move_to(0)
            self._act("step", _NOTHING)

    def _act(self, kind: EventKind, subject: Subject, storage: int = -1) -> None:
        self._arrive()
        segment = self._segments[-1]
        segment.acts.append(Act(len(segment.events), kind, subject, storage))

    @contextmanager
    def kernel(self, name: str) -> Iterator[Callable[[int], None]]:
        """What is allocated inside stands for a kernel; the value is told its floating-point operations."""
        self._kernel = name
        try:
            yield self._count
        finally:
            self._kernel = ""

    def _count(self, flops: int) -> None:
        self._segments[-1].flops += flops

    def finish(self, gradients: Sequence[Any], depths: Mapping[int, int]) -> Recording:
        """End the record. ``gradients`` are tensors of the gradients; ``depths`` says how many layers a stack has.

        Raises NotRepeating if a stack's layers did not run once each, in order.
        """
        self._on = False
        if self._segments[-1].phase == "backward":
            self._move_to(0)
        _check_order(self._segments, depths)
        kept = {self._index.get(self.tracker.serial_of(gradient)) for gradient in gradients}
        kept |= {act.storage for segment in self._segments for act in segment.acts}
        components = [
            INPUT if i < self._inputs else GRADIENT if i in kept else _component(storage)
            for i, storage in enumerate(self._storages)
        ]
        return Recording(self._segments, [storage.birth for storage in self._storages], components, self._inputs)

    # What the tracker says.

    def calls(self, func: Any, args: Any) -> None:
        self._operations += 1
        if self._operations > MOST_OPERATIONS:
            raise UnsupportedError(
                f"trace: one micro-batch runs more than {MOST_OPERATIONS:,} operations, as where a forward loops over "
                "tokens in Python because the kernels that it has for a GPU are no part of torch. Shorten --seq-len."
            )
        self._replaced = None
        if self._on and self._adds_in_place and _is_add(func) and _is_in_place_without_subclasses(args[0]):
            self._replaced = self._index.get(self.tracker.serial_of(args[0]) or 0)

    def called(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if self._on:
            self._segments[-1].flops += _flops(func, args, kwargs, out)

    def born(self, serial: int, nbytes: int, tensor: Any, op: str) -> None:
        if not self._on:
            return
        name = self._kernel or op.split(".")[1 if "." in op else 0]
        birth = Birth(nbytes, name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        phase = self._arrive()
        if self._leaving:
            self._leaving = False
            self._cut(phase, None)
        in_head = phase == "loss" or (self._head is not None and (phase == "forward" or self._runs_since(self._head)))
        self._index[serial] = len(self._storages)
        self._segments[-1].events.append(len(self._storages))
        self._storages.append(_Storage(serial, birth, phase, in_head, _recomputing(phase)))

    def died(self, serial: int) -> None:
        index = self._index.pop(serial, None)
        if index is None or not self._on:
            return
        phase = self._arrive()
        if index == self._replaced and self._takes_over(index):
            return
        self._segments[-1].events.append(~index)
        self._storages[index].freed_in = phase
        self._storages[index].freed_recomputing = _recomputing(phase)

    def _takes_over(self, old: int) -> bool:
        """The sum that was just born is the old gradient itself."""
        self._replaced = None
        events, new = self._segments[-1].events, len(self._storages) - 1
        if not events or events[-1] != new or self._storages[new].birth.nbytes != self._storages[old].birth.nbytes:
            return False
        events.pop()
        born = self._storages.pop()
        self._storages[old].serial = born.serial
        self._index[born.serial] = old
        return True

    # Where it is.

    def _phase(self) -> str:
        phase: str = self.tracker.phase
        return phase if phase in ("loss", "backward") else "forward"

    def _arrive(self) -> str:
        """Cut where the phase has changed or the backward has come to another layer."""
        phase = self._phase()
        if phase != self._segments[-1].phase:
            self._leaving = False
            self._cut(phase, None)
            self._at = len(self._bounds) - 1
            if phase == "loss" and self._head is None:
                self._head = _sequence_number()
        if phase == "backward":
            number = _running_node()
            if number is not None:
                self._move_to(bisect_right(self._bounds, number, key=_number) - 1)
        return phase

    def _move_to(self, place: int) -> None:
        while self._at > max(place, 0):
            self._at -= 1
            self._cut("backward", self._bounds[self._at][1])

    def _cut(self, phase: str, layer: LayerKey | None) -> None:
        self._segments.append(Segment(phase, layer))

    def _runs_since(self, number: int) -> bool:
        running = _running_node()
        return running is not None and running >= number


def _number(bound: tuple[int, LayerKey | None]) -> int:
    return bound[0]


def _component(storage: _Storage) -> int:
    if storage.in_head:
        return LOGITS
    if storage.phase != "backward":
        return TEMPORARY if storage.freed_in in ("forward", "loss") else ACTIVATION
    return ACTIVATION if storage.recomputed and not storage.freed_recomputing else TEMPORARY


def _check_order(segments: Sequence[Segment], depths: Mapping[int, int]) -> None:
    for stack, run in _runs(segments):
        depth = depths[stack]
        layers = [segments[i].layer[1] for i in run]  # type: ignore[index]
        expected = list(range(depth))
        if segments[run[0]].phase == "backward":
            expected.reverse()
        if layers != expected:
            raise NotRepeating(f"layers run in the order {layers}")
    forward = [stack for stack, run in _runs(segments) if segments[run[0]].phase == "forward"]
    if sorted(forward) != sorted(depths):
        raise NotRepeating(f"stacks {forward} of {sorted(depths)} run")


def _runs(segments: Sequence[Segment]) -> list[tuple[int, list[int]]]:
    """Segments of the same stack and phase that follow each other, as (stack, numbers of the segments)."""
    runs: list[tuple[int, list[int]]] = []
    for i, segment in enumerate(segments):
        if segment.layer is None:
            continue
        before = segments[i - 1] if i else None
        if (
            before is not None
            and before.layer
            and before.layer[0] == segment.layer[0]
            and before.phase == segment.phase
        ):
            runs[-1][1].append(i)
        else:
            runs.append((segment.layer[0], [i]))
    return runs


def _sequence_number() -> int:
    import torch

    number: int = torch._C._autograd._get_sequence_nr()
    return number


def _running_node() -> int | None:
    """The number of the autograd node that runs; None outside of nodes and in a leaf's sink."""
    import torch

    node = torch._C._current_autograd_node()
    number: int | None = None if node is None else node._sequence_nr()
    return None if number is None or number >= _LEAF else number


def _recomputing(phase: str) -> bool:
    import torch

    return phase == "backward" and torch.is_grad_enabled()


def _is_add(func: Any) -> bool:
    import torch

    return func is torch.ops.aten.add.Tensor


def _is_in_place_without_subclasses(into: Any) -> bool:
    """Whether autograd's engine, which adds, would do so in place if ``into`` were no subclass of a tensor.

    It would not where a view of it is known: that one holds its base, so that the storage has two owners
    (can_accumulate_inplace in autograd/input_buffer.cpp).
    """
    frame: Any = sys._getframe(3)
    while frame is not None and frame.f_code.co_filename.endswith(_BETWEEN):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward" and not into._is_view()


_BETWEEN = ("/torch/_compile.py", "/torch/_dynamo/eval_frame.py", "/torch/_ops.py")
"""Files of torch that stand between an operation's caller and a dispatch mode."""


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


# -- repeating -------------------------------------------------------------------------------------------------------


def expand(short: Recording, templates: Templates) -> Recording:
    """Write the recording of a deeper model whose layers are those of ``short``, repeated as ``templates`` says.

    Raises NotRepeating where a free cannot be carried over.
    """
    return _Expansion(short, templates).run()


class _Expansion:
    def __init__(self, short: Recording, templates: Templates) -> None:
        self._short = short
        self._templates = templates
        self._home: list[tuple[int, int]] = [(0, 0)] * len(short.births)
        """Storage of the short recording -> its segment, and its number among those born there."""
        self._born: list[list[int]] = []
        """Segment -> the storages born there, in order."""
        for i, segment in enumerate(short.segments):
            births = [event for event in segment.events if event >= 0]
            self._born.append(births)
            for place, storage in enumerate(births):
                self._home[storage] = (i, place)
        self._place = {(segment.phase, segment.layer): i for i, segment in enumerate(short.segments) if segment.layer}
        self._made: dict[tuple[int, int | None], int] = {}
        """(storage of the short recording, layer of the deep model) -> storage of the deep one."""
        self._of: list[int] = []
        """Storage of the deep recording -> the one of the short that it repeats."""

    def run(self) -> Recording:
        segments = [self._segment(i, layer) for i, layer in self._order()]
        self._check(segments)
        births = [self._short.births[storage] for storage in self._of]
        components = [self._short.components[storage] for storage in self._of]
        return Recording(segments, births, components, self._short.input_count)

    def _order(self) -> list[tuple[int, int | None]]:
        """(segment of the short recording, layer that it stands for), in the order of time."""
        segments = self._short.segments
        runs = {run[0]: (stack, run) for stack, run in _runs(segments)}
        order: list[tuple[int, int | None]] = []
        for i, segment in enumerate(segments):
            if segment.layer is None:
                order.append((i, None))
            elif i in runs:
                stack, run = runs[i]
                by_layer = {segments[j].layer[1]: j for j in run}  # type: ignore[index]
                layers = [(by_layer[template], layer) for layer, template in enumerate(self._templates[stack])]
                order += reversed(layers) if segment.phase == "backward" else layers
        return order

    def _segment(self, number: int, layer: int | None) -> Segment:
        segment = self._short.segments[number]
        events: list[int] = []
        acts: list[Act] = []
        waiting = deque(segment.acts)
        for position, event in enumerate(segment.events):
            while waiting and waiting[0].position == position:
                acts.append(self._act(waiting.popleft(), len(events), segment, layer))
            if event >= 0:
                self._made[event, layer] = len(self._of)
                events.append(len(self._of))
                self._of.append(event)
            else:
                events += [~storage for storage in self._freed(~event, segment, layer)]
        acts += [self._act(act, len(events), segment, layer) for act in waiting]
        key = None if segment.layer is None or layer is None else (segment.layer[0], layer)
        return Segment(segment.phase, key, events, segment.flops, acts)

    def _act(self, act: Act, position: int, segment: Segment, layer: int | None) -> Act:
        """What an engine does in ``segment``, when that stands for the deep model's ``layer``."""
        storage = act.storage
        if storage >= 0:
            owner = self._short.segments[self._home[storage][0]].layer
            if owner is not None and owner != segment.layer:
                raise NotRepeating("a weight's gradient is made in another layer")
            storage = self._find(storage, None if owner is None else layer)
        subject = act.subject
        if subject.layer is not None:
            if subject.layer != segment.layer or layer is None:
                raise NotRepeating("an engine acts on a layer outside of it")
            subject = replace(subject, layer=(subject.layer[0], layer))
        return Act(position, act.kind, subject, storage)

    def _freed(self, storage: int, segment: Segment, layer: int | None) -> list[int]:
        """What the free of ``storage``, seen in ``segment``, means in the deep model's ``layer``."""
        home, place = self._home[storage]
        owner, where = self._short.segments[home].layer, segment.layer
        if owner and where and layer is not None and self._counts_from(owner, where):
            return [self._neighbour(self._short.segments[home].phase, owner, place, layer + owner[1] - where[1])]
        if where is not None and layer != self._last(segment.phase, where):
            return []  # a layer further on still holds it
        if owner is None:
            return [self._find(storage, None)]
        # Outside of its stack, every layer's is freed at once.
        return [self._find(storage, at) for at, made in enumerate(self._templates[owner[0]]) if made == owner[1]]

    def _counts_from(self, owner: LayerKey, where: LayerKey) -> bool:
        """Whether ``where`` knows ``owner`` by its distance, and not as an end of its stack or as of another one."""
        is_end = owner[1] in (self._templates[owner[0]][0], self._templates[owner[0]][-1])
        return owner[0] == where[0] and (not is_end or abs(owner[1] - where[1]) < 2)

    def _last(self, phase: str, where: LayerKey) -> int:
        """The last layer in time, of those that a layer of the short model stands for."""
        layers = [at for at, template in enumerate(self._templates[where[0]]) if template == where[1]]
        return layers[0] if phase == "backward" else layers[-1]

    def _neighbour(self, phase: str, owner: LayerKey, place: int, layer: int) -> int:
        """The storage in ``layer`` that has the place of one in ``owner``'s segment."""
        templates = self._templates[owner[0]]
        if not 0 <= layer < len(templates):
            raise NotRepeating("a layer frees what one beyond the ends would own")
        born = self._born[self._place[phase, (owner[0], templates[layer])]]
        if place >= len(born):
            raise NotRepeating("a layer frees what its neighbour does not allocate")
        return self._find(born[place], layer)

    def _find(self, storage: int, layer: int | None) -> int:
        found = self._made.get((storage, layer))
        if found is None:
            raise NotRepeating("a storage is freed before it is there")
        return found

    def _check(self, segments: Sequence[Segment]) -> None:
        """Every storage is freed once, if the one that it repeats is freed, and after its birth."""
        mortal = {~event for segment in self._short.segments for event in segment.events if event < 0}
        freed: set[int] = set()
        for segment in segments:
            for event in segment.events:
                if event < 0:
                    if ~event in freed:
                        raise NotRepeating("a storage is freed twice")
                    freed.add(~event)
        for storage, origin in enumerate(self._of):
            if (storage in freed) != (origin in mortal):
                raise NotRepeating("a storage is never freed")


def same_log(one: Recording, other: Recording) -> bool:
    """Whether two recordings allocate and free the same in the same order, but for the order of successive frees."""
    return _normal(one) == _normal(other)


def _normal(recording: Recording) -> list[Any]:
    order: dict[int, int] = {}
    result: list[Any] = []
    frees: list[int] = []

    def flush() -> None:
        if frees:
            result.append(sorted(frees))
            frees.clear()

    for segment in recording.segments:
        acts: dict[int, list[Act]] = {}
        for act in segment.acts:
            acts.setdefault(act.position, []).append(act)
        for position, event in enumerate([*segment.events, None]):
            for act in acts.get(position, ()):
                flush()
                result.append((act.kind, act.subject.path, order.get(act.storage, -1)))
            if event is None:
                break
            if event < 0:
                frees.append(order[~event])
                continue
            flush()
            order[event] = len(order)
            result.append((segment.phase, recording.births[event], recording.components[event]))
    return [*result, sorted(frees)]


# -- as a tape -------------------------------------------------------------------------------------------------------


def known_dtype(name: str) -> DType:
    """The DType of a torch name; for one that memplan has no rules for, a DType that has only the name."""
    return DTYPES.get(name) or DType(name, 1, False)


def to_tape(recording: Recording, rules: DeviceRules, subjects: Mapping[str, int]) -> Tape:
    """Return a tape that says it ran what was recorded. ``subjects``: what an engine hooks into, its id() by path."""
    tape = Tape(rules)
    tape.sizes = [(birth.nbytes + 511) & -512 for birth in recording.births]
    tape.births = [(birth.name, birth.shape, known_dtype(birth.dtype)) for birth in recording.births]
    tape.components = list(recording.components)
    tape.input_count = recording.input_count
    phase = "forward"
    for segment in recording.segments:
        if segment.phase != phase:
            phase = segment.phase
            tape.mark(phase)
        elif phase == "forward":
            tape.mark("layer", segment.layer)
        start = len(tape.log)
        for act in segment.acts:
            subject = 0 if act.subject == _NOTHING else subjects[act.subject.path]
            tape.events.append(Event(start + act.position, act.kind, subject, act.storage))
        tape.log += segment.events
        tape.flops += segment.flops
        if phase == "backward":
            tape.mark("layer_backward_end", segment.layer)
    return tape
