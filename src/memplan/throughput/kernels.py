"""What a micro-batch has a GPU do: matrix products, attention, bytes moved, read off the tape that also gives memory.

Every result on the tape's log is one kernel. The tape has noted the FLOPs of products; the other kernels are as long as
the bytes that they write and read take, which follow from the result's size and its operation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from memplan.memory.timeline import Segment, Unrolled
from memplan.tape.tape import Tape

Stage = Literal["forward", "backward", "recomputation"]

STAGES: tuple[Stage, ...] = ("forward", "backward", "recomputation")

_PRODUCTS = frozenset({
    "linear", "addmm", "linear_grad_input", "linear_grad_weight", "bmm", "bmm_grad", "baddbmm", "conv2d",
    "conv2d_grad_input", "conv2d_grad_weight", "grouped_mm", "grouped_mm_grad_input", "grouped_mm_grad_weight",
    "gemm_4bit", "quantized_grad_input", "int8_linear_matmul", "liger_mm", "liger_logits", "liger_pre_act",
    "liger_d_pre_act", "mm", "convolution", "convolution_backward", "sdpa_backward",
})  # fmt: skip
"""Results of matrix products; the last are ATen's, of a trace."""

_NO_KERNEL = frozenset({
    "sdpa_logsumexp", "sdpa_seed", "sdpa_offset", "sdpa_grad_k", "sdpa_grad_v", "sdpa_grad_bias", "flash_softmax_d",
    "flash_dq_accum", "flash_lse_accum", "flash_out_accum", "efficient_out_accum", "efficient_workspace",
    "cudnn_workspace", "dropout_mask", "layer_norm_mean", "layer_norm_rstd", "layer_norm_grad_weight",
    "layer_norm_grad_bias", "nll_total_weight", "sort_indices", "topk_indices", "max_indices", "outliers", "liger_rstd",
    "conv2d_grad_bias", "input_ids", "labels", "attention_mask", "pixel_values",
})  # fmt: skip
"""What another result's kernel writes as well, or the batch, which is there."""

_READS: dict[str, float] = {
    "zeros": 0, "zeros_like": 0, "ones": 0, "ones_like": 0, "arange": 0, "zeros_grad": 0,
    "embedding_backward": 0, "gather_backward": 0, "index_put": 0, "nll_loss_backward": 0, "slice_backward": 1,
    "to": 1, "to_backward": 1, "cast_grad": 1, "clone": 1, "clone_grad": 1, "reshape_copy": 1, "cat": 1, "pad": 1,
    "embedding": 1, "index": 1, "gather": 1, "neg": 1, "pow": 1, "rsqrt": 1, "silu": 1, "gelu": 1, "relu": 1, "tanh": 1,
    "sigmoid": 1, "erf": 1, "cos": 1, "sin": 1, "softmax": 1, "log_softmax": 1, "layer_norm": 1, "dropout": 1,
    "scale_backward": 1, "masked_fill": 1, "masked_fill_backward": 1, "mean_backward": 0,
    "dequantize_4bit": 0.25, "dequantize_int8": 0.5, "dequantize_blockwise": 0.25,
}  # fmt: skip
"""Bytes read for each byte written. Other elementwise operations read two operands: add, mul, a unary's backward."""

_REDUCTIONS = frozenset({"mean", "sum", "sum_to_size", "nll_loss", "max"})
"""They read what was made before them, of which they leave little."""

_FAR = 8
"""Results between the count of a product's FLOPs and its own: copies of strided operands."""


class Product(NamedTuple):
    """A matrix product [m, k] x [k, n]; a batch of them has its rows together."""

    m: int
    n: int
    k: float
    dtype: str


