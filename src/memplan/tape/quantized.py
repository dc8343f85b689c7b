"""bitsandbytes' matrix products with quantized weights: what they save, dequantize and give back.

Read from bitsandbytes/autograd/_functions.py and bitsandbytes/backends/{default,cpu,cuda}/ops.py, 0.50.2, and measured
on CPU allocation by allocation (benchmarks/measurements/bitsandbytes). For CUDA the source alone speaks:

* 4 bit: a fused kernel reads the packed weight where there are few rows (up to 4 always; up to 1536 for some shapes on
  some GPUs); otherwise, and on CPU always, the weight is dequantized first. The table by GPU and shape is not
  repeated here: from 5 rows on the weight counts as dequantized, an upper bound of the forward's temporaries. The
  backward always dequantizes.
* int8: CUDA multiplies int8 by int8 (``MatMul8bitLt``), CPU dequantizes in training (``MatMul8bitFp``). Outlier
  columns of the input, whose number depends on the values, count as none: they would add their share of the input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from memplan.tape import ops
from memplan.tape.ops import Grads
from memplan.tape.tape import Node, Tape
from memplan.tape.tensor import DType, Parameter, Tensor, bool_, float16, float32, int8, int32

BLOCK = 64
"""Weights that share a scale in 4 bit (Params4bit's default)."""
NESTED_BLOCK = 256
"""Scales that share a scale under double quantization (functional.quantize_4bit)."""
FUSED_ROWS = 4
"""Rows up to which CUDA's fused 4-bit kernel is taken for every shape (_GEMM_4BIT_CUSTOM_FLOOR_M)."""


class Weight4bit(NamedTuple):
    """The shape of a packed weight and what dequantizing it makes."""

    n_out: int
    n_in: int
    dtype: DType
    """The dtype that was quantized: ``quant_state.dtype``, in which the backward dequantizes."""
    nested: bool
    """Double quantization: the scales are quantized too."""

    @property
    def numel(self) -> int:
        return self.n_out * self.n_in

    @property
    def blocks(self) -> int:
        """Scales of the weight."""
        return -(-self.numel // BLOCK)


def matmul_4bit(x: Tensor, weight: Weight4bit, bias: Tensor | None, packed: Parameter) -> Tensor:
    """bitsandbytes.matmul_4bit of x [..., in]: saves nothing but the ``packed`` weight, as ``ctx.tensors``."""
    t = x.storage.tape
    node = t.node(_matmul_4bit_backward, (_with_cast_gradient(t, x),), (), (x.shape, weight))
    with t.no_grad():
        out = _gemm_4bit(t, x, weight, bias)
    out.node = node
    if node is not None:
        t.keep_weight(packed)
    return out


def _with_cast_gradient(t: Tape, x: Tensor) -> Tensor:
    """x, for whose gradient a node of its own does the engine's cast to x's dtype once the product's node is done."""
    return Tensor(x.shape, x.strides, x.dtype, x.storage, t.node(_cast_gradient, (x,), (), x.dtype))


def _cast_gradient(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (grad.to(node.ctx),)


def _gemm_4bit(t: Tape, x: Tensor, weight: Weight4bit, bias: Tensor | None) -> Tensor:
    rows = x.numel // weight.n_in
    if t.rules.kind == "cuda" and rows <= FUSED_ROWS and weight.n_in % BLOCK == 0:
        x = x.contiguous()
        t.count(2 * rows * weight.numel)
        return t.new((*x.shape[:-1], weight.n_out), x.dtype, "gemm_4bit")
    scales = _dequantized_scales(t, weight, in_place=False)
    dense = t.new((weight.n_out, weight.n_in), x.dtype, "dequantize_4bit")
    out = ops.linear(x, dense, bias)
    del scales
    return out


def _dequantized_scales(t: Tape, weight: Weight4bit, in_place: bool) -> list[Tensor]:
    """float32 scales of a nested weight, the offset added; CUDA's forward keeps the table before the offset too."""
    if not weight.nested:
        return []
    scales = [t.new((weight.blocks,), float32, "dequantize_blockwise")]
    if not in_place:
        scales.append(t.new((weight.blocks,), float32, "absmax"))
        if t.rules.kind == "cpu":
            del scales[0]
    return scales


def _matmul_4bit_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    shape, weight = node.ctx
    scales = _dequantized_scales(t, weight, in_place=True)
    dense = t.new((weight.n_out, weight.n_in), weight.dtype, "dequantize_4bit")
    del scales
    dense = dense.to(grad.dtype)
    return (_times_weight(t, grad, dense, shape),)


def _times_weight(t: Tape, grad: Tensor, dense: Tensor, shape: tuple[int, ...]) -> Tensor:
    """matmul(grad [..., out], weight [out, in])."""
    n_out, n_in = dense.shape
    rows = grad.numel // n_out
    grad = ops.reshape(grad, rows, n_out)
    t.count(2 * rows * n_out * n_in)
    return t.new(shape, grad.dtype, "quantized_grad_input")


def matmul_8bit(x: Tensor, n_out: int, bias: Tensor | None) -> Tensor:
    """bitsandbytes.matmul of x [..., in] with an int8 weight [out, in].

    It keeps its whole input as ``ctx.A``: not as a saved tensor, so neither its own backward nor a checkpoint lets go
    of it before the loss dies.
    """
    t = x.storage.tape
    n_in = x.shape[-1]
    node = t.node(_matmul_8bit_backward, (x,), (), (x.shape, x.dtype, n_out, n_in))
    with t.no_grad():
        on_cpu = t.rules.kind == "cpu" and t.training
        out = _dequantized_int8(t, x, n_out, bias) if on_cpu else _int8(t, x, n_out, bias)
    if node is not None:
        t.keep(x)
        out.node = node
    return out


def _dequantized_int8(t: Tape, x: Tensor, n_out: int, bias: Tensor | None) -> Tensor:
    """MatMul8bitFp.forward."""
    dense = _dense_int8(t, n_out, x.shape[-1], x.dtype)
    return ops.linear(x, dense, bias)


def _dense_int8(t: Tape, n_out: int, n_in: int, dtype: DType) -> Tensor:
    """CB.to(dtype).mul_(SCB / 127): on CPU a 16-bit tensor is multiplied in place by way of two float32 copies."""
    dense = t.new((n_out, n_in), dtype, "dequantize_int8")
    scales = t.new((n_out, 1), float32, "SCB")
    if t.rules.kind == "cpu" and dtype is not float32:
        copies = [t.new((n_out, n_in), float32, "mul_") for _ in range(2)]
        del copies
    del scales
    return dense


def _int8(t: Tape, x: Tensor, n_out: int, bias: Tensor | None) -> Tensor:
    """MatMul8bitLt.forward: the input quantized row by row, an int32 product, and its result in float16 first."""
    *lead, n_in = x.shape
    a = ops.reshape(x, x.numel // n_in, n_in)
    rows = a.shape[0]
    half = a.to(float16)
    row_stats = t.new((rows,), float32, "SCA")
    quantized = t.new((rows, n_in), int8, "CA")
    absolute = t.new((rows, n_in), float16, "abs")
    outliers = t.new((rows, n_in), bool_, "outliers")
    del absolute, outliers, half
    t.count(2 * rows * n_in * n_out)
    product = t.new((rows, n_out), int32, "int8_linear_matmul")
    out = t.new((rows, n_out), float16, "int8_mm_dequant").to(x.dtype)
    del product, quantized, row_stats
    return out.view(*lead, n_out)


def _matmul_8bit_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    shape, dtype, n_out, n_in = node.ctx
    grad = ops.reshape(grad, grad.numel // n_out, n_out)
    dense = _dense_int8(t, n_out, n_in, dtype)
    return (_times_weight(t, grad.to(dtype), dense, shape),)
