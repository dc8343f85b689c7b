"""A measured run beside its estimate, as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.text import Text

from memplan.introspect.calibrate import Profile
from memplan.introspect.measurement import BlockDifference, Boundary, Measured, Measurement
from memplan.render.table import _console, _grid, _line, _model, _setup, _text
from memplan.render.words import gib

__all__ = ["boundary_text", "measured_text"]

_LARGEST = 12
"""Sizes of blocks that are listed."""
_TOLD = 2
"""Kinds of blocks of a size and side that are told."""


def measured_text(result: Measured, console: Console | None = None) -> str:
    """Return a row per phase and peak, and the largest blocks if they were kept."""
    console = console or _console()
    measurement = result.measurement
    table = _grid(header=True)
    table.add_column("")
    unit, size = ("GiB", 2**30) if result.estimate.gpu.peak_allocated >= 2**30 else ("MiB", 2**20)
    for header in (f"estimated {unit}", f"measured {unit}", "difference"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in result.differences:
        relative = "-" if row.relative is None else f"{row.relative:+.2%}"
        sizes = (f"{nbytes / size:,.2f}" for nbytes in (row.estimated, row.measured))
        table.add_row(row.name.replace("_", " "), *sizes, relative)
    parts = [_model(result.estimate), _setup(result.estimate), Text(), table, Text(), _line(_how(measurement))]
    if measurement.step_seconds:
        times = ", ".join(f"{seconds:.3g}" for seconds in measurement.step_seconds)
        parts.append(_line(f"seconds a step: {times}"))
    if result.blocks is not None:
        parts += [Text(), _blocks(result.blocks)]
    if measurement.status != "ok":
        parts.append(Text(f"{measurement.status}: {measurement.message}"))
    return _text(Group(*parts), console)


def _blocks(found: Sequence[BlockDifference]) -> Group:
    """What only one side has."""
    if not found:
        return Group(_line("at the fullest moment both have the same blocks"))
    table = _grid(header=True)
    for header in ("bytes of a block", "estimated", "measured", "MiB apart"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("what and where")
    for row in found[:_LARGEST]:
        what = "; ".join((*row.names[:_TOLD], *row.sites[:_TOLD]))
        numbers = (f"{row.bytes:,}", str(row.estimated), str(row.measured), f"{row.difference / 2**20:+,.2f}")
        table.add_row(*numbers, what)
    others = found[_LARGEST:]
    rest = sum(row.difference for row in others)
    last = [_line(f"{len(others)} more sizes: {rest / 2**20:+,.2f} MiB")] if others else []
    return Group(_line("at the fullest moment, blocks of which one side has more:"), table, *last)


def boundary_text(found: Boundary, console: Console | None = None) -> str:
    """Return the two figures, and what was run."""
    console = console or _console()
    table = _grid(header=True)
    for header in (found.option, "reserved GiB", ""):
        table.add_column(header, justify="right", no_wrap=True)
    for tried in found.tried:
        reserved = "-" if tried.peak_reserved is None else gib(tried.peak_reserved)
        table.add_row(str(tried.value), reserved, tried.status)
    said = "none" if found.predicted is None else str(found.predicted)
    seen = "none" if found.measured is None else str(found.measured)
    answer = f"Largest {found.option} that runs: {seen}; predicted: {said} (steps of {found.step})."
    return _text(Group(_model(found.estimate), _setup(found.estimate), Text(), table, Text(), Text(answer)), console)


def profile_text(profile: Profile, path: Path, console: Console | None = None) -> str:
    """Return a row per constant, and where they are kept."""
    console = console or _console()
    table = _grid(header=True)
    table.add_column(f"{profile.gpu}, this machine's own")
    for header in ("value", "low", "high"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in profile.constants:
        size, unit = {"B": (2**20, "MiB"), "B/s": (1e9, "GB/s")}.get(row.unit, (1e12, "TFLOP/s"))
        values = (f"{number / size:,.1f}" for number in (row.value, row.low, row.high))
        table.add_row(f"{row.name} ({unit})", *values)
    said = f"Estimates for this machine's {profile.gpu} use it: {path}"
    return _text(Group(table, Text(), Text(said)), console)


def _how(measurement: Measurement) -> str:
    device = measurement.device["name"]
    others = "; the other ranks are made up" if measurement.group == "fake" else ""
    cap = "" if measurement.cap is None else f", as if it had {gib(measurement.cap)} GiB"
    return f"on {device}{cap}{others}"
