"""What was measured on real devices beside what is estimated today: every archive of the campaign, without a GPU.

    python benchmarks/replay.py                 a line per metric, and what misses its target
    python benchmarks/replay.py --diff TEXT     blocks that only one side has, of rows that contain TEXT

An archive is a folder of measurements/ with rows.jsonl, as campaign.py writes it. A row of the list that is marked
``holdout`` is judged apart: no rule was made from it. Where a row was run more than once, the last one counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import archived

from memplan import api, measuring
from memplan.errors import MemplanError, PositionsError, SpecError
from memplan.introspect.measurement import Boundary, Measurement
from memplan.render.measured import measured_text
from memplan.results import PHASES, Estimate
from memplan.specs.software import SoftwareSpec

MEASUREMENTS = Path(__file__).parent / "measurements"

METRICS = ("phases", "first_step", "allocated", "reserved", "device")
"""``phases`` are each phase's allocated bytes, but for the first step's; the others the peaks over all phases."""
MEAN, MEDIAN, WORST, UNDER = "mean", "median", "worst", "worst under-estimate"
TARGETS: dict[str, dict[str, float]] = {
    "allocated": {MEAN: 0.005, WORST: 0.03},
    "reserved": {MEDIAN: 0.02, WORST: 0.08},
    "device": {MEDIAN: 0.02, UNDER: 0.05},
}
"""Of |estimated - measured| / measured, on a GPU."""
ON_CPU: dict[str, dict[str, float]] = {
    "allocated": {MEAN: 0.001, WORST: 0.003},
    "phases": {WORST: 0.003},
    "first_step": {UNDER: 0.003, WORST: 0.01},
}
"""Where tensors are counted, no kernel, allocator or driver is in between. The first step is estimated from above: an
optimizer makes the states of weights without decay when those with decay have been stepped, and what that takes is
gone; the estimate adds both. In small models norms and biases weigh most.
"""
INSIDE, WIDTH = 0.95, 0.06
"""Of holdout rows, the share whose device memory is within the interval, and the interval's median width."""
EXACT, TIGHT = 0.85, 0.15
"""Of boundaries, the share that is predicted exactly, and the share that is left open."""


@dataclass(frozen=True)
class Replayed:
    """A run, and what is estimated of it today."""

    row: dict[str, Any]
    """Of the campaign's list."""
    measurement: Measurement
    estimate: Estimate
    errors: dict[str, float]
    """Phase or metric -> (estimated - measured) / measured."""
    inside: bool | None
    """Whether the interval holds the device memory; None if that was not measured."""
    width: float
    """Of the interval, of the estimated device memory."""

    @property
    def name(self) -> str:
        """The row as text."""
        return json.dumps(self.row, sort_keys=True)


@dataclass(frozen=True)
class Bounded:
    """The largest value that runs, and what is said today of it and of those beside it."""

    row: dict[str, Any]
    boundary: Boundary
    verdicts: dict[int, str]
    """How many steps away from the largest that runs -> verdict."""

    @property
    def name(self) -> str:
        """The row as text."""
        return json.dumps(self.row, sort_keys=True)

    @property
    def died_but_fits(self) -> bool:
        """A value that dies is said to fit."""
        return "fits" in (self.verdicts.get(1), self.verdicts.get(2))

    @property
    def is_exact(self) -> bool:
        """The largest that is said to fit is the largest that runs."""
        return self.verdicts.get(0, "fits") == "fits" and self.verdicts.get(1) != "fits"

    @property
    def is_near(self) -> bool:
        """They are one step apart at most."""
        return self.verdicts.get(-1, "fits") == "fits" and self.verdicts.get(2) != "fits"


@dataclass
class Archive:
    """One folder."""

    path: Path
    runs: list[Replayed] = field(default_factory=list)
    boundaries: list[Bounded] = field(default_factory=list)
    refused: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    """Rows that were not run, and why; runs that failed of something else than memory among them."""


