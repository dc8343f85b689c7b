"""Buckets of a broadcast against those of torch's own."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.memory import broadcast


@pytest.fixture
def process_group() -> Iterator[Any]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


class Flattened(TorchDispatchMode):
    """The bytes of each copy that is made, and how many are there when the next one is."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.alive: list[int] = []
        self._copies: list[weakref.ref[torch.UntypedStorage]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.cat.default:
            return func(*args, **kwargs or {})
        self.alive.append(sum(copy() is not None for copy in self._copies))
        copy = func(*args)
        storage = copy.untyped_storage()
        self.sizes.append(storage.nbytes())
        self._copies.append(weakref.ref(storage))
        return copy


@pytest.mark.parametrize(
    "numels",
    [
        {"float32": [200, 100, 100, 300, 10, 260, 260, 5]},
        {"float32": [100] * 12, "bfloat16": [130, 10, 400, 20]},
        {"float32": [1000]},
    ],
    ids=str,
)
def test_buckets_are_torchs(numels: dict[str, list[int]], process_group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "BUCKET", 1000)
    tensors = [torch.zeros(n, dtype=getattr(torch, dtype)) for dtype, each in numels.items() for n in each]
    tensors = tensors[::2] + tensors[1::2]
    with Flattened() as flattened:
        torch.distributed._broadcast_coalesced(process_group, tensors, 1000, 0)
    sent = broadcast.copies((tensor.dtype, tensor.nbytes) for tensor in tensors)
    assert flattened.sizes == [nbytes for nbytes in sent if nbytes]
    alive: list[int] = []
    found: list[int] = []

    def allocate(nbytes: int) -> int:
        found.append(len(alive))
        alive.append(nbytes)
        return nbytes

    broadcast.broadcast(sent, allocate, alive.remove)
    assert found == flattened.alive
    assert not alive
