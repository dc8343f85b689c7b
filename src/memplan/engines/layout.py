"""A model as an engine that shards sees it: its weights and modules, layer by layer, in the model's order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from memplan.architectures.nn import Layers, Module
from memplan.engines import checkpoint
from memplan.memory.course import WAITING, Block, Course, Key, Ledger
from memplan.memory.evaluation import Kept, pile_up, to_host
from memplan.memory.optimizers import OUTSIDE, Optimizer, groups_of
from memplan.tape.tensor import Parameter

LEAF_MODULES = frozenset(
    f"{family}{kind}"
    for family in ("Mixtral", "Qwen2Moe", "Qwen3Moe")
    for kind in ("SparseMoeBlock", "LoopedMoeBlock")  # the same, as transformers before 5.0 has it
)
"""DEFAULT_LEAF_MODULE_CLASSES of deepspeed/runtime/zero/leaf_module_config.py, 0.18.0 to 0.19.8."""


@dataclass(slots=True)
class Layout:
    """Keys stand for weights and modules of the whole model; they are the same for every tape of a setup."""

    numbers: dict[int, Key] = field(default_factory=dict)
    """The key of every made weight and module, by id(); of a layer that stands for several, that of the first."""
    parameters: dict[Key, Parameter] = field(default_factory=dict)
    """Every weight, trained or frozen, in the order of ``named_parameters()``."""
    modules: dict[Key, list[Key]] = field(default_factory=dict)
    """Every module's own weights."""
    leaves: dict[Key, list[Key]] = field(default_factory=dict)
    """Modules that DeepSpeed fetches with all that is below them, and those."""
    names: list[Key] = field(default_factory=list)
    """The weights as ``model.state_dict()`` lists them, tied ones more than once."""
    merged: list[Key] = field(default_factory=list)
    """Experts' gates and up-projections, of which each has its own weight in a checkpoint."""
    groups: list[list[Key]] = field(default_factory=list)
    """Groups of trained weights: the Trainer's, with and without weight decay, those that are not empty; or one."""

    @property
    def split(self) -> int:
        """Elements of those weights."""
        return sum(self.parameters[key].numel for key in self.merged)

    def stacked(self, own: Sequence[Key]) -> list[Key]:
        """Of a module's weights those of all experts."""
        return [key for key in own if len(self.parameters[key].shape) == checkpoint.STACKED]


def layout(root: Module, one_group: bool = False) -> Layout:
    """Walk the model; ``one_group`` is how the Trainer hands weights to an optimizer that DeepSpeed makes."""
    found = Layout()

    counts = [0, 1]

    def number(thing: object, layer: int, kind: int = 0) -> Key:
        if id(thing) in found.numbers:
            return found.numbers[id(thing)][0], layer
        # Weights have even numbers, so that no module without any, as Liger leaves out, changes them.
        found.numbers[id(thing)] = key = (counts[kind], layer)
        counts[kind] += 2
        return key

    visited: dict[int, Sequence[tuple[Module, Sequence[Parameter]]]] = {}
    """By id() of a module: it and all below it up to other layers, each with its own weights."""

    def visit(module: Module, layer: int) -> None:
        if id(module) not in visited:
            visited[id(module)] = [(each, [p for _, p in each.parameters()]) for each in _with_children(module)]
        for each, weights in visited[id(module)]:
            key = number(each, layer, 1)
            own = found.modules[key] = []
            if type(each).__name__ in LEAF_MODULES:
                found.leaves[key] = [number(below, layer, 1) for below in _with_children(each)][1:]
            for p in weights:
                known = found.numbers.get(id(p))
                weight = known if known is not None and known[1] == OUTSIDE else number(p, layer)
                own.append(weight)
                found.names.append(weight)
                found.parameters.setdefault(weight, p)
            if isinstance(each, Layers):
                made = dict(each.children())
                for index, stands in enumerate(each.sequence()):
                    visit(made[str(stands)], index)

    visit(root, OUTSIDE)
    found.merged = [stacked[0] for stacked in map(found.stacked, found.modules.values()) if len(stacked) > 1]
    undecayed = groups_of(root).undecayed
    trained = [(key, p) for key, p in found.parameters.items() if p.node is not None]
    groups = [[key for key, p in trained if (id(p) in undecayed) is plain] for plain in (False, True)]
    if one_group:
        groups = [[key for key, _ in trained]]
    found.groups = [group for group in groups if group]
    return found


def _with_children(module: Module) -> Iterator[Module]:
    """The module and all below it, but for layers, in the order of ``modules()``."""
    yield module
    if not isinstance(module, Layers):
        for _, child in module.children():
            yield from _with_children(child)


