"""A mistake in any rule is seen: each of these, made on purpose, is caught by a replay of a few archived rows.

The rows are traces of real models (O1), real engines as rank 0 of N (O2) and published measurements (O5), and what each
is held to is less than what it misses by.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from tests.engines import test_ddp
from tests.oracles import o1, o2, test_engines
from tests.oracles.compare import comparable, compare
from tests.scripts import script

from memplan import micro_batch
from memplan.adapters import lora
from memplan.architectures import gpt_bigcode, nn
from memplan.engines import ddp, fsdp, fsdp1, plain, zero, zero3
from memplan.estimator import estimate
from memplan.memory import optimizers
from memplan.memory.course import Ledger
from memplan.tape import ops, quantized
from memplan.tape.tape import Tape

score = script("benchmarks/published/score.py")

TRACED = 0.0008
"""Relative error of steady_allocated, of O1's rows here."""
MEASURED = {
    "fms-a-009": 1e-4, "fms-a-010": 1e-4, "fms-a-033": 1e-4, "fms-a-077": 1e-4, "fms-a-071": 1e-3,
}  # fmt: skip
"""Row of memory.csv -> relative error of what was allocated."""
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
    return {id: (score.adapter.setup(rows[id]), float(rows[id]["measured_GiB"])) for id in MEASURED}


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
    for id, (setup, measured) in published().items():
        found = estimate(
            setup.model, setup.training, setup.cluster, setup.strategy, setup.software, replay=False
        ).gpu.peak_allocated
        error = found / 2**30 / measured - 1
        if abs(error) > MEASURED[id]:
            yield f"{id}: {error:+.3%}"


def missed(check: Callable[[o2.Row], None], row: o2.Row) -> Iterator[str]:
    try:
        check(row)
    except AssertionError as error:
        yield f"{row.setup.key}: {error}"


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


MISTAKES = {
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
