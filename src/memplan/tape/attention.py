"""scaled_dot_product_attention: one operation whose backend decides what is saved and what backward needs.

Sources: tools/autograd/derivatives.yaml (what is saved), aten/src/ATen/native/transformers/attention.cpp and its
cuda/ folder (backend choice, workspaces), torch 2.13.
"""

from __future__ import annotations

from typing import Any

from memplan.constants import exact
from memplan.tape import attention_kernels as kernels
from memplan.tape import ops
from memplan.tape.attention_kernels import up
from memplan.tape.dispatch import choose_sdpa_backend, why_math
from memplan.tape.ops import Grads
from memplan.tape.tape import Node, Tape
from memplan.tape.tensor import DType, Shape, Tensor, bool_, dense_like, float32, int64, is_contiguous


def _by_position(shape: Shape) -> Shape:
    """Strides of [B, H, S, D] that lies in memory as [B, S, H, D]."""
    _, heads, length, dim = shape
    return (length * heads * dim, dim, heads * dim, 1)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention of query [B, H, Sq, D], key and value [B, K, Sk, D]; [B, H, Sq, Dv]."""
    t = query.storage.tape
    if t.autocast is not None:
        if attn_mask is not None:
            attn_mask = ops._lower(t, attn_mask)
        value, key, query = ops._lower(t, value), ops._lower(t, key), ops._lower(t, query)
    if not t.training:
        dropout_p = 0.0
    backend = choose_sdpa_backend(
        t.rules,
        dtype=query.dtype.name,
        head_dim=query.shape[-1],
        value_head_dim=value.shape[-1],
        query_heads=query.shape[1],
        kv_heads=key.shape[1],
        query_len=query.shape[2],
        kv_len=key.shape[2],
        mask=attn_mask is not None,
        mask_requires_grad=attn_mask is not None and attn_mask.node is not None,
        dropout=dropout_p,
        requires_grad=t.grad_enabled and (query.node is not None or key.node is not None or value.node is not None),
    )
    if attn_mask is not None and attn_mask.dtype is bool_:
        # convert_boolean_attn_mask: where(mask, 0, -inf) in the query's dtype
        attn_mask = t.new(attn_mask.shape, query.dtype, "attn_mask")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        backend = "math"  # no kernel broadcasts heads unasked (check_batch_size_and_num_heads_dense)
    if backend == "math":
        if t.rules.kind == "cuda":
            _note_scores(t, query, key)
        return _math(t, query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if attn_mask is not None and backend == "efficient":
        # preprocess_mask: the kernel wants rows aligned to 16 elements, for every head of every sequence
        length = attn_mask.shape[-1]
        if length % 16:
            attn_mask = ops.pad_last(attn_mask, up(length, 16) - length).narrow(-1, 0, length)
        attn_mask = attn_mask.expand(*query.shape[:3], length)
    return _fused(t, backend, query, key, value, attn_mask, dropout_p, is_causal)


def flash_attention_2(query: Tensor, key: Tensor, value: Tensor, dtype: DType, is_causal: bool = True) -> Tensor:
    """The flash-attn package on query [B, S, H, D], key and value [B, S, K, D]; float32 is cast to ``dtype`` first.

    Source: transformers/integrations/flash_attention.py, modeling_flash_attention_utils.py (fa_peft_integration_check).
    """
    if query.dtype is float32:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    width = value.shape[-1]
    if width != query.shape[-1]:
        value = ops.pad_last(value, query.shape[-1] - width)
    t = query.storage.tape
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out = _fused(t, "flash", query, key, value, None, 0.0, is_causal)
    out = out.transpose(1, 2)
    return out.narrow(-1, 0, width) if width != out.shape[-1] else out


def _note_scores(t: Tape, query: Tensor, key: Tensor) -> None:
    """Say among the assumptions that the scores are a tensor of their own, in float32, and why."""
    name = "attention_scores_of_a_layer"
    batch, heads, sq, dim = query.shape
    size = 4 * batch * heads * sq * key.shape[2]
    known = t.assumptions.get(name)
    if known is None or size > known.value:
        dtype = query.dtype.name
        why = why_math(t.rules, dtype=dtype, head_dim=dim, query_heads=heads, kv_heads=key.shape[1])
        source = (
            f"{why}, so that it falls to the math backend (ATen/native/transformers/cuda/sdp_utils.cpp, torch 2.13)"
        )
        t.assumptions[name] = exact(name, size, "B", source)


def _fused(
    t: Tape,
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool = False,
) -> Tensor:
    """One kernel: saves its inputs, its result, the log-sum-exp of the scores and the state of the generator."""
    batch, heads, sq, dim = q.shape
    dim_v = v.shape[-1]
    sk = k.shape[2]
    flops = 2 * batch * heads * sq * sk * (dim + dim_v)
    node = t.node(_fused_backward, (q, k, v, mask), (q, k, v, mask), (backend, flops, dropout_p, is_causal))
    t.count(flops)
    if is_causal:
        t.skipped.append((len(t.sizes), flops // 2))
    shape = (batch, heads, sq, dim_v)
    out = t.new(shape, q.dtype, "sdpa", _by_position(shape) if backend == "efficient" else dense_like(shape, q.strides))
    lse_len = up(sq, 32) if backend == "efficient" else sq
    lse = (
        t.new((batch, heads, lse_len), float32, "sdpa_logsumexp")
        if node is not None or backend != "efficient"
        else None
    )
    temporaries = _forward_temporaries(t, backend, q, k, v, dropout_p)
    rng = [t.new((), int64, "sdpa_seed"), t.new((), int64, "sdpa_offset")] if t.rules.kind == "cuda" else []
    del temporaries
    if node is not None:
        t.save(node, out, lse, *rng)
        out.node = node
    return out


def _forward_temporaries(t: Tape, backend: str, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> list[Tensor]:
    """What the kernel accumulates in: flash where it splits the keys, the memory-efficient one for wide heads."""
    batch, heads, sq, dim = q.shape
    if backend == "flash" and not dropout_p:
        blocks = batch * heads * -(-sq // 64)
        splits = kernels.flash_splits(t.rules.multiprocessors, blocks, k.shape[2], dim)
        if splits > 1:
            return [
                t.new((splits, batch, heads, sq), float32, "flash_lse_accum"),
                t.new((splits, batch, heads, sq, kernels.flash_head_dim(dim)), float32, "flash_out_accum"),
            ]
    if backend == "efficient" and kernels.accumulates_output(q.dtype.itemsize == 2, dim, v.shape[-1]):
        return [t.new((batch, sq, heads, v.shape[-1]), float32, "efficient_out_accum")]
    return []


def _fused_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    backend, flops, dropout_p, is_causal = node.ctx
    q, k, v, mask, out = saved[:5]
    t.count(flops * 5 // 2)
    if is_causal:
        t.skipped.append((len(t.sizes), flops * 5 // 4))
    copies = []
    if backend in ("flash", "efficient"):
        copies = [_copy_by_position(t, x) for x in ((grad, out) if backend == "flash" else (grad,))]
    gq = _new_grad(t, backend, q, "sdpa_grad_q")
    gk = _new_grad(t, backend, k, "sdpa_grad_k")
    gv = _new_grad(t, backend, v, "sdpa_grad_v")
    gmask = None
    if node.edges[3] is not None:
        rows = t.new((*q.shape[:3], up(k.shape[2], 16)), mask.dtype, "sdpa_grad_bias")
        gmask = rows.narrow(-1, 0, k.shape[2])
    if backend == "flash":
        scratch = _flash_backward(t, q, k, v)
    elif backend == "efficient":
        scratch = _efficient_backward(t, q, k, v, dropout_p)
    elif backend == "cudnn":
        scratch = _cudnn_backward(t, q)
    else:
        scratch = []
    del scratch, copies
    return gq, gk, gv, gmask


def _new_grad(t: Tape, backend: str, x: Tensor, name: str) -> Tensor:
    by_position = backend in ("efficient", "flash_cpu")
    return t.new(x.shape, x.dtype, name, _by_position(x.shape) if by_position else dense_like(x.shape, x.strides))


def _copy_by_position(t: Tape, x: Tensor) -> Tensor:
    """x, or a copy that lies in memory as [B, S, H, D]."""
    strides = _by_position(x.shape)
    return x if is_contiguous(*_transposed(x)) else t.new(x.shape, x.dtype, "clone", strides)


def _transposed(x: Tensor) -> tuple[Shape, Shape]:
    """Shape and strides of x.transpose(1, 2)."""
    (b, h, s, d), (sb, sh, ss, sd) = x.shape, x.strides
    return (b, s, h, d), (sb, ss, sh, sd)


def _flash_backward(t: Tape, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """mha_bwd: the gradient of the queries in float32, and each query head's own gradients of keys and values."""
    batch, heads, sq, dim = q.shape
    rows = up(sq, 128)
    scratch = [
        t.new((batch, heads, rows), float32, "flash_softmax_d"),
        t.new((batch, rows, heads, kernels.flash_head_dim(dim)), float32, "flash_dq_accum"),
    ]
    if heads != k.shape[1]:
        scratch += [
            t.new((batch, k.shape[2], heads, dim), k.dtype, "flash_dk_expanded"),
            t.new((batch, k.shape[2], heads, dim), v.dtype, "flash_dv_expanded"),
        ]
    return scratch


