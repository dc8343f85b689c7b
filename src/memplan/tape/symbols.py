"""Batch and length as symbols: what a tape did for some numbers, told for others.

All that a tape does follows from the numbers it is given: by arithmetic, and by comparisons that decide which way the
code goes. Run with symbols in their place, arithmetic makes further symbols, and a comparison answers for the numbers
that they stand for. A :class:`Record` keeps every step. For other numbers the steps are taken again: as long as each
comparison comes out as it did, the code would have gone the same way and done the same; if one does not, the record
says nothing. Whatever else is asked of a symbol - to be an index, a float, the end of a range - raises TypeError.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Union

Number = Union[int, float, "Symbol"]


class Record:
    """The steps that some code took, with symbols for some of its numbers."""

    def __init__(self) -> None:
        self._inputs = 0
        self._values: list[Any] = []
        """Of inputs, constants and results; results are made anew each time."""
        self._steps: list[tuple[Callable[[Any, Any], Any], int, int, int, bool | None]] = []
        """(operation, its operands' places, the result's place, or how a comparison came out)."""
        self._results: dict[tuple[Callable[[Any, Any], Any], int, int], Symbol | bool] = {}
        self._constants: dict[tuple[type, int | float], int] = {}

    def input(self, value: int) -> Symbol:
        """A symbol that stands for ``value`` now. All inputs come before the first step."""
        assert len(self._values) == self._inputs
        self._inputs += 1
        return self._symbol(value)

    def place(self, number: Number) -> int:
        """Where :meth:`replay` gives this number."""
        if isinstance(number, Symbol):
            return number.place
        key = number.__class__, number
        if key not in self._constants:
            self._constants[key] = len(self._values)
            self._values.append(number)
        return self._constants[key]

    def calculate(self, operation: Callable[[Any, Any], Any], a: Number, b: Number) -> Symbol:
        """A step of arithmetic: the same symbol for the same step."""
        key = operation, self.place(a), self.place(b)
        found = self._results.get(key)
        if found is None:
            found = self._results[key] = self._symbol(operation(self._values[key[1]], self._values[key[2]]))
            self._steps.append((*key, found.place, None))
        assert isinstance(found, Symbol)
        return found

    def compare(self, operation: Callable[[Any, Any], Any], a: Number, b: Number) -> bool:
        """A comparison, which decides which way the code goes."""
        key = operation, self.place(a), self.place(b)
        found = self._results.get(key)
        if found is None:
            found = self._results[key] = operation(self._values[key[1]], self._values[key[2]])
            self._steps.append((*key, -1, found))
        assert isinstance(found, bool)
        return found

    def replay(self, *inputs: int) -> Sequence[int] | None:
        """All numbers for other inputs, by their places; None if the code would have gone another way."""
        values = list(self._values)
        values[: len(inputs)] = inputs
        for operation, a, b, place, outcome in self._steps:
            value = operation(values[a], values[b])
            if outcome is None:
                values[place] = value
            elif value is not outcome:
                return None
        return values

    def _symbol(self, value: int) -> Symbol:
        self._values.append(value)
        return Symbol(self, len(self._values) - 1)


class Symbol:
    """An integer of a record. Equal symbols may be different objects, so it is no key, but of a cache."""

    __slots__ = ("place", "record")

    def __init__(self, record: Record, place: int) -> None:
        self.record = record
        self.place = place

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return self.record.compare(operator.ne, self, 0)

    def __neg__(self) -> Symbol:
        return self.record.calculate(operator.sub, 0, self)


def _calculates(name: str, operation: Callable[[Any, Any], Any]) -> None:
    def of(self: Symbol, other: Any) -> Any:
        return self.record.calculate(operation, self, other) if other.__class__ in (int, Symbol) else NotImplemented

    def reflected(self: Symbol, other: Any) -> Any:
        return self.record.calculate(operation, other, self) if other.__class__ is int else NotImplemented

    setattr(Symbol, f"__{name}__", of)
    setattr(Symbol, f"__r{name}__", reflected)


def _compares(name: str, operation: Callable[[Any, Any], Any]) -> None:
    def of(self: Symbol, other: Any) -> Any:
        return (
            self.record.compare(operation, self, other) if other.__class__ in (int, float, Symbol) else NotImplemented
        )

    setattr(Symbol, f"__{name}__", of)


for _name in ("add", "sub", "mul", "floordiv", "mod", "and"):
    _calculates(_name, getattr(operator, f"__{_name}__"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _compares(_name, getattr(operator, _name))
