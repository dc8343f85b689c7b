"""What other estimators say of a model: their published arithmetic, in memplan's own code.

None of them knows activations, and none is corrected here: a number that one of them would print is reproduced, with
its rounding to bytes. Sizes are bytes, but for accelerate's, which counts a bool as an eighth of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memplan.architectures.nn import Inventory, Module
from memplan.memory.loading import children
from memplan.tape.tensor import Buffer, Parameter, bool_
from memplan.units import GB

BUFFER_FACTOR = 1.5
"""DeepSpeed's ``additional_buffer_factor``, by which it raises every need of the host."""
KERNELS = 13 * GB // 10
"""The 1.3 GB of the rule of thumb: what "the kernels alone take up" of a V100 under CUDA 11.2 (transformers,
docs/source/en/model_memory_anatomy.md, 4.49)."""
RULE_COPIES = 4
"""Weights, gradients and Adam's two moments, all of one type."""


# -- DeepSpeed 0.19.8 ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counted:
    """What DeepSpeed's estimators know of a model: model_to_params of deepspeed/runtime/zero/stage3.py."""

    parameters: int
    """Elements of all parameters, tied ones once, frozen ones too."""
    largest_layer: int
    """Elements of the parameters that one module holds itself, without the modules below it."""


@dataclass(frozen=True, slots=True)
class States:
    """Bytes of parameters, gradients and optimizer states."""

    gpu: int
    """On each GPU."""
    host: int
    """On each node."""


def count(root: Module) -> Counted:
    """Count a model as DeepSpeed does; of repeated layers one of each kind is enough."""
    parameters = sum(p.numel * times for p, times in Inventory(root).parameters)
    largest = max(sum(p.numel for _, p in module.parameters()) for _, module in root.named_modules())
    return Counted(parameters, largest)


# A node's share is a float, multiplied in DeepSpeed's order: its bytes are what int() leaves of the product.


def zero2_states(parameters: int, gpus_per_node: int, nodes: int, *, offload_optimizer: bool) -> States:
    """``estimate_zero2_model_states_mem_needs`` (deepspeed/runtime/zero/stage_1_and_2.py).

    16-bit weights are whole on each GPU; 18 bytes of each parameter are shared out, or offloaded.
    """
    gpus = nodes * gpus_per_node
    if offload_optimizer:
        return States(gpu=2 * parameters, host=int(parameters * max(4 * gpus, 16) * BUFFER_FACTOR))
    gpu = 2 * parameters + int(18 * parameters / gpus)
    return States(gpu, host=int(parameters * 4 * gpus_per_node * BUFFER_FACTOR))


def zero3_states(
    counted: Counted, gpus_per_node: int, nodes: int, *, offload_optimizer: bool, offload_param: bool, zero_init: bool
) -> States:
    """``estimate_zero3_model_states_mem_needs`` (deepspeed/runtime/zero/stage3.py).

    The largest layer is gathered on each GPU, 4 bytes a parameter; of 18 bytes of each parameter, shared out, the host
    takes what is offloaded. Without zero.Init every process of a node first makes the whole model in float32.
    """
    share = 1 / nodes
    made = 4 * gpus_per_node
    offloaded = 16 + 2 * offload_param if offload_optimizer else 0
    gpu = 4 * counted.largest_layer + int((18 - offloaded) * counted.parameters / (nodes * gpus_per_node))
    if not zero_init:
        host = counted.parameters * max(made, offloaded * share)
    elif offload_optimizer:
        host = counted.parameters * offloaded * share
    else:
        host = counted.largest_layer * made
    return States(gpu, int(host * BUFFER_FACTOR))


# -- accelerate 1.15 -------------------------------------------------------------------------------------------------

ACCELERATE_DTYPES = {"float32": 1, "float16": 2, "int8": 4, "int4": 8}
"""What ``accelerate estimate-memory`` prints unless asked otherwise -> how many go into float32's size."""
ACCELERATE_TRAINING = {"float32": 4, "float16": 2}
"""Times the size in float32 that training with Adam takes: the largest figure of ``estimate_training_usage``
(accelerate/commands/estimate.py), which is the step's. For integers it has none."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What ``accelerate estimate-memory`` knows of a model: calculate_maximum_sizes of accelerate/utils/modeling.py."""

    total: float
    """Bytes of weights and buffers in float32."""
    largest_layer: float
    """Of them, the largest block that stays whole, or module without further modules."""


def maximum_sizes(root: Module) -> Sizes:
    """Size a model, built in float32, as accelerate does.

    A tied weight counts under each of its names: init_empty_weights makes a parameter of its own of each.
    """
    own = [_nbytes(x) for x in _tensors(root)]
    parts = [_sizes(child) for _, child, _ in children(root)]
    total = sum(own) + sum(part.total for part in parts)
    return Sizes(total, max([*own, *(part.largest_layer for part in parts)]))


def _sizes(module: Module) -> Sizes:
    parts = [_sizes(child) for _, child, _ in children(module)]
    total = sum(map(_nbytes, _tensors(module))) + sum(part.total for part in parts)
    if module.no_split or not parts:
        return Sizes(total, total)
    # What a module that is taken apart holds itself is no layer to accelerate.
    return Sizes(total, max(part.largest_layer for part in parts))


def _tensors(module: Module) -> Iterator[Parameter | Buffer]:
    for value in module.__dict__.values():
        if isinstance(value, Parameter) or (isinstance(value, Buffer) and value.registered):
            yield value


def _nbytes(tensor: Parameter | Buffer) -> float:
    return tensor.numel / 8 if tensor.dtype is bool_ else tensor.nbytes


# -- the rule of thumb -----------------------------------------------------------------------------------------------


def rule_of_thumb(parameters: int, itemsize: int, activations: int) -> int:
    """Bytes of "parameters x bytes x 4 + 1.3 GB + activations", which has no formula for the last."""
    return RULE_COPIES * itemsize * parameters + KERNELS + activations
