"""One forward and backward of a small model on the tape, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from memplan.architectures.nn import Build, InputEmbeddings, Inventory, Model
from memplan.architectures.registry import build_model
from memplan.specs.model import ModelSpec
from memplan.tape import tensor as dtypes
from memplan.tape.dispatch import CPU, DeviceRules
from memplan.tape.tape import INPUT, Tape

REAL_CPU = replace(CPU, accumulate_in_place=True)
"""CPU without a dispatch mode."""


@dataclass(frozen=True)
class TapeStep:
    """The signed bytes of every event, blocks of 512, and the model's tensors."""

    tape: Tape
    inventory: Inventory
    forward: list[int]
    backward: list[int]


def build(
    config: dict[str, Any], dtype: str, *, rules: DeviceRules = CPU, head: str | None = None, **options: Any
) -> tuple[Build, Model]:
    """Make the model's modules, on a tape of their own."""
    spec = ModelSpec(
        id="test",
        model_type=config["model_type"],
        architecture=config["architectures"][0],
        config=config,
        source="test",
    )
    b = Build(Tape(rules), dtypes.dtype_named(dtype), **options)
    return b, build_model(b, spec, head)  # type: ignore[return-value]


def step(
    config: dict[str, Any],
    dtype: str,
    adapt: Callable[[Build, Model], None],
    *,
    mixed_precision: str = "no",
    micro_batch_size: int = 2,
    seq_len: int = 48,
    **options: Any,
) -> TapeStep:
    """Run one micro-batch; ``adapt`` changes the model first."""
    b, root = build(config, dtype, **options)
    adapt(b, root)
    if b.gradient_checkpointing:
        first = next(module for _, module in root.named_modules() if isinstance(module, InputEmbeddings))
        first.require_output_grad = True
    tape = b.tape
    with tape.tagged(INPUT):
        inputs = root.inputs(micro_batch_size, seq_len)
    start = len(tape.log)
    autocast = {"no": None, "bf16": dtypes.bfloat16}[mixed_precision]
    with tape.autocasting(autocast):
        loss, logits = root(*inputs)
    if autocast is not None:
        logits.float()
    del logits
    middle = len(tape.log)
    tape.mark("backward")
    tape.backward(loss)
    return TapeStep(tape, Inventory(root), events(tape, start, middle), events(tape, middle, len(tape.log)))


def events(tape: Tape, start: int, end: int) -> list[int]:
    """The signed bytes of the log from ``start`` to ``end``."""
    return [tape.sizes[e] if e >= 0 else -tape.sizes[~e] for e in tape.log[start:end]]


def rounded(measured: list[int]) -> list[int]:
    """Measured events in blocks of 512 bytes; scalars that kernels are called with (8 bytes and less) left out."""
    tensors = [nbytes for nbytes in measured if abs(nbytes) > 8]
    return [(abs(nbytes) + 511) // 512 * (512 if nbytes > 0 else -512) for nbytes in tensors]


def peak(signed: list[int]) -> int:
    """The largest running sum."""
    total = highest = 0
    for nbytes in signed:
        total += nbytes
        highest = max(highest, total)
    return highest
