"""ZeRO++ at stage 3: a second partition of the weights within a node, and what is quantized on its way.

Sources: deepspeed/runtime/zero/{partition_parameters,stage3}.py (_partition_param_sec, CUDAQuantizer) and
runtime/comm/coalesced_collectives.py (all_to_all_quant_reduce), 0.19.8, whose names are kept; what the CUDA kernels
return is in csrc/quantization/pt_binding.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil

from memplan.errors import SpecError
from memplan.memory.course import Block, Key, Ledger
from memplan.tape.tensor import Shape, float16, float32

SECONDARY = "second partitions of the weights (zero_hpz_partition_size)"
QUANTIZED = "weights in 8 bits, with their scales (zero_quantized_weights)"
DEQUANTIZED = "weights in float16, as they are dequantized (zero_quantized_weights)"
REDUCED = "gradients in 4 bits and their sums (zero_quantized_gradients)"
"""Blocks as an explanation names them; in parentheses the keys that size them."""

TARGET_GROUP_SIZE, LARGEST_GROUP = 8000, 16000
"""Elements that share a scale: as many as are wanted, and more than there may be (CUDAQuantizer)."""


class Secondaries:
    """Weights of which a rank has a second partition, ``group``-th of the whole: from when they are first cut, anew in
    every step, to its end. Those that are not trained keep theirs.
    """

    def __init__(self, group: int, allocate: Callable[[int], Block]) -> None:
        self.group = group
        """Ranks that have all of them together (zero_param_process_group); 0 is none."""
        self._allocate = allocate
        self._blocks: dict[Key, Block] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._blocks

    def partition(self, key: Key, aligned: int, itemsize: int) -> None:
        """_partition_param_sec of a weight of ``aligned`` elements, if it has none."""
        if self.group and key not in self._blocks:
            self._blocks[key] = self._allocate(aligned // self.group * itemsize)

    def pop(self, key: Key) -> Block | None:
        """That of a weight, which is made again."""
        return self._blocks.pop(key, None)

    def invalidate(self, keys: Iterable[Key], ledger: Ledger) -> None:
        """invalidate_secondary_tensor."""
        ledger.free(*(self._blocks.pop(key, None) for key in keys))


def quantization_groups(elements: int) -> int:
    """Scales of a tensor in 8 bits (CUDAQuantizer.quantize). Raises SpecError for one that it asserts against.

    >>> quantization_groups(100_000)
    20
    """
    groups = ceil(elements / TARGET_GROUP_SIZE)
    while groups < elements and elements % (8 * groups):
        groups += 1
    while elements % (8 * groups * 2) == 0 and elements / groups > TARGET_GROUP_SIZE:
        groups *= 2
    if elements % (8 * groups) or elements / groups >= LARGEST_GROUP or elements <= groups:
        problem = f"is refused by DeepSpeed for a partition of {elements} elements, which it cannot cut into groups"
        raise SpecError.at("zero.zero_quantized_weights", True, problem, "Use other numbers of GPUs, or leave it out.")
    return groups


def quantized(elements: int) -> tuple[int, int]:
    """Bytes of a tensor in 8 bits, and of its scales."""
    return elements, quantization_groups(elements) * float32.itemsize


def reduces_quantized(shape: Shape, elements: int, ranks: int) -> bool:
    """Whether a gradient is quantized to be reduced: others fall back to reduce_scatter_coalesced."""
    return len(shape) > 1 and elements % (2 * ranks) == 0


def quant_reduce_sizes(shape: Shape, elements: int, ranks: int, per_node: int) -> list[Sequence[int]]:
    """Bytes of what all_to_all_quant_reduce makes of a gradient, in its order; what stands together is made at once."""
    groups = max(shape[0], shape[1], ranks)
    in_4_bit, scales = elements // 2, groups * float32.itemsize
    sums, their_scales = in_4_bit // per_node, groups // per_node * float32.itemsize
    return [
        (in_4_bit, scales),
        (in_4_bit,),
        (scales,),
        (sums, their_scales),
        (sums,),
        (their_scales,),
        (elements // per_node * float16.itemsize,),
    ]
