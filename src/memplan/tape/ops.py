"""The operations of the tape, each with autograd's rule for what it saves and what its backward allocates.

An operation first makes its backward node (saving inputs), then allocates its result, then saves results, which is
the order of torch's generated autograd code. Backward functions return one gradient per input.
Sources: tools/autograd/derivatives.yaml, torch/csrc/autograd/FunctionsManual.cpp, torch 2.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memplan.tape.tape import Node, Recomputed, Tape
from memplan.tape.tensor import (
    DType,
    Shape,
    Tensor,
    bool_,
    dense_like,
    float32,
    int64,
    is_contiguous,
    is_dense,
    iterated_strides,
    promote,
    viewed_strides,
)

Grads = Sequence["Tensor | None"]


def _alias(x: Tensor, shape: Shape, strides: Shape, node: Node | None = None, slot: int = 0) -> Tensor:
    return Tensor(shape, strides, x.dtype, x.storage, node, slot)


def _broadcast(a: Shape, b: Shape) -> Shape:
    if a == b:
        return a
    if len(a) < len(b):
        a, b = b, a
    b = (1,) * (len(a) - len(b)) + b
    return tuple(y if x == 1 else x for x, y in zip(a, b))


def _sum_to(t: Tape, grad: Tensor, shape: Shape, dtype: DType) -> Tensor:
    """The engine's validate_outputs: reduce a broadcast gradient, then cast it to the input's dtype."""
    if grad.shape != shape:
        grad = t.new(shape, grad.dtype, "sum_to_size")
    if grad.dtype is not dtype:
        grad = t.new(grad.shape, dtype, "cast_grad", dense_like(grad.shape, grad.strides))
    return grad


# -- views ---------------------------------------------------------------------------------------------------------


def _view_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (_reshape_nograd(t, grad, node.ctx),)


def _reshape_nograd(t: Tape, x: Tensor, shape: Shape) -> Tensor:
    strides = viewed_strides(x.shape, x.strides, shape)
    if strides is None:
        return t.new(shape, x.dtype, "reshape_copy")
    return Tensor(shape, strides, x.dtype, x.storage, is_view=True)


def _infer(x: Tensor, shape: Shape) -> Shape:
    if -1 in shape:
        known = 1
        for size in shape:
            if size != -1:
                known *= size
        return tuple(x.numel // known if size == -1 else size for size in shape)
    return shape


def reshape(x: Tensor, *shape: int) -> Tensor:
    """A view where the strides allow it, else a contiguous copy."""
    target = _infer(x, shape)
    strides = viewed_strides(x.shape, x.strides, target)
    if strides is None:
        return reshape(contiguous(x), *target)
    node = x.storage.tape.node(_view_backward, (x,), (), x.shape) if x.node is not None else None
    return Tensor(target, strides, x.dtype, x.storage, node)


def transpose(x: Tensor, a: int, b: int) -> Tensor:
    """Swap two dimensions (a view)."""
    shape, strides = list(x.shape), list(x.strides)
    shape[a], shape[b] = shape[b], shape[a]
    strides[a], strides[b] = strides[b], strides[a]
    node = x.storage.tape.node(_transpose_backward, (x,), (), (a, b)) if x.node is not None else None
    return Tensor(tuple(shape), tuple(strides), x.dtype, x.storage, node)


def _transpose_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    a, b = node.ctx
    shape, strides = list(grad.shape), list(grad.strides)
    shape[a], shape[b] = shape[b], shape[a]
    strides[a], strides[b] = strides[b], strides[a]
    return (Tensor(tuple(shape), tuple(strides), grad.dtype, grad.storage, is_view=True),)


def permute(x: Tensor, *dims: int) -> Tensor:
    """Reorder dimensions (a view)."""
    node = x.storage.tape.node(_permute_backward, (x,), (), dims) if x.node is not None else None
    return Tensor(tuple(x.shape[d] for d in dims), tuple(x.strides[d] for d in dims), x.dtype, x.storage, node)


def _permute_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    inverse = sorted(range(len(node.ctx)), key=lambda i: node.ctx[i] % len(node.ctx))
    shape, strides = (tuple(of[d] for d in inverse) for of in (grad.shape, grad.strides))
    return (Tensor(shape, strides, grad.dtype, grad.storage, is_view=True),)


def unsqueeze(x: Tensor, dim: int) -> Tensor:
    """Insert a dimension of size 1 (a view)."""
    if dim < 0:
        dim += len(x.shape) + 1
    shape = (*x.shape[:dim], 1, *x.shape[dim:])
    step = x.shape[dim] * x.strides[dim] if dim < len(x.shape) else 1
    node = x.storage.tape.node(_view_backward, (x,), (), x.shape) if x.node is not None else None
    return Tensor(shape, (*x.strides[:dim], step, *x.strides[dim:]), x.dtype, x.storage, node)


def squeeze(x: Tensor, dim: int) -> Tensor:
    """Drop a dimension of size 1 (a view)."""
    if dim < 0:
        dim += len(x.shape)
    node = x.storage.tape.node(_view_backward, (x,), (), x.shape) if x.node is not None else None
    return Tensor(x.shape[:dim] + x.shape[dim + 1 :], x.strides[:dim] + x.strides[dim + 1 :], x.dtype, x.storage, node)


def expand(x: Tensor, *shape: int) -> Tensor:
    """Repeat dimensions of size 1 without copying (a view with stride 0)."""
    lead = len(shape) - len(x.shape)
    own = (1,) * lead + x.shape
    strides = (0,) * lead + x.strides
    target = tuple(o if s == -1 else s for o, s in zip(own, shape))
    if target == x.shape:
        return x
    strides = tuple(st if o == s else 0 for o, s, st in zip(own, target, strides))
    node = x.storage.tape.node(_expand_backward, (x,), (), x.shape) if x.node is not None else None
    return Tensor(target, strides, x.dtype, x.storage, node)


def _expand_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (_sum_to(t, grad, node.ctx, grad.dtype),)


def narrow(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    """A slice along one dimension (a view). Backward writes into zeros of the whole shape."""
    if dim < 0:
        dim += len(x.shape)
    if length == x.shape[dim]:  # indexing by x[..., :n] makes an alias of the whole
        node = x.storage.tape.node(_pass_backward, (x,)) if x.node is not None else None
        return _alias(x, x.shape, x.strides, node)
    node = x.storage.tape.node(_slice_backward, (x,), (), x.shape) if x.node is not None else None
    return Tensor((*x.shape[:dim], length, *x.shape[dim + 1 :]), x.strides, x.dtype, x.storage, node)


def _slice_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (t.new(node.ctx, grad.dtype, "slice_backward"),)


def every(x: Tensor, start: int, step: int) -> Tensor:
    """x[..., start::step] (a view). Backward writes into zeros of the whole shape."""
    node = x.storage.tape.node(_slice_backward, (x,), (), x.shape) if x.node is not None else None
    length = -(-(x.shape[-1] - start) // step)
    return Tensor((*x.shape[:-1], length), (*x.strides[:-1], x.strides[-1] * step), x.dtype, x.storage, node)


def select(x: Tensor, dim: int, index: int) -> Tensor:
    """One index along a dimension (a view). Backward writes into zeros of the whole shape."""
    if dim < 0:
        dim += len(x.shape)
    node = x.storage.tape.node(_slice_backward, (x,), (), x.shape) if x.node is not None else None
    return Tensor(x.shape[:dim] + x.shape[dim + 1 :], x.strides[:dim] + x.strides[dim + 1 :], x.dtype, x.storage, node)


def split(x: Tensor, sizes: int | tuple[int, ...], dim: int = -1) -> list[Tensor]:
    """Consecutive slices (views) of one node. Backward concatenates, with zeros for parts without a gradient."""
    if dim < 0:
        dim += len(x.shape)
    if isinstance(sizes, int):
        whole, rest = divmod(x.shape[dim], sizes)
        sizes = (sizes,) * whole + ((rest,) if rest else ())
    shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
    node = None
    if x.node is not None:
        node = x.storage.tape.node(_split_backward, (x,), (), (x.shape, shapes, x.dtype), outputs=len(sizes))
    return [Tensor(shape, x.strides, x.dtype, x.storage, node, i) for i, shape in enumerate(shapes)]


def chunk(x: Tensor, chunks: int, dim: int = -1) -> list[Tensor]:
    """torch.chunk."""
    return split(x, -(-x.shape[dim] // chunks), dim)


def _split_backward(t: Tape, node: Node, grads: Any, saved: Any) -> Grads:
    shape, shapes, dtype = node.ctx
    parts = grads if len(shapes) > 1 else [grads]  # a node of one output is given its gradient alone
    zeros = [t.new(shapes[i], dtype, "zeros") for i, g in enumerate(parts) if g is None]
    out = t.new(shape, dtype, "cat")
    del zeros
    return (out,)


def unbind(x: Tensor, dim: int) -> list[Tensor]:
    """All indices along a dimension (views) of one node. Backward stacks."""
    if dim < 0:
        dim += len(x.shape)
    shape = x.shape[:dim] + x.shape[dim + 1 :]
    strides = x.strides[:dim] + x.strides[dim + 1 :]
    n = x.shape[dim]
    node = None
    if x.node is not None:
        node = x.storage.tape.node(_split_backward, (x,), (), (x.shape, [shape] * n, x.dtype), outputs=n)
    return [Tensor(shape, strides, x.dtype, x.storage, node, i) for i in range(n)]


def contiguous(x: Tensor) -> Tensor:
    """x itself if it is contiguous, else a copy."""
    if is_contiguous(x.shape, x.strides):
        return x
    t = x.storage.tape
    node = t.node(_pass_backward, (x,)) if x.node is not None else None
    out = t.new(x.shape, x.dtype, "clone")
    out.node = node
    return out


def clone(x: Tensor) -> Tensor:
    """x.clone()."""
    t = x.storage.tape
    node = t.node(_pass_backward, (x,)) if x.node is not None else None
    out = t.new_like(x, "clone")
    out.node = node
    return out


def copy_slice(base: Tensor, source: Tensor, start: int) -> Tensor:
    """base[..., start : start + n].copy_(source): base's storage, another node (CopySlices)."""
    context = (base.shape, base.strides, source.shape, source.dtype)
    node = base.storage.tape.node(_copy_slice_backward, (base, source), (), context)
    return _alias(base, base.shape, base.strides, node)


