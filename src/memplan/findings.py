"""What is wrong with the files of a run, beside memory: one small function per mistake.

A finding is raised only where the installed libraries really behave so, or memplan's own estimate says so; the tests
of each show it. ``docs/checks.md`` has a heading per code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from memplan.configs.run import Run
from memplan.results import Estimate, Finding
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

__all__ = ["CHECKS", "Checked", "find", "sorted_by_severity"]

_SEVERITY = ("error", "warning", "info")


@dataclass(frozen=True, slots=True)
class Checked:
    """A run, as its files say it and as it is merged."""

    run: Run
    training: TrainingSpec
    strategy: Strategy
    cluster: ClusterSpec
    model: ModelSpec
    software: SoftwareSpec
    estimate: Estimate


def find(checked: Checked) -> list[Finding]:
    """Return every finding, in the order of :data:`CHECKS`."""
    return [found for check in CHECKS if (found := check(checked)) is not None]


def sorted_by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings; of equals what was found first."""
    return tuple(sorted(findings, key=lambda found: _SEVERITY.index(found.severity)))


CHECKS: tuple[Callable[[Checked], Finding | None], ...] = ()