def _efficient_backward(t: Tape, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> list[Tensor]:
    """_efficient_attention_backward: delta, which is gradient times result summed, and the workspace."""
    batch, heads, sq, dim = q.shape
    dim_v = v.shape[-1]
    half = q.dtype.itemsize == 2
    product: list[Tensor] = []
    if not kernels.computes_delta(t.rules, half, kernels.backward_tile(t.rules, half, max(dim, dim_v), dropout_p)):
        # One expression of C++, whose temporaries live to its end: both in float32, the product, and the sum.
        shape = (batch, sq, heads, dim_v)
        product = [t.new(shape, float32, "efficient_float") for _ in range(3 if half else 1)]
        product.append(t.new(shape[:3], float32, "efficient_sum"))
    delta = t.new((batch, heads, sq), float32, "efficient_delta")
    product.clear()
    size = kernels.efficient_workspace(t.rules, half, batch, heads, sq, k.shape[2], dim, dim_v, dropout_p)
    return [delta, t.new((size,), float32, "efficient_workspace")] if size else [delta]


def _cudnn_backward(t: Tape, q: Tensor) -> list[Tensor]:
    """run_cudnn_SDP_bprop: the size of the plan's workspace is cuDNN's affair, taken as flash's without its padding."""
    batch, heads, sq, dim = q.shape
    return [
        t.new((batch, heads, sq, dim), float32, "cudnn_workspace"),
        t.new((batch, heads, sq), float32, "cudnn_workspace"),
    ]


def _math(
    t: Tape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> Tensor:
    """_scaled_dot_product_attention_math: 16-bit inputs are computed in float32, without autocast."""
    origin = q.dtype
    with t.autocasting(None):
        q, k, v = q.to(float32), k.to(float32), v.to(float32)
        query = q * 0.5
        if is_causal:
            mask = t.new((q.shape[2], k.shape[2]), bool_, "ones")
            mask = t.new(mask.shape, bool_, "causal_mask")
            mask = t.new(mask.shape, float32, "attn_mask")
        n_rep = q.shape[1] // k.shape[1] if enable_gqa else 1
        key, value = _repeat_interleave(k, n_rep), _repeat_interleave(v, n_rep)
        scaled_key = key.transpose(2, 3) * 0.5
        attn = ops.matmul(query, scaled_key)
        del scaled_key
        if mask is not None:  # attn.add_(mask), which under a dispatch mode is attn.add(mask)
            attn = ops.add_(attn, mask) if t.accumulate_in_place else attn + mask
        attn = ops.safe_softmax(attn)
        if dropout_p:
            attn = ops.dropout(attn, dropout_p)
        weights = attn.to(origin)
        out = ops.matmul(attn, value).to(origin)
        del weights  # the second result, which nobody takes
        return out


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """transformers' repeat_kv: [B, K, S, D] -> [B, K * n_rep, S, D], copied unless K and B are 1."""
    if n_rep == 1:
        return x
    batch, heads, length, dim = x.shape
    x = x.unsqueeze(2).expand(batch, heads, n_rep, length, dim)
    return x.reshape(batch, heads * n_rep, length, dim)


def _repeat_interleave(x: Tensor, n_rep: int) -> Tensor:
    """Tensor.repeat_interleave of the heads: as repeat_kv, but always copied."""
    if n_rep == 1:
        return x
    batch, heads, length, dim = x.shape
    x = x.unsqueeze(2).expand(batch, heads, n_rep, length, dim).contiguous()
    return x.reshape(batch, heads * n_rep, length, dim)
