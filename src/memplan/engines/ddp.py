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

    With gradient_as_bucket_view the gradients live in the buckets, so they exist between steps too.
    """
    buckets = sum(bucket_bytes(((p, count) for p, count in run.trainable), ddp))
    result = plain.phases(run, communication=buckets, ranks=ranks)
    if ddp.gradient_as_bucket_view:
        for parts in result.values():
            parts["gradients"] = 0
    return result


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
