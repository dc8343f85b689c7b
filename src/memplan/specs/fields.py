"""Typed, checked reading of a raw ``config.json``: what an architecture file takes its numbers from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, TypeAlias, TypeVar

from memplan.errors import SpecError, did_you_mean
from memplan.specs._base import LARGEST_INT

__all__ = ["Fields"]

# The methods below are named after the types they return, which hides those types in the class body.
Int: TypeAlias = int
Float: TypeAlias = float
Bool: TypeAlias = bool
Str: TypeAlias = str
T = TypeVar("T")


class _Required:
    """Marks a field without a default."""


_REQUIRED: Final = _Required()
MOST_LAYERS = 4096
"""Several times the depth of any published model."""
_LARGEST_FLOAT = 1e12  # rope_theta reaches 1e11 in long-context checkpoints; 1e30 is a slip


class Fields:
    """Reads a config's fields by name, with their types and ranges checked.

    Every method raises SpecError, naming field, value and file, for a field that is missing without a
    default, has another type, is NaN, infinite, or outside its range. ``alias`` is the name that some
    checkpoints use instead; the main name wins. A JSON ``null`` counts as missing.

    >>> fields = Fields({"hidden_size": 64, "rms_norm_eps": 1e-6}, "config.json")
    >>> fields.int("hidden_size"), fields.int("num_key_value_heads", 4), fields.float("rms_norm_eps")
    (64, 4, 1e-06)
    """

    __slots__ = ("_config", "source")

    def __init__(self, config: Mapping[Str, Any], source: Str) -> None:
        self._config = config
        self.source = source

    def has(self, name: Str) -> Bool:
        """Tell whether the field is there and not null."""
        return self._config.get(name) is not None

    def raw(self, name: Str, default: Any = None, *, alias: Str | None = None) -> Any:
        """Return the value as it stands, or ``default`` if the field is missing or null."""
        value = self._config.get(name)
        if value is None and alias is not None:
            value = self._config.get(alias)
        return default if value is None else value

    def int(
        self, name: Str, default: Int | _Required = _REQUIRED, *, minimum: Int = 1, alias: Str | None = None
    ) -> Int:
        """Return an integer from ``minimum`` to 2**40."""
        value = self.raw(name, alias=alias)
        if value is None:
            return self._default(name, default)
        return self._integer(name, value, minimum)

    def layers(self, name: Str, default: Int | _Required = _REQUIRED, *, alias: Str | None = None) -> Int:
        """Return a number of layers, from 1 to 4096: each is run, so a slip must not take hours."""
        value = self.int(name, default, alias=alias)
        if value > MOST_LAYERS:
            raise self.wrong(name, value, "is out of range", f"Use an integer from 1 to {MOST_LAYERS}.")
        return value

    def optional_int(self, name: Str, *, minimum: Int = 1, alias: Str | None = None) -> Int | None:
        """Return an integer from ``minimum`` to 2**40, or None if the field is missing or null."""
        value = self.raw(name, alias=alias)
        return None if value is None else self._integer(name, value, minimum)

    def is_null(self, name: Str) -> Bool:
        """Tell whether the field is there as null, which switches off what a missing field leaves at its default."""
        return name in self._config and self._config[name] is None

    def nullable_int(self, name: Str, default: Int | None, *, minimum: Int = 1) -> Int | None:
        """Return an integer from ``minimum`` to 2**40, None if the field is null, ``default`` if it is missing."""
        if self.is_null(name):
            return None
        value = self.raw(name)
        return default if value is None else self._integer(name, value, minimum)

    def float(
        self,
        name: Str,
        default: Float | _Required = _REQUIRED,
        *,
        minimum: Float = 0.0,
        maximum: Float = _LARGEST_FLOAT,
        alias: Str | None = None,
    ) -> Float:
        """Return a finite number from ``minimum`` to ``maximum``; an integer in the file is a number too."""
        value = self.raw(name, alias=alias)
        if value is None:
            return self._default(name, default)
        if isinstance(value, Bool) or not isinstance(value, (Int, Float)):
            raise self.wrong(name, value, "is not a number", f"Use a number from {minimum:g} to {maximum:g}.")
        if not minimum <= value <= maximum or math.isinf(value):  # written so that NaN fails
            raise self.wrong(name, value, "is out of range", f"Use a number from {minimum:g} to {maximum:g}.")
        return Float(value)

    def bool(self, name: Str, default: Bool | _Required = _REQUIRED, *, alias: Str | None = None) -> Bool:
        """Return true or false; 0, 1 and text are refused."""
        value = self.raw(name, alias=alias)
        if value is None:
            return self._default(name, default)
        if not isinstance(value, Bool):
            raise self.wrong(name, value, "is not true or false", "Use a JSON boolean.")
        return value

    def str(self, name: Str, default: Str | _Required = _REQUIRED, *, alias: Str | None = None) -> Str:
        """Return text that is not empty."""
        value = self.raw(name, alias=alias)
        if value is None:
            return self._default(name, default)
        if not isinstance(value, Str) or not value:
            raise self.wrong(name, value, "is not text", "Use a JSON string that is not empty.")
        return value

    def list_int(
        self,
        name: Str,
        default: tuple[Int, ...] | _Required = _REQUIRED,
        *,
        minimum: Int = 1,
        alias: Str | None = None,
    ) -> tuple[Int, ...]:
        """Return integers from ``minimum`` to 2**40, as a tuple; the list may be empty."""
        value = self.raw(name, alias=alias)
        if value is None:
            return self._default(name, default)
        if not isinstance(value, (list, tuple)):
            raise self.wrong(name, value, "is not a list of integers", "Use a JSON array of integers.")
        return tuple(self._integer(f"{name}[{index}]", item, minimum) for index, item in enumerate(value))

    def list_str(
        self, name: Str, default: tuple[Str, ...] | _Required = _REQUIRED, *, alias: Str | None = None
    ) -> tuple[Str, ...]:
        """Return texts, as a tuple; the list may be empty."""
        value = self.raw(name, alias=alias)
        if value is None:
            return self._default(name, default)
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, Str) for item in value):
            raise self.wrong(name, value, "is not a list of names", "Use a JSON array of strings.")
        return tuple(value)

    def section(self, name: Str) -> Fields:
        """Return the fields of a nested object (``rope_parameters``, ``text_config``); empty if it is missing."""
        value = self.raw(name)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.wrong(name, value, "is not an object", "Use a JSON object.")
        return Fields(value, f"{self.source}: {name}")

    def wrong(self, name: Str, value: object, problem: Str, remedy: Str) -> SpecError:
        """Return (not raise) the error for a field, naming the file; for checks across fields."""
        return SpecError.at(f"{self.source}: {name}", value, problem, remedy)

    def _integer(self, name: Str, value: Any, minimum: Int) -> Int:
        # type(), not isinstance: true is an int to Python. It also keeps a read well under a microsecond.
        if type(value) is Int and minimum <= value <= LARGEST_INT:
            return value
        problem = "is out of range" if type(value) is Int else "is not an integer"
        raise self.wrong(name, value, problem, f"Use an integer from {minimum} to {LARGEST_INT}.")

    def _default(self, name: Str, default: T | _Required) -> T:
        if isinstance(default, _Required):
            if name in self._config:
                raise SpecError(f"{self.source}: {name}: is null. Give it a value.")
            hint = did_you_mean(name, self._config) if self._config else "The file has no fields."
            raise SpecError(f"{self.source}: {name}: missing. Add the field to the config. {hint}")
        return default
