"""What rank 0 sends to the other ranks as DDP and FSDP1 are made: copies of the model's tensors, in buckets.

Sources: torch/csrc/distributed/c10d/comm.cpp (broadcast_coalesced) and reducer.cpp (compute_bucket_assignment_by_size),
torch/nn/parallel/distributed.py, torch/distributed/fsdp/_init_utils.py, torch 2.13.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

from memplan.units import MiB

BUCKET = 250 * MiB
"""From these bytes on a bucket is full (broadcast_bucket_size, PARAM_BROADCAST_BUCKET_SIZE)."""
IN_FLIGHT = 2
"""Buckets that are there at one time (max_in_flight)."""

BlockT = TypeVar("BlockT")


class _Bucket(NamedTuple):
    first: int
    """Number of its first tensor: buckets are sent in the order of these."""
    tensors: int
    nbytes: int


def copies(tensors: Iterable[tuple[object, int]]) -> list[int]:
    """Bytes of the copy that each bucket of tensors, of (dtype, bytes), is sent as; 0 for a tensor alone, which is sent
    itself (flatten_dense_tensors). A bucket takes tensors of one dtype until it is full.

    >>> [nbytes // MiB for nbytes in copies(("bf16", n * MiB) for n in (200, 100, 100, 300, 10))]
    [300, 400, 0]
    >>> [nbytes // MiB for nbytes in copies([("u8", 200 * MiB), ("bf16", 250 * MiB), ("u8", 100 * MiB)])]
    [300, 0]
    """
    full: list[_Bucket] = []
    filling: dict[object, _Bucket] = {}
    for number, (dtype, nbytes) in enumerate(tensors):
        first, number_of, before = filling.get(dtype, (number, 0, 0))
        filling[dtype] = bucket = _Bucket(first, number_of + 1, before + nbytes)
        if bucket.nbytes >= BUCKET:
            full.append(filling.pop(dtype))
    return [bucket.nbytes if bucket.tensors > 1 else 0 for bucket in sorted([*full, *filling.values()])]


def most_alive(sent: Sequence[int]) -> int:
    """Bytes of the copies at the fullest moment.

    >>> most_alive([10, 20, 30]), most_alive([10]), most_alive([])
    (50, 10, 0)
    """
    return max((sum(each) for each in pairwise(sent)), default=sum(sent))


def broadcast(sent: Iterable[int], allocate: Callable[[int], BlockT], free: Callable[[BlockT], None]) -> None:
    """Allocate and free the copies in the order in which they are sent."""
    in_flight: deque[BlockT | None] = deque()

    def finish() -> None:
        block = in_flight.popleft()
        if block is not None:
            free(block)

    for nbytes in sent:
        if len(in_flight) == IN_FLIGHT:
            finish()
        in_flight.append(allocate(nbytes) if nbytes else None)
    while in_flight:
        finish()