def _copy_slice_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    """A copy of the gradient for base, in which zeros replace the slice; a copy of the slice for source."""
    shape, strides, source_shape, source_dtype = node.ctx
    result = t.new(shape, grad.dtype, "copy_slices", strides)
    piece = t.new(source_shape, grad.dtype, "clone", dense_like(source_shape, strides))
    zeros = t.new_like(piece, "zeros") if node.edges[0] is not None else None
    piece = to(piece, source_dtype)
    del zeros
    return result if node.edges[0] is not None else None, piece if node.edges[1] is not None else None


def detach(x: Tensor) -> Tensor:
    """The same storage without gradient."""
    return Tensor(x.shape, x.strides, x.dtype, x.storage)


def _pass_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (grad,)


# -- casts ---------------------------------------------------------------------------------------------------------


def to(x: Tensor, dtype: DType) -> Tensor:
    """x itself if it has that dtype, else a copy."""
    if x.dtype is dtype:
        return x
    t = x.storage.tape
    node = t.node(_to_backward, (x,), (), x.dtype) if x.node is not None else None
    out = t.new(x.shape, dtype, "to", dense_like(x.shape, x.strides))
    out.node = node
    return out


def _to_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (t.new(grad.shape, node.ctx, "to_backward", dense_like(grad.shape, grad.strides)),)


