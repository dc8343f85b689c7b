"""A mistake in any rule is seen: each of these, made on purpose, is caught by a replay of a few archived rows.

The rows are traces of real models (O1), real engines as rank 0 of N (O2) and published measurements (O5), and what each
is held to is less than what it misses by.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from tests.adapters import test_quantization
from tests.engines import test_ddp
from tests.oracles import o1, o2, test_engines
from tests.oracles.compare import comparable, compare
from tests.scripts import script
from tests.tape import test_dispatch
from tests.tape.test_dispatch import A100, V100, B, H, Step

from memplan import estimator, micro_batch
from memplan.adapters import lora, quantization
from memplan.architectures import gpt_bigcode, nn
from memplan.engines import ddp, fsdp, fsdp1, plain, zero, zero3
from memplan.estimator import estimate
from memplan.memory import allocator, optimizers
from memplan.memory.course import Ledger
from memplan.tape import attention_kernels, dispatch, ops, quantized
from memplan.tape.tape import Tape
from memplan.tape.tensor import float32

score = script("benchmarks/published/score.py")

TRACED = 0.0008
"""Relative error of steady_allocated, of O1's rows here."""
MEASURED = {
    "fms-a-009": 1e-4, "fms-a-010": 1e-4, "fms-a-033": 1e-4, "fms-a-077": 1e-4, "fms-a-071": 1e-3,
}  # fmt: skip
"""Row of memory.csv -> relative error of what was allocated."""
ON_DEVICE = {"hf-bert-05": 0.003, "fms-a-010-nv": 0.001}
"""Likewise, of the process: a context without lazy loading, and one with NCCL and four streams."""
ENGINES = ("zero1", "zero2", "zero3", "fsdp", "fsdp1", "offload", "quantized")


@cache
def traced() -> list[o1.Row]:
    rows = []
    for family in ("llama", "gpt2", "bert"):
        for row in o1.load_archive(o1.ARCHIVE / f"{family}.json").rows:
            options = row.setup.options
            if comparable(row) and (options["seq_len"], options.get("num_layers", 4)) == (200, 4):
                rows.append(row)
    return rows


@cache
def engines() -> list[o2.Row]:
    archives = o2.load_archives()
    return [
        next(row for row in archives[name].rows if row.result is not None and row.setup.options["strategy"] != "single")
        for name in ENGINES
    ]


@cache
def swapped() -> o2.Row:
    return next(row for row in o2.load_archives()["nvme"].rows if row.result is not None and "nvme" in row.result)


@cache
def published() -> dict[str, tuple[Any, float]]:
    """Setup and GiB."""
    rows = {row["id"]: row for row in score.read()}
    ids = (*MEASURED, *ON_DEVICE)
    return {id: (score.adapter.setup(rows[id]), float(rows[id]["measured_GiB"])) for id in ids}


def kernels() -> Iterator[str]:
    """What the backward of CUDA's fused attention takes for a moment, by its source, beside what the tape has.

    flash_api.cpp, mha_bwd: dq_accum, float32 [B, ceil128(S), H, ceil32(D)], and softmax_d, float32 [B, H, ceil128(S)].
    attention_backward.cu: where the kernel does not compute delta, as of 16-bit heads wider than 128 on 7.0, gradient
    and result are cast to float32, multiplied and summed at once: three tensors of [B, S, H, D], two of [B, H, S].
    kernel_backward.h, workspace_elements_gq: on 8.0 a tile of float32 and a lock of four words for every 64 queries.
    """
    length, dim = 200, 72
    rows, elements = 256, B * H * length * dim
    transient = 4 * B * H * rows * 96 + 4 * B * H * rows
    step = Step(A100, "bfloat16", length=length, dim=dim)
    if step.backward_peak - step.saved != 4 * 2 * elements + transient:
        yield f"flash: {step.backward_peak - step.saved}"
    step = Step(A100, "bfloat16", mask=True, length=256)
    workspace = 4 * B * H * 4 * (64 * 64 + 4)
    if step.backward_peak - step.saved != 4 * 2 * B * H * 256 * 64 + 4 * B * H * 256 + workspace:
        yield f"memory-efficient: {step.backward_peak - step.saved}"
    heads, length, dim = 64, 512, 160  # with so many heads the workspace, which comes later, is smaller
    elements, delta = B * heads * length * dim, 4 * B * heads * length
    step = Step(V100, "float16", heads=heads, kv_heads=heads, length=length, dim=dim)
    transient = step.backward_peak - step.saved - 4 * 2 * elements
    if transient != 3 * 4 * elements + 2 * delta:
        yield f"memory-efficient, delta outside the kernel: {transient}"


@cache
def imposed() -> list[o1.Row]:
    """Traces on which CUDA's list of what autocast makes float32 was imposed."""
    return [row for row in test_dispatch.imposed_rows() if row.setup.family in ("bert", "gpt2")]