class StateDict(NamedTuple):
    """``model.state_dict()``, and what writing it in the checkpoint's format takes."""

    weights: Sequence[tuple[Key, int]]
    """Tied ones more than once, each with its bytes."""
    scales: Sequence[int]
    """Bytes of what a quantized weight has beside it, each tensor's."""
    split: int
    """Elements of the experts' weights that are halved, which copies them (revert_weight_conversion)."""


class Engine(Protocol):
    """Who holds what, on a ledger."""

    def initialize(self) -> None:
        """Load the model and set the engine up."""

    def begin_micro_batch(self, boundary: bool) -> None:
        """A forward begins; after the micro-batch at the ``boundary`` comes the step."""

    def begin_evaluation(self) -> None:
        """A batch's forward without gradients begins."""

    def module_event(self, kind: str, module: Key) -> None:
        """A watched module begins or ends its forward or backward: pre_forward .. post_backward."""

    def process_gradients(self, key: Key, gradient: Block | None) -> None:
        """A gradient is ready, and the engine's from now on. None is one that was added to the one there."""

    def finish_micro_batch(self) -> None:
        """A backward has ended."""

    def step(self) -> None:
        """The optimizer's step."""

    def end_graph(self) -> None:
        """The loss dies, and what its graph holds of the engine's."""

    def save(self, state_dict: StateDict) -> None:
        """The Trainer's ``_save_checkpoint``: the model, whose ``state_dict`` names tied weights twice; the rest."""

    keeps_loaded: bool
    """The model as it was loaded stays on the host until the engine is set up."""


class WholeWeights:
    """What engines have in common under which every rank has all weights whole."""

    keeps_loaded = False
    ledger: Ledger
    _boundary = True
    """The micro-batch that runs is the last before a step."""

    def begin_micro_batch(self, boundary: bool) -> None:
        self._boundary = boundary

    def begin_evaluation(self) -> None:
        """Weights are there."""

    def module_event(self, kind: str, module: Key) -> None:
        """No module needs anything."""

    def end_graph(self) -> None:
        """No weight is gathered into memory that a graph could hold."""

    def _save_model(self, state_dict: StateDict, itemsize: int) -> None:
        """accelerate's get_state_dict: on every rank a clone of it on the host, tied weights apart."""
        sizes = [*(nbytes for _, nbytes in state_dict.weights), *state_dict.scales]
        clones = [self.ledger.allocate("weights", nbytes, "host") for nbytes in sizes]
        self.ledger.briefly("temporaries", state_dict.split * itemsize, "main")
        self.ledger.free(*clones)


def temporaries_of_step(ledger: Ledger, optimizer: Optimizer, place: str = "gpu") -> None:
    """What a step allocates and gives back, tensor by tensor on the GPU: to the caching allocator they are not one."""
    component, name = "temporaries", "of the optimizer's step"
    if place != "gpu":
        ledger.briefly(component, optimizer.temporaries.peak, place, name)
        return
    step = optimizer.step()
    blocks: dict[int, Block] = {}
    for event in step.log:
        if event >= 0:
            blocks[event] = ledger.allocate(component, step.sizes[event], name=name)
        else:
            ledger.free(blocks.pop(~event))


class EvaluationLoop(NamedTuple):
    """Evaluation after the last step."""

    course: Course
    """A batch's forward."""
    inputs: Sequence[int]
    """Bytes of each input of the last micro-batch, which the training loop still has."""
    kept: Kept
    ranks: int
    """Processes from which predictions are gathered: with one too."""
    limit: int | None
    """Bytes that CUDA has to give, if that is known."""


class Played(NamedTuple):
    """What is there beside the engine, and the micro-batches of each step."""

    loaded: Sequence[checkpoint.Loaded]
    """The model that the engine is given."""
    converted: int
    """Bytes that the main process has of the largest weight of experts while it is put together for ``zero.Init``."""
    loaded_on: Literal["gpu", "host"]
    quantizing: int
    """Bytes on the GPU at the fullest moment of loading a model that is quantized; or none."""
    quantized_on_host: int
    """Bytes of the largest weight that is taken to the host meanwhile."""
    held: Sequence[int]
    """Bytes of each buffer of the model."""
    outlived: Sequence[tuple[int, str]]
    """Bytes and places of states that the optimizer makes for weights before the engine gives it others instead."""
    state_dict: StateDict
    workspaces: Sequence[int]
    """cuBLAS's."""
    first: Course
    later: Course
    """A micro-batch that finds gradients."""
    grad_accum_steps: int
    waiting: Sequence[int]
    """Bytes of each input of a step's other micro-batches, together: the Trainer has all of them on the GPU before the
    first runs, and until the next step's are (get_batch_samples).
    """
    evaluation: EvaluationLoop | None


