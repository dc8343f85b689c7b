"""Charts as SVG for a page that stands alone: sizes are bytes, axes are GiB, colours follow the page's theme.

A chart says in a table beside it what it shows; its ``label`` is for who cannot see it. Its places across are percent
of its width, its places down and its letters are pixels: on a phone it is narrower, and as easily read.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

from memplan.render import words
from memplan.render.colors import BLUE, COMPONENTS
from memplan.units import GiB

__all__ = ["Bar", "Dot", "alone", "definitions", "legend", "scatter", "stacks"]

WIDTH = 800
"""Of a chart in a file of its own."""
_NARROW = 288
"""The least width that a chart is laid out for: of a page 320 pixels wide, without its margins."""
_TEXT = 7.2
"""Width of a character, on average."""
_LINE = 17
_LETTERS = 14
"""Height of a line of text, and what of it letters fill."""
_BAR = 16
_TURN = {"//": 45, "xx": 45, "..": 0}


class Bar(NamedTuple):
    """A stacked bar below what stands for it."""

    name: str
    parts: Sequence[tuple[str, int]]
    """Component, or another name, and bytes, in order."""
    low: int
    high: int
    """An interval of it; none is drawn where both are the sum of the parts."""


class Dot(NamedTuple):
    """A setup of the front."""

    seconds: float
    size: int
    """Bytes."""


def definitions() -> str:
    """Return the patterns, once for a page."""
    return f'<svg width="0" height="0" aria-hidden="true" class="defs"><defs>{_patterns()}</defs></svg>'


def _patterns() -> str:
    return "".join(
        f'<pattern id="fill-{name}" width="6" height="6" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate({_TURN[hatch]})"><rect width="6" height="6" fill="{color}"/>{_ink(hatch)}</pattern>'
        for name, (color, hatch) in COMPONENTS.items()
        if hatch
    )


def _ink(hatch: str) -> str:
    line = '<path d="M0 1H6" stroke="#000" stroke-opacity=".35" stroke-width="2"/>'
    across = '<path d="M1 0V6" stroke="#000" stroke-opacity=".35" stroke-width="2"/>'
    dot = '<circle cx="2" cy="2" r="1.2" fill="#fff"/>'
    return {"//": line, "xx": line + across, "..": dot}[hatch]


def alone(chart: str, title: str, names: Sequence[str], style: str) -> str:
    """Return a chart as a file of its own: with a title, its patterns and a legend of the components that are named."""
    found = re.match(r'<svg width="100%" height="(\d+)"(.*?)>(.*)</svg>$', chart, re.DOTALL)
    assert found is not None
    row, left = int(found[1]) + 44, 12.0
    keys = []
    for name in names:
        if left + 24 + len(name) * _TEXT > WIDTH:
            row, left = row + 20, 12.0
        keys.append(f'<rect x="{left:.0f}" y="{row - 6}" width="16" height="12" fill="{_fill(name)}"/>')
        keys.append(f'<text x="{left + 22:.1f}" y="{row}">{escape(name)}</text>')
        left += 38 + len(name) * _TEXT
    height = row + 18
    size = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return (
        f"<svg {size}{found[2]}><style>{style}</style><defs>{_patterns()}</defs>"
        f'<rect class="back" width="{WIDTH}" height="{height}"/><text x="12" y="16">{escape(title)}</text>'
        f'<g transform="translate(0 30)">{found[3]}</g>{"".join(keys)}</svg>\n'
    )


def legend(names: Iterable[str]) -> str:
    """Return the components' colours, as a list."""
    items = (
        f'<li><svg width="16" height="12" aria-hidden="true"><rect width="16" height="12" fill="{_fill(name)}"/></svg> '
        f"{escape(name)}</li>"
        for name in names
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def stacks(bars: Sequence[Bar], capacity: int | None, axis: str, label: str) -> str:
    """Return a row per bar below its name, with its interval, and the capacity as a dashed line across the bars."""
    full = max([bar.high for bar in bars] + [capacity or 0, 1])

    def x(size: float) -> float:
        return 2 + 92 * size / full

    y = 8.0
    parts: list[str] = []
    if capacity is not None:
        parts, y = _key(y, capacity), y + 22
    top = y
    for bar in bars:
        for line in textwrap.wrap(bar.name, int(0.96 * _NARROW / _TEXT)):
            parts.append(_text(2, y, line, halo=True))
            y += _LINE
        upper, lower = y - 6, y - 6 + _BAR
        start = 0
        for name, size in bar.parts:
            if size:
                parts.append(_rect(x(start), upper, x(start + size) - x(start), name, size))
                start += size
        if not bar.low == bar.high == start:
            for look in ("around", "span"):
                parts.append(_line(look, x(bar.low), upper + _BAR / 2, x(bar.high), upper + _BAR / 2))
                parts += [_line(look, x(end), upper + 4, x(end), lower - 4) for end in (bar.low, bar.high)]
        if capacity is not None:  # across the bars only: nothing that is written is on it
            parts += [_line(look, x(capacity), upper - 2, x(capacity), lower + 2) for look in ("around", "capacity")]
        y = lower + 16
    bottom = y - 10
    grid = []
    for tick in _ticks(0, full / GiB):
        grid.append(_line("grid", x(tick * GiB), top - 8, x(tick * GiB), bottom))
        grid.append(_text(x(tick * GiB), bottom + 10, f"{tick:g}", "middle"))
    grid.append(_text(50, bottom + 10 + _LINE, axis, "middle"))
    return _svg(bottom + 20 + _LINE, label, f"{''.join(grid)}{''.join(parts)}")


def scatter(dots: Sequence[Dot], capacity: int | None, label: str) -> str:
    """Return seconds of a step against the memory, the front as a staircase, each setup with its number.

    ``dots`` are those of a front: each is slower than the one before, and smaller.
    """
    top, bottom = 52, 300
    full = max([dot.size for dot in dots] + [capacity or 0, 1])
    first, last = dots[0].seconds, dots[-1].seconds
    margin = (last - first) / 6 or last / 6  # for a number to the left of the first
    least, most = first - margin, last + margin

    def x(seconds: float) -> float:
        return 13 + 81 * (seconds - least) / (most - least)

    def y(size: float) -> float:
        return bottom - 24 - (bottom - 24 - top) * size / full  # room for a number below a dot at the very bottom

    parts = [_text(2, 8, "GiB per GPU, at most")]
    for tick in _ticks(0, full / GiB):
        parts += [_line("grid", 13, y(tick * GiB), 98, y(tick * GiB)), _text(12, y(tick * GiB), f"{tick:g}", "end")]
    for tick in _ticks(max(least, 0.0), most):
        parts += [_line("grid", x(tick), top, x(tick), bottom), _text(x(tick), bottom + 12, f"{tick:g}", "middle")]
    parts.append(_text(55, bottom + 12 + _LINE, "seconds per step", "middle"))
    for one, other in pairwise(dots):
        parts.append(_line("front", x(one.seconds), y(one.size), x(other.seconds), y(one.size)))
        parts.append(_line("front", x(other.seconds), y(one.size), x(other.seconds), y(other.size)))
    if capacity is not None:
        parts += [*_key(8 + _LINE, capacity), _line("capacity", 13, y(capacity), 98, y(capacity))]
    for dot in dots:
        parts.append(
            f'<circle cx="{x(dot.seconds):.3f}%" cy="{y(dot.size):.1f}" r="5" fill="{BLUE}" data-bytes="{dot.size}"/>'
        )
    # Below and to the left of a dot is neither another one of a front nor its staircase.
    for numbers in _together([(x(dot.seconds) / 100 * _NARROW, y(dot.size)) for dot in dots]):
        dot = dots[numbers[0]]
        parts.append(_text(x(dot.seconds), y(dot.size) + 12, _numbers(numbers), "end", halo=True, aside=-7))
    return _svg(bottom + 22 + _LINE, label, "".join(parts))


def _together(places: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Indices of the dots that share a place for their numbers, because those of each would cover each other.

    ``places`` are pixels from the left and from the top, and both grow.

    >>> _together([(10, 10), (40, 12), (42, 15), (44, 200)])
    [[0], [1, 2], [3]]
    """
    groups: list[list[int]] = []
    for index in range(len(places)):
        groups.append([index])
        # A longer text reaches further to the left, so what was apart may touch.
        while len(groups) > 1 and _touch(places, *groups[-2:]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return groups


def _touch(places: Sequence[tuple[float, float]], before: list[int], after: list[int]) -> bool:
    (left, above), (right, below) = places[before[0]], places[after[0]]
    return below - above < _LETTERS and right - left < _TEXT * len(_numbers(after)) + 4


def _numbers(indices: Sequence[int]) -> str:
    first, last = indices[0] + 1, indices[-1] + 1
    return f"{first}" if first == last else f"{first}-{last}"


def _svg(height: float, label: str, inner: str) -> str:
    return f'<svg width="100%" height="{height:.0f}" role="img" aria-label="{escape(label)}">{inner}</svg>'


def _fill(name: str) -> str:
    """A component's colour or pattern; the colour of a bar for what is none."""
    if name not in COMPONENTS:
        return BLUE
    return f"url(#fill-{name})" if COMPONENTS[name].hatch else COMPONENTS[name].color


def _rect(x: float, y: float, width: float, name: str, size: int) -> str:
    """An area that says what it is to a pointer that rests on it."""
    place = f'x="{x:.3f}%" y="{y:.1f}" width="{width:.3f}%" height="{_BAR}" fill="{_fill(name)}"'
    return f'<rect {place} data-bytes="{size}"><title>{escape(name)}: {words.gib(size)} GiB</title></rect>'


def _text(x: float, y: float, text: str, anchor: str = "start", *, halo: bool = False, aside: int = 0) -> str:
    look = ' class="halo"' if halo else ""
    look += f' dx="{aside}"' if aside else ""
    return f'<text x="{x:.3f}%" y="{y:.1f}" text-anchor="{anchor}"{look}>{escape(text)}</text>'


def _line(look: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{look}" x1="{x1:.3f}%" y1="{y1:.1f}" x2="{x2:.3f}%" y2="{y2:.1f}"/>'


def _key(y: float, capacity: int) -> list[str]:
    """What the dashed line is."""
    return [_line("capacity", 2, y, 7, y), _text(8, y, f"capacity {words.gib(capacity)} GiB")]


def _ticks(least: float, most: float) -> list[float]:
    """About five round steps of 1, 2 or 5 times a power of ten.

    >>> _ticks(0, 24), _ticks(12.1, 16.4)
    ([0.0, 5.0, 10.0, 15.0, 20.0], [13.0, 14.0, 15.0, 16.0])
    """
    rough = (most - least) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (1, 2, 5, 10) if step * power >= rough) * power
    return [float(f"{step * n:.12g}") for n in range(math.ceil(least / step), math.floor(most / step) + 1)]
