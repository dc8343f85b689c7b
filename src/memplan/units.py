"""Bytes: parse and format. Sizes are integers of bytes everywhere; GiB (2**30) exists only in text."""

from __future__ import annotations

import math
import re

from memplan.errors import SpecError

__all__ = ["GB", "MB", "GiB", "KiB", "MiB", "format_gib", "gib", "parse_bytes", "parse_gib"]

KiB = 2**10
MiB = 2**20
GiB = 2**30
MB = 10**6
GB = 10**9

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": MB,
    "gb": GB,
    "tb": 10**12,
    "kib": KiB,
    "mib": MiB,
    "gib": GiB,
    "tib": 2**40,
}
_LARGEST = 2**60  # an exbibyte: beyond every machine, and still exact in a float's rounding to bytes
_SIZE = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_bytes(size: str | float, field: str = "size") -> int:
    """Return bytes: a number is bytes already, text needs a unit (``GiB`` is 2**30, ``GB`` is 10**9).

    Raises SpecError, naming ``field``, for text without a unit, for an unknown unit, and for a size
    that is negative, NaN, infinite or above an exbibyte.

    >>> parse_bytes("1.5 GiB"), parse_bytes("80GB"), parse_bytes(4096)
    (1610612736, 80000000000, 4096)
    """
    return _parse(size, field, bare_unit=None)


def parse_gib(size: str | float, field: str = "size") -> int:
    """Return bytes: a bare number is GiB, text may carry a unit of its own.

    Raises SpecError as :func:`parse_bytes` does.

    >>> parse_gib(24) == parse_gib("24") == parse_gib("24GiB") == 24 * 2**30
    True
    """
    return _parse(size, field, bare_unit=GiB)


def gib(size: int) -> str:
    """Bytes as a number of GiB with two decimals; the unit stands elsewhere.

    >>> gib(13_250_000_000)
    '12.34'
    """
    return f"{size / GiB:,.2f}"


def format_gib(size: int) -> str:
    """Format bytes as GiB with two decimals.

    >>> format_gib(13_250_000_000)
    '12.34 GiB'
    """
    return f"{gib(size)} GiB"


def _parse(size: str | float, field: str, bare_unit: int | None) -> int:
    if isinstance(size, bool) or not isinstance(size, (str, int, float)):
        raise SpecError.at(field, size, "is not a size", "Write a number with a unit, as in 24GiB.")
    if not isinstance(size, str):
        return _to_bytes(size, bare_unit or 1, field, size)
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise SpecError.at(field, size, "is not a size", "Write a number with a unit, as in 24GiB.")
    number, unit = match.groups()
    if not unit:
        if bare_unit is None:
            raise SpecError.at(field, size, "has no unit", f"Write {size.strip()}GiB if it is in GiB.")
        return _to_bytes(float(number), bare_unit, field, size)
    if unit.lower() not in _UNITS:
        raise SpecError.at(field, size, f"has an unknown unit {unit}", "Use B, KiB, MiB, GiB, TiB, KB, MB, GB or TB.")
    return _to_bytes(float(number), _UNITS[unit.lower()], field, size)


def _to_bytes(number: float, unit: int, field: str, given: str | float) -> int:
    # The comparison is written so that NaN fails it.
    if not 0 <= number <= _LARGEST / unit or math.isinf(number):
        raise SpecError.at(field, given, "is not a size", "Use a finite number from 0 B to 1 EiB.")
    return round(number * unit)
