"""DDP: plain training with one more copy of the gradients, in buckets.

Sources: torch/nn/parallel/distributed.py, torch/csrc/distributed/c10d/reducer.cpp (compute_bucket_assignment_by_size),
torch 2.13; accelerate leaves gradient_as_bucket_view at False.
"""

from __future__ import annotations

from collections.abc import Iterable

from memplan.engines import plain
from memplan.engines.plain import Parts, Run
from memplan.specs.strategy import DdpSpec
from memplan.tape.tensor import Parameter
from memplan.units import MiB

FIRST_BUCKET = 1 * MiB
"""Bytes: the first bucket is small so that communication starts early (dist._DEFAULT_FIRST_BUCKET_BYTES)."""


def phases(run: Run, ddp: DdpSpec, ranks: int) -> dict[str, Parts]:
    """Plain training's phases with the buckets, which live from construction on.

    With gradient_as_bucket_view each gradient is autograd's own at first, since zero_grad has taken away the view of
    its bucket; the hook copies it there and leaves a view (mark_variable_ready_dense). The hooks sleep until a step's
    last micro-batch (no_sync), so accumulated gradients are autograd's own until then. That they go one by one in the
    last backward is not counted: it matters for two micro-batches alone, of which the peak is an upper bound.
    """
    buckets = sum(bucket_bytes(((p, count) for p, count in run.trainable), ddp))
    return plain.phases(run, buckets, ranks, gradients_in_buckets=ddp.gradient_as_bucket_view)


def bucket_bytes(parameters: Iterable[tuple[Parameter, int]], ddp: DdpSpec) -> list[int]:
    """Bytes of each bucket: parameters in reverse order, a bucket closing once it has reached its cap."""
    buckets: list[int] = []
    open_bytes = 0
    cap = FIRST_BUCKET
    for p, count in reversed(list(parameters)):
        for _ in range(count):
            open_bytes += p.nbytes
            if open_bytes >= cap:
                buckets.append(open_bytes)
                open_bytes = 0
                cap = ddp.bucket_cap_mb * MiB
    if open_bytes:
        buckets.append(open_bytes)
    return buckets
