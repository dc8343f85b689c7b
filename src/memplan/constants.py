"""Numbers that cannot be derived, each with its unit, its range and the source it was read from."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Constant", "exact"]


@dataclass(frozen=True, slots=True)
class Constant:
    """A number with provenance.

    Raises ValueError if ``source`` is blank or ``value`` is outside ``low`` .. ``high``.

    >>> Constant("cuda_context", 500, 400, 600, "MiB", "nvidia-smi of an idle process").value
    500
    """

    name: str
    """What it is, as it appears among an estimate's assumptions."""
    value: float | int
    """The expected value, in ``unit``."""
    low: float | int
    """The smallest plausible value."""
    high: float | int
    """The largest plausible value."""
    unit: str
    """The unit of all three numbers: ``B``, ``GB/s``, ``1`` for a ratio ..."""
    source: str
    """Where it was read or measured: a URL, a file of a library at a version, a measurement."""

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError(f"constant {self.name!r} has no source")
        # Written so that NaN fails too.
        if not self.low <= self.value <= self.high:
            raise ValueError(f"constant {self.name!r}: not {self.low} <= {self.value} <= {self.high}")


def exact(name: str, value: float | int, unit: str, source: str) -> Constant:
    """Return a constant without uncertainty: a rule read from source code, a documented default."""
    return Constant(name, value, value, value, unit, source)
