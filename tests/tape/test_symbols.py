"""Symbols: what a record says for other numbers, and when it says nothing."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import pytest

from memplan.tape.symbols import Record, Symbol


def replayed(function: Any, recorded: tuple[int, int], other: tuple[int, int]) -> int | None:
    record = Record()
    place = record.place(function(*map(record.input, recorded)))
    values = record.replay(*other)
    return None if values is None else values[place]


def arithmetic(a: Any, b: Any) -> Any:
    return (prod((a, b, 3), start=2) + 511 & -512) + -(-a // 64) * (b - 1) % 7 + (1000 - a) // b + 77 % b + 9 * a


@pytest.mark.parametrize("other", [(3, 5), (640, 480), (1, 1), (7, 1000)])
def test_arithmetic_is_repeated(other: tuple[int, int]) -> None:
    assert replayed(arithmetic, (100, 20), other) == arithmetic(*other)


def choosing(a: Any, b: Any) -> Any:
    if a % 16 or b < 3.5:
        return a
    return max(a, b) if (a, b) != (b, a) else 1


@pytest.mark.parametrize(
    ("recorded", "same", "different"),
    [
        ((32, 8), (64, 16), (33, 8)),
        ((33, 8), (31, 9), (32, 8)),
        ((16, 16), (32, 32), (32, 48)),
        ((16, 3), (32, 2), (16, 4)),
    ],
)
def test_a_comparison_must_come_out_the_same(
    recorded: tuple[int, int], same: tuple[int, int], different: tuple[int, int]
) -> None:
    assert replayed(choosing, recorded, same) == choosing(*same)
    assert replayed(choosing, recorded, different) is None


def test_same_steps_are_taken_once() -> None:
    record = Record()
    a, b = record.input(6), record.input(4)
    assert a * b is a * b
    assert (a * b == 24, a * b == 24) == (True, True)
    assert len(record._steps) == 2


def test_what_is_remembered_of_other_symbols_is_not_found() -> None:
    calls = []

    @lru_cache
    def is_even(n: Any) -> bool:
        calls.append(n)
        return bool(n % 2 == 0)

    for value in (4, 4, 5):
        assert is_even(Record().input(value)) is (value == 4)
    assert is_even(4)
    assert len(calls) == 4


@pytest.mark.parametrize(
    "use",
    [
        lambda n: range(n),
        lambda n: [0] * n,
        lambda n: [0, 1][n],
        lambda n: float(n),
        lambda n: int(n),
        lambda n: n / 2,
        lambda n: n * 0.5,
        lambda n: n**2,
        lambda n: n << 1,
        lambda n: round(n),
        lambda n: f"{n:d}",
    ],
)
def test_other_uses_are_refused(use: Any) -> None:
    with pytest.raises(TypeError):
        use(Record().input(3))


def test_bool_is_a_comparison() -> None:
    record = Record()
    assert record.input(3)
    assert record.replay(5) is not None
    assert record.replay(0) is None


def test_a_symbol_compares_with_numbers_alone() -> None:
    symbol = Record().input(3)
    assert isinstance(symbol, Symbol)
    assert symbol != "3"
    assert symbol is not None
