"""What a device's dispatcher decides: autocast's lists and the attention backend. One table per device kind.

Sources: aten/src/ATen/autocast_mode.h (AT_FORALL_* lists), aten/src/ATen/native/transformers/sdp_utils.cpp and
cuda/sdp_utils.cpp, torch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memplan.tape.tensor import DType, Tensor, bool_, float16, float32

if TYPE_CHECKING:
    from memplan.tape.tape import Node, Tape


@dataclass(frozen=True, slots=True)
class DeviceRules:
    """Dispatch rules of one device kind."""

    kind: str
    autocast_float32: frozenset[str]
    """Operations that autocast runs in float32."""
    autocast_promote: frozenset[str] = frozenset()
    """Operations whose inputs autocast casts to the widest of their dtypes; elsewhere the kernel reads mixed ones."""
    compute_capability: tuple[int, int] = (0, 0)
    cudnn_attention: bool = True
    """cuDNN is newer than 9.15.0, so that its attention is preferred on compute capability 9.x and 10.x."""
    cudnn_wide_attention: bool = False
    """cuDNN is newer than 9.22.0 and takes heads of up to 256 there."""
    accumulate_in_place: bool = True
    """Whether the engine adds a gradient into one that it alone holds. Not under a dispatch mode (O1's tracker)."""
    softmax_keeps_input: bool = False
    """softmax and log_softmax save their input too, which no backward reads: torch before 1.11 (pytorch#66018)."""
    multiprocessors: int = 1
    """Streaming multiprocessors: kernels that sum by block keep one partial sum for each."""

    def dropout(self, t: Tape, x: Tensor, node: Node | None) -> Tensor:
        """The result; ``node`` saves the mask. CUDA's native_dropout makes both at once, the mask a byte per element;
        CPU multiplies by noise of x's dtype, which is saved before there is a result.
        """
        if self.kind == "cuda":
            out = t.new_like(x, "dropout")
            t.save(node, t.new(x.shape, bool_, "dropout_mask"))
            return out
        noise = t.new_like(x, "dropout_noise")
        t.save(node, noise)
        return t.new_like(x, "dropout")

    def layer_norm_stats(self, x: DType, weight: DType) -> DType:
        """The dtype of the saved mean and rstd: float32 on CUDA for 16-bit inputs; the input's on CPU."""
        if self.kind == "cuda" or weight is float32:
            return float32
        return x

    def softmax_input(self, x: Tensor, dtype: DType, cast: Any) -> Tensor:
        """softmax(dtype=float32): CUDA converts float16 inside the kernel (half_to_float); all else is cast first.

        Source: softmax in aten/src/ATen/native/SoftMax.cpp.
        """
        if self.kind == "cuda" and x.dtype is float16:
            return x
        result: Tensor = cast(x, dtype)
        return result


CPU = DeviceRules(
    "cpu", frozenset({"cross_entropy_loss", "nll_loss"}), autocast_promote=frozenset({"cat"}), accumulate_in_place=False
)

CUDA_AUTOCAST_FLOAT32 = frozenset(
    {"pow", "rsqrt", "layer_norm", "softmax", "nll_loss", "sum", "exp", "log", "norm", "softplus", "cumsum"}
)


def cuda(
    compute_capability: tuple[int, int],
    cudnn_attention: bool = True,
    multiprocessors: int = 108,
    cudnn_wide_attention: bool = False,
) -> DeviceRules:
    """The rules of an NVIDIA GPU; by default with an A100's multiprocessors."""
    return DeviceRules(
        "cuda",
        CUDA_AUTOCAST_FLOAT32,
        compute_capability=compute_capability,
        cudnn_attention=cudnn_attention,
        multiprocessors=multiprocessors,
        cudnn_wide_attention=cudnn_wide_attention,
    )


def choose_sdpa_backend(
    rules: DeviceRules,
    *,
    dtype: str,
    head_dim: int,
    value_head_dim: int,
    query_heads: int,
    kv_heads: int,
    query_len: int,
    kv_len: int,
    mask: bool,
    mask_requires_grad: bool,
    dropout: float,
    requires_grad: bool,
) -> str:
    """The backend that torch's dispatcher takes: flash, efficient, cudnn, math or flash_cpu.

    On CUDA the first whose filters pass, of cudnn where it is preferred, flash, efficient and math
    (select_sdp_backend); nothing is deterministic by request, and no environment variable reorders them.
    """
    if rules.kind == "cpu":
        return "math" if dropout > 0.0 or mask_requires_grad or head_dim != value_head_dim else "flash_cpu"
    cc = rules.compute_capability
    half = dtype in ("bfloat16", "float16")
    widths = (head_dim, value_head_dim)
    if (
        half
        and rules.cudnn_attention
        and cc[0] in (9, 10)
        and all(width % 8 == 0 for width in widths)
        and _fits_cudnn(rules, widths, requires_grad)
        and not mask_requires_grad
        and kv_len != 1
        and not (dropout and query_len == 1)
        and (dropout * 16) % 1 == 0
    ):
        return "cudnn"
    if half and cc >= (8, 0) and not mask and head_dim == value_head_dim <= 256:
        small_smem = (8, 6) <= cc <= (8, 9) or cc[0] == 12
        if not (requires_grad and small_smem and head_dim > 192 and (head_dim <= 224 or dropout > 0.0)):
            return "flash"
    if query_heads == kv_heads and not (dtype == "bfloat16" and cc < (8, 0)):
        alignment = gemm_alignment(cc, half)
        if all(width % alignment == 0 for width in widths):
            return "efficient"
    return "math"


def _fits_cudnn(rules: DeviceRules, widths: tuple[int, int], requires_grad: bool) -> bool:
    """Head sizes of query and key, and of value, that cuDNN's attention takes (check_cudnn_tensor_shapes)."""
    if max(widths) <= 128 or widths == (192, 128):
        return True
    return rules.cudnn_wide_attention and max(widths) <= 256 and (widths == (256, 256) or not requires_grad)


def gemm_alignment(compute_capability: tuple[int, int], half: bool) -> int:
    """Elements to which head sizes must be aligned for the memory-efficient kernel (minimum_gemm_alignment)."""
    if half:
        return 8 if compute_capability >= (7, 0) else 1
    return 4 if compute_capability >= (8, 0) else 1


def why_math(rules: DeviceRules, *, dtype: str, head_dim: int, query_heads: int, kv_heads: int) -> str:
    """Why no fused kernel takes a call of scaled_dot_product_attention on a GPU."""
    major, minor = rules.compute_capability
    half = dtype in ("bfloat16", "float16")
    if dtype == "bfloat16" and major < 8:
        return f"no fused kernel takes bfloat16 on compute capability {major}.{minor}"
    if query_heads != kv_heads:
        what = f"compute capability {major}.{minor}" if half else dtype
        return f"flash attention does not take {what}, and the memory-efficient kernel no grouped queries"
    return f"no fused kernel takes heads of {head_dim} in {dtype} on compute capability {major}.{minor}"