def autocast() -> Iterator[str]:
    rules = replace(test_dispatch.CUDA_LIST_ON_CPU, autocast_float32=dispatch.CUDA_AUTOCAST_FLOAT32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimator, "device_rules", lambda gpu, software: rules)
        for row in imposed():
            error = compare(row).error
            if abs(error) > TRACED:
                yield f"{row.setup.key}: {error:+.3%}"


@cache
def bitsandbytes() -> dict[str, Any]:
    """A layer of each kind, as bitsandbytes itself allocated it."""
    return {row["case"]["kind"]: row for row in reversed(test_quantization.ARCHIVE["layers"])}


def replay() -> Iterator[str]:
    """The rows that are missed."""
    for row in traced():
        error = compare(row).error
        if abs(error) > TRACED:
            yield f"{row.setup.key}: {error:+.3%}"
    for row in engines():
        yield from missed(test_engines.check_gpu, row)
        if "host" in row.result["phases"]:
            yield from missed(test_engines.check_host, row)
    yield from missed(test_engines.check_nvme, swapped())
    if test_ddp.estimated_buckets() != pytest.approx(json.loads(test_ddp.ARCHIVE.read_text())["buckets"], rel=0.001):
        yield "DDP's buckets"
    assert imposed()
    yield from autocast()
    yield from kernels()
    for row in bitsandbytes().values():
        yield from missed(test_quantization.test_a_layer_allocates_what_bitsandbytes_does, row, str(row["case"]))
    for id, (setup, measured) in published().items():
        on_device = id in ON_DEVICE
        specs = (setup.model, setup.training, setup.cluster, setup.strategy, setup.software)
        gpu = estimate(*specs, replay=on_device).gpu
        error = (gpu.peak_device if on_device else gpu.peak_allocated) / 2**30 / measured - 1
        if abs(error) > (ON_DEVICE if on_device else MEASURED)[id]:
            yield f"{id}: {error:+.3%}"


def missed(check: Callable[[Any], None], row: Any, name: str = "") -> Iterator[str]:
    try:
        check(row)
    except AssertionError as error:
        yield f"{name or row.setup.key}: {error}"


def forget_everything() -> None:
    """Empty every cache of memplan's: what was estimated before a rule changed would answer after it."""
    for name, module in list(sys.modules.items()):
        if name == "memplan" or name.startswith("memplan."):
            for value in list(vars(module).values()):
                for each in (value, *(vars(value).values() if isinstance(value, type) else ())):
                    clear = getattr(each, "cache_clear", None)
                    if callable(clear):
                        clear()


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    forget_everything()
    with monkeypatch.context() as patch:
        yield patch
    forget_everything()


def test_without_a_mistake_no_row_is_missed() -> None:
    assert len(traced()) >= 30
    assert list(replay()) == []


# -- mistakes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """A rule, and what stands in its place."""

    owner: Any
    name: str
    wrong: Callable[[Any], Any]
    """Of the real rule, makes the wrong one."""


def without(*names: str) -> Callable[[Any], Any]:
    """Blocks of these names take nothing."""

    def wrong(real: Any) -> Any:
        def allocate(self: Any, component: str, nbytes: int, place: str = "gpu", name: str = "") -> Any:
            return real(self, component, 0 if name in names else nbytes, place, name)

        return allocate

    return wrong


def tensors_without(*names: str) -> Callable[[Any], Any]:
    """Tensors of these names take nothing to speak of."""

    def wrong(real: Any) -> Any:
        def new(self: Any, shape: Any, dtype: Any, name: str, strides: Any = None) -> Any:
            found = real(self, shape, dtype, name, strides)
            if name in names:
                self.sizes[found.storage.id] = 512
            return found

        return new

    return wrong


def saving_its_result(operation: str) -> Callable[[Any], Any]:
    """An operation saves its result in place of its input."""
    return lambda real: lambda x, name, saves: real(x, name, "result" if name == operation else saves)


def off_pages(real: Any) -> Any:
    def allocate(self: Any, component: str, nbytes: int, place: str = "gpu", name: str = "") -> Any:
        return real(self, component, nbytes, "host" if place == "locked" else place, name)

    return allocate


def nothing(real: Any) -> Any:
    """A constant of bytes is none."""
    return lambda *args, **kwargs: replace(real(*args, **kwargs), value=0, low=0, high=0)


def delta_in_the_kernel(real: Any) -> Any:
    return lambda rules, half, tile: True


def without_scales(real: Any) -> Any:
    def init(self: Any, b: Any, base: Any) -> None:
        real(self, b, base)
        self.SCB = b.tape.buffer((1,), float32, registered=False)

    return init


