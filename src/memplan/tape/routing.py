"""Operations of a mixture of experts: choosing by value, moving rows by index, matmuls in groups.

Where autograd scatters a gradient into zeros it does so in place, or into one more tensor under a dispatch mode
(areAnyTensorSubclassLike in FunctionsManual.cpp); ``Tape.accumulate_in_place`` tells which.
Sources: tools/autograd/derivatives.yaml, torch/csrc/autograd/FunctionsManual.cpp,
aten/src/ATen/native/{GroupedMMUtils.h,cuda/Indexing.cu,cuda/GroupMM.cu}, torch 2.13.
"""

from __future__ import annotations

from typing import Any

from memplan.tape.ops import Grads
from memplan.tape.tape import Node, Tape
from memplan.tape.tensor import DType, Shape, Tensor, bool_, int32, int64


def _scattered(t: Tape, shape: Shape, dtype: DType, name: str) -> Tensor:
    """Zeros into which a gradient has been scattered."""
    zeros = t.new(shape, dtype, "zeros")
    return zeros if t.accumulate_in_place else t.new(shape, dtype, name)


# -- choosing ------------------------------------------------------------------------------------------------------


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk over the last dimension: values and int64 indices; saves the indices."""
    t = x.storage.tape
    node = t.node(_topk_backward, (x,), (), x.shape) if x.node is not None else None
    shape = (*x.shape[:-1], k)
    values, indices = t.new(shape, x.dtype, "topk"), t.new(shape, int64, "topk_indices")
    t.save(node, indices)
    values.node = node
    return values, indices


def _topk_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    """value_selecting_reduction_backward."""
    return (_scattered(t, node.ctx, grad.dtype, "scatter"),)


def max_(x: Tensor) -> Tensor:
    """x.max(dim=-1).values; used without gradient."""
    t = x.storage.tape
    values = t.new(x.shape[:-1], x.dtype, "max")
    t.new(x.shape[:-1], int64, "max_indices")
    return values


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x.gather(1, index) of [T, E] and [T, k]; saves both."""
    t = x.storage.tape
    node = t.node(_gather_backward, (x,), (x, index)) if x.node is not None else None
    out = t.new(index.shape, x.dtype, "gather")
    out.node = node
    return out


def _gather_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (_scattered(t, saved[0].shape, grad.dtype, "scatter_add"),)


def masked_fill(x: Tensor, mask: Tensor) -> Tensor:
    """x.masked_fill(mask, number); saves the mask."""
    t = x.storage.tape
    node = t.node(_masked_fill_backward, (x,), (mask,)) if x.node is not None else None
    out = t.new_like(x, "masked_fill")
    out.node = node
    return out


def _masked_fill_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (t.new_like(grad, "masked_fill_backward"),)


def logical_not(x: Tensor) -> Tensor:
    """~x of booleans."""
    return x.storage.tape.new(x.shape, bool_, "logical_not")


