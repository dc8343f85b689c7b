"""Charts as SVG for a page that stands alone: sizes are bytes, axes are GiB, colours follow the page's theme.

A chart says in a table beside it what it shows; its ``label`` is for who cannot see it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from memplan.render import words
from memplan.render.colors import BLUE, COMPONENTS
from memplan.units import GiB

__all__ = ["Bar", "Dot", "alone", "columns", "definitions", "legend", "scatter", "stacks"]

WIDTH = 800
_ROW = 26
_TEXT = 7.2
"""Width of a character, on average."""
_TURN = {"//": 45, "xx": 45, "..": 0}


class Bar(NamedTuple):
    """A stacked bar."""

    name: str
    parts: Sequence[tuple[str, int]]
    """Component and bytes, in order."""
    low: int
    high: int
    note: str
    """What stands behind it."""


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
    found = re.match(rf'<svg viewBox="0 0 {WIDTH} (\d+)"(.*)</svg>$', chart, re.DOTALL)
    assert found is not None
    row, left = int(found[1]) + 44, 12.0
    keys = []
    for name in names:
        if left + 24 + len(name) * _TEXT > WIDTH:
            row, left = row + 20, 12.0
        keys.append(f'<rect x="{left:.0f}" y="{row - 6}" width="16" height="12" fill="{_fill(name)}"/>')
        keys.append(_text(left + 22, row, name, "start"))
        left += 38 + len(name) * _TEXT
    height = row + 18
    size = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    rest = found[2].partition(">")
    moved = f'<g transform="translate(0 30)">{rest[2]}</g>'
    return (
        f"<svg {size}{rest[0]}><style>{style}</style><defs>{_patterns()}</defs>"
        f'<rect class="back" width="{WIDTH}" height="{height}"/>{_text(12, 16, title, "start")}'
        f"{moved}{''.join(keys)}</svg>\n"
    )


def legend(names: Iterable[str]) -> str:
    """Return the components' colours, as a list."""
    items = (
        f'<li><svg width="16" height="12" aria-hidden="true"><rect width="16" height="12" fill="{_fill(name)}"/></svg> '
        f"{escape(name)}</li>"
        for name in names
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def stacks(bars: Sequence[Bar], capacity: int | None, label: str) -> str:
    """Return a row per bar, with an interval from low to high and the capacity as a dashed line."""
    left = max((len(bar.name) for bar in bars), default=0) * _TEXT + 12
    room = WIDTH - left - max((len(bar.note) for bar in bars), default=0) * _TEXT - 16
    top, bottom = 22, 22 + _ROW * len(bars)
    full = max([bar.high for bar in bars] + [capacity or 0, 1])

    def x(size: float) -> float:
        return left + room * size / full

    rows = []
    for index, bar in enumerate(bars):
        y, start = top + _ROW * index, 0
        middle = y + _ROW / 2
        rows.append(_text(left - 8, middle, bar.name, "end"))
        for name, size in bar.parts:
            if size:
                rows.append(_rect(x(start), y + 4, x(start + size) - x(start), _ROW - 8, name, size, _fill(name)))
                start += size
        span = f"M{x(bar.low):.1f} {middle}H{x(bar.high):.1f}"
        span += "".join(f"M{x(end):.1f} {middle - 4}v8" for end in (bar.low, bar.high))
        rows += [f'<path class="{look}" d="{span}"/>' for look in ("around", "span")]
        rows.append(_text(x(max(bar.high, start)) + 8, middle, bar.note, "start", halo=True))
    axis = "".join(
        _grid(f"M{x(tick):.1f} {top}V{bottom}", _text(x(tick), bottom + 12, f"{tick / GiB:g}", "middle"))
        for tick in _ticks(full)
    )
    axis += _text(left + room / 2, bottom + 30, "GiB per GPU at the peak", "middle")
    line = ""
    if capacity is not None:
        anchor = "start" if x(capacity) < WIDTH / 2 else "end"
        line = _capacity(f"M{x(capacity):.1f} {top - 4}V{bottom}", x(capacity), 10, capacity, anchor)
    return _svg(bottom + 40, label, f"{axis}{''.join(rows)}{line}")


def columns(sizes: Sequence[tuple[str, int]], capacity: int | None, label: str) -> str:
    """Return a column per phase, with the capacity as a dashed line."""
    left, top, bottom = 56, 28, 228
    full = max([size for _, size in sizes] + [capacity or 0, 1])
    step = (WIDTH - left - 8) / max(len(sizes), 1)

    def y(size: float) -> float:
        return bottom - (bottom - top) * size / full

    parts = [
        _grid(f"M{left} {y(tick):.1f}H{WIDTH - 8}", _text(left - 6, y(tick), f"{tick / GiB:g}", "end"))
        for tick in _ticks(full)
    ]
    for index, (name, size) in enumerate(sizes):
        at, middle = left + step * index, left + step * (index + 0.5)
        parts.append(_rect(at + step * 0.15, y(size), step * 0.7, bottom - y(size), name, size, BLUE))
        parts.append(_text(middle, bottom + 14, name, "middle"))
    if capacity is not None:
        parts.append(_capacity(f"M{left} {y(capacity):.1f}H{WIDTH - 8}", WIDTH - 8, y(capacity) - 8, capacity, "end"))
    for index, (_, size) in enumerate(sizes):  # above the line
        parts.append(_text(left + step * (index + 0.5), y(size) - 8, words.gib(size), "middle", halo=True))
    parts.append(_text(left, 10, "GiB allocated per GPU, at most", "start"))
    return _svg(bottom + 28, label, "".join(parts))


def scatter(dots: Sequence[Dot], capacity: int | None, label: str) -> str:
    """Return seconds of a step against the memory, the front as a staircase, each setup with its number."""
    left, top, bottom = 56, 28, 268
    full, slowest = max([dot.size for dot in dots] + [capacity or 0, 1]), max(dot.seconds for dot in dots)

    def x(seconds: float) -> float:
        return left + (WIDTH - left - 24) * seconds / slowest

    def y(size: float) -> float:
        return bottom - (bottom - top) * size / full

    parts = [
        _grid(f"M{left} {y(tick):.1f}H{WIDTH - 8}", _text(left - 6, y(tick), f"{tick / GiB:g}", "end"))
        for tick in _ticks(full)
    ]
    parts += [
        _grid(f"M{x(tick):.1f} {top}V{bottom}", _text(x(tick), bottom + 12, f"{tick:g}", "middle"))
        for tick in _ticks(slowest, 1.0)
    ]
    stairs = f"M{x(dots[0].seconds):.1f} {y(dots[0].size):.1f}"
    stairs += "".join(f"H{x(dot.seconds):.1f}V{y(dot.size):.1f}" for dot in dots[1:])
    parts.append(f'<path class="front" d="{stairs}"/>')
    if capacity is not None:
        parts.append(_capacity(f"M{left} {y(capacity):.1f}H{WIDTH - 8}", WIDTH - 8, y(capacity) - 8, capacity, "end"))
    for number, dot in enumerate(dots, start=1):
        at = f'cx="{x(dot.seconds):.1f}" cy="{y(dot.size):.1f}"'
        parts.append(f'<circle {at} r="9" fill="{BLUE}" data-bytes="{dot.size}"/>')
        parts.append(f'<text x="{x(dot.seconds):.1f}" y="{y(dot.size):.1f}" class="on">{number}</text>')
    parts.append(_text(left, 10, "GiB per GPU, at most", "start"))
    parts.append(_text((left + WIDTH) / 2, bottom + 30, "seconds per step", "middle"))
    return _svg(bottom + 40, label, "".join(parts))


def _svg(height: float, label: str, inner: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{inner}</svg>'


def _fill(name: str) -> str:
    return f"url(#fill-{name})" if COMPONENTS[name].hatch else COMPONENTS[name].color


def _rect(x: float, y: float, width: float, height: float, name: str, size: int, fill: str) -> str:
    """An area that says what it is to a pointer that rests on it."""
    place = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    return (
        f'<rect {place} fill="{fill}" data-bytes="{size}"><title>{escape(name)}: {words.gib(size)} GiB</title></rect>'
    )


def _text(x: float, y: float, text: str, anchor: str, *, halo: bool = False) -> str:
    look = ' class="halo"' if halo else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{look}>{escape(text)}</text>'


def _grid(path: str, number: str) -> str:
    return f'<path class="grid" d="{path}"/>{number}'


def _capacity(path: str, x: float, y: float, capacity: int, anchor: str) -> str:
    text = _text(x, y, f"capacity {words.gib(capacity)} GiB", anchor, halo=True)
    return f'<path class="capacity" d="{path}"/>{text}'


def _ticks(full: float, unit: float = GiB) -> list[float]:
    """About five round steps of 1, 2 or 5 times a power of ten, from 0.

    >>> _ticks(24 * GiB) == [0, 5 * GiB, 10 * GiB, 15 * GiB, 20 * GiB]
    True
    """
    rough = full / unit / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (1, 2, 5, 10) if step * power >= rough) * power
    return [step * n * unit for n in range(int(full / unit / step) + 1)]
