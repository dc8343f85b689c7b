"""What a leaf keeps as its gradient, beside torch."""

from __future__ import annotations

from typing import Any

import torch

from memplan.tape import ops
from memplan.tape.tape import Tape
from memplan.tape.tensor import float32, int64


def test_a_view_is_kept_with_all_of_the_storage_it_looks_at() -> None:
    real = [torch.zeros(1, rows, 8, requires_grad=True) for rows in (1, 200)]
    joined = torch.cat(real, dim=1).view(201, 8)
    torch.nn.functional.cross_entropy(joined, torch.zeros(201, dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
    storages = {x.grad.untyped_storage().data_ptr() for x in real if x.grad is not None}

    tape = Tape()
    mine: list[Any] = [tape.parameter("", (1, rows, 8), float32) for rows in (1, 200)]
    logits = ops.cat(mine, dim=1).view(201, 8)
    tape.backward(ops.cross_entropy(logits, tape.new((201,), int64, "labels")))
    assert len({p.node.grad.storage.id for p in mine}) == len(storages) == 1
    assert [p.node.grad.strides[1:] for p in mine] == [x.grad.stride()[1:] for x in real if x.grad is not None]


def test_a_transposed_gradient_is_copied() -> None:
    weight = torch.zeros(8, 200, requires_grad=True)
    torch.nn.functional.cross_entropy(weight.t(), torch.zeros(200, dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None

    tape = Tape()
    mine: Any = tape.parameter("", (8, 200), float32)
    tape.backward(ops.cross_entropy(mine.transpose(0, 1), tape.new((200,), int64, "labels")))
    assert mine.node.grad.strides == weight.grad.stride() == (200, 1)
    assert "clone_grad" in {name for name, _, _ in tape.births}
