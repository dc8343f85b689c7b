"""CUDA's kernels, where they allocate other tensors than CPU's: fused attention, dropout and norms.

A trace runs on fake CPU tensors. What a CUDA device would do instead is put in their place: attention with the
backend that torch's dispatcher takes there, with what that kernel keeps and needs (the rules of
:mod:`memplan.tape.attention`, which are the estimator's own), dropout with a mask of a byte per element, layer_norm
with statistics in float32 and rms_norm in one kernel. A library that asks whether autocast is on is told CUDA's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from memplan.tape import tensor as dtypes
from memplan.tape.attention import _fused
from memplan.tape.dispatch import DeviceRules, choose_sdpa_backend
from memplan.tape.tape import Tape
from memplan.tape.tensor import Tensor

__all__ = ["cuda_kernels", "cuda_operations"]


Kernel = Callable[[str], AbstractContextManager[Callable[[int], None]]]
"""Around what stands for a kernel, by name; inside, it is told the kernel's floating-point operations."""


def cuda_operations() -> Mapping[Any, Callable[..., Any]]:
    """Operations of torch -> what stands for them where a CUDA kernel returns other tensors than a CPU's."""
    import torch

    layer_norm = torch.ops.aten.native_layer_norm.default

    def with_float32_statistics(*args: Any, **kwargs: Any) -> Any:
        """Mean and rstd are of the accumulation type: layer_norm_cuda in ATen/native/cuda/layer_norm_kernel.cu."""
        out, *statistics = layer_norm(*args, **kwargs)
        return (out, *(x.float() if x.dtype in _half() else x for x in statistics))

    return {layer_norm: with_float32_statistics}


def _half() -> Any:
    import torch

    return torch.float16, torch.bfloat16


@contextmanager
def cuda_kernels(rules: DeviceRules, kernel: Kernel) -> Iterator[None]:
    """Under it attention, dropout and rms_norm allocate what they do on the device of ``rules``.

    ``kernel`` hears of attention, which is no operation of torch here.
    """
    import torch

    known = torch.is_autocast_enabled

    def is_autocast_enabled(device_type: str = "cuda") -> bool:  # as PEFT asks, for one
        return known("cpu" if device_type == "cuda" else device_type)

    torch.is_autocast_enabled = is_autocast_enabled
    try:
        with _kernels(rules, kernel):
            yield
    finally:
        torch.is_autocast_enabled = known


