"""The errors memplan raises on purpose.

::

    MemplanError
    ├── SpecError (also a ValueError)   an input is wrong: names the field or file, the value and the remedy
    │   └── ResolutionError             a name, path or id does not lead to a model, GPU or config
    ├── UnsupportedError                the input is legal, but memplan does not model it: says why
    └── PreflightError                  a run will not fit or has a finding of severity error

Messages read ``field: value problem. remedy``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "MemplanError",
    "PreflightError",
    "ResolutionError",
    "SpecError",
    "UnsupportedError",
    "did_you_mean",
    "short",
    "suggest_names",
]

_LONGEST_VALUE = 80  # a value is shown to be recognised, not reproduced: a config may hold megabytes
_LONGEST_NAME_LIST = 12  # more names than this hide the message; the full list has a command of its own


class MemplanError(Exception):
    """Base of every error that memplan raises on purpose."""

    @classmethod
    def at(cls, field: str, value: object, problem: str, remedy: str) -> Self:
        """Build the error from its four parts.

        >>> str(SpecError.at("gpus", 0, "is not a positive integer", "Use 1 or more."))
        'gpus: 0 is not a positive integer. Use 1 or more.'
        """
        return cls(f"{field}: {_shown(value)} {problem}. {remedy}")


class SpecError(MemplanError, ValueError):
    """An input is wrong; the message names the field or file, the value and the remedy."""


class PositionsError(SpecError):
    """A sequence is longer than the model has positions for.

    Attributes:
        most: how many it has.
    """

    most: int = 0


class ResolutionError(SpecError):
    """A name, path or id does not lead to a model, a GPU or a config."""


class UnsupportedError(MemplanError):
    """The input is legal, but memplan does not model it; the message gives the reason."""


class PreflightError(MemplanError):
    """A preflight check found that the run cannot work.

    Attributes:
        report: the estimate the check was made from, or None.
        findings: the findings, worst first.
    """

    def __init__(self, message: str, *, report: Any = None, findings: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.report = report
        self.findings = tuple(findings)


def suggest_names(name: str, candidates: Iterable[str], limit: int = 3) -> list[str]:
    """Return up to ``limit`` candidates that resemble ``name``, nearest first; case is ignored.

    >>> suggest_names("adamw_tocrh", ["sgd", "adamw_torch", "muon"])
    ['adamw_torch']
    """
    by_lower: dict[str, str] = {}
    for candidate in candidates:
        by_lower.setdefault(candidate.lower(), candidate)
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=limit, cutoff=0.6)
    return [by_lower[match] for match in near]


def did_you_mean(name: str, candidates: Iterable[str], limit: int = 3) -> str:
    """Return a remedy sentence that names the nearest candidates, or all of them if none is near.

    >>> did_you_mean("sgdd", ["sgd", "adafactor"])
    'Did you mean sgd?'
    >>> did_you_mean("zzz", ["sgd", "adafactor"])
    'Known: adafactor, sgd.'
    """
    names = [short(candidate) for candidate in candidates]
    near = suggest_names(name, names, limit)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    shown = sorted(names)
    if len(shown) > 2 * _LONGEST_NAME_LIST:
        return f"Known: {', '.join(shown[:_LONGEST_NAME_LIST])} and {len(shown) - _LONGEST_NAME_LIST} more."
    return f"Known: {', '.join(shown)}."


_IN_FILES = {None: "null", True: "true", False: "false"}


def short(text: str) -> str:
    """Cut a text to what is enough to recognise it."""
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return _IN_FILES[value]
    # A huge int cannot even be printed (sys.set_int_max_str_digits), and a huge list should not be.
    if isinstance(value, int) and value.bit_length() > 4 * _LONGEST_VALUE:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value[:_LONGEST_VALUE]) if isinstance(value, (str, bytes, list, tuple)) else repr(value)
    if len(text) <= _LONGEST_VALUE and not (isinstance(value, (str, list, tuple)) and len(value) > _LONGEST_VALUE):
        return text
    return text[: _LONGEST_VALUE - 3] + "..."
