"""Colours are told apart by people with each kind of dichromacy, and letters stand out from what is behind them."""

from itertools import combinations, pairwise

import pytest

from memplan.render.colors import COMPONENTS, SERIES, VERDICTS, series
from memplan.results import COMPONENTS as NAMES

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009),
# severity 1.0; in linear RGB.
SEEN = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
NOTICEABLE = 10.0
"""CIE76 distance; 2.3 is just noticeable side by side."""


def linear(color: str) -> list[float]:
    values = (int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]


def luminance(color: str) -> float:
    red, green, blue = linear(color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def lab(color: str, kind: str) -> tuple[float, float, float]:
    """CIE L*a*b* under D65, as seen with one kind of vision."""
    red, green, blue = (
        min(1, max(0, sum(w * part for w, part in zip(row, linear(color), strict=True)))) for row in SEEN[kind]
    )
    x = (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.95047
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    z = (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.08883
    fx, fy, fz = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def distance(one: str, other: str, kind: str) -> float:
    return sum((a - b) ** 2 for a, b in zip(lab(one, kind), lab(other, kind), strict=True)) ** 0.5


def test_each_component_has_a_look_of_its_own() -> None:
    assert tuple(COMPONENTS) == NAMES
    assert len(set(COMPONENTS.values())) == len(NAMES)


@pytest.mark.parametrize("kind", SEEN)
def test_components_and_lines_are_told_apart(kind: str) -> None:
    for (one, a), (other, b) in combinations(COMPONENTS.items(), 2):
        assert a.hatch != b.hatch or distance(a.color, b.color, kind) > NOTICEABLE, (one, other)
    for one, other in combinations(SERIES, 2):
        assert distance(one, other, kind) > NOTICEABLE


def test_many_lines_are_told_apart() -> None:
    looks = series(35)
    assert len({(color, marker) for color, marker, _ in looks}) == 35
    for first, second in pairwise(looks):
        assert all(a != b for a, b in zip(first[:2], second[:2], strict=True))
    assert len({(color, line) for color, _, line in looks[:20]}) == 20


def test_white_letters_stand_out_from_every_verdict() -> None:
    for color in VERDICTS.values():
        assert 1.05 / (luminance(color) + 0.05) >= 4.5  # WCAG 2.2, 1.4.3