def folders() -> list[Path]:
    """Return the archives."""
    return sorted(path.parent for path in MEASUREMENTS.glob("*/rows.jsonl"))


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return an archive's lines, the last of each row."""
    path, found = folder / "rows.jsonl", dict[str, dict[str, Any]]()
    for number, line in archived.numbered(path):
        for name, kind in (("measurement", Measurement), ("boundary", Boundary)):
            try:
                if name in line:
                    kind.from_dict(line[name])
            except SpecError as error:
                said = str(error).partition("\n")[0]
                raise archived.ArchiveError(f"{path}, line {number}: {name}: {said} {archived.REMEDY}") from None
        row = {name: value for name, value in line["row"].items() if name not in ("holdout", "alone")}
        found[json.dumps(row, sort_keys=True)] = line
    return list(found.values())


def replay(folder: Path) -> Archive:
    """Estimate again what was measured."""
    archive = Archive(folder)
    for line in lines(folder):
        if "boundary" in line:
            archive.boundaries.append(_bounded(line["row"], Boundary.from_dict(line["boundary"])))
        elif "measurement" in line and line["measurement"]["status"] != "failed":
            archive.runs.append(replay_line(line))
        else:
            archive.refused.append((line["row"], line.get("refused") or line["measurement"]["message"]))
    return archive


def replay_line(line: dict[str, Any]) -> Replayed:
    """Estimate again what a line has measured."""
    measurement = Measurement.from_dict(line["measurement"])
    found = measuring.estimate_again(measurement)
    alone = line.get("alongside", 0) == 0 or measurement.device.get("counted") == "process"
    errors = {row.name.removeprefix("peak_"): row.relative for row in found.differences if row.relative is not None}
    if measurement.ran.get("skipped_steps"):  # the optimizer made no states
        errors = {name: error for name, error in errors.items() if name in ("load", "forward", "loss", "backward")}
    if not alone:  # what is in use is others' too
        errors.pop("device", None)
    used, gpu = measurement.peak("device"), found.estimate.gpu
    low, high = gpu.low, gpu.high
    if measurement.group == "fake":  # without what NCCL takes
        spread = next((each for each in found.estimate.assumptions if each.name == "nccl"), None)
        low, high = (end - int(getattr(spread, name, 0)) for end, name in ((low, "low"), (high, "high")))
    inside = low <= used <= high if used is not None and "device" in errors else None
    width = (high - low) / gpu.peak_device if gpu.peak_device else 0.0
    return Replayed(line["row"], measurement, found.estimate, errors, inside, width)


def _bounded(row: dict[str, Any], found: Boundary) -> Bounded:
    """Estimate again the largest value that runs, and those up to two steps away."""
    seen = found.measurement
    cluster: dict[str, Any] = {"gpus": row.get("gpus", 1), "gpu": found.estimate.setup["gpu"]}
    if "cap" in row:
        cluster["gpu_memory"] = row["cap"] << 30
    versions = {} if seen is None else seen.versions
    software = SoftwareSpec(
        **{name: versions[name].partition("+")[0] for name in SoftwareSpec.model_fields if name in versions}
    )
    verdicts = {}
    for away in (-1, 0, 1, 2):
        value = (found.measured or 0) + away * found.step
        if value > 0:
            training = {**row["training"], found.option: value}
            try:
                result = api.estimate(row["model"], training, cluster, row.get("strategy"), software=software)
            except PositionsError:  # the model's end, and the search's
                continue
            verdicts[away] = str(result.verdict)
    return Bounded(row, found, verdicts)


# -- judging -----------------------------------------------------------------------------------------------------------


def errors_of(runs: Iterable[Replayed], metric: str) -> list[tuple[float, Replayed]]:
    """Return each run's error, of phases each phase's; of runs that died the phases until then alone."""
    names = [phase for phase in PHASES if phase != "first_step"] if metric == "phases" else [metric]
    return [(run.errors[name], run) for run in runs for name in names if name in run.errors]


STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    MEAN: lambda errors: statistics.fmean(map(abs, errors)),
    MEDIAN: lambda errors: statistics.median(map(abs, errors)),
    WORST: lambda errors: max(map(abs, errors)),
    UNDER: lambda errors: max(0.0, -min(errors)),
}


def summary(archive: Archive) -> list[str]:
    """Return a line per metric, of holdout rows and of the others."""
    said = []
    for holdout in (False, True):
        runs = [run for run in archive.runs if bool(run.row.get("holdout")) == holdout]
        for metric in METRICS:
            errors = [error for error, _ in errors_of(runs, metric)]
            if errors:
                told = ", ".join(f"{name} {count(errors):.3%}" for name, count in STATISTICS.items())
                said.append(f"{metric:10} {'holdout' if holdout else 'others':8} n {len(errors):4}: {told}")
    return said