MISTAKES = {
    "memory-efficient attention's float32 temporaries are forgotten": Mistake(
        Tape, "new", tensors_without("efficient_float")
    ),
    "memory-efficient attention computes delta in the kernel everywhere": Mistake(
        attention_kernels, "computes_delta", delta_in_the_kernel
    ),
    "memory-efficient attention has no workspace": Mistake(
        attention_kernels, "efficient_workspace", lambda real: lambda *_: 0
    ),
    "flash's gradient of the queries is in their type": Mistake(Tape, "new", tensors_without("flash_dq_accum")),
    "there is no context": Mistake(estimator, "cuda_context", nothing),
    "NCCL takes nothing": Mistake(estimator, "nccl", nothing),
    "the allocator's segments are no larger than what is asked for": Mistake(
        allocator, "segment_size", lambda real: lambda size, large_segment_size=0: size
    ),
    "the allocator's segments are whole 64 MiB": Mistake(
        allocator, "segment_size", lambda real: lambda size, large_segment_size=0: -(-size // (64 << 20)) * (64 << 20)
    ),
    "softmax is not float32 under CUDA's autocast": Mistake(
        dispatch, "CUDA_AUTOCAST_FLOAT32", lambda real: real - {"softmax"}
    ),
    "pow is not float32 under CUDA's autocast": Mistake(dispatch, "CUDA_AUTOCAST_FLOAT32", lambda real: real - {"pow"}),
    "8-bit weights have no scales": Mistake(quantization.Linear8bitLt, "__init__", without_scales),
    "the loss forgets to make the logits float32": Mistake(
        nn,
        "causal_lm_loss",
        lambda real: lambda b, logits, labels, ce=ops.cross_entropy: nn._shifted_loss(logits, labels, ce)[0],
    ),
    "log_softmax is not saved": Mistake(Tape, "new", tensors_without("log_softmax")),
    "accelerate's float32 copy of the outputs is forgotten": Mistake(
        micro_batch,
        "_forward",
        lambda real: lambda tape, root, inputs, setup: _plain_forward(tape, root, inputs, setup),
    ),
    "Adam's moments are halved": Mistake(
        optimizers.AdamW, "states", lambda real: lambda self, p: tuple(n // 2 for n in real(self, p))
    ),
    "foreach's temporaries are forgotten": Mistake(
        optimizers.AdamW, "has_temporaries", lambda real: property(lambda self: False)
    ),
    "gradients take nothing in the step": Mistake(
        plain, "states", lambda real: lambda run: real(run)._replace(gradients=0)
    ),
    "a SiLU saves its result": Mistake(ops, "_unary", saving_its_result("silu")),
    "a GELU saves its result": Mistake(ops, "_unary", saving_its_result("gelu")),
    "autocast does not keep the weights that it cast": Mistake(
        Tape, "cached_cast", lambda real: lambda self, p, dtype, cast: cast(p, dtype)
    ),
    "attention's log-sum-exp is not saved": Mistake(Tape, "new", tensors_without("sdpa_logsumexp")),
    "dropout's mask is not saved": Mistake(Tape, "new", tensors_without("dropout_mask")),
    "checkpointing checkpoints nothing": Mistake(Tape, "checkpoint", lambda real: lambda self, fn, *args: fn(*args)),
    "LoRA's adapters are in the weights' type": Mistake(
        lora,
        "_adapted",
        lambda real: lambda b, m, path, spec: real(b, m, path, spec.replace(autocast_adapter_dtype=False)),
    ),
    "cuBLAS has no workspace": Mistake(micro_batch, "cublas_workspaces", lambda real: lambda *_, **__: ()),
    "a scale stands for twice as many 4-bit weights": Mistake(quantized, "BLOCK", lambda real: 2 * real),
    "gpt_bigcode gives out no cache": Mistake(gpt_bigcode, "gives_presents", lambda real: lambda b: False),
    "DDP's buckets are forgotten": Mistake(ddp, "bucket_bytes", lambda real: lambda parameters, keys: []),
    "ZeRO's bucket is forgotten": Mistake(Ledger, "allocate", without(zero.BUCKETS)),
    "ZeRO's masters are in the model's type": Mistake(zero, "master_dtype", lambda real: lambda strategy, dtype: dtype),
    "ZeRO's rank keeps no gradients": Mistake(Ledger, "allocate", without(zero.PARTITION)),
    "ZeRO-3 gathers into nothing": Mistake(Ledger, "allocate", without(zero3.LIVE, zero3.TOGETHER)),
    "FSDP2 gathers into nothing": Mistake(Ledger, "allocate", without(fsdp.TOGETHER, fsdp.GATHERED)),
    "FSDP1 gathers into nothing": Mistake(Ledger, "allocate", without(fsdp1.GATHERED)),
    "locked buffers are not whole pages": Mistake(Ledger, "allocate", off_pages),
}


def _plain_forward(tape: Any, root: Any, inputs: Any, setup: Any) -> Any:
    with tape.autocasting(setup.autocast):
        return root(*inputs)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name: str, mutate: pytest.MonkeyPatch) -> None:
    mistake = MISTAKES[name]
    mutate.setattr(mistake.owner, mistake.name, mistake.wrong(getattr(mistake.owner, mistake.name)))
    assert next(replay(), None) is not None