STEPS = 2
"""The first makes the optimizer's states, the second is like all that follow."""
MICRO_BATCHES = 3
"""The third is like all that follow."""


def load(engine: Engine, ledger: Ledger, run: Played) -> None:
    """What is there before the first step: the model is loaded, and the engine set up."""
    ledger.begin("load")
    if run.quantizing:
        ledger.briefly("weights", run.quantizing, name="weights on their way to being quantized")
        ledger.briefly("temporaries", run.quantized_on_host, "host")
        ledger.empty_cache()
    for nbytes in run.held:
        ledger.allocate("weights", nbytes, name="buffers of the model")
    loaded = checkpoint.load(ledger, run.loaded, run.loaded_on)
    ledger.briefly("temporaries", run.converted, "main")
    for nbytes, place in run.outlived:
        ledger.allocate("optimizer", nbytes, place)
    if not engine.keeps_loaded:
        ledger.free(*loaded)  # by .to(device)
        loaded = []
    engine.initialize()
    ledger.free(*loaded)


def play(engine: Engine, ledger: Ledger, run: Played) -> None:
    """Load, run the steps, evaluate, and save."""
    load(engine, ledger, run)
    ledger.begin("first_step")
    for nbytes in run.workspaces:
        ledger.allocate("workspace", nbytes, name="cuBLAS, one per thread that runs GEMMs")
    micro_batches = min(run.grad_accum_steps, MICRO_BATCHES)
    for nbytes in run.waiting:
        ledger.allocate("activations", nbytes, name=WAITING)
    for step in range(STEPS):
        ledger.moves = []
        for number in range(micro_batches):
            ledger.moves.append(Counter())
            boundary = number == micro_batches - 1
            engine.begin_micro_batch(boundary)
            _micro_batch(engine, ledger, run.later if number else run.first, first=step == 0, boundary=boundary)
    ledger.begin("idle")
    ledger.moves_of_step, ledger.moves = ledger.moves, []
    if run.evaluation is not None:
        ledger.begin("eval")
        _evaluate(engine, ledger, run.evaluation)
    ledger.begin("save")
    engine.save(run.state_dict)


def _micro_batch(engine: Engine, ledger: Ledger, course: Course, *, first: bool, boundary: bool) -> None:
    """Forward, backward, and the step; what the graph of the loss holds dies before the step or after it."""

    def finish() -> None:
        engine.finish_micro_batch()
        if boundary:
            ledger.begin("first_step" if first else "step")
            engine.step()
        engine.end_graph()

    _run(engine, ledger, course, within="first_step" if first else None, finish=finish)


def _evaluate(engine: Engine, ledger: Ledger, loop: EvaluationLoop) -> None:
    """The engine's hooks fire as in training; predictions pile up."""
    ledger.rewind()
    inputs = [ledger.allocate("activations", nbytes) for nbytes in loop.inputs]
    if loop.limit is not None:
        ledger.confine(loop.limit)

    def forward() -> None:
        engine.begin_evaluation()
        _run(engine, ledger, loop.course, within="eval")
        ledger.rewind()

    def allocate(sizes: Sequence[int]) -> list[Block]:
        return [ledger.allocate("logits", nbytes) for nbytes in sizes]

    forward()  # of a batch before: what an engine leaves gathered, the next one finds
    predictions = pile_up(loop.kept, loop.ranks, forward, allocate, lambda blocks: ledger.free(*blocks), gathers=True)
    to_host(ledger, loop.kept, loop.ranks)
    ledger.free(*predictions, *inputs)


def _run(
    engine: Engine, ledger: Ledger, course: Course, within: str | None, finish: Callable[[], None] | None = None
) -> None:
    """A forward and its backward, if it has one, in phases of their own or ``within`` one. ``finish`` comes at the end,
    or where the step runs before the graph dies.
    """
    ledger.rewind()
    unrolled, run, module_event = course.unrolled, ledger.run, engine.module_event
    for leg, begins, kind, key in course.stretches:
        if begins is not None:
            ledger.begin(within or begins)
        run(unrolled, leg)
        if kind is None:
            continue
        if kind == "step" and finish is not None:
            finish()
            finish = None
        if key is None:
            continue
        if kind == "gradient":
            engine.process_gradients(key, ledger.take(unrolled, leg))
        else:
            module_event(kind, key)
    if finish is not None:
        finish()