def complaints(archive: Archive) -> list[str]:
    """Return what misses its target, with the rows that do."""
    on_cpu = all(run.measurement.device.get("name") == "cpu" for run in archive.runs)
    targets = ON_CPU if on_cpu else TARGETS
    said: list[str] = []
    for holdout in (True, False):
        runs = [run for run in archive.runs if bool(run.row.get("holdout")) == holdout]
        which = "holdout" if holdout else "other"
        for metric, limits in targets.items():
            found = errors_of(runs, metric)
            for statistic, limit in limits.items():
                errors = [error for error, _ in found]
                if errors and STATISTICS[statistic](errors) > limit:
                    worst, run = max(found, key=lambda each: abs(each[0]))
                    value = STATISTICS[statistic](errors)
                    said.append(
                        f"{metric}, {statistic} of {which} rows: {value:.2%} > {limit:.2%}; {worst:+.2%} {run.name}"
                    )
    said += [f"died but fits: {run.name}" for run in archive.runs if _died_but_fits(run)]
    said += _about_intervals([run for run in archive.runs if run.row.get("holdout")])
    return said + _about_boundaries(archive.boundaries)


def _died_but_fits(run: Replayed) -> bool:
    return run.measurement.status == "out-of-memory" and run.estimate.verdict == "fits"


def _about_intervals(runs: Sequence[Replayed]) -> list[str]:
    told = [run for run in runs if run.inside is not None]
    if not told:
        return []
    said = []
    inside = sum(bool(run.inside) for run in told) / len(told)
    if inside < INSIDE:
        outside = "; ".join(run.name for run in told if not run.inside)
        said.append(f"intervals hold {inside:.0%} of holdout rows, not {INSIDE:.0%}: {outside}")
    width = statistics.median(run.width for run in told)
    if width > WIDTH:
        said.append(f"intervals are {width:.1%} wide in the median, not {WIDTH:.0%}")
    return said


def _about_boundaries(found: Sequence[Bounded]) -> list[str]:
    if not found:
        return []
    said = [f"died but fits: {each.name}" for each in found if each.died_but_fits]
    said += [f"more than a step off: {each.name}" for each in found if not each.is_near]
    exact = sum(each.is_exact for each in found) / len(found)
    if exact < EXACT:
        said.append(f"{exact:.0%} of boundaries are exact, not {EXACT:.0%}")
    tight = sum("tight" in (each.verdicts.get(0), each.verdicts.get(1)) for each in found) / len(found)
    if tight > TIGHT:
        said.append(f"{tight:.0%} of boundaries are tight, more than {TIGHT:.0%}")
    return said


def differences(folder: Path, text: str) -> str:
    """Return what :func:`memplan.render.measured.measured_text` says of rows with ``text`` whose blocks were kept."""
    found = []
    for line in lines(folder):
        row = json.dumps(line["row"], sort_keys=True)
        if text in row and line.get("measurement", {}).get("blocks"):
            again = measuring.estimate_again(Measurement.from_dict(line["measurement"]), blocks=True)
            found.append(f"{row}\n\n{measured_text(again)}\n")
    return "\n".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diff", metavar="TEXT", help="rows whose JSON contains it")
    options = parser.parse_args()
    try:
        return told(options.diff)
    except MemplanError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def told(diff: str | None) -> int:
    """Print what is asked for. Raises MemplanError."""
    if diff is not None:
        sys.stdout.write("".join(differences(folder, diff) for folder in folders()))
        return 0
    missed = 0
    for folder in folders():
        archive = replay(folder)
        numbers = f"{len(archive.runs)} runs, {len(archive.boundaries)} boundaries, {len(archive.refused)} refused"
        sys.stdout.write(f"{folder.name}: {numbers}\n")
        found = complaints(archive)
        missed += len(found)
        refused = [f"refused {json.dumps(row, sort_keys=True)}: {why}" for row, why in archive.refused]
        sys.stdout.write("".join(f"  {line}\n" for line in (*summary(archive), *found, *refused)))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
