"""Symbolic tensors: shape, dtype, strides, storage and place in the autograd graph, but no data.

A tensor's storage lives exactly as long as Python references to it do. The forward passes in
``memplan.architectures`` keep the same local variables alive as the transformers source they model, and the
graph keeps the same saved tensors alive as torch's autograd, so CPython's reference counting frees every storage at
the same point of the program at which torch frees it.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from memplan.errors import UnsupportedError

if TYPE_CHECKING:
    from memplan.tape.tape import AccumulateGrad, Node, Tape


class DType:
    """An element type: name as in torch, bytes per element, floating or not. Compared by identity."""

    __slots__ = ("is_floating", "itemsize", "name")

    def __init__(self, name: str, itemsize: int, is_floating: bool) -> None:
        self.name = name
        self.itemsize = itemsize
        self.is_floating = is_floating

    def __repr__(self) -> str:
        return self.name


float64 = DType("float64", 8, True)
float32 = DType("float32", 4, True)
bfloat16 = DType("bfloat16", 2, True)
float16 = DType("float16", 2, True)
int64 = DType("int64", 8, False)
int32 = DType("int32", 4, False)
int8 = DType("int8", 1, False)
uint8 = DType("uint8", 1, False)
bool_ = DType("bool", 1, False)

DTYPES = {d.name: d for d in (float64, float32, bfloat16, float16, int64, int32, int8, uint8, bool_)}

Shape = tuple[int, ...]
Scalar = float
"""A Python number; ``Tensor.float`` hides the type's own name."""


@lru_cache(maxsize=4096)
def contiguous_strides(shape: Shape) -> Shape:
    """Row-major strides in elements."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@lru_cache(maxsize=4096)
def is_contiguous(shape: Shape, strides: Shape) -> bool:
    """Whether the elements lie row-major without gaps, or are none; dimensions of size 1 do not matter."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides)):
        if size != 1:
            if stride != step:
                return 0 in shape
            step *= size
    return True


@lru_cache(maxsize=4096)
def is_dense(shape: Shape, strides: Shape) -> bool:
    """Whether some permutation of the dimensions is contiguous (torch: non-overlapping and dense)."""
    step = 1
    for stride, size in sorted((st, sz) for st, sz in zip(strides, shape) if sz != 1):
        if stride != step:
            return False
        step *= size
    return True


@lru_cache(maxsize=4096)
def dense_like(shape: Shape, strides: Shape) -> Shape:
    """Strides of a fresh elementwise result: the input's own order of dimensions, without gaps."""
    if is_dense(shape, strides):
        return strides
    return iterated_strides(shape, ((shape, strides),))


@lru_cache(maxsize=4096)
def iterated_strides(shape: Shape, operands: tuple[tuple[Shape, Shape], ...]) -> Shape:
    """Strides of a fresh elementwise result of several operands, each (its shape, its strides), broadcast to ``shape``.

    TensorIteratorBase::reorder_dimensions: of two dimensions the inner one is that of the smaller stride in the first
    operand that is broadcast along neither; where none says so, that of the higher number.
    """
    rank = len(shape)
    strides = [
        (0,) * (rank - len(own))
        + tuple(0 if o == 1 != s else st for o, s, st in zip(own, shape[rank - len(own) :], given))
        for own, given in operands
    ]

    def is_inside(inner: int, outer: int) -> int:
        for own in strides:
            if own[inner] and own[outer]:
                if own[inner] != own[outer]:
                    return 1 if own[inner] < own[outer] else -1
                if shape[inner] > shape[outer]:
                    return -1
        return 0

    order: list[int] = []  # innermost first
    for d in range(rank - 1, -1, -1):
        order.append(d)
        at = len(order) - 1
        for i in range(at - 1, -1, -1):
            comparison = is_inside(order[i], order[at])
            if comparison < 0:
                order[i], order[at] = order[at], order[i]
                at = i
            elif comparison > 0:
                break
    result = [0] * rank
    step = 1
    for d in order:
        result[d] = step
        step *= shape[d]
    return tuple(result)


@lru_cache(maxsize=4096)
def viewed_strides(shape: Shape, strides: Shape, new_shape: Shape) -> Shape | None:
    """Strides of ``new_shape`` as a view, or None where torch would have to copy (at::detail::computeStride)."""
    if is_contiguous(shape, strides):
        return contiguous_strides(new_shape)
    result = [0] * len(new_shape)
    view_d = len(new_shape) - 1
    chunk_stride = strides[-1]
    tensor_numel = view_numel = 1
    for d in range(len(shape) - 1, -1, -1):
        tensor_numel *= shape[d]
        if d == 0 or (shape[d - 1] != 1 and strides[d - 1] != tensor_numel * chunk_stride):
            while view_d >= 0 and (view_numel < tensor_numel or new_shape[view_d] == 1):
                result[view_d] = view_numel * chunk_stride
                view_numel *= new_shape[view_d]
                view_d -= 1
            if view_numel != tensor_numel:
                return None
            if d > 0:
                chunk_stride = strides[d - 1]
                tensor_numel = view_numel = 1
    return tuple(result) if view_d == -1 else None


