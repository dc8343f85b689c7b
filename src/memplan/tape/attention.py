"""scaled_dot_product_attention: one operation whose backend decides what is saved and what backward needs.

Sources: tools/autograd/derivatives.yaml (what is saved), aten/src/ATen/native/transformers/attention.cpp and its
cuda/ folder (backend choice, workspaces), torch 2.13.
"""

from __future__ import annotations

from typing import Any

from memplan.tape import ops
from memplan.tape.dispatch import choose_sdpa_backend
from memplan.tape.ops import Grads
from memplan.tape.tape import Node, Tape
from memplan.tape.tensor import Tensor, bool_, float32, int64


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


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
    if backend == "math":
        return _math(t, query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if attn_mask is not None and attn_mask.dtype is bool_:
        # convert_boolean_attn_mask: where(mask, 0, -inf) in the query's dtype
        attn_mask = t.new(attn_mask.shape, query.dtype, "attn_mask")
    return _fused(t, backend, query, key, value, attn_mask, dropout_p)


def flash_attention_2(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The flash-attn package on query [B, S, H, D], key and value [B, S, K, D]: as _fused, in that layout."""
    t = query.storage.tape
    out = _fused(
        t, "flash", query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None, 0.0
    )
    return out.transpose(1, 2)


def _fused(
    t: Tape, backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> Tensor:
    batch, heads, sq, dim = q.shape
    dim_v = v.shape[-1]
    sk = k.shape[2]
    flops = 2 * batch * heads * sq * sk * (dim + dim_v)
    node = t.node(_fused_backward, (q, k, v), (q, k, v, mask), (backend, flops, k.shape[1]))
    t.flops += flops
    # [B, S, H, D] in memory, seen as [B, H, S, D]
    out = t.new((batch, heads, sq, dim_v), q.dtype, "sdpa", (sq * heads * dim_v, dim_v, heads * dim_v, 1))
    lse_len = _up(sq, 32) if backend == "efficient" else sq
    lse = t.new((batch, heads, lse_len), float32, "sdpa_logsumexp") if node is not None or backend != "efficient" else None
    rng = [t.new((), int64, "sdpa_seed"), t.new((), int64, "sdpa_offset")] if t.rules.kind == "cuda" else []
    if node is not None:
        t.save(node, out, lse, *rng)
        out.node = node
    return out


def _fused_backward(t: Tape, node: Node, grad: Tensor, saved: Any) -> Grads:
    backend, flops, kv_heads = node.ctx
    q, k, v, mask = saved[:4]
    t.flops += flops * 5 // 2
    batch, heads, sq, dim = q.shape
    sk = k.shape[2]
    dims = -(-dim // 32) * 32 if dim <= 128 else -(-dim // 64) * 64
    scratch: list[Tensor] = []
    if backend == "flash":
        rows = _up(sq, 128)
        scratch = [
            t.new((batch, heads, rows), float32, "flash_softmax_d"),
            t.new((batch, rows, heads, dims), float32, "flash_dq_accum"),
        ]
    elif backend == "efficient":
        scratch = [
            t.new((batch, heads, sq), float32, "efficient_delta"),
            t.new((batch, heads, sq, dim), float32, "efficient_workspace"),
        ]
    elif backend == "cudnn":
        scratch = [
            t.new((batch, heads, sq, dim), float32, "cudnn_workspace"),
            t.new((batch, heads, sq), float32, "cudnn_workspace"),
        ]
    gq = t.new_like(q, "sdpa_grad_q")
    if backend == "flash" and heads != kv_heads:
        scratch += [
            t.new((batch, sk, heads, dim), k.dtype, "flash_dk_expanded"),
            t.new((batch, sk, heads, dim), v.dtype, "flash_dv_expanded"),
        ]
    gk = t.new_like(k, "sdpa_grad_k")
    gv = t.new_like(v, "sdpa_grad_v")
    del scratch
    return gq, gk, gv


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
    """_scaled_dot_product_attention_math: 16-bit inputs are computed in float32 on CUDA."""
    origin = q.dtype
    if t.rules.kind == "cuda" and origin is not float32:
        q, k, v = q.to(float32), k.to(float32), v.to(float32)
    if is_causal:
        mask = t.new((q.shape[2], k.shape[2]), bool_, "causal_mask")
    if mask is not None and mask.dtype is bool_:
        mask = t.new(mask.shape, q.dtype, "attn_mask")
    n_rep = q.shape[1] // k.shape[1]
    if enable_gqa and n_rep > 1:
        k, v = repeat_interleave(k, n_rep), repeat_interleave(v, n_rep)
    q = q * 0.5
    scores = ops.matmul(q, (k * 0.5).transpose(2, 3))
    if mask is not None:
        scores = scores + mask
    probabilities = ops.softmax(scores)
    del scores
    if dropout_p:
        probabilities = ops.dropout(probabilities, dropout_p)
    return ops.matmul(probabilities, v).to(origin)


def repeat_interleave(x: Tensor, n_rep: int) -> Tensor:
    """[B, K, S, D] -> [B, K * n_rep, S, D], copied; transformers' repeat_kv makes the same tensors."""
    if n_rep == 1:
        return x
    batch, heads, length, dim = x.shape
    x = x.unsqueeze(2).expand(batch, heads, n_rep, length, dim)
    return x.reshape(batch, heads * n_rep, length, dim)