def float_(x: Tensor) -> Tensor:
    """x.float()."""
    return to(x, float32)


def _lower(t: Tape, x: Tensor) -> Tensor:
    """autocast's cast to the low-precision dtype, with its cache for weights."""
    dtype = t.autocast
    if dtype is None or x.dtype is dtype or not x.dtype.is_floating:
        return x
    return t.cached_cast(x, dtype, to)


def _upper(t: Tape, x: Tensor, op: str) -> Tensor:
    """autocast's cast to float32 for the operations on the device's list."""
    if t.autocast is not None and x.dtype is not float32 and op in t.rules.autocast_float32:
        return to(x, float32)
    return x


# -- elementwise ---------------------------------------------------------------------------------------------------


def _result_strides(a: Tensor, b: Tensor, shape: Shape) -> Shape:
    """The layout of an elementwise result."""
    if a.shape == shape and is_dense(shape, a.strides):
        return a.strides
    return iterated_strides(shape, ((a.shape, a.strides), (b.shape, b.strides)))


def add(a: Tensor, b: Tensor | float) -> Tensor:
    """a + b with broadcasting and type promotion."""
    t = a.storage.tape
    if not isinstance(b, Tensor):
        node = t.node(_pass_backward, (a,)) if a.node is not None else None
        out = t.new_like(a, "add")
        out.node = node
        return out
    shape = _broadcast(a.shape, b.shape)
    node = t.node(_add_backward, (a, b), (), (a.shape, a.dtype, b.shape, b.dtype))
    out = t.new(shape, promote(a.dtype, b.dtype), "add", _result_strides(a, b, shape))
    out.node = node
    return out


def _add_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    a_shape, a_dtype, b_shape, b_dtype = node.ctx
    ga = gb = None
    if node.edges[0] is not None:
        ga = _sum_to(t, grad, a_shape, a_dtype)
    if node.edges[1] is not None:
        gb = _sum_to(t, grad, b_shape, b_dtype)
    return ga, gb


def add_(a: Tensor, b: Tensor) -> Tensor:
    """a += b: a's storage, another node."""
    node = a.storage.tape.node(_add_backward, (a, b), (), (a.shape, a.dtype, b.shape, b.dtype))
    return Tensor(a.shape, a.strides, a.dtype, a.storage, node)


def mul_(a: Tensor) -> Tensor:
    """a *= number (or /=): a's storage, another node."""
    node = a.storage.tape.node(_scale_backward, (a,)) if a.node is not None else None
    return Tensor(a.shape, a.strides, a.dtype, a.storage, node)


def sub(a: Tensor, b: Tensor | float) -> Tensor:
    """a - b."""
    if not isinstance(b, Tensor):
        return add(a, b)
    t = a.storage.tape
    shape = _broadcast(a.shape, b.shape)
    node = t.node(_sub_backward, (a, b), (), (a.shape, a.dtype, b.shape, b.dtype))
    out = t.new(shape, promote(a.dtype, b.dtype), "sub", _result_strides(a, b, shape))
    out.node = node
    return out


def _sub_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    a_shape, a_dtype, b_shape, b_dtype = node.ctx
    ga = gb = None
    if node.edges[1] is not None:
        gb = t.new_like(grad, "neg")
    if node.edges[0] is not None:
        ga = _sum_to(t, grad, a_shape, a_dtype)
    if gb is not None:
        gb = _sum_to(t, gb, b_shape, b_dtype)
    return ga, gb


def mul(a: Tensor, b: Tensor | float) -> Tensor:
    """a * b with broadcasting and type promotion. Each factor is saved if the other needs a gradient."""
    t = a.storage.tape
    if not isinstance(b, Tensor):
        node = t.node(_scale_backward, (a,)) if a.node is not None else None
        out = t.new_like(a, "mul")
        out.node = node
        return out
    shape = _broadcast(a.shape, b.shape)
    node = None
    if a.node is not None or b.node is not None:
        node = t.node(
            _mul_backward,
            (a, b),
            (b if a.node is not None else None, a if b.node is not None else None),
            (a.shape, a.dtype, b.shape, b.dtype),
        )
    out = t.new(shape, promote(a.dtype, b.dtype), "mul", _result_strides(a, b, shape))
    out.node = node
    return out


def _scale_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (t.new_like(grad, "scale_backward"),)


def _mul_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    a_shape, a_dtype, b_shape, b_dtype = node.ctx
    other_of_a, other_of_b = saved
    ga = gb = None
    if node.edges[1] is not None:
        gb = t.new(
            grad.shape,
            promote(grad.dtype, other_of_b.dtype),
            "mul_backward",
            _result_strides(grad, other_of_b, grad.shape),
        )
    if node.edges[0] is not None:
        ga = t.new(
            grad.shape,
            promote(grad.dtype, other_of_a.dtype),
            "mul_backward",
            _result_strides(grad, other_of_a, grad.shape),
        )
    del other_of_a, other_of_b
    if saved.__class__ is Recomputed:
        saved.clear()
    if ga is not None:
        ga = _sum_to(t, ga, a_shape, a_dtype)
    if gb is not None:
        gb = _sum_to(t, gb, b_shape, b_dtype)
    return ga, gb


