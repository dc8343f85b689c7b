"""Optimizers: what each keeps per parameter, and what one step allocates and gives back.

A step runs on a tape. The methods below are the loops of the libraries' sources, and ``f`` holds the local variables
that keep tensors alive there: a name that is bound again frees its old tensor only once the new one is there, and the
last parameter's tensors live into the next one's turn. Scalars are left out, except where they stay.

Sources: torch/optim/{adam,sgd,adagrad,rmsprop,_muon}.py and torch/nn/utils/clip_grad.py, torch 2.13;
Trainer.create_optimizer in transformers/trainer.py, trainer_optimizer.py and optimization.py (Adafactor), 5.23;
bitsandbytes/optim/optimizer.py, 0.50.2.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from math import prod
from types import SimpleNamespace
from typing import Literal

from memplan.architectures.nn import Embedding, LayerNorm, Layers, Linear, Module
from memplan.errors import SpecError, did_you_mean
from memplan.tape.dispatch import DeviceRules
from memplan.tape.tape import Tape
from memplan.tape.tensor import DType, Parameter, Shape, Tensor, bfloat16, float32, uint8

Counted = Sequence[tuple[Parameter, int]]
"""Trainable parameters, each with how many of the model it stands for."""


def rounded(nbytes: int) -> int:
    """The block that the caching allocator gives for a request: a multiple of 512 (kMinBlockSize)."""
    return (nbytes + 511) & -512


# -- the parameter groups --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Groups:
    """Trainable parameters as ``Trainer.create_optimizer`` groups them."""

    parameters: list[Parameter] = field(default_factory=list)
    """In the model's order; those of a layer that stands for several as often as the model has it."""
    layers: list[int] = field(default_factory=list)
    """For each of them its layer, or OUTSIDE."""
    undecayed: set[int] = field(default_factory=set)
    """Ids of those without weight decay: biases and the weights of norms."""
    embeddings: set[int] = field(default_factory=set)
    """Ids of the weights of embeddings, tied ones too."""
    outputs: set[int] = field(default_factory=set)
    """Ids of the weights of output embeddings: linear layers as wide as the vocabulary."""

    @property
    def decay(self) -> list[Parameter]:
        """The first group."""
        return [p for p in self.parameters if id(p) not in self.undecayed]

    @property
    def no_decay(self) -> list[Parameter]:
        """The second group."""
        return [p for p in self.parameters if id(p) in self.undecayed]


_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Trainer.get_decay_parameter_names: names, in lower case, that get no weight decay."""


OUTSIDE = -1
"""The layer of a weight that is in none."""


def groups_of(root: Module) -> Groups:
    """Walk a model in the order of torch's ``named_parameters()``: shared parameters stand where they come first."""
    groups = Groups()
    seen: set[int] = set()
    linear: list[Parameter] = []
    vocabulary = 0

    def visit(module: Module, path: str) -> list[tuple[Parameter, int]]:
        nonlocal vocabulary
        if isinstance(module, Embedding):
            groups.embeddings.add(id(module.weight))
            vocabulary = vocabulary or module.weight.shape[0]  # the first is the tokens'
        elif isinstance(module, Linear):
            linear.append(module.weight)
        found = []
        for name, p in module.parameters():
            if p.node is not None and id(p) not in seen:
                seen.add(id(p))
                if not p.unused:
                    found.append((p, OUTSIDE))
                if isinstance(module, LayerNorm) or _NO_DECAY.search(f"{path}{name}".lower()):
                    groups.undecayed.add(id(p))
        parts = {name: visit(child, f"{path}{name}.") for name, child in module.children()}
        if isinstance(module, Layers):
            return [(p, layer) for layer, made in enumerate(module.sequence()) for p, _ in parts[str(made)]]
        for part in parts.values():
            found += part
        return found

    for p, layer in visit(root, ""):
        groups.parameters.append(p)
        groups.layers.append(layer)
    groups.outputs.update(id(p) for p in linear if p.shape[0] == vocabulary)
    return groups