@dataclass
class Work:
    """The kernels of one stage of a micro-batch, with how often each runs."""

    flops: int = 0
    """As torch.utils.flop_counter counts them."""
    results: int = 0
    """Results that the host has made."""
    hooks: int = 0
    """Times that a watched module begins or ends, forward or backward."""
    gradients: int = 0
    """Gradients that an engine has taken."""
    products: Counter[Product] = field(default_factory=Counter)
    attention: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Fused attention by dtype and the FLOPs that the kernel computes: half of them where it is causal."""
    elementwise: Counter[int] = field(default_factory=Counter)
    """Other kernels by the bytes that they move."""
    unknown: Counter[str] = field(default_factory=Counter)
    """FLOPs of products whose shape is not known, by dtype: those of a trace."""

    @property
    def moved(self) -> int:
        """Bytes moved by elementwise kernels."""
        return sum(nbytes * count for nbytes, count in self.elementwise.items())

    @property
    def computed(self) -> float:
        """FLOPs that kernels compute."""
        products = sum(2 * p.m * p.n * p.k * count for p, count in self.products.items())
        attention = sum(flops * count for (_, flops), count in self.attention.items())
        return products + attention + sum(self.unknown.values())


def work_of(unrolled: Unrolled) -> dict[Stage, Work]:
    """Count the kernels of a whole micro-batch, layer by layer, each kind of layer once."""
    found: dict[Stage, Work] = {stage: Work() for stage in STAGES}
    reader = _Reader(unrolled.tape)
    seen: dict[int, tuple[Segment, int]] = {}
    for segment, count in unrolled.runs:
        before = seen.get(id(segment))
        seen[id(segment)] = segment, count + (before[1] if before else 0)
    for segment, count in seen.values():
        reader.count(segment, count, found)
    return found


class _Reader:
    """Reads a tape's log: what has been noted of a storage, by its number."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.recomputed = {i for start, end in tape.recomputed for i in range(start, end)}
        self.flops: Counter[int] = Counter()
        self.skipped: Counter[int] = Counter(dict(tape.skipped))
        for index, flops in tape.products:
            self.flops[index] += flops

    def count(self, segment: Segment, times: int, found: dict[Stage, Work]) -> None:
        """Add a segment's kernels, as often as the segment runs."""
        tape = self.tape
        work = found["backward" if segment.phase == "backward" else "forward"]
        left = segment.flops  # of which no product was told: a trace knows segments alone
        waiting = skipped = passed = 0
        dtype = "float32"
        for index in tape.log[segment.start : segment.end]:
            if index < 0:
                continue
            if segment.phase == "backward":
                work = found["recomputation" if index in self.recomputed else "backward"]
            name, _, born = tape.births[index]
            if born.is_floating and (name in _PRODUCTS or index in self.flops):
                dtype = born.name  # what products are computed in, where their FLOPs are told of a segment alone
            if index in self.flops:
                work.unknown[dtype] += waiting * times  # one whose result did not come
                waiting, skipped, passed = self.flops[index], self.skipped[index], 0
                left -= waiting
                work.flops += waiting * times
            work.results += times
            passed += 1
            if self._one(work, index, times, waiting, skipped):
                waiting = 0
            elif passed > _FAR:
                work.unknown[dtype] += waiting * times
                waiting = 0
        work.unknown[dtype] += (left + waiting) * times
        work.flops += left * times
        for event in tape.events[segment.events]:
            work.hooks += times * event.kind.startswith(("pre_", "post_"))
            work.gradients += times * (event.kind == "gradient")

    def _one(self, work: Work, index: int, times: int, flops: int, skipped: int) -> bool:
        """Add one result's kernel; whether it was the product that is waited for."""
        tape = self.tape
        name, shape, dtype = tape.births[index]
        if flops and name in _PRODUCTS:
            numel = 1
            for size in shape:
                numel *= size
            n = shape[-1] if shape else 1
            work.products[Product(numel // max(n, 1), n, flops / (2 * max(numel, 1)), dtype.name)] += times
            return True
        if flops and name in ("sdpa", "sdpa_grad_q"):
            work.attention[dtype.name, flops - skipped] += times
            return True
        if name in _NO_KERNEL or name in _PRODUCTS:
            return False
        written = tape.sizes[index]
        if name in _REDUCTIONS:
            moved = written + (tape.sizes[index - 1] if index else 0)
        else:
            moved = round(written * (1 + _READS.get(name, 2)))
        work.elementwise[moved] += times
        return False