def div(a: Tensor, b: Tensor | float) -> Tensor:
    """a / scalar."""
    assert not isinstance(b, Tensor)
    return mul(a, 1.0 / b)


def div_(a: Tensor, b: Tensor) -> Tensor:
    """a /= b: a's storage, another node, which saves b and, for b's gradient, a copy of a as it was."""
    t = a.storage.tape
    if not t.grad_enabled or (a.node is None and b.node is None):
        return a
    shapes = (a.shape, a.dtype, b.shape, b.dtype)
    copy = t.new_like(a, "clone") if b.node is not None else None
    node = t.node(_div_backward, (a, b), (copy, b if a.node is not None else None), shapes)
    return _alias(a, a.shape, a.strides, node)


def _div_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    """grad / b and -grad * ((a / b) / b), the second one C++ expression whose temporaries die together."""
    a_shape, a_dtype, b_shape, b_dtype = node.ctx
    ga = gb = None
    if node.edges[1] is not None:
        temporaries = [t.new_like(grad, name) for name in ("div", "div", "neg")]
        gb = t.new_like(grad, "div_backward")
        del temporaries
    if node.edges[0] is not None:
        ga = _sum_to(t, t.new_like(grad, "div_backward"), a_shape, a_dtype)
    if gb is not None:
        gb = _sum_to(t, gb, b_shape, b_dtype)
    return ga, gb


def neg(x: Tensor) -> Tensor:
    """-x."""
    return mul(x, -1.0)


def _unary(x: Tensor, name: str, save: str) -> Tensor:
    """An elementwise function whose backward needs its input or its result and one new tensor."""
    t = x.storage.tape
    x = _upper(t, x, name)
    node = None
    if x.node is not None:
        node = t.node(_unary_backward, (x,), (x,) if save == "input" else (), name)
    out = t.new_like(x, name)
    if node is not None:
        if save == "result":
            t.save(node, out)
        out.node = node
    return out


def _unary_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (t.new_like(grad, node.ctx + "_backward"),)


def silu(x: Tensor) -> Tensor:
    """Saves its input."""
    return _unary(x, "silu", "input")


def gelu(x: Tensor) -> Tensor:
    """F.gelu, either approximation; saves its input."""
    return _unary(x, "gelu", "input")


def relu(x: Tensor) -> Tensor:
    """Saves its result."""
    return _unary(x, "relu", "result")


def tanh(x: Tensor) -> Tensor:
    """Saves its result."""
    return _unary(x, "tanh", "result")


def sigmoid(x: Tensor) -> Tensor:
    """Saves its result."""
    return _unary(x, "sigmoid", "result")


def cos(x: Tensor) -> Tensor:
    """Used without gradient (rotary tables)."""
    return _unary(x, "cos", "input")


def sin(x: Tensor) -> Tensor:
    """Used without gradient (rotary tables)."""
    return _unary(x, "sin", "input")


def erf(x: Tensor) -> Tensor:
    """Saves its input."""
    t = x.storage.tape
    node = t.node(_erf_backward, (x,), (x,)) if x.node is not None else None
    out = t.new_like(x, "erf")
    out.node = node
    return out


def _erf_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    """2 / sqrt(pi) * exp(-x.pow(2)) * grad, one C++ expression: its temporaries die together."""
    temporaries = [t.new_like(saved[0], name) for name in ("pow", "neg", "exp", "mul")]
    out = t.new_like(grad, "erf_backward")
    del temporaries
    return (out,)


