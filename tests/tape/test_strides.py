"""The layout of elementwise results, which decides where a later reshape copies: memplan's rule beside torch's."""

from __future__ import annotations

import random
from typing import Any

import pytest

from memplan.tape.tensor import Shape, dense_like, iterated_strides


@pytest.mark.parametrize(
    ("shape", "operands", "expected"),
    [
        # where(causal [1, 1, S, S], bias of [S, S, H] seen as [1, H, S, S], scalar): the bias decides, heads inside
        ((1, 6, 8, 8), (((1, 1, 8, 8), (64, 64, 8, 1)), ((1, 6, 8, 8), (384, 1, 48, 6)), ((), ())), (384, 1, 48, 6)),
        # an expanded operand says nothing about the dimension it is expanded along
        ((2, 3, 4), (((2, 3, 4), (3, 1, 0)),), (12, 4, 1)),
        ((2, 3, 4), (((2, 3, 4), (3, 1, 0)), ((2, 3, 4), (12, 1, 3))), (12, 1, 3)),
        # nothing decides: row-major
        ((2, 3), (((2, 1), (1, 1)), ((1, 3), (3, 1))), (3, 1)),
    ],
)
def test_known_layouts(shape: Shape, operands: tuple[tuple[Shape, Shape], ...], expected: Shape) -> None:
    assert iterated_strides(shape, operands) == expected


def test_a_dense_result_keeps_its_operands_order() -> None:
    assert dense_like((2, 3, 4), (12, 1, 3)) == (12, 1, 3)
    assert dense_like((2, 3, 4), (24, 2, 6)) == (12, 1, 3)


def _operand(torch: Any, rng: random.Random, shape: list[int]) -> Any:
    """A tensor that broadcasts to ``shape``: permuted, with gaps, expanded, or with fewer dimensions."""
    lead = rng.randint(0, len(shape) - 1) if rng.random() < 0.3 else 0
    own = [1 if rng.random() < 0.25 else size for size in shape[lead:]]
    order = list(range(len(own)))
    rng.shuffle(order)
    gap = 2 if rng.random() < 0.3 else 1
    whole = torch.empty([gap * own[d] for d in order])
    tensor = whole[tuple(slice(own[d]) for d in order)].permute([order.index(d) for d in range(len(own))])
    if rng.random() < 0.4:
        sizes = zip(own, shape[lead:], strict=True)
        tensor = tensor.expand([size if rng.random() < 0.5 else mine for mine, size in sizes])
    return tensor


def test_layouts_are_torchs() -> None:
    torch = pytest.importorskip("torch")
    rng = random.Random(0)
    for _ in range(3000):
        shape = [rng.choice([1, 2, 3, 4]) for _ in range(rng.randint(1, 5))]
        operands = [_operand(torch, rng, shape) for _ in range(rng.choice([1, 2]))]
        result = operands[0].neg() if len(operands) == 1 else operands[0] + operands[1]
        given = tuple((tuple(x.shape), tuple(x.stride())) for x in operands)
        found = iterated_strides(tuple(result.shape), given)
        # the stride of a dimension of size 1 means nothing
        pairs = zip(result.shape, result.stride(), found, strict=True)
        assert all(mine == theirs for size, theirs, mine in pairs if size != 1), given
