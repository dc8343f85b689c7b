"""What all specs share: frozen models, checked number types, and errors in memplan's words.

A validator of one field raises ``SpecError.at("", value, problem, remedy)``: the field's name, and the
path to it through nested specs, is put in front here, where it is known.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from memplan.errors import SpecError, did_you_mean
from memplan.units import MiB, parse_bytes

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from typing_extensions import Self

__all__ = [
    "LARGEST_INT",
    "FrozenDict",
    "MemorySize",
    "Names",
    "NonNegativeInt",
    "PositiveInt",
    "Probability",
    "Spec",
    "freeze",
    "integer",
    "raise_spec_error",
]

LARGEST_INT = 2**40
"""No count in a training run reaches this: a larger one is a slip, and would only overflow later."""


class Spec(BaseModel):
    """A frozen input; a wrong one raises one SpecError with a line per wrong field."""

    __slots__ = ("_hashed",)
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def __hash__(self) -> int:
        # A search looks the same specs up thousands of times.
        try:
            found: int = object.__getattribute__(self, "_hashed")
        except AttributeError:
            values = self.__dict__
            found = hash((type(self), *[values[name] for name in type(self).model_fields]))
            object.__setattr__(self, "_hashed", found)
        return found

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise_spec_error(type(self), error)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from plain JSON values, as :meth:`to_dict` gives them. Raises SpecError."""
        if not isinstance(data, Mapping):
            raise SpecError.at(cls.__name__, data, "is not a JSON object", "Give its fields by name.")
        return cls(**data)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Build from the JSON text of :meth:`to_json`. Raises SpecError."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise SpecError.at(cls.__name__, text, f"is not JSON ({error})", "Give a JSON object.") from None
        return cls.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """Return JSON text."""
        return self.model_dump_json()

    def replace(self, **changes: Any) -> Self:
        """Return a copy with ``changes``, validated as a new one would be. Raises SpecError."""
        return type(self)(**({name: getattr(self, name) for name in self.model_fields_set} | changes))


def raise_spec_error(spec: type[BaseModel], error: ValidationError) -> NoReturn:
    """Raise pydantic's error as one SpecError: a line per wrong field."""
    raise SpecError("\n".join(_lines(spec, detail) for detail in error.errors(include_url=False))) from None


def _lines(spec: type[BaseModel], detail: ErrorDetails) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    value, kind, context = detail["input"], detail["type"], detail.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, SpecError):
        return "\n".join(_below(path, line) for line in str(cause).split("\n"))
    if kind == "extra_forbidden":
        remedy = did_you_mean(path.rsplit(".", 1)[-1], spec.model_fields)
        return str(SpecError.at(path, value, f"is given to a field that {spec.__name__} does not have", remedy))
    if kind == "missing":
        return f"{path}: missing. {spec.__name__} needs a value for it."
    if kind == "literal_error":
        return str(SpecError.at(path, value, "is not a choice", f"Use {context['expected']}."))
    return str(SpecError.at(path or spec.__name__, value, "is refused", f"{detail['msg']}."))


def _below(path: str, line: str) -> str:
    if not path:
        return line
    return path + line if line.startswith(":") else f"{path}.{line}"


def integer(value: object, smallest: int, field: str = "") -> int:
    """Return ``value`` as an int from ``smallest`` to 2**40; raise SpecError for anything else.

    Takes numpy's integers; refuses floats, text, and bool, which is an int but never meant as one.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # a TypeError is the answer
    except TypeError:
        number = smallest - 1
    if isinstance(value, bool) or not smallest <= number <= LARGEST_INT:
        problem = "is not a positive integer" if smallest == 1 else "is not an integer in range"
        raise SpecError.at(field, value, problem, f"Use an integer from {smallest} to {LARGEST_INT}.")
    return number


def _positive(value: object) -> int:
    return integer(value, 1)


def _non_negative(value: object) -> int:
    return integer(value, 0)


def _probability(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:  # NaN fails it
        raise SpecError.at("", value, "is not a probability", "Use a number from 0 up to, but not including, 1.")
    return float(value)


def _memory(value: object) -> int:
    if isinstance(value, float) and not value.is_integer() and math.isfinite(value):
        raise SpecError.at("", value, "is not a whole number of bytes", "Write a unit, as in '24GiB'.")
    size = parse_bytes(value, field="")  # type: ignore[arg-type]  # it refuses other types itself
    if size < MiB:
        # 24 for 24 GiB is the likely slip: nothing that trains has less than a MiB.
        raise SpecError.at("", value, "is a size in bytes, and below 1 MiB", "Write a unit, as in '24GiB'.")
    return size


def _names(value: object) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise SpecError.at("", value, "is not a list of names", "Write names separated by commas.")
    names = tuple(part.strip() for part in parts)
    if not all(names) and value != "":
        raise SpecError.at("", value, "has an empty name", "Write names separated by commas.")
    return tuple(name for name in names if name)


PositiveInt = Annotated[int, BeforeValidator(_positive)]
"""1 .. 2**40."""
NonNegativeInt = Annotated[int, BeforeValidator(_non_negative)]
"""0 .. 2**40."""
Probability = Annotated[float, BeforeValidator(_probability)]
"""0 <= p < 1."""
MemorySize = Annotated[int, BeforeValidator(_memory)]
"""Bytes, at least 1 MiB: an int of bytes, or text with a unit."""
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
"""Names: a list, or text with commas."""


class FrozenDict(dict[str, Any]):
    """A dict that cannot change and can be hashed; made by :func:`freeze`."""

    __slots__ = ()

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a spec's config is frozen; make a new spec from a changed copy, dict(config)")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        # dict's own reduce sets items one by one, which is refused here.
        return FrozenDict, (dict(self),)


_SCALARS = frozenset({str, int, float, bool, type(None)})


def freeze(value: Any) -> Any:
    """Return a deep copy of JSON-like data that cannot change: FrozenDict for dict, tuple for list."""
    if value.__class__ in _SCALARS:  # most of it, and a Mapping is dear to tell
        return value
    if isinstance(value, Mapping):
        return FrozenDict({str(key): freeze(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    return value
