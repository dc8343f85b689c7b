"""Liger's operations: autograd Functions whose kernels work in place and keep little.

Each has the rule of its Python source for what it saves, what its forward and backward allocate, and which storage it
writes a result into. A Function saves when its forward is done, and its ``ensure_contiguous`` copies strided inputs.

Sources: liger_kernel/ops/{rms_norm,rope,swiglu,geglu,cross_entropy,fused_linear_cross_entropy,fused_moe}.py and
liger_kernel/transformers/model/loss_utils.py, liger-kernel 0.8.5, with its Triton kernels: the CuTe and cuTile ones,
which further packages bring, are not modelled.
"""

from __future__ import annotations

from typing import Any

from memplan.tape import ops
from memplan.tape.ops import Grads
from memplan.tape.tape import GRADIENT, LOGITS, Node, Tape
from memplan.tape.tensor import Tensor, bool_, float32, int32, is_contiguous

# -- normalisation, activation, positions --------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, in_place: bool) -> Tensor:
    """LigerRMSNormFunction over the last dimension: the result has x's dtype; saves x, the weight and a float32 rstd.

    ``in_place``: the gradient of x overwrites that of the result.
    """
    t = x.storage.tape
    node = t.node(_rms_norm_backward, (x, weight), (), in_place)
    x = _contiguous(x)
    out = t.new(x.shape, x.dtype, "liger_rms_norm")
    rstd = t.new((x.numel // x.shape[-1],), float32, "liger_rstd")
    t.save(node, x, weight, rstd)
    out.node = node
    return out


def _rms_norm_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    """Every multiprocessor sums a row of the weight's gradient, and the rows are summed."""
    weight = saved[1]
    grad = _contiguous(grad)
    needs_weight = node.edges[1] is not None
    rows = t.new((t.rules.multiprocessors, *weight.shape), float32, "liger_dW_rows") if needs_weight else None
    gx = _view(grad if node.ctx else t.new_like(grad, "liger_rms_norm_backward"))
    if rows is None:
        return gx, None
    gw = t.new(weight.shape, float32, "liger_dW")
    return gx, gw.to(weight.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """LigerSiLUMulFunction, LigerGELUMulFunction: act(gate) * up.

    Saves both factors; the backward computes the activation again and writes the gradients over them.
    """
    t = gate.storage.tape
    node = t.node(_gated_backward, (gate, up))
    gate, up = _contiguous(gate), _contiguous(up)
    out = t.new(gate.shape, gate.dtype, "liger_gated")
    t.save(node, gate, up)
    out.node = node
    return out


def _gated_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    grad = _contiguous(grad)
    return _view(saved[0]), _view(saved[1])


def rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """LigerRopeFunction of q [B, H, S, D] and k [B, K, S, D], overwritten where they lie in memory as [B, S, H, D].

    The result keeps their dtypes whatever that of cos and sin, which are all it saves.
    """
    t = q.storage.tape
    node = t.node(_rotary_backward, (q, k), (), (q.shape, k.shape), outputs=2)
    rotated = [_rotated(q), _rotated(k)]
    t.save(node, cos, sin)
    for slot, x in enumerate(rotated):
        x.node, x.slot = node, slot
    return rotated[0], rotated[1]


def _rotary_backward(t: Tape, node: Node, grads: list[Tensor | None], saved: Any) -> Grads:
    """A result that was not used has zeros for a gradient."""
    known = next(grad for grad in grads if grad is not None)
    grads = [
        t.new(shape, known.dtype, "zeros") if grad is None else grad
        for grad, shape in zip(grads, node.ctx, strict=True)
    ]
    return [_view(_rotated(grad)) for grad in grads if grad is not None]


def _rotated(x: Tensor) -> Tensor:
    """x itself, written over, or a copy of it that lies in memory as [B, S, H, D]."""
    by_position = ops.transpose(ops.detach(x), 1, 2)
    return ops.transpose(ops.contiguous(by_position), 1, 2)


def _view(grad: Tensor) -> Tensor:
    """A gradient that a Function gives back as a view of what it has written into."""
    return Tensor(grad.shape, grad.strides, grad.dtype, grad.storage, is_view=True)


def _contiguous(x: Tensor) -> Tensor:
    """ensure_contiguous, inside a Function: without a node of its own."""
    return x if is_contiguous(x.shape, x.strides) else ops.contiguous(ops.detach(x))


# -- loss ----------------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """LigerCrossEntropyFunction of [rows, classes]: the gradient overwrites the logits, and is all it saves."""
    t = logits.storage.tape
    node = t.node(_cross_entropy_backward, (logits,))
    losses = t.new(labels.shape, logits.dtype, "liger_loss_1d")
    mask = t.new(labels.shape, bool_, "liger_target_mask")
    t.scratch(labels.nbytes, "liger_masked_target")
    out = t.new((), losses.dtype, "liger_loss")
    del losses, mask
    t.save(node, logits)
    out.node = node
    return out


def _cross_entropy_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return (saved[0],)


def fused_linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, addmm_out_dtype: bool) -> Tensor:
    """LigerFusedLinearCrossEntropyFunction of x [T, H], weight [V, H] and labels [T]: the loss.

    The forward computes the logits of some rows at a time and from them, at once, both gradients, which are all it
    saves; the backward scales them in place. ``addmm_out_dtype``: torch has addmm(out_dtype=...), since 2.8.
    """
    t = x.storage.tape
    node = t.node(_fused_linear_cross_entropy_backward, (x, weight))
    with t.no_grad():
        grad_x = t.new_like(x, "liger_grad_input")
        with t.tagged(GRADIENT):
            grad_weight = t.new(weight.shape, weight.dtype, "liger_grad_weight") if _both(x, weight) else None
        losses = t.new(labels.shape, float32, "liger_loss_1d")
        mask = t.new(labels.shape, bool_, "liger_target_mask")
        with t.tagged(LOGITS):
            _chunks(t, x, weight, x.node is not None, grad_weight, addmm_out_dtype)
        out = t.new((), float32, "liger_loss")
    del losses, mask
    t.save(node, grad_x, grad_weight)
    out.node = node
    return out


def _both(x: Tensor, weight: Tensor) -> bool:
    return x.node is not None and weight.node is not None


def _fused_linear_cross_entropy_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    return saved[0], saved[1]


def chunk_rows(rows: int, vocab_size: int, hidden_size: int) -> int:
    """Rows of x whose logits are computed at a time: the logits take about as many elements as x.

    >>> chunk_rows(4 * 4096, 32000, 4096)
    2048
    """
    chunks = -(-vocab_size // hidden_size)
    return min(_next_power_of_2(-(-rows // chunks)), rows)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _chunks(
    t: Tape, x: Tensor, weight: Tensor, needs_grad: bool, grad_weight: Tensor | None, addmm_out_dtype: bool
) -> None:
    """Logits and gradients, chunk by chunk. All chunks but the last have the same rows and allocate the same, so that
    after two of them the allocator sees nothing new: only their FLOPs are counted.
    """
    rows, hidden_size = x.shape
    vocab_size = weight.shape[0]
    size = chunk_rows(rows, vocab_size, hidden_size)
    whole, rest = divmod(rows, size)
    products = 1 + needs_grad + (grad_weight is not None)
    t.count(2 * rows * vocab_size * hidden_size * products)
    storage = t.new((size, vocab_size), x.dtype, "liger_logits") if _writes_into(t, x, weight) else None
    for length in [size] * min(whole, 2) + ([rest] if rest else []):
        chunk = ops.narrow(ops.detach(x), 0, 0, length)
        logits = _mm(t, chunk, ops.transpose(ops.detach(weight), 0, 1)) if storage is None else storage
        if needs_grad and storage is None:
            _mm(t, logits, weight)  # copied into its rows of the gradient
        if grad_weight is not None:
            _add_to_grad_weight(t, grad_weight, logits, chunk, addmm_out_dtype)
        del chunk, logits


def _writes_into(t: Tape, x: Tensor, weight: Tensor) -> bool:
    """_can_use_mm_out: products go straight into their place, unless autocast has something to cast."""
    return t.rules.kind == "cuda" and x.dtype is weight.dtype and (t.autocast is None or x.dtype is t.autocast)


def _mm(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] times b [k, n], under autocast; a weight's cast is kept, that of its transpose is not."""
    b, a = ops._lower(t, b), ops._lower(t, a)
    return t.new((a.shape[0], b.shape[1]), a.dtype, "liger_mm")


def _add_to_grad_weight(t: Tape, grad_weight: Tensor, logits: Tensor, chunk: Tensor, addmm_out_dtype: bool) -> None:
    """grad_weight += logits.T @ chunk: one addmm from compute capability 8.0 on, for 16-bit logits; else through the
    product and a float32 copy of it, each as large as the weight.
    """
    half = logits.dtype.itemsize == 2
    in_kernel = grad_weight.dtype is logits.dtype or (addmm_out_dtype and grad_weight.dtype is float32)
    if t.rules.kind == "cuda" and t.rules.compute_capability >= (8, 0) and half and in_kernel:
        chunk.to(logits.dtype)
    else:
        _mm(t, ops.transpose(logits, 0, 1), chunk).float()


# -- experts -------------------------------------------------------------------------------------------------------

_BLOCK_M = 64
"""Rows of one tile of the experts' matrix products (BLOCK_M_TOKEN)."""


def fused_experts(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """LigerFusedMoEFunction of x [T, H], weights of the experts [E, 2 I, H] and [E, H, I], top k [T, k]: [T, H].

    Not on autocast's lists: it computes in x's dtype. Saves x and the gate and up projections of every token's
    experts; neither the activation nor what each expert gave. The backward makes gradients of frozen weights too.
    """
    t = x.storage.tape
    experts, hidden_size, width = down_proj.shape
    copies = index.numel
    node = t.node(_fused_experts_backward, (x, gate_up_proj, down_proj, weights), (), copies)
    x, weights = _contiguous(x), _contiguous(weights)
    starts = t.new((experts + 1,), int32, "liger_expert_start_idx")
    tiles = [t.new((copies // _BLOCK_M + experts,), int32, "liger_tiles") for _ in range(2)]
    permutations = [t.new((copies,), int32, "liger_permutation") for _ in range(3)]
    t.count(6 * copies * width * hidden_size)
    pre_act = t.new((copies, 2 * width), x.dtype, "liger_pre_act")
    post_act = t.new((copies, width), x.dtype, "liger_post_act")
    per_expert = t.new((copies, hidden_size), x.dtype, "liger_expert_out")
    out = t.new(x.shape, x.dtype, "liger_experts")
    t.save(node, x, gate_up_proj, down_proj, pre_act, weights, starts, *permutations, *tiles)
    del post_act, per_expert
    out.node = node
    return out


def _fused_experts_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    _, gate_up_proj, down_proj, _, weights = saved[:5]
    copies = node.ctx
    _, hidden_size, width = down_proj.shape
    grad = _contiguous(grad)
    t.count(14 * copies * width * hidden_size)
    d_pre_act = t.new((copies, 2 * width), grad.dtype, "liger_d_pre_act")
    weighted_act = t.new((copies, width), grad.dtype, "liger_weighted_act")
    d_weights = t.new(weights.shape, grad.dtype, "liger_d_weights")
    d_down = t.new(down_proj.shape, down_proj.dtype, "liger_d_down_proj")
    dx_expanded = t.new((copies, hidden_size), grad.dtype, "liger_dx_expanded")
    dx = t.new(grad.shape, grad.dtype, "liger_dx")
    d_gate_up = t.new(gate_up_proj.shape, gate_up_proj.dtype, "liger_d_gate_up_proj")
    del d_pre_act, weighted_act, dx_expanded
    grads = dx, d_gate_up, d_down, d_weights.to(weights.dtype)
    return [g if edge is not None else None for g, edge in zip(grads, node.edges)]