# -- what a step allocates -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepLog:
    """Allocations and frees in the order of time, as a tape logs them."""

    log: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """The most bytes alive at one time."""
        live = peak = 0
        for event in self.log:
            live += self.sizes[event] if event >= 0 else -self.sizes[~event]
            peak = max(peak, live)
        return peak

    @property
    def counts(self) -> dict[int, tuple[int, int]]:
        """For every size, the most alive at one time and how many are allocated."""
        live: dict[int, int] = {}
        counts: dict[int, tuple[int, int]] = {}
        for event in self.log:
            size = self.sizes[event if event >= 0 else ~event]
            live[size] = live.get(size, 0) + (1 if event >= 0 else -1)
            most, number = counts.get(size, (0, 0))
            counts[size] = max(most, live[size]), number + (event >= 0)
        return counts


@dataclass(slots=True)
class Temporaries:
    """What a step allocates and gives back: the most bytes, and for each size of tensor (the most, how many in all)."""

    peak: int = 0
    counts: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, part: StepLog, times: int = 1) -> None:
        """A part of the step, which it goes through ``times`` times."""
        self.peak = max(self.peak, part.peak)
        for size, (alive, allocated) in part.counts.items():
            most, number = self.counts.get(size, (0, 0))
            self.counts[size] = max(most, alive), number + allocated * times