def _kernels(rules: DeviceRules, kernel: Kernel) -> Any:
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    fused, fused_norm = _fused_function(rules, kernel), _fused_rms_norm()

    class Kernels(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is functional.scaled_dot_product_attention:
                return attention(*args, **kwargs)
            if func is functional.dropout:
                return dropout(*args, **kwargs)
            if func is functional.rms_norm:
                return rms_norm(*args, **kwargs)
            return func(*args, **kwargs)

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        query, key, value, attn_mask = (_autocast(x) for x in (query, key, value, attn_mask))
        backend = choose_sdpa_backend(
            rules,
            dtype=str(query.dtype).removeprefix("torch."),
            head_dim=query.size(-1),
            value_head_dim=value.size(-1),
            query_heads=query.size(-3),
            kv_heads=key.size(-3),
            query_len=query.size(-2),
            kv_len=key.size(-2),
            mask=attn_mask is not None,
            mask_requires_grad=attn_mask is not None and attn_mask.requires_grad,
            dropout=dropout_p,
            requires_grad=torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
        )
        if attn_mask is not None and attn_mask.dtype is torch.bool:  # convert_boolean_attn_mask
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        # No kernel broadcasts heads unasked (check_batch_size_and_num_heads_dense), or takes less than four dimensions.
        if backend == "math" or query.dim() != 4 or (query.size(1) != key.size(1) and not enable_gqa):
            return _math_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        if attn_mask is not None:
            attn_mask = _expanded(attn_mask, (*query.shape[:3], key.size(-2)), aligned=backend == "efficient")
        return fused.apply(query, key, value, attn_mask, backend, dropout_p)

    def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if p == 0.0 or not training or inplace:
            return functional.dropout(input, p, training, inplace)
        return torch.native_dropout(input, p, True)[0]

    def rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
        if torch.is_autocast_enabled("cpu"):  # it is on autocast's float32 list
            input, weight = (x.float() if x is not None and x.dtype in _half() else x for x in (input, weight))
        if weight is not None and weight.dtype != input.dtype:  # the kernel takes one dtype, the same as a CPU does
            return functional.rms_norm(input, normalized_shape, weight, eps)
        return fused_norm.apply(input, weight, len(normalized_shape))

    return Kernels()


def _autocast(x: Any) -> Any:
    """Cast as autocast does before attention, in whatever kind of device the trace calls it."""
    import torch

    if x is None or not torch.is_autocast_enabled("cpu") or x.dtype is not torch.float32:
        return x
    return x.to(torch.get_autocast_dtype("cpu"))


def _expanded(mask: Any, shape: tuple[int, ...], *, aligned: bool) -> Any:
    """A mask as the kernels take it: one for every head, its rows aligned to 16 elements where they must be.

    Source: preprocess_mask and pad_bias in aten/src/ATen/native/transformers/attention.cpp.
    """
    import torch

    length = mask.size(-1)
    if aligned and length % 16:
        mask = torch.nn.functional.pad(mask, (0, -length % 16))[..., :length]
    return mask.expand(shape)


def _math_attention(
    query: Any, key: Any, value: Any, mask: Any, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> Any:
    """_scaled_dot_product_attention_math as a GPU runs it: the mask is added in place, dropout is CUDA's."""
    import torch

    dtype = query.dtype
    with torch.autocast("cpu", enabled=False):
        query, key, value = (x.float() if x.dtype in _half() else x for x in (query, key, value))
        scaled = query * 0.5  # by the root of the scale; all that is named lives until the end, as in C++
        if is_causal:
            mask = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
            mask = torch.empty_like(mask, dtype=query.dtype)
        repeats = query.size(-3) // key.size(-3) if enable_gqa else 1
        keys, values = (x.repeat_interleave(repeats, -3) if repeats > 1 else x for x in (key, value))
        scores = scaled @ (keys.transpose(-2, -1) * 0.5)
        if mask is not None:
            scores.add_(mask)
        scores = torch.ops.aten._safe_softmax(scores, -1)
        if dropout_p > 0.0:
            scores = torch.native_dropout(scores, dropout_p, True)[0]
        weights = scores.to(dtype)  # the second result, which nobody takes
        out = (scores @ values).to(dtype)
        del weights
        return out


def _fused_rms_norm() -> Any:
    """rms_norm in one kernel, as an autograd.Function: it keeps input, weight and a float32 per row.

    Source: rms_norm_symint in ATen/native/layer_norm.cpp and _fused_rms_norm_cuda in
    ATen/native/cuda/layer_norm_kernel.cu.
    """
    import torch

    class FusedRMSNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, dims: int) -> Any:
            dtype = torch.float32 if x.dtype in _half() else x.dtype
            rstd = torch.empty(x.shape[:-dims], dtype=dtype, device=x.device)
            ctx.save_for_backward(x, weight, rstd)
            return torch.empty_like(x, memory_format=torch.contiguous_format)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            x, weight, _ = ctx.saved_tensors
            needs = ctx.needs_input_grad
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
            return grad_x, torch.empty_like(weight) if weight is not None and needs[1] else None, None

    return FusedRMSNorm


def _fused_function(rules: DeviceRules, kernel: Kernel) -> Any:
    """Attention in one kernel, as an autograd.Function that allocates what the tape's rule says."""
    import torch

    class FusedAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any, mask: Any, backend: str, dropout_p: float) -> Any:
            tape = Tape(rules)
            symbols = _symbols(tape, q, k, v, mask)
            start = len(tape.sizes)
            out = _fused(tape, backend, *symbols, dropout_p)  # type: ignore[arg-type, call-arg]
            with kernel("sdpa") as count:
                count(tape.flops)
                made = _allocated(tape, start, q, [out])
            ctx.save_for_backward(q, k, v, mask, *made)
            ctx.backend, ctx.dropout_p = backend, dropout_p
            return made[0]

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            tape = Tape(rules)
            saved = ctx.saved_tensors  # all of them are there until the kernel has run, checkpointed or not
            q = saved[0]
            out = _fused(tape, ctx.backend, *_symbols(tape, *saved[:4]), ctx.dropout_p)  # type: ignore[arg-type, call-arg]
            (symbol,) = _symbols(tape, grad)
            start, flops = len(tape.sizes), tape.flops
            node: Any = out.node
            grads = node.fn(tape, node, symbol, node.saved)
            with kernel("sdpa_backward") as count:
                count(tape.flops - flops)
                made = _allocated(tape, start, q, grads)
            return (*made[: len(grads)], None, None)

    return FusedAttention


def _symbols(tape: Tape, *tensors: Any) -> list[Tensor | None]:
    """The tensors on a tape, as leaves."""
    symbols: list[Tensor | None] = []
    for x in tensors:
        if x is None:
            symbols.append(None)
            continue
        dtype = dtypes.dtype_named(str(x.dtype).removeprefix("torch."))
        symbol = tape.new(tuple(x.shape), dtype, "", tuple(x.stride()))
        if x.requires_grad:
            tape.require_grad(symbol)
        symbols.append(symbol)
    return symbols


def _allocated(tape: Tape, start: int, like: Any, results: Sequence[Tensor | None]) -> list[Any]:
    """``results`` as tensors of torch, and what else the tape has allocated since ``start`` and not freed."""
    import torch

    made: dict[int, Any] = {
        i: torch.empty(tape.sizes[i], dtype=torch.uint8, device=like.device)
        for i in range(start, len(tape.sizes))
        if i not in {x.storage.id for x in results if x is not None}
    }
    tensors = [
        None
        if x is None
        else torch.empty_strided(x.shape, x.strides, dtype=getattr(torch, x.dtype.name), device=like.device)
        for x in results
    ]
    freed = {~event for event in tape.log if event < 0}
    return [*tensors, *(made[i] for i in made if i not in freed)]