def pow_(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent; saves its input. Backward of a square: grad * (2 * x)."""
    t = x.storage.tape
    x = _upper(t, x, "pow")
    node = t.node(_pow_backward, (x,), (x,), exponent) if x.node is not None else None
    out = t.new_like(x, "pow")
    out.node = node
    return out


def _pow_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    """pow_backward: grad * (exponent * self.pow(exponent - 1)), one C++ expression: its temporaries die together."""
    x = saved[0]
    power = t.new_like(x, "pow")
    scaled = t.new_like(x, "mul")
    out = t.new(x.shape, promote(grad.dtype, x.dtype), "pow_backward", _result_strides(grad, scaled, x.shape))
    del power, scaled
    return (out,)


def rsqrt(x: Tensor) -> Tensor:
    """Saves its result."""
    t = x.storage.tape
    x = _upper(t, x, "rsqrt")
    node = t.node(_rsqrt_backward, (x,)) if x.node is not None else None
    out = t.new_like(x, "rsqrt")
    if node is not None:
        t.save(node, out)
        out.node = node
    return out


def _rsqrt_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    scaled = t.new_like(grad, "mul")
    cubed = t.new_like(grad, "pow")
    out = t.new_like(grad, "rsqrt_backward")
    del scaled, cubed
    return (out,)


def mean(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """The mean over one dimension."""
    t = x.storage.tape
    if dim < 0:
        dim += len(x.shape)
    shape = (*x.shape[:dim], 1, *x.shape[dim + 1 :]) if keepdim else x.shape[:dim] + x.shape[dim + 1 :]
    node = t.node(_mean_backward, (x,), (), (x.shape, dim, keepdim)) if x.node is not None else None
    out = t.new(shape, x.dtype, "mean")
    out.node = node
    return out


def _mean_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    """expand, then divide: one new tensor of the input's shape."""
    shape, _, _ = node.ctx
    return (t.new(shape, grad.dtype, "mean_backward"),)


def sum_(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """The sum over one dimension. Backward only expands."""
    t = x.storage.tape
    x = _upper(t, x, "sum")
    if dim < 0:
        dim += len(x.shape)
    shape = (*x.shape[:dim], 1, *x.shape[dim + 1 :]) if keepdim else x.shape[:dim] + x.shape[dim + 1 :]
    node = t.node(_sum_backward, (x,), (), (x.shape, dim, keepdim)) if x.node is not None else None
    out = t.new(shape, x.dtype, "sum")
    out.node = node
    return out


def _sum_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    shape, dim, keepdim = node.ctx
    strides = list(grad.strides)
    if keepdim:
        strides[dim] = 0
    else:
        strides.insert(dim, 0)
    return (Tensor(shape, tuple(strides), grad.dtype, grad.storage, is_view=True),)


def clamp_(x: Tensor) -> Tensor:
    """x.clamp_(min, max): x's own storage with a new history, for which x is copied before it is overwritten."""
    t = x.storage.tape
    if x.node is None or not t.grad_enabled:
        return x
    node = t.node(_clamp_backward, (x,), (t.new_like(x, "clone"),))
    return _alias(x, x.shape, x.strides, node)


def clamp(x: Tensor) -> Tensor:
    """torch.clamp(x, min, max); saves its input."""
    t = x.storage.tape
    node = t.node(_clamp_backward, (x,), (x,)) if x.node is not None else None
    out = t.new_like(x, "clamp")
    out.node = node
    return out


def _clamp_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    """where(self >= min and self <= max, grad, 0)."""
    above = t.new(grad.shape, bool_, "ge")
    below = t.new(grad.shape, bool_, "le")
    out = t.new_like(grad, "where")
    del above, below
    return (out,)


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout in training: saves the mask. The identity for p = 0 outside training."""
    t = x.storage.tape
    if not t.training:
        return x
    if p == 0.0:
        return x
    node = t.node(_dropout_backward, (x,)) if x.node is not None else None
    out = t.rules.dropout(t, x, node)
    out.node = node
    return out


def _dropout_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (t.new_like(grad, "dropout_backward"),)


# -- matrix products -----------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear. Saves x if the weight needs a gradient, and the weight if x does.

    x: [..., in], weight: [out, in]. Without bias it is a matmul (x folded to 2-D, copied where it is not
    contiguous); with bias an addmm.
    """
    t = x.storage.tape
    if t.zero3_linear:
        return _zero3_linear(t, x, weight, bias)
    if t.autocast is not None:  # C++ evaluates the casts from the last argument to the first
        if bias is not None:
            bias = _lower(t, bias)
        weight = _lower(t, weight)
        x = _lower(t, x)
    return _matmul_weight(t, x, weight, bias, weight.shape[0], weight.shape[1], "linear")


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """transformers' Conv1D: addmm(bias, x.view(-1, in), weight) with weight [in, out]."""
    t = x.storage.tape
    if t.autocast is not None:
        weight, x, bias = _lower(t, weight), _lower(t, x), _lower(t, bias)
    return _matmul_weight(t, x, weight, bias, weight.shape[1], weight.shape[0], "addmm")


def _zero3_linear(t: Tape, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """LinearFunctionForZeroStage3 of deepspeed/runtime/zero/linear.py (memory_efficient_linear), which ZeRO-3 puts in
    F.linear's place: it saves all it gets, even where a weight is frozen, once the result is there.
    """
    n_out, n_in = weight.shape
    node = t.node(_zero3_linear_backward, (x, weight, bias), (), (x.shape, weight.shape, x.dtype))
    t.count(2 * x.numel * n_out)
    folded = reshape(x, -1, n_in) if not is_contiguous(x.shape, x.strides) else None
    out = t.new((*x.shape[:-1], n_out), x.dtype, "linear")
    del folded
    t.save(node, x, weight, bias)
    out.node = node
    return out


def _zero3_linear_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    x_shape, weight_shape, dtype = node.ctx
    rows = grad.numel // weight_shape[0]
    gx = gw = gb = None
    if node.edges[0] is not None:
        t.count(2 * grad.numel * weight_shape[1])
        gx = t.new(x_shape, dtype, "linear_grad_input")
    if node.edges[1] is not None:
        t.count(2 * grad.numel * weight_shape[1])
        folded = (
            _reshape_nograd(t, grad, (rows, weight_shape[0])) if not is_contiguous(grad.shape, grad.strides) else None
        )
        gw = t.new(weight_shape, dtype, "linear_grad_weight")
        del folded
    if node.edges[2] is not None:
        gb = t.new((weight_shape[0],), dtype, "linear_grad_bias")
    return gx, gw, gb


def _matmul_weight(t: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, n_out: int, n_in: int, name: str) -> Tensor:
    lead = x.shape[:-1]
    rows = 1
    for size in lead:
        rows *= size
    if not is_contiguous(x.shape, x.strides):
        x = reshape(x, rows, n_in)
    node = None
    if x.node is not None or weight.node is not None or (bias is not None and bias.node is not None):
        node = t.node(
            _linear_backward,
            (bias, x, weight),  # addmm's order, in which gradients reach their weights
            (x if weight.node is not None else None, weight if x.node is not None else None),
            (x.shape, weight.shape, weight.strides, n_out, n_in, rows, x.dtype, name == "linear"),
        )
    t.count(2 * rows * n_in * n_out)
    out = t.new((*lead, n_out), x.dtype, name)
    out.node = node
    return out


def _linear_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    x_shape, w_shape, w_strides, n_out, n_in, rows, dtype, transposed = node.ctx
    if not is_contiguous(grad.shape, grad.strides):
        grad = _reshape_nograd(t, grad, (rows, n_out))
    gx = gw = gb = None
    if node.edges[1] is not None and node.edges[0] is not None:  # AddmmBackward0 begins with it, MmBackward0 does not
        t.count(2 * rows * n_in * n_out)
        gx = t.new(x_shape, dtype, "linear_grad_input")
    if node.edges[2] is not None:
        t.count(2 * rows * n_in * n_out)
        gw = t.new(w_shape, dtype, "linear_grad_weight", w_strides)
    if node.edges[1] is not None and gx is None:
        t.count(2 * rows * n_in * n_out)
        gx = t.new(x_shape, dtype, "linear_grad_input")
    if node.edges[0] is not None:
        gb = t.new((n_out,), dtype, "linear_grad_bias")
    if gx is not None:  # both are views of products of matrices
        gx.is_view = len(x_shape) > 2
    if gw is not None:
        gw.is_view = transposed
    return gb, gx, gw


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Batched matmul: leading dimensions are broadcast and folded to bmm, saved as folded. A 2-D b makes it an mm."""
    t = a.storage.tape
    if t.autocast is not None:
        b, a = _lower(t, b), _lower(t, a)
    if len(b.shape) == 2:
        return _matmul_weight(t, a, b, None, b.shape[1], b.shape[0], "matmul")
    lead = _broadcast(a.shape[:-2], b.shape[:-2])
    batch = 1
    for size in lead:
        batch *= size
    m, k = a.shape[-2:]
    n = b.shape[-1]
    a = reshape(expand(a, *lead, m, k), batch, m, k)
    b = reshape(expand(b, *lead, k, n), batch, k, n)
    out = bmm(a, b)
    return reshape(out, *lead, m, n)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """torch.bmm; each factor is saved if the other needs a gradient."""
    t = a.storage.tape
    if t.autocast is not None:
        b, a = _lower(t, b), _lower(t, a)
    batch, m, k = a.shape
    n = b.shape[-1]
    node = None
    if a.node is not None or b.node is not None:
        node = t.node(
            _bmm_backward,
            (a, b),
            (a if b.node is not None else None, b if a.node is not None else None),
            (a.shape, b.shape, b.strides, 2 * batch * m * k * n),
        )
    t.count(2 * batch * m * k * n)
    out = t.new((batch, m, n), a.dtype, "bmm")
    out.node = node
    return out


def _bmm_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    a_shape, b_shape, b_strides, flops = node.ctx
    ga = gb = None
    if node.edges[1] is not None:
        t.count(flops)
        gb = t.new(b_shape, grad.dtype, "bmm_grad")
    if node.edges[0] is not None:
        t.count(flops)
        ga = t.new(a_shape, grad.dtype, "bmm_grad")
    return ga, gb


def baddbmm(x: Tensor, batch1: Tensor, batch2: Tensor) -> Tensor:
    """beta * x + alpha * (batch1 @ batch2), alpha other than 1, x without gradient; saves both factors."""
    t = x.storage.tape
    if t.autocast is not None:
        batch2, batch1, x = _lower(t, batch2), _lower(t, batch1), _lower(t, x)
    batch, m, k = batch1.shape
    n = batch2.shape[-1]
    node = t.node(_baddbmm_backward, (batch1, batch2), (batch1, batch2), 2 * batch * m * k * n)
    t.count(2 * batch * m * k * n)
    out = t.new((batch, m, n), batch1.dtype, "baddbmm")
    out.node = node
    return out


def _baddbmm_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    """maybe_multiply(bmm, alpha) for each factor."""
    grads: list[Tensor] = []
    for factor in saved:
        t.count(node.ctx)
        product = t.new(factor.shape, grad.dtype, "bmm_grad")
        grads.append(t.new_like(product, "scale_backward"))
        del product
    return grads


def conv2d(x: Tensor, weight: Tensor, bias: Tensor, stride: Shape) -> Tensor:
    """F.conv2d without padding: x [N, C, H, W], weight [O, C, kH, kW] -> [N, O, H', W']. Saves x and the weight.

    cuDNN's workspace is not modelled: its heuristics choose it per device and shape.
    """
    t = x.storage.tape
    if t.autocast is not None:
        bias, weight, x = _lower(t, bias), _lower(t, weight), _lower(t, x)
    channels, _, *kernel = weight.shape
    places = tuple((size - k) // step + 1 for size, k, step in zip(x.shape[2:], kernel, stride))
    shape = (x.shape[0], channels, *places)
    flops = 2 * x.shape[0] * places[0] * places[1] * weight.numel
    node = t.node(_conv2d_backward, (x, weight, bias), (x, weight), flops)
    t.count(flops)
    out = t.new(shape, x.dtype, "conv2d")
    out.node = node
    return out


def _conv2d_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    x, weight = saved
    if t.rules.kind == "cuda":  # inside the operation, which a dispatch mode cannot see
        grad = contiguous(grad)
    gx = gw = gb = None
    if node.edges[0] is not None:
        t.count(node.ctx)
        gx = t.new(x.shape, x.dtype, "conv2d_grad_input")
    if node.edges[1] is not None:
        t.count(node.ctx)
        gw = t.new(weight.shape, weight.dtype, "conv2d_grad_weight")
    if node.edges[2] is not None:
        gb = t.new(weight.shape[:1], weight.dtype, "conv2d_grad_bias")
    return gx, gw, gb


# -- normalisation, softmax, embedding -----------------------------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """F.layer_norm over the last dimension: saves its input, mean and rstd."""
    t = x.storage.tape
    if t.autocast is not None and "layer_norm" in t.rules.autocast_float32:
        x = _upper(t, x, "layer_norm")
        weight = _upper(t, weight, "layer_norm") if weight is not None else None
        bias = _upper(t, bias, "layer_norm") if bias is not None else None
    node = t.node(_layer_norm_backward, (x, weight, bias), (x, weight, bias))
    copy = contiguous(detach(x))  # the kernel's own, where x is strided
    out = t.new(x.shape, x.dtype, "layer_norm")
    stat = (*x.shape[:-1], 1)
    stats = t.rules.layer_norm_stats(x.dtype, weight.dtype if weight is not None else x.dtype)
    mean_, rstd = t.new(stat, stats, "layer_norm_mean"), t.new(stat, stats, "layer_norm_rstd")
    del copy
    if node is not None:
        t.save(node, mean_, rstd)
        out.node = node
    return out


def _layer_norm_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    x, weight, bias = saved[:3]
    grad, copy = contiguous(grad), contiguous(x)
    gx = t.new(x.shape, x.dtype, "layer_norm_backward") if node.edges[0] is not None else None
    gw = t.new(weight.shape, weight.dtype, "layer_norm_grad_weight") if node.edges[1] is not None else None
    gb = t.new(bias.shape, bias.dtype, "layer_norm_grad_bias") if node.edges[2] is not None else None
    del copy
    return gx, gw, gb


def softmax(x: Tensor, dtype: DType | None = None) -> Tensor:
    """softmax over the last dimension, in ``dtype`` if given; saves its result."""
    t = x.storage.tape
    if dtype is None and t.autocast is not None and "softmax" in t.rules.autocast_float32:
        dtype = float32  # autocast names a dtype here (fp32_set_opt_dtype) rather than casting the argument
    source = x  # not x itself: the caller may have left the input to us, and torch keeps it until the end
    if dtype is not None and dtype is not x.dtype:
        source = t.rules.softmax_input(x, dtype, to)
    node = t.node(_softmax_backward, (source,), _kept(source), (source.dtype,)) if x.node is not None else None
    out = t.new(x.shape, dtype or x.dtype, "softmax")
    if node is not None:
        t.save(node, out)
        out.node = node
    return out


def safe_softmax(x: Tensor) -> Tensor:
    """at::_safe_softmax of math attention: a softmax, then its wholly masked rows set to zero in place."""
    out = softmax(x)
    if x.storage.tape.rules.kind == "cuda":  # inside one operation, which a dispatch mode cannot see
        x.storage.tape.scratch(x.numel, "isneginf")
    return out


def _kept(x: Tensor) -> tuple[Tensor, ...]:
    """What softmax saves of its input."""
    return (x,) if x.storage.tape.rules.softmax_keeps_input else ()


def _softmax_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (t.new(grad.shape, node.ctx[0], "softmax_backward"),)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """F.embedding; saves the ids. Backward makes a dense gradient of the whole table."""
    t = ids.storage.tape
    node = (
        t.node(_embedding_backward, (weight,), (ids,), (weight.shape, weight.dtype))
        if weight.node is not None
        else None
    )
    out = t.new((*ids.shape, weight.shape[-1]), weight.dtype, "embedding")
    out.node = node
    return out


def _embedding_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    shape, dtype = node.ctx
    return (t.new(shape, dtype, "embedding_backward"),)


def index_rows(x: Tensor, rows: int) -> Tensor:
    """x[arange, index] of [B, S, C]: a gather of ``rows`` rows; backward scatters into zeros of x's shape."""
    t = x.storage.tape
    node = t.node(_index_backward, (x,), (), x.shape) if x.node is not None else None
    out = t.new((rows, x.shape[-1]), x.dtype, "index")
    out.node = node
    return out


def _index_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    """zeros, and index_put_ into them, which under a dispatch mode is index_put."""
    zeros = t.new(node.ctx, grad.dtype, "zeros")
    if t.accumulate_in_place:
        return (zeros,)
    return (t.new(node.ctx, grad.dtype, "index_put"),)


def take_one(x: Tensor, dim: int) -> Tensor:
    """x[:, ..., [i]]: one index along a dimension, which stays with size 1: a copy; backward scatters into zeros."""
    t = x.storage.tape
    index = t.new((1,), int64, "index")
    node = t.node(_index_backward, (x,), (index,), x.shape) if x.node is not None else None
    out = t.new((*x.shape[:dim], 1, *x.shape[dim + 1 :]), x.dtype, "index")
    out.node = node
    return out


def cat(tensors: Sequence[Tensor], dim: int = -1) -> Tensor:
    """torch.cat into a contiguous tensor; backward gives views of the gradient."""
    first = tensors[0]
    t = first.storage.tape
    if dim < 0:
        dim += len(first.shape)
    total = 0
    dtype = first.dtype
    for x in tensors:
        total += x.shape[dim]
        dtype = promote(dtype, x.dtype)
    if t.autocast is not None and "cat" in t.rules.autocast_promote:
        tensors = [to(x, dtype) for x in tensors]
    node = t.node(_cat_backward, tensors, (), [(x.shape, x.dtype) for x in tensors])
    out = t.new((*first.shape[:dim], total, *first.shape[dim + 1 :]), dtype, "cat")
    out.node = node
    return out


def _cat_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return [
        _sum_to(t, Tensor(shape, grad.strides, grad.dtype, grad.storage, is_view=True), shape, dtype)
        if node.edges[i] is not None
        else None
        for i, (shape, dtype) in enumerate(node.ctx)
    ]


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """torch.stack of equal shapes and dtypes along a new last dimension; backward gives views of the gradient."""
    first = tensors[0]
    t = first.storage.tape
    node = t.node(_stack_backward, tensors)
    out = t.new((*first.shape, len(tensors)), first.dtype, "stack")
    out.node = node
    return out


def _stack_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    view = Tensor(grad.shape[:-1], grad.strides[:-1], grad.dtype, grad.storage, is_view=True)
    return [view if edge is not None else None for edge in node.edges]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """F.cross_entropy of [rows, classes]: log_softmax saves its result; nll_loss saves it too, with the labels.

    log_softmax is called with the dtype of the logits, so autocast leaves it there: CUDA's autocast raises nll_loss
    alone, which then saves a float32 copy; CPU's raises cross_entropy_loss as a whole (ATen/native/LossNLL.cpp).
    """
    t = logits.storage.tape
    logits = _upper(t, logits, "cross_entropy_loss")
    node = t.node(_log_softmax_backward, (logits,), _kept(logits), logits.dtype) if logits.node is not None else None
    log_probs = t.new(logits.shape, logits.dtype, "log_softmax")
    if node is not None:
        t.save(node, log_probs)
        log_probs.node = node
    log_probs = _upper(t, log_probs, "nll_loss")
    node = t.node(_nll_backward, (log_probs,), (log_probs, labels)) if log_probs.node is not None else None
    out = t.new((), log_probs.dtype, "nll_loss")
    total = t.new((), log_probs.dtype, "nll_total_weight")
    if node is not None:
        t.save(node, total)
        out.node = node
    return out


def _nll_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (t.new(saved[0].shape, saved[0].dtype, "nll_loss_backward"),)


def _log_softmax_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (t.new(grad.shape, node.ctx, "log_softmax_backward"),)


def arange(t: Tape, n: int) -> Tensor:
    """torch.arange(n): int64."""
    return t.new((n,), int64, "arange")


def pad_last(x: Tensor, extra: int) -> Tensor:
    """F.pad of the last dimension; backward cuts the gradient into a new tensor."""
    t = x.storage.tape
    node = t.node(_pad_backward, (x,), (), x.shape) if x.node is not None else None
    out = t.new((*x.shape[:-1], x.shape[-1] + extra), x.dtype, "pad")
    out.node = node
    return out


def _pad_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (t.new(node.ctx, grad.dtype, "pad_backward"),)


def logical_and(x: Tensor, other: Tensor) -> Tensor:
    """x & other of booleans."""
    return x.storage.tape.new(_broadcast(x.shape, other.shape), bool_, "logical_and")


def compare(x: Tensor, other: Tensor) -> Tensor:
    """An elementwise comparison: a boolean result."""
    return x.storage.tape.new(_broadcast(x.shape, other.shape), bool_, "compare")


def masked_fill(x: Tensor, mask: Tensor) -> Tensor:
    """x.masked_fill(mask, value); saves the mask."""
    t = x.storage.tape
    node = t.node(_masked_fill_backward, (x,), (mask,)) if x.node is not None else None
    out = t.new_like(x, "masked_fill")
    out.node = node
    return out


def _masked_fill_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (t.new_like(grad, "masked_fill_backward"),)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """torch.gather along the last dimension; saves both. Backward adds into zeros of x's shape."""
    t = x.storage.tape
    node = t.node(_gather_backward, (x,), (x, index)) if x.node is not None else None
    out = t.new(index.shape, x.dtype, "gather")
    out.node = node
    return out


def _gather_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    zeros = t.new(saved[0].shape, grad.dtype, "gather_backward")
    if t.accumulate_in_place:
        return (zeros,)
    return (t.new_like(zeros, "scatter_add"),)  # under a dispatch mode


def repeat(x: Tensor, times: int) -> Tensor:
    """x.repeat(times, 1, ...): a copy. Backward sums the copies' gradients."""
    t = x.storage.tape
    node = t.node(_repeat_backward, (x,), (), x.shape) if x.node is not None else None
    out = t.new((times * x.shape[0], *x.shape[1:]), x.dtype, "repeat")
    out.node = node
    return out


def _repeat_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (_sum_to(t, grad, node.ctx, grad.dtype),)


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """torch.where(condition, a, b); saves the condition."""
    t = condition.storage.tape
    shape = _broadcast(_broadcast(condition.shape, a.shape), b.shape)
    node = t.node(_where_backward, (a, b), (condition,), (a.shape, a.dtype, b.shape, b.dtype))
    operands = ((condition.shape, condition.strides), (a.shape, a.strides), (b.shape, b.strides))
    out = t.new(shape, promote(a.dtype, b.dtype), "where", iterated_strides(shape, operands))
    out.node = node
    return out


def _where_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    a_shape, a_dtype, b_shape, b_dtype = node.ctx
    zeros = t.new((), grad.dtype, "zeros")
    ga = t.new_like(grad, "where_backward") if node.edges[0] is not None else None
    gb = t.new_like(grad, "where_backward") if node.edges[1] is not None else None
    del zeros
    if ga is not None:
        ga = _sum_to(t, ga, a_shape, a_dtype)
    if gb is not None:
        gb = _sum_to(t, gb, b_shape, b_dtype)
    return ga, gb


# torch's method spellings.
_METHODS: dict[str, Any] = {
    "view": reshape,
    "reshape": reshape,
    "transpose": transpose,
    "permute": permute,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "expand": expand,
    "narrow": narrow,
    "select": select,
    "split": split,
    "chunk": chunk,
    "unbind": unbind,
    "contiguous": contiguous,
    "to": to,
    "float": float_,
    "detach": detach,
    "pow": pow_,
    "mean": mean,
    "sum": sum_,
    "__add__": add,
    "__radd__": add,
    "__sub__": sub,
    "__mul__": mul,
    "__rmul__": mul,
    "__truediv__": div,
    "__neg__": neg,
}
for _name, _function in _METHODS.items():
    setattr(Tensor, _name, _function)