def _by_dtype(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    """_group_tensors_by_device_and_dtype: a foreach kernel takes tensors of one dtype."""
    groups: dict[DType, list[Parameter]] = {}
    for p in parameters:
        groups.setdefault(p.dtype, []).append(p)
    return list(groups.values())


def _out(t: Tape, x: Tensor, dtype: DType | None = None) -> Tensor:
    """The result of an elementwise operation on x. If x is a temporary, it dies once the result is there."""
    return t.new(x.shape, dtype or x.dtype, "step")


def _kind(p: Parameter) -> tuple[Shape, DType]:
    """Equal for parameters that a step treats alike."""
    return p.shape, p.dtype


def _foreach(t: Tape, parameters: Sequence[Parameter]) -> list[Tensor]:
    """The results of a torch._foreach function."""
    return [_out(t, p) for p in parameters]


SCALAR = 4
"""Bytes of a float32 scalar: a norm, the step count, Adafactor's RMS."""

CHUNK = 65536
"""Elements that one block of a foreach kernel takes (kChunkSize in ForeachFunctors.cuh)."""


def clip_grad_norm(parameters: Counted, rules: DeviceRules) -> list[tuple[int, int]]:
    """torch.nn.utils.clip_grad_norm_, which the Trainer calls before each step: a norm of each gradient, then of all.

    Returns what is alive at the fullest moment: (bytes, how many). CUDA's kernel takes the gradients of one dtype at a
    time and makes a partial norm of each chunk, for every tensor as many as the largest has (_foreach_tensor_norm_cuda
    in ForeachReduceOp.cu); with or without them the norms are stacked in the end.
    """
    groups: dict[DType, tuple[int, int]] = {}
    for p, count in parameters:
        tensors, chunks = groups.get(p.dtype, (0, 0))
        groups[p.dtype] = tensors + count, max(chunks, -(-p.numel // CHUNK))
    norms = 0
    fullest: list[tuple[int, int]] = []
    for tensors, chunks in groups.values():
        norms += tensors
        if rules.kind == "cuda":
            fullest = max(fullest, [(rounded(4 * tensors * chunks), 1), (rounded(SCALAR), norms)], key=_total)
    if norms:
        stack = norms * max(dtype.itemsize for dtype in groups)
        fullest = max(fullest, [(rounded(stack), 1), (rounded(SCALAR), norms + 1)], key=_total)
    return fullest


def _total(alive: list[tuple[int, int]]) -> int:
    return sum(size * count for size, count in alive)


# -- the optimizers --------------------------------------------------------------------------------------------------

Init = Callable[[Parameter], None]
"""Makes a parameter's states where they are not there yet."""


class Optimizer:
    """One optimizer over a model's parameters on one kind of device. Subclasses say what it keeps and how it steps.

    ``groups`` is called when first needed: most optimizers do without. ``weight_decay`` says that the first group has
    any; the Trainer's default is none.
    """

    made_at_construction = False
    """Whether the states are there before the first forward; otherwise the first step makes them."""

    def __init__(self, rules: DeviceRules, groups: Callable[[], Groups], weight_decay: bool = False) -> None:
        self.rules = rules
        self.foreach = rules.kind != "cpu"
        """All parameters of a dtype at once; otherwise one after the other (_default_to_fused_or_foreach)."""
        self.weight_decay = weight_decay
        self._make_groups = groups
        self._states: dict[int, tuple[Parameter, tuple[int, ...]]] = {}
        """By the parameter's id(), with the parameter, so that no other gets its id."""
        self._steps: dict[bool, StepLog] = {}

    @cached_property
    def groups(self) -> Groups:
        """The parameters in the order in which the optimizer takes them."""
        return self._make_groups()

    def state_bytes(self, p: Parameter) -> tuple[int, ...]:
        """Bytes of each tensor that is kept on the device for p, rounded, in the order they are made."""
        known = self._states.get(id(p))
        if known is None:
            self._states[id(p)] = known = p, tuple(rounded(size) for size in self.states(p))
        return known[1]

    def shared_bytes(self, parameters: Counted) -> tuple[int, ...]:
        """Bytes of each tensor on the device that all parameters' states share, rounded."""
        return ()

    def paged_bytes(self, p: Parameter) -> int:
        """Bytes of p's states in unified memory: torch does not count them, and the driver moves them to host RAM."""
        return 0

    def step(self, first: bool = False) -> StepLog:
        """What one step allocates and frees; the first one makes the states, which are alive at the log's end."""
        if first not in self._steps:
            self._steps[first] = self._step(first)
        return self._steps[first]

    def _step(self, first: bool) -> StepLog:
        makes_states = first and not self.made_at_construction
        t = Tape(self.rules)
        states: list[Tensor] = []
        shared: list[Tensor] = []

        def init(p: Parameter) -> None:
            if not shared:
                shared.extend(t.new((size,), uint8, "shared state") for size in self.shared_bytes([(p, 1)]))
            states.extend(t.new((size,), uint8, "state") for size in self.state_bytes(p))

        for optimizer, parameters, decays in self.calls() if makes_states or self.has_temporaries else ():
            optimizer.update(t, parameters, init if makes_states else _nothing, decays)
        return StepLog(list(t.log), t.sizes)

    @cached_property
    def temporaries(self) -> Temporaries:
        """What a step after the first has alive and allocates, as ``step()`` tells, but equal turns of a loop run once.

        What a loop holds in a parameter's turn depends on this parameter and the one before alone; what it allocates,
        on this one.
        """
        result = Temporaries()
        for optimizer, parameters, decays in self.calls() if self.has_temporaries else ():
            if optimizer.foreach:
                result.add(optimizer._run(parameters, decays))
                continue
            pairs = {(_kind(a), _kind(b)): [a, b] for a, b in pairwise(parameters)}
            for pair in pairs.values():
                result.add(optimizer._run(pair, decays), times=0)
            kinds = {_kind(p): p for p in parameters}
            for kind, times in Counter(map(_kind, parameters)).items():
                result.add(optimizer._run([kinds[kind]], decays), times)
        return result

    def _run(self, parameters: list[Parameter], decays: bool) -> StepLog:
        t = Tape(self.rules)
        self.update(t, parameters, _nothing, decays)
        return StepLog(list(t.log), t.sizes)

    # What a subclass says.

    @property
    def has_temporaries(self) -> bool:
        """Whether a step allocates anything but states."""
        return True

    def states(self, p: Parameter) -> tuple[int, ...]:
        """Bytes of each tensor kept for p."""
        raise NotImplementedError

    def calls(self) -> list[tuple[Optimizer, list[Parameter], bool]]:
        """The calls of :meth:`update` in one step: torch.optim's make one for each parameter group."""
        return [(self, self.groups.decay, self.weight_decay), (self, self.groups.no_decay, False)]

    def update(self, t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
        """One function call of the library; ``decays`` says that the group's weight decay is not 0."""
        for p in parameters:
            init(p)

    def step_count(self, fused: bool = False) -> tuple[int, ...]:
        """The state ``step``: a tensor on the device for fused, on the host for the others."""
        return (SCALAR,) if fused or self.rules.kind == "cpu" else ()


def _nothing(p: Parameter) -> None:
    """The states are there."""


class AdamW(Optimizer):
    """torch.optim.AdamW. Its decay is done in place."""

    def __init__(
        self,
        rules: DeviceRules,
        groups: Callable[[], Groups],
        weight_decay: bool = False,
        implementation: Literal["default", "fused", "foreach", "loop"] = "default",
    ) -> None:
        super().__init__(rules, groups, weight_decay)
        self.fused = implementation == "fused"
        if implementation != "default":
            self.foreach = implementation == "foreach"

    @property
    def has_temporaries(self) -> bool:
        return not self.fused

    def states(self, p: Parameter) -> tuple[int, ...]:
        return *self.step_count(self.fused), p.nbytes, p.nbytes

    def update(self, t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
        for p in parameters:
            init(p)
        f = SimpleNamespace()
        if self.foreach:  # _multi_tensor_adam
            for group in _by_dtype(parameters):
                f.exp_avg_sq_sqrt = _foreach(t, group)
        elif not self.fused:  # _single_tensor_adam
            for p in parameters:
                f.denom = _out(t, _out(t, p))  # exp_avg_sq.sqrt() / bias_correction2_sqrt


class CpuOptimizer(Optimizer):
    """DeepSpeedCPUAdam, or with one moment DeepSpeedCPUAdagrad: C++ that works in place (deepspeed/ops, 0.19.8)."""

    def __init__(self, rules: DeviceRules, groups: Callable[[], Groups], moments: int = 2, itemsize: int = 4) -> None:
        super().__init__(rules, groups)
        self.moments = moments
        self.itemsize = itemsize

    @property
    def has_temporaries(self) -> bool:
        return False

    def states(self, p: Parameter) -> tuple[int, ...]:
        return (p.numel * self.itemsize,) * self.moments


class SGD(Optimizer):
    """torch.optim.SGD without momentum: no states, and a temporary only for weight decay."""

    @property
    def has_temporaries(self) -> bool:
        return self.weight_decay

    def states(self, p: Parameter) -> tuple[int, ...]:
        return ()

    def update(self, t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
        f = SimpleNamespace()
        for group in _by_dtype(parameters) if self.foreach else [[p] for p in parameters]:
            f.grad = None
            if decays:
                f.grad = _foreach(t, group)


class Adagrad(Optimizer):
    """torch.optim.Adagrad."""

    made_at_construction = True

    def states(self, p: Parameter) -> tuple[int, ...]:
        return *self.step_count(), p.nbytes

    def update(self, t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
        f = SimpleNamespace()
        for group in _by_dtype(parameters) if self.foreach else [[p] for p in parameters]:
            f.grad = None
            if decays:
                f.grad = _foreach(t, group)
            f.std = _foreach(t, group)
            if self.foreach:  # _multi_tensor_adagrad scales the gradient: in place where it is a copy
                f.numerator = f.grad or _foreach(t, group)


class RMSprop(Optimizer):
    """torch.optim.RMSprop without momentum, not centered."""

    def states(self, p: Parameter) -> tuple[int, ...]:
        return *self.step_count(), p.nbytes

    def update(self, t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
        for p in parameters:
            init(p)
        f = SimpleNamespace()
        for group in _by_dtype(parameters) if self.foreach else [[p] for p in parameters]:
            f.grad = None
            if decays:
                f.grad = _foreach(t, group)
            f.avg = _foreach(t, group)


class Adafactor(Optimizer):
    """transformers' Adafactor without first moment: float32 rows and columns, and copies of 16-bit tensors."""

    def __init__(self, rules: DeviceRules, groups: Callable[[], Groups], weight_decay: bool = False) -> None:
        super().__init__(rules, groups, weight_decay)
        self.foreach = False

    def states(self, p: Parameter) -> tuple[int, ...]:
        if len(p.shape) < 2:
            return 4 * p.numel, SCALAR
        return 4 * prod(p.shape[:-1]), 4 * prod(p.shape[:-2] + p.shape[-1:]), SCALAR

    def calls(self) -> list[tuple[Optimizer, list[Parameter], bool]]:
        return [(self, [*self.groups.decay, *self.groups.no_decay], self.weight_decay)]

    def update(self, t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
        f = SimpleNamespace()
        for p in parameters:
            f.grad = None
            if p.dtype.itemsize == 2:
                f.grad = _out(t, p, float32)
            init(p)
            f.p_data_fp32 = None
            if p.dtype.itemsize == 2:
                f.p_data_fp32 = _out(t, p, float32)
            f.update = _out(t, _out(t, p, float32))  # (grad**2) + eps
            if len(p.shape) >= 2:
                t.new(p.shape[:-1], float32, "update.mean(dim=-1)")
                t.new(p.shape[:-2] + p.shape[-1:], float32, "update.mean(dim=-2)")
                f.update = self._approx_sq_grad(t, p)
            else:
                f.update = _out(t, p, float32)  # exp_avg_sq.rsqrt()
            _out(t, f.update)  # -update

    def _approx_sq_grad(self, t: Tape, p: Parameter) -> Tensor:
        f = SimpleNamespace()
        f.mean = t.new((*p.shape[:-2], 1), float32, "exp_avg_sq_row.mean")
        f.r_factor = t.new(p.shape[:-1], float32, "r_factor")
        f.mean = None
        f.c_factor = t.new(p.shape[:-2] + p.shape[-1:], float32, "c_factor")
        return _out(t, p, float32)


NS_STEPS = 5
"""Newton-Schulz iterations of torch.optim.Muon."""


class Muon(Optimizer):
    """torch.optim.Muon for matrices; AdamW for embeddings, the output head and everything that is no matrix."""

    def __init__(self, rules: DeviceRules, groups: Callable[[], Groups], weight_decay: bool = False) -> None:
        super().__init__(rules, groups, weight_decay)
        self.foreach = False
        self._adamw = AdamW(rules, groups, weight_decay)

    def is_hidden(self, p: Parameter) -> bool:
        """Whether p is Muon's."""
        return len(p.shape) == 2 and id(p) not in self.groups.embeddings and id(p) not in self.groups.outputs

    def states(self, p: Parameter) -> tuple[int, ...]:
        return (p.nbytes,) if self.is_hidden(p) else self._adamw.states(p)

    def calls(self) -> list[tuple[Optimizer, list[Parameter], bool]]:
        hidden = [p for p in self.groups.parameters if self.is_hidden(p)]
        others = [p for p in self.groups.parameters if not self.is_hidden(p)]
        return [(self, hidden, self.weight_decay), (self._adamw, others, self.weight_decay)]

    def update(self, t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
        for p in parameters:
            init(p)
        f = SimpleNamespace()
        for p in parameters:
            f.update = _out(t, p)  # grad.lerp(buf, momentum)
            f.update = self._zeropower_via_newtonschulz(t, f.update)

    def _zeropower_via_newtonschulz(self, t: Tape, grad: Tensor) -> Tensor:
        ortho_grad = grad if grad.dtype is bfloat16 else _out(t, grad, bfloat16)
        side = min(grad.shape)
        f = SimpleNamespace()
        for _ in range(NS_STEPS):
            f.gram_matrix = t.new((side, side), bfloat16, "gram_matrix")
            f.gram_update = t.new((side, side), bfloat16, "gram_update")
            ortho_grad = _out(t, ortho_grad)
        return ortho_grad


MIN_8BIT_SIZE = 4096
"""Elements from which bitsandbytes makes 8-bit states; below they are float32 (``min_8bit_size``)."""

BLOCK_SIZE = 256
"""Elements that share one float32 scale in an 8-bit state (Optimizer2State.init_state; 2048 before 0.45)."""

QUANTIZATION_MAP = 256 * 4
"""Bytes of the table of an 8-bit state's values, which all parameters share (``qmap1``, ``qmap2``)."""

MIN_PAGED_SIZE = 100_000
"""Elements from which a paged optimizer's state is in unified memory (Optimizer8bit.get_state_buffer)."""


class BitsAndBytes(Optimizer):
    """bitsandbytes' AdamW (two moments) and Lion (one): a CUDA kernel for each parameter, states of 8 or 32 bits.

    The states of embeddings stay at 32 bits, as the Trainer asks (GlobalOptimManager.register_module_override). What
    bitsandbytes' substitute for a CPU allocates is not here: traces do not show it either.
    """

    def __init__(
        self,
        rules: DeviceRules,
        groups: Callable[[], Groups],
        weight_decay: bool = False,
        moments: int = 2,
        bits: Literal[8, 32] = 8,
        paged: bool = False,
    ) -> None:
        super().__init__(rules, groups, weight_decay)
        self.moments = moments
        self.bits = bits
        self.paged = paged and rules.kind != "cpu"

    @property
    def has_temporaries(self) -> bool:
        return False

    def is_8bit(self, p: Parameter) -> bool:
        """Whether p's moments have 8 bits."""
        return self.bits == 8 and p.numel >= MIN_8BIT_SIZE and id(p) not in self.groups.embeddings

    def is_paged(self, p: Parameter) -> bool:
        """Whether p's moments are in unified memory; the scales of 8-bit ones never are."""
        return self.paged and p.numel >= MIN_PAGED_SIZE

    def moment_bytes(self, p: Parameter) -> int:
        """Bytes of one of p's moments."""
        return p.numel if self.is_8bit(p) else 4 * p.numel

    def states(self, p: Parameter) -> tuple[int, ...]:
        moments = () if self.is_paged(p) else (self.moment_bytes(p),) * self.moments
        scales = (4 * -(-p.numel // BLOCK_SIZE),) * self.moments if self.is_8bit(p) else ()
        return moments + scales

    def shared_bytes(self, parameters: Counted) -> tuple[int, ...]:
        return (QUANTIZATION_MAP,) * self.moments if any(self.is_8bit(p) for p, _ in parameters) else ()

    def paged_bytes(self, p: Parameter) -> int:
        return self.moment_bytes(p) * self.moments if self.is_paged(p) else 0


_MAKERS: dict[str, Callable[..., Optimizer]] = {
    "adamw_torch": AdamW,
    "adamw_torch_fused": partial(AdamW, implementation="fused"),
    "adamw_torch_foreach": partial(AdamW, implementation="foreach"),
    "adamw_torch_loop": partial(AdamW, implementation="loop"),
    "adamw_bnb_8bit": BitsAndBytes,
    "adamw_8bit": BitsAndBytes,
    "paged_adamw_32bit": partial(BitsAndBytes, bits=32, paged=True),
    "paged_adamw_8bit": partial(BitsAndBytes, paged=True),
    "adafactor": Adafactor,
    "sgd": SGD,
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
    "lion_32bit": partial(BitsAndBytes, moments=1, bits=32),
    "lion_8bit": partial(BitsAndBytes, moments=1),
    "paged_lion_32bit": partial(BitsAndBytes, moments=1, bits=32, paged=True),
    "paged_lion_8bit": partial(BitsAndBytes, moments=1, paged=True),
    "muon": Muon,
}


def make_optimizer(
    name: str, rules: DeviceRules, groups: Callable[[], Groups], *, weight_decay: bool = False
) -> Optimizer:
    """The optimizer of a name in ``specs.training.OPTIMIZERS``. Raises SpecError for another one."""
    if name not in _MAKERS:
        raise SpecError.at("optim", name, "is not an optimizer of TrainingArguments", did_you_mean(name, _MAKERS))
    return _MAKERS[name](rules, groups, weight_decay)