def expert_mask(group_mask: Tensor, num_experts: int) -> Tensor:
    """A mask of groups [T, G], repeated for the experts of each group: [T, E], in new memory."""
    tokens, groups = group_mask.shape
    return group_mask.unsqueeze(-1).expand(-1, groups, num_experts // groups).reshape(tokens, num_experts)


# -- moving --------------------------------------------------------------------------------------------------------


def sort(ids: Tensor) -> tuple[Tensor, Tensor]:
    """torch.sort of integers [S]: the sorted ones and the permutation."""
    t = ids.storage.tape
    return t.new(ids.shape, ids.dtype, "sort"), t.new(ids.shape, int64, "sort_indices")


def floor_divide(ids: Tensor) -> Tensor:
    """ids // number."""
    return ids.storage.tape.new(ids.shape, ids.dtype, "floor_divide")


def inverse(perm: Tensor) -> Tensor:
    """inv_perm[perm] = arange(S): the permutation that undoes ``perm``, int64 [S]."""
    t = perm.storage.tape
    inv_perm = t.new(perm.shape, perm.dtype, "inv_perm")
    t.scratch(perm.nbytes, "arange")
    return inv_perm


def histc(x: Tensor, bins: int) -> Tensor:
    """torch.histc: how many of x fall into each bin."""
    return x.storage.tape.new((bins,), x.dtype, "histc")


def cumsum(x: Tensor) -> Tensor:
    """torch.cumsum(x, dim=0, dtype=torch.int32)."""
    return x.storage.tape.new(x.shape, int32, "cumsum")


def index(x: Tensor, *indices: Tensor, dim: int = 0) -> Tensor:
    """x[indices] along as many dimensions from ``dim`` on; saves the indices. Backward adds the rows into zeros of x's
    shape.
    """
    t = x.storage.tape
    node = t.node(_index_backward, (x,), indices, x.shape) if x.node is not None else None
    out = t.new((*x.shape[:dim], *indices[0].shape, *x.shape[dim + len(indices) :]), x.dtype, "index")
    out.node = node
    return out


def _index_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    out = _scattered(t, node.ctx, grad.dtype, "index_put")
    if t.rules.kind == "cuda":  # index_put_with_sort_kernel: the linear, the sorted and the original indices
        t.scratch(3 * saved[0].nbytes, "index_put_sort")
    return (out,)


def one_hot(ids: Tensor, num_classes: int) -> Tensor:
    """F.one_hot of integers: int64 [..., num_classes]."""
    return ids.storage.tape.new((*ids.shape, num_classes), int64, "one_hot")


def counted(mask: Tensor) -> Tensor:
    """mask.sum(dim=(-1, -2)) of integers [E, K, T]: int64 [E]."""
    return mask.storage.tape.new(mask.shape[:1], int64, "sum")


def nonzero(x: Tensor, found: int) -> Tensor:
    """x.nonzero(), of which ``found`` elements are not zero: int64 [found, dimensions of x].

    CUDA's kernel reads a contiguous copy (nonzero_cuda_out_impl in aten/src/ATen/native/cuda/NonZero.cu).
    """
    t = x.storage.tape
    if t.rules.kind == "cuda" and not x.contiguous_:
        t.scratch(x.nbytes, "contiguous")
    return t.new((found, len(x.shape)), int64, "nonzero")


def index_add_(base: Tensor, indices: Tensor, source: Tensor) -> Tensor:
    """base.index_add_(0, indices, source): base's storage, another node, which saves the indices and the source."""
    node = base.storage.tape.node(_index_add_backward, (base, source), (indices, source))
    return Tensor(base.shape, base.strides, base.dtype, base.storage, node)


def _index_add_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    """grad itself for base; grad.index_select(0, index).expand_as(source) for source."""
    rows = None
    if node.edges[1] is not None:
        rows = t.new(saved[1].shape, grad.dtype, "index_select")
        rows.is_view = True
    return grad if node.edges[0] is not None else None, rows


# -- matmul --------------------------------------------------------------------------------------------------------


def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """F.grouped_mm of x [S, K], sorted by group, and weight [E, K, N]: [S, N], whatever the sizes of the groups.

    Saves x if the weight needs a gradient, the weight if x does, and ``offs``. It is on no autocast list: with float32
    weights it computes in float32 under autocast too. What the kernel takes besides grows with E alone: some KiB.
    """
    t = x.storage.tape
    rows, n_in = x.shape
    n_out = weight.shape[-1]
    flops = 2 * rows * n_in * n_out
    node = None
    if x.node is not None or weight.node is not None:
        node = t.node(
            _grouped_mm_backward,
            (x, weight),
            (x if weight.node is not None else None, weight if x.node is not None else None, offs),
            (x.shape, weight.shape, weight.strides, flops),
        )
    t.count(flops)
    out = t.new((rows, n_out), x.dtype, "grouped_mm")
    out.node = node
    return out


def _grouped_mm_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    x_shape, w_shape, w_strides, flops = node.ctx
    gx = gw = None
    if node.edges[1] is not None:
        t.count(flops)
        gw = t.new(w_shape, grad.dtype, "grouped_mm_grad_weight", w_strides)
    if node.edges[0] is not None:
        t.count(flops)
        gx = t.new(x_shape, grad.dtype, "grouped_mm_grad_input")
    return gx, gw
