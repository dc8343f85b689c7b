"""DeepSpeed without ZeRO: whole copies, and in 16 bit float32 masters of every weight.

Sources: deepspeed/runtime/fp16/unfused_optimizer.py (``FP16_UnfusedOptimizer``, which wraps whatever optimizer the
Trainer brings), runtime/engine.py (``buffered_allreduce_fallback``), 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from memplan.engines import checkpoint
from memplan.engines.layout import Layout, StateDict, WholeWeights, temporaries_of_step
from memplan.errors import UnsupportedError
from memplan.memory.course import Block, Key, Ledger
from memplan.memory.optimizers import Groups, Optimizer, make_optimizer
from memplan.tape.dispatch import DeviceRules
from memplan.tape.tape import Tape
from memplan.tape.tensor import DType, Parameter, float32

REDUCED = "gradients that are reduced together"
"""A block as an explanation names it."""
ELEMENTS_PER_BUFFER = 500_000_000
"""Gradients are reduced in copies of this many elements and the last one's (MEMORY_OPT_ALLREDUCE_SIZE)."""


@dataclass(frozen=True, slots=True)
class Zero0Setup:
    """What stage 0 places."""

    weights: Sequence[Key]
    """The trained ones, in the model's order."""
    elements: Sequence[int]
    frozen: Sequence[int]
    """Bytes of each weight that is not trained."""
    dtype: DType
    communication_dtype: DType
    """What gradients are reduced in."""
    optimizer: Optimizer
    stepped: Sequence[Parameter]
    """What the optimizer steps: the weights, or their masters in float32."""


class Zero0(WholeWeights):
    """One rank: ``FP16_UnfusedOptimizer``, or the plain optimizer where the model is in float32."""

    def __init__(self, setup: Zero0Setup, ledger: Ledger) -> None:
        self.setup = setup
        self.ledger = ledger
        self._grads: dict[Key, Block] = {}
        self._has_states = False

    @property
    def _has_masters(self) -> bool:
        return self.setup.dtype is not float32

    def initialize(self) -> None:
        """Load; in 16 bit make masters, and step once with gradients of zeros so that the states are there."""
        size = self.setup.dtype.itemsize
        for nbytes in (*self.setup.frozen, *(elements * size for elements in self.setup.elements)):
            self.ledger.allocate("weights", nbytes, name="whole")
        if not self._has_masters:
            return
        for elements in self.setup.elements:
            clone = self.ledger.allocate("temporaries", elements * size, name="masters on their way")
            self.ledger.allocate("optimizer", elements * float32.itemsize, name="masters")
            self.ledger.free(clone)
        zeros = [self.ledger.allocate("gradients", n * size, name="zeros") for n in self.setup.elements]
        zeros += [self.ledger.allocate("gradients", n * float32.itemsize, name="zeros") for n in self.setup.elements]
        self._step()
        self.ledger.free(*zeros)

    def process_gradients(self, key: Key, gradient: Block | None) -> None:
        if gradient is not None:
            self._grads[key] = gradient

    def finish_micro_batch(self) -> None:
        """buffered_allreduce_fallback: gradients are copied together until there are enough, and back."""
        if not self._boundary:
            return
        for bucket in buckets(self.setup.elements):
            flat = None
            self.ledger.move("all_reduce", sum(bucket) * self.setup.communication_dtype.itemsize)
            if len(bucket) > 1:  # one alone is a view
                flat = self.ledger.allocate("communication", sum(bucket) * self.setup.dtype.itemsize, name=REDUCED)
            if self.setup.communication_dtype is not self.setup.dtype:
                nbytes = sum(bucket) * self.setup.communication_dtype.itemsize
                self.ledger.briefly("communication", nbytes, name=REDUCED)
            self.ledger.free(flat)

    def step(self) -> None:
        upcast = []
        if self._has_masters:
            sizes = (elements * float32.itemsize for elements in self.setup.elements)
            upcast = [self.ledger.allocate("gradients", nbytes, name="in float32") for nbytes in sizes]
        self._step()
        self.ledger.free(*upcast)
        self.ledger.free(*self._grads.values())
        self._grads.clear()

    def save(self, state_dict: StateDict) -> None:
        """The model; then rank 0 writes weights, masters and states."""
        setup = self.setup
        self._save_model(state_dict, setup.dtype.itemsize)
        states = [nbytes for p in setup.stepped for nbytes in (p.nbytes, *setup.optimizer.state_bytes(p))]
        checkpoint.write(self.ledger, [*setup.frozen, *states], "main")

    def _step(self) -> None:
        optimizer = self.setup.optimizer
        if not self._has_states:
            self._has_states = True
            for p in self.setup.stepped:
                for nbytes in optimizer.state_bytes(p):
                    self.ledger.allocate("optimizer", nbytes, name="states")
        temporaries_of_step(self.ledger, optimizer)


def buckets(sizes: Iterable[int]) -> Iterator[list[int]]:
    """allreduce_no_retain: what is reduced together; a bucket ends once it has more elements than a buffer."""
    bucket: list[int] = []
    for size in sizes:
        bucket.append(size)
        if sum(bucket) > ELEMENTS_PER_BUFFER:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def zero0_setup(
    model: Layout, frozen: Sequence[int], dtype: DType, communication_dtype: DType, optim: str, rules: DeviceRules
) -> Zero0Setup:
    """Stage 0's settings. Raises UnsupportedError for an optimizer of several kinds of groups."""
    if optim == "muon":
        raise UnsupportedError("optim: 'muon' is not modelled under zero0. Use another, or ddp.")
    weights = [key for group in model.groups for key in group]
    tape = Tape(rules)
    stepped = [tape.parameter("stepped", model.parameters[key].shape, float32) for key in weights]
    if dtype is float32:
        stepped = [model.parameters[key] for key in weights]
    return Zero0Setup(
        weights=weights,
        elements=[p.numel for p in stepped],
        frozen=frozen,
        dtype=dtype,
        communication_dtype=communication_dtype,
        optimizer=make_optimizer(optim, rules, partial(Groups, stepped)),
        stepped=stepped,
    )