class Storage:
    """Bytes on the device. Its birth and its death are entries in the tape's log."""

    __slots__ = ("id", "log", "tape")

    def __init__(self, tape: Tape, id: int, log: list[int]) -> None:
        self.tape = tape
        self.id = id
        self.log = log

    def __del__(self) -> None:
        self.log.append(~self.id)


class Persistent:
    """The storage of a parameter, or of the buffers: there before the step and after it, so never in the log."""

    __slots__ = ("id", "owner", "tape")

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.id = -1
        self.owner = 0
        """id() of the parameter: its views have the same storage."""


class Tensor:
    """A symbolic tensor. ``node`` is None where no gradient flows; ``slot`` is the output index at that node.

    ``is_view`` says of a gradient that torch knows a base of it, which keeps the engine from adding into it.
    """

    __slots__ = ("dtype", "is_view", "node", "shape", "slot", "storage", "strides")

    def __init__(
        self,
        shape: Shape,
        strides: Shape,
        dtype: DType,
        storage: Storage | Persistent,
        node: Node | AccumulateGrad | None = None,
        slot: int = 0,
        is_view: bool = False,
    ) -> None:
        self.shape = shape
        self.strides = strides
        self.dtype = dtype
        self.storage = storage
        self.node = node
        self.slot = slot
        self.is_view = is_view

    def __repr__(self) -> str:
        return f"Tensor({'x'.join(map(str, self.shape))}, {self.dtype})"

    @property
    def tape(self) -> Tape:
        return self.storage.tape

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape, start=self.dtype.itemsize)

    @property
    def requires_grad(self) -> bool:
        return self.node is not None

    @property
    def contiguous_(self) -> bool:
        return is_contiguous(self.shape, self.strides)

    # torch's spellings; the operations live in ops.py, which binds them here (see its last lines).
    if TYPE_CHECKING:

        def view(self, *shape: int) -> Tensor: ...
        def reshape(self, *shape: int) -> Tensor: ...
        def transpose(self, a: int, b: int) -> Tensor: ...
        def permute(self, *dims: int) -> Tensor: ...
        def unsqueeze(self, dim: int) -> Tensor: ...
        def squeeze(self, dim: int) -> Tensor: ...
        def expand(self, *shape: int) -> Tensor: ...
        def narrow(self, dim: int, start: int, length: int) -> Tensor: ...
        def select(self, dim: int, index: int) -> Tensor: ...
        def split(self, sizes: int | tuple[int, ...], dim: int = -1) -> list[Tensor]: ...
        def chunk(self, chunks: int, dim: int = -1) -> list[Tensor]: ...
        def unbind(self, dim: int) -> list[Tensor]: ...
        def contiguous(self) -> Tensor: ...
        def to(self, dtype: DType) -> Tensor: ...
        def float(self) -> Tensor: ...
        def detach(self) -> Tensor: ...
        def pow(self, exponent: Scalar) -> Tensor: ...
        def mean(self, dim: int, keepdim: bool = False) -> Tensor: ...
        def sum(self, dim: int, keepdim: bool = False) -> Tensor: ...
        def __add__(self, other: Tensor | Scalar) -> Tensor: ...
        def __radd__(self, other: Scalar) -> Tensor: ...
        def __sub__(self, other: Tensor | Scalar) -> Tensor: ...
        def __mul__(self, other: Tensor | Scalar) -> Tensor: ...
        def __rmul__(self, other: Scalar) -> Tensor: ...
        def __truediv__(self, other: Tensor | Scalar) -> Tensor: ...
        def __neg__(self) -> Tensor: ...


class Parameter(Tensor):
    """A leaf weight, made by ``Tape.parameter``; ``name`` is its name in the state dict."""

    __slots__ = ("elements", "loaded", "name", "unused")

    name: str
    elements: int
    """How many numbers it stands for: more than it has elements where several are packed into one."""
    loaded: DType | None
    """In which it was loaded and prepared, if an engine casts it; None: not told."""
    unused: bool
    """It is to be trained, but a backward has not reached it: it has no gradient, and optimizers pass it by."""


class Buffer(Tensor):
    """A tensor without gradient that lives as long as the model, made by ``Tape.buffer``."""

    __slots__ = ("registered",)

    registered: bool
    """Listed by ``model.buffers()``; not so the scales that a library keeps beside a quantized weight."""


def promote(a: DType, b: DType) -> DType:
    """torch.result_type of two floating tensors (or of a floating and an integer one)."""
    if a is b:
        return a
    if a.is_floating != b.is_floating:
        return a if a.is_floating else b
    if not a.is_floating:
        return a if a.itemsize >= b.itemsize else b
    if a.itemsize == b.itemsize == 2:
        return float32
    return a if a.itemsize > b.itemsize else b


def dtype_named(name: str) -> DType:
    """The DType of a torch name; raises UnsupportedError for one that memplan does not model."""
    try:
        return DTYPES[name]
    except KeyError:
        raise UnsupportedError(f"dtype: {name!r} is not modelled. Use one of {', '.join(DTYPES)}.") from None
