"""Optimizers: what each keeps per parameter, and what one step allocates and gives back.

A step runs on a tape. The functions below are the loops of the libraries' sources, and ``f`` holds the local variables
that keep tensors alive there: a name that is bound again frees its old tensor only once the new one is there, and the
last parameter's tensors live into the next one's turn. Scalars are left out, except where they stay.

Sources: torch/optim/{adam,sgd,adagrad,rmsprop,_muon}.py and torch/nn/utils/clip_grad.py, torch 2.13;
Trainer.create_optimizer in transformers/trainer.py, trainer_optimizer.py and optimization.py (Adafactor), 5.23;
bitsandbytes/optim/optimizer.py, 0.50.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace

from memplan.architectures.nn import Embedding, Layers, LayerNorm, Linear, Module
from memplan.tape.dispatch import DeviceRules
from memplan.tape.tape import Tape
from memplan.tape.tensor import DType, Parameter, Shape, Tensor, bfloat16, float32, uint8

Counted = Sequence[tuple[Parameter, int]]
"""Trainable parameters, each with how many of the model it stands for."""

SCALAR = 4
"""Bytes of the step count (float32) and of Adafactor's RMS."""


def rounded(nbytes: int) -> int:
    """The block that the caching allocator gives for a request: a multiple of 512 (kMinBlockSize)."""
    return (nbytes + 511) & -512


# -- the parameter groups --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Groups:
    """Trainable parameters as ``Trainer.create_optimizer`` groups them, each group in the model's order.

    A layer that stands for several is there as often as the model has it.
    """

    decay: list[Parameter] = field(default_factory=list)
    no_decay: list[Parameter] = field(default_factory=list)
    """Biases and the weights of norms."""
    embeddings: frozenset[int] = frozenset()
    """Ids of the weights of embeddings, tied ones too."""
    outputs: frozenset[int] = frozenset()
    """Ids of the weights of output embeddings: linear layers outside the blocks, as wide as the vocabulary."""


_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Trainer.get_decay_parameter_names: names, in lower case, that get no weight decay."""


def groups_of(root: Module) -> Groups:
    """Walk a model in the order of torch's ``named_parameters()``."""
    embeddings = {id(p): p for p in _weights_of(root, Embedding)}
    vocabulary = max((p.shape[0] for p in embeddings.values()), default=0)
    outputs = {id(p) for p in _weights_of(root, Linear) if p.shape[0] == vocabulary}
    found = _in_order(root, "", set())
    return Groups(
        decay=[p for p, decays in found if decays],
        no_decay=[p for p, decays in found if not decays],
        embeddings=frozenset(embeddings),
        outputs=frozenset(outputs),
    )


def _weights_of(module: Module, kind: type[Embedding] | type[Linear]) -> Iterable[Parameter]:
    """Weights of one kind of module, outside the blocks."""
    if isinstance(module, kind):
        yield module.weight
    if not isinstance(module, Layers):
        for _, child in module.children():
            yield from _weights_of(child, kind)


def _in_order(module: Module, path: str, seen: set[int]) -> list[tuple[Parameter, bool]]:
    """Trainable parameters, each with whether it decays; shared ones where they come first."""
    found = []
    for name, p in module.parameters():
        if p.node is not None and id(p) not in seen:
            seen.add(id(p))
            found.append((p, not isinstance(module, LayerNorm) and _NO_DECAY.search(f"{path}{name}".lower()) is None))
    parts = {name: _in_order(child, f"{path}{name}.", seen) for name, child in module.children()}
    order = map(str, module.sequence()) if isinstance(module, Layers) else parts
    for name in order:
        found += parts[name]
    return found


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


CHUNK = 65536
"""Elements that one block of a foreach kernel takes (kChunkSize in ForeachFunctors.cuh)."""


