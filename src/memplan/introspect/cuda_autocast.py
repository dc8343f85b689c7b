"""CUDA's autocast lists, imposed on CPU tensors.

``torch.autocast("cpu")`` already runs linear layers, matrix products, convolutions and attention in 16 bit, as CUDA
does, but it knows few of the operations that CUDA raises to float32: layer_norm, softmax, pow, sum and others stay
in bf16 on CPU. :func:`cuda_rules` raises them, so that a trace on fake CPU tensors has the dtypes of a GPU run.

Source: AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE, AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE and AT_FORALL_PROMOTE
of ATen/autocast_mode.h, torch 2.13 (``sum`` and ``rms_norm`` included).

A TorchFunctionMode sees calls made from Python. What C++ calls inside one of them is covered where transformers use
it (``interpolate``, and ``cross_entropy``, of which only the nll_loss is raised: its log_softmax names a dtype). A
fused half-to-float softmax, which CUDA has for float16 alone, is traced as a copy to float32 followed by the softmax.
"""

from __future__ import annotations

from typing import Any

__all__ = ["cuda_rules"]

#: Run in float32: every floating-point argument is copied up, as ``cached_cast(at::kFloat)`` does.
FLOAT32 = frozenset(
    {
        *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt"),
        *("sinh", "tan", "pow", "__pow__", "__rpow__", "softplus", "logsumexp"),
        *("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "frobenius_norm", "nuclear_norm", "renorm"),
        *("cosine_similarity", "dist", "pdist", "cdist"),
        *("nll_loss", "poisson_nll_loss", "cosine_embedding_loss", "hinge_embedding_loss", "kl_div"),
        *("l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss"),
        *("soft_margin_loss", "triplet_margin_loss", "multi_margin_loss", "binary_cross_entropy_with_logits"),
        "interpolate",  # every kind of upsampling
    }
)

#: Keep the argument as it is and return float32, unless the caller names a dtype.
FLOAT32_RESULT = frozenset(
    {"prod", "softmax", "log_softmax", "cumprod", "cumsum", "linalg_vector_norm", "linalg_matrix_norm", "sum", "norm"}
)

#: Run in the widest dtype among the arguments.
PROMOTE = frozenset(
    {
        *("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sample", "grid_sampler"),
        *("index_put", "tensordot", "scatter_add"),
    }
)


def cuda_rules() -> Any:
    """Return a context manager that applies CUDA's float32 rules wherever CPU autocast is enabled."""
    import torch
    from torch.overrides import TorchFunctionMode

    floats = (torch.float16, torch.bfloat16)

    def raised(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(torch.float32) if value.dtype in floats else value
        if isinstance(value, (list, tuple)):
            return type(value)(raised(item) for item in value)
        return value

    def is_float(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype in floats

    def cross_entropy(input: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        """``cross_entropy_loss`` of ATen/native/LossNLL.cpp; with probabilities or smoothing, all in float32."""
        functional = torch.nn.functional
        if not is_float(input) or target.is_floating_point() or kwargs.get("label_smoothing"):
            return functional.cross_entropy(raised(input), raised(target), *args, **kwargs)
        kwargs.pop("label_smoothing", None)
        logits = functional.log_softmax(input, min(input.dim() - 1, 1), dtype=input.dtype)
        return functional.nll_loss(
            raised(logits), target, *args, **{key: raised(value) for key, value in kwargs.items()}
        )

    class Rules(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            name = getattr(func, "__name__", "")
            if not torch.is_autocast_enabled("cpu"):
                return func(*args, **kwargs)
            if name == "cross_entropy":
                with torch.autocast("cpu", enabled=False):
                    return cross_entropy(*args, **kwargs)
            promotes = name in PROMOTE and any(
                isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in args
            )
            if name in FLOAT32 or promotes:
                args, kwargs = raised(args), {key: raised(value) for key, value in kwargs.items()}
            elif name in FLOAT32_RESULT and args and is_float(args[0]) and kwargs.get("dtype") is None:
                kwargs["dtype"] = torch.float32
            else:
                return func(*args, **kwargs)
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)

    return Rules()
