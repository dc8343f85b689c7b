"""A model as an engine that shards sees it: its weights and modules, layer by layer, in the model's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from memplan.architectures.nn import Layers, Module
from memplan.memory.course import Block, Course, Key, Ledger
from memplan.memory.optimizers import OUTSIDE, groups_of
from memplan.tape.tensor import Parameter


@dataclass(slots=True)
class Layout:
    """Keys stand for weights and modules of the whole model; they are the same for every tape of a setup."""

    numbers: dict[int, Key] = field(default_factory=dict)
    """The key of every made weight and module, by id(); of a layer that stands for several, that of the first."""
    parameters: dict[Key, Parameter] = field(default_factory=dict)
    """Every weight, trained or frozen, in the order of ``named_parameters()``."""
    modules: dict[Key, list[Key]] = field(default_factory=dict)
    """Every module's own weights."""
    groups: list[list[Key]] = field(default_factory=list)
    """Groups of trained weights: the Trainer's, with and without weight decay, those that are not empty; or one."""


def layout(root: Module, one_group: bool = False) -> Layout:
    """Walk the model; ``one_group`` is how the Trainer hands weights to an optimizer that DeepSpeed makes."""
    found = Layout()

    def number(thing: object, layer: int) -> Key:
        if id(thing) in found.numbers:
            return found.numbers[id(thing)][0], layer
        found.numbers[id(thing)] = key = (len(found.numbers), layer)
        return key

    def visit(module: Module, layer: int) -> None:
        own = found.modules[number(module, layer)] = []
        for _, p in module.parameters():
            known = found.numbers.get(id(p))
            key = known if known is not None and known[1] == OUTSIDE else number(p, layer)
            own.append(key)
            found.parameters.setdefault(key, p)
        if isinstance(module, Layers):
            made = dict(module.children())
            for index, stands in enumerate(module.sequence()):
                visit(made[str(stands)], index)
            return
        for _, child in module.children():
            visit(child, layer)

    visit(root, OUTSIDE)
    undecayed = groups_of(root).undecayed
    trained = [(key, p) for key, p in found.parameters.items() if p.node is not None]
    groups = [[key for key, p in trained if (id(p) in undecayed) is plain] for plain in (False, True)]
    if one_group:
        groups = [[key for key, _ in trained]]
    found.groups = [group for group in groups if group]
    return found


class Engine(Protocol):
    """Who holds what, on a ledger."""

    def initialize(self) -> None:
        """Load the model and set the engine up."""

    def begin_micro_batch(self, boundary: bool) -> None:
        """A forward begins; after the micro-batch at the ``boundary`` comes the step."""

    def module_event(self, kind: str, module: Key) -> None:
        """A watched module begins or ends its forward or backward: pre_forward .. post_backward."""

    def process_gradients(self, key: Key, gradient: Block | None) -> None:
        """A gradient is ready, and the engine's from now on. None is one that was added to the one there."""

    def finish_micro_batch(self) -> None:
        """A backward has ended."""

    def step(self) -> None:
        """The optimizer's step."""


class WholeWeights:
    """What engines have in common under which every rank has all weights whole."""

    _boundary = True
    """The micro-batch that runs is the last before a step."""

    def begin_micro_batch(self, boundary: bool) -> None:
        self._boundary = boundary

    def module_event(self, kind: str, module: Key) -> None:
        """No module needs anything."""


@dataclass(frozen=True, slots=True)
class Played:
    """What is there beside the engine, and the micro-batches of each step."""

    held: Sequence[int]
    """Bytes of each buffer of the model."""
    workspaces: Sequence[int]
    """cuBLAS's."""
    first: Course
    later: Course
    """A micro-batch that finds gradients."""
    grad_accum_steps: int


STEPS = 2
"""The first makes the optimizer's states, the second is like all that follow."""
MICRO_BATCHES = 3
"""The third is like all that follow."""


def play(engine: Engine, ledger: Ledger, run: Played) -> None:
    """Load, and run the steps."""
    ledger.begin("load")
    for nbytes in run.held:
        ledger.allocate("weights", nbytes)
    engine.initialize()
    ledger.begin("first_step")
    for nbytes in run.workspaces:
        ledger.allocate("workspace", nbytes)
    micro_batches = min(run.grad_accum_steps, MICRO_BATCHES)
    for step in range(STEPS):
        for number in range(micro_batches):
            engine.begin_micro_batch(boundary=number == micro_batches - 1)
            _micro_batch(engine, ledger, run.later if number else run.first, first=step == 0)
            engine.finish_micro_batch()
        ledger.begin("step" if step else "first_step")
        engine.step()
    ledger.begin("idle")


def _micro_batch(engine: Engine, ledger: Ledger, course: Course, *, first: bool) -> None:
    ledger.rewind()
    phase = ""
    for leg, key in course.legs:
        if leg.segment.phase != phase:
            phase = leg.segment.phase
            ledger.begin("first_step" if first else phase)
        ledger.run(course.unrolled, leg)
        if key is None or leg.event is None:
            continue
        if leg.event.kind == "gradient":
            engine.process_gradients(key, ledger.take(course.unrolled, leg))
        else:
            engine.module_event(leg.event.kind, key)