def clip_grad_norm(parameters: Counted, rules: DeviceRules) -> StepLog:
    """torch.nn.utils.clip_grad_norm_, which the Trainer calls before each step: a norm per gradient, and all in one.

    CUDA's foreach kernel also keeps a partial norm for each chunk, in every tensor's row as many as the largest has
    (foreach_tensor_norm_cuda in ForeachReduceOp.cu).
    """
    t = Tape(rules)
    norms: list[Tensor] = []
    for dtype, group in _by_dtype(parameters).items():
        f = SimpleNamespace()
        if rules.kind == "cuda":
            chunks = max(-(-p.numel // CHUNK) for p, _ in group)
            f.output_per_tensor = t.new((sum(count for _, count in group) * chunks,), float32, "partial_norms")
        norms += [t.new((count * rounded(dtype.itemsize),), uint8, "norms") for _, count in group]
    if norms:
        t.new((sum(count for _, count in parameters),), parameters[0][0].dtype, "stack")
    return StepLog(list(t.log), t.sizes)


def _by_dtype(parameters: Counted) -> dict[DType, list[tuple[Parameter, int]]]:
    """_group_tensors_by_device_and_dtype: foreach kernels take tensors of one dtype."""
    groups: dict[DType, list[tuple[Parameter, int]]] = {}
    for p, count in parameters:
        groups.setdefault(p.dtype, []).append((p, count))
    return groups


# -- the steps -------------------------------------------------------------------------------------------------------

Init = Callable[[Parameter], None]
"""Makes a parameter's states where they are not there yet."""

Step = Callable[[Tape, Sequence[Parameter], Init, bool], None]
"""One call of the optimizer over a group; the last argument says that the group's weight decay is not 0."""


def _out(t: Tape, x: Tensor, dtype: DType | None = None) -> Tensor:
    """The result of an elementwise operation on x. If x is a temporary, it dies when the result is there."""
    return t.new(x.shape, dtype or x.dtype, "step")


def _foreach(t: Tape, parameters: Sequence[Parameter]) -> list[Tensor]:
    """The result of a torch._foreach function."""
    return [_out(t, p) for p in parameters]


def _dtype_groups(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    return [[p for p, _ in group] for group in _by_dtype([(p, 1) for p in parameters]).values()]


def _states_only(t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
    """One kernel that reads and writes weights, gradients and states: fused AdamW, SGD, bitsandbytes on CUDA."""
    for p in parameters:
        init(p)


def _adam(t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
    """_single_tensor_adam; AdamW's decay is done in place."""
    for p in parameters:
        init(p)
    f = SimpleNamespace()
    for p in parameters:
        f.denom = _out(t, _out(t, p))  # exp_avg_sq.sqrt() / bias_correction2_sqrt


def _adam_foreach(t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
    """_multi_tensor_adam."""
    for p in parameters:
        init(p)
    f = SimpleNamespace()
    for group in _dtype_groups(parameters):
        f.exp_avg_sq_sqrt = _foreach(t, group)


def _sgd(t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
    """_single_tensor_sgd with weight decay."""
    f = SimpleNamespace()
    for p in parameters:
        f.grad = p
        if decays:
            f.grad = _out(t, p)


def _sgd_foreach(t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
    """_multi_tensor_sgd with weight decay."""
    f = SimpleNamespace()
    for group in _dtype_groups(parameters):
        f.device_grads = group
        if decays:
            f.device_grads = _foreach(t, group)


def _adagrad(t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
    """_single_tensor_adagrad, and _single_tensor_rmsprop, whose avg is its std."""
    for p in parameters:
        init(p)
    f = SimpleNamespace()
    for p in parameters:
        f.grad = p
        if decays:
            f.grad = _out(t, p)
        f.std = _out(t, p)


def _adagrad_foreach(t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
    """_multi_tensor_adagrad."""
    f = SimpleNamespace()
    for group in _dtype_groups(parameters):
        f.device_grads = group
        if decays:
            f.device_grads = _foreach(t, group)
        f.std = _foreach(t, group)
        f.numerator = f.device_grads if decays else _foreach(t, group)


def _rmsprop_foreach(t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
    """_multi_tensor_rmsprop."""
    for p in parameters:
        init(p)
    f = SimpleNamespace()
    for group in _dtype_groups(parameters):
        f.grouped_grads = group
        if decays:
            f.grouped_grads = _foreach(t, group)
        f.avg = _foreach(t, group)


def _adafactor(t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
    """transformers' Adafactor.step, with float32 copies of 16-bit gradients and weights."""
    f = SimpleNamespace()
    for p in parameters:
        f.grad = p
        if p.dtype.itemsize == 2:
            f.grad = _out(t, p, float32)
        init(p)
        f.p_data_fp32 = p
        if p.dtype.itemsize == 2:
            f.p_data_fp32 = _out(t, p, float32)
        f.update = _out(t, _out(t, p, float32))  # (grad**2) + eps
        if len(p.shape) >= 2:
            t.new(_rows(p), float32, "update.mean(dim=-1)")
            t.new(_columns(p), float32, "update.mean(dim=-2)")
            f.update = _approx_sq_grad(t, p)
        else:
            f.update = _out(t, p, float32)  # exp_avg_sq.rsqrt()
        _out(t, f.update)  # -update


def _approx_sq_grad(t: Tape, p: Parameter) -> Tensor:
    """Adafactor._approx_sq_grad."""
    f = SimpleNamespace()
    f.mean = t.new((*_rows(p)[:-1], 1), float32, "exp_avg_sq_row.mean")
    f.r_factor = t.new(_rows(p), float32, "r_factor")
    f.mean = None
    f.c_factor = t.new(_columns(p), float32, "c_factor")
    return _out(t, p, float32)


def _rows(p: Parameter) -> Shape:
    return p.shape[:-1]


def _columns(p: Parameter) -> Shape:
    return p.shape[:-2] + p.shape[-1:]


NS_STEPS = 5
"""Newton-Schulz iterations of torch.optim.Muon."""


def _muon(t: Tape, parameters: Sequence[Parameter], init: Init, decays: bool) -> None:
    """_single_tensor_muon with Nesterov momentum."""
    for p in parameters:
        init(p)
    f = SimpleNamespace()
    for p in parameters:
        f.update = _out(t, p)
        f.update = _newton_schulz(t, f.update)


def _newton_schulz(t: Tape, grad: Tensor) -> Tensor:
    """_zeropower_via_newtonschulz: bfloat16 throughout."""
    f = SimpleNamespace()
    f.ortho_grad = grad if grad.dtype is bfloat16 else _out(t, grad, bfloat16)
    side = min(grad.shape)
    for _ in range(NS_STEPS):
        f.gram_matrix = t.new((side, side), bfloat16, "gram_matrix")
        f.gram_update = t.new((side, side), bfloat16, "gram_update")
        f.ortho_grad = _out(t, f.ortho_grad)
    result: Tensor = f.ortho_grad
    return result


_STEPS: dict[str, tuple[Step, Step]] = {
    "adamw_torch": (_adam, _adam_foreach),
    "adamw_torch_loop": (_adam, _adam),
    "adamw_torch_foreach": (_adam_foreach, _adam_foreach),
    "sgd": (_sgd, _sgd_foreach),
    "adagrad": (_adagrad, _adagrad_foreach),
    "rmsprop": (_adagrad, _rmsprop_foreach),
    "adafactor": (_adafactor, _adafactor),
    "muon": (_muon, _muon),
}
"""The step on CPU and on CUDA, where torch takes foreach by default (_default_to_fused_or_foreach). The others are
_states_only."""


# -- the optimizers --------------------------------------------------------------------------------------------------

MIN_8BIT_SIZE = 4096
"""Elements from which bitsandbytes makes 8-bit states; below they are float32 (``min_8bit_size``)."""

BLOCK_SIZE = 256
"""Elements that share one float32 scale in an 8-bit state (Optimizer2State.init_state; 2048 before 0.45)."""

QUANTIZATION_MAP = 256 * 4
"""Bytes of the table of an 8-bit state's values, one for each of the states of a parameter, shared by all parameters."""

MIN_PAGED_SIZE = 100_000
"""Elements from which a paged optimizer's state is in unified memory (Optimizer8bit.get_state_buffer)."""


class Optimizer:
    """One optimizer, by its name in ``specs.training.OPTIMIZERS``, over a model's parameters on one kind of device.

    ``groups`` is called when first needed: most optimizers do without. ``weight_decay`` says that the first group has
    any; the Trainer's default is 0.
    """

    def __init__(
        self, name: str, rules: DeviceRules, groups: Callable[[], Groups], *, weight_decay: bool = False
    ) -> None:
        self.name = name
        self.rules = rules
        self.weight_decay = weight_decay
        self._make_groups = groups
        self._bits = 8 if "8bit" in name else 32
        self._paged = name.startswith("paged") and rules.kind != "cpu"  # bitsandbytes does not page on a CPU
        self._step = _STEPS.get(name, (_states_only, _states_only))[rules.kind != "cpu"]
        if name == "sgd" and not weight_decay:
            self._step = _states_only

    @cached_property
    def groups(self) -> Groups:
        """The parameters in the order in which the optimizer takes them."""
        return self._make_groups()

    # -- states ------------------------------------------------------------------------------------------------

    @property
    def made_at_construction(self) -> bool:
        """Whether the states are there before the first forward; otherwise the first step makes them."""
        return self.name == "adagrad"

    def state_bytes(self, p: Parameter) -> tuple[int, ...]:
        """Bytes of each tensor that the optimizer keeps on the device for p, rounded, in the order it makes them."""
        return tuple(rounded(size) for size in self._states(p) if not self._is_paged(p, size))

    def paged_bytes(self, p: Parameter) -> int:
        """Bytes of p's states in unified memory, which torch does not count and the driver moves to host RAM."""
        return sum(size for size in self._states(p) if self._is_paged(p, size))

    def shared_bytes(self, parameters: Counted) -> tuple[int, ...]:
        """Bytes of each tensor on the device that all parameters' states share."""
        if self._bits == 8 and any(self._has_8bit(p) for p, _ in parameters):
            return (QUANTIZATION_MAP,) * self._moments
        return ()

    @property
    def _moments(self) -> int:
        return 1 if "lion" in self.name else 2

    def _has_8bit(self, p: Parameter) -> bool:
        """The Trainer registers 32-bit states for embeddings (GlobalOptimManager.register_module_override)."""
        return self._bits == 8 and p.numel >= MIN_8BIT_SIZE and id(p) not in self.groups.embeddings

    def _is_paged(self, p: Parameter, size: int) -> bool:
        """The scales of 8-bit states are never paged."""
        return self._paged and p.numel >= MIN_PAGED_SIZE and size >= p.numel

    def _states(self, p: Parameter) -> tuple[int, ...]:
        name, n = self.name, p.nbytes
        if name == "muon":
            if self._is_hidden(p):
                return (n,)
            name = "adamw_torch"
        if name.startswith("adamw_torch"):
            return (*self._step_count(fused=name == "adamw_torch_fused"), n, n)
        if name in ("adagrad", "rmsprop"):
            return (*self._step_count(), n)
        if name == "adafactor":
            if len(p.shape) < 2:
                return 4 * p.numel, SCALAR
            return 4 * _numel(_rows(p)), 4 * _numel(_columns(p)), SCALAR
        if name == "sgd":
            return ()
        if self._has_8bit(p):
            return (p.numel,) * self._moments + (4 * -(-p.numel // BLOCK_SIZE),) * self._moments
        return (4 * p.numel,) * self._moments

    def _step_count(self, fused: bool = False) -> tuple[int, ...]:
        """A tensor on the device for fused, on the host for the others."""
        return (SCALAR,) if fused or self.rules.kind == "cpu" else ()

    def _is_hidden(self, p: Parameter) -> bool:
        """Muon is for the matrices of the blocks; embeddings, heads and vectors are AdamW's."""
        return len(p.shape) == 2 and id(p) not in self.groups.embeddings and id(p) not in self.groups.outputs

    # -- the step ----------------------------------------------------------------------------------------------

    def step(self, first: bool = False) -> StepLog:
        """What one step allocates and frees; the first one makes the states, which are alive at the log's end."""
        makes_states = first and not self.made_at_construction
        if self._step is _states_only and not makes_states:
            return StepLog()
        t = Tape(self.rules)
        states: list[Tensor] = []

        def make(sizes: Iterable[int]) -> None:
            states.extend(t.new((size,), uint8, "state") for size in sizes)

        shared = False

        def init(p: Parameter) -> None:
            nonlocal shared
            if makes_states:
                if not shared and self._has_8bit(p):
                    shared = True
                    make(self.shared_bytes([(p, 1)]))
                make(self.state_bytes(p))

        self._run(t, init)
        return StepLog(list(t.log), t.sizes)

    def _run(self, t: Tape, init: Init) -> None:
        decay, no_decay = self.groups.decay, self.groups.no_decay
        if self.name == "adafactor":  # one function goes through both groups
            self._step(t, [*decay, *no_decay], init, self.weight_decay)
        elif self.name == "muon":
            hidden = [p for p in (*decay, *no_decay) if self._is_hidden(p)]
            others = [p for p in (*decay, *no_decay) if not self._is_hidden(p)]
            self._step(t, hidden, init, self.weight_decay)
            _STEPS["adamw_torch"][self.rules.kind != "cpu"](t, others, init, self.weight_decay)
        else:
            self._step(t, decay, init, self.weight_decay)
            self._step(t, no_decay, init, False)


def _numel(shape: Shape) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
